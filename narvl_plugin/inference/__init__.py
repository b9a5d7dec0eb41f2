"""Models that answer: captions of images, targets, confidence, features."""
