"""Timing of models, searches, losses and training steps; systems take turns and are compared by ratios."""
