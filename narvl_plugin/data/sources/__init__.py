"""Official downloads in OFA's columns: one file a data set, and how all of them read and write."""
