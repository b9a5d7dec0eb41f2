"""fairseq's trainer as our tasks need it, and what it is given: averaged weights, schedule, optimizer."""
