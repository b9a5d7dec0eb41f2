"""Inference with trained models: captions of images, distilled targets, calibrated confidence, features."""
