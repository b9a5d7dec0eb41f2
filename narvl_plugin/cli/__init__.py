"""The program `narvl`: arguments only."""
