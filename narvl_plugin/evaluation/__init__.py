"""Predictions in the files that benchmarks take, and their scores against the official annotations."""
