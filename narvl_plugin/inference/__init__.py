"""Models that answer: captions of pictures, targets, confidence, features."""
