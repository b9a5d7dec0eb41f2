"""Official downloads converted to OFA's columns: one module for each data set, and shared reading and writing."""
