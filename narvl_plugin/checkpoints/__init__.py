"""Checkpoints: read safely, loaded, converted."""
