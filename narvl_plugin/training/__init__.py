"""What fairseq's trainer is given: averaged weights, schedule, optimizer."""
