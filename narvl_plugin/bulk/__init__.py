"""Predictions for inputs of any size: shards of rows in, shards of outputs out, in one process or on many machines."""
