"""Timing of models, searches, losses and trainings, in turns and as ratios."""
