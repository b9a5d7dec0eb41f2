"""Checkpoints: safe reading, loading, conversion."""
