"""Prediction files in the benchmarks' formats, and their scores against the official annotations."""
