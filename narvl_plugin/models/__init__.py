"""The models, teacher and student: configurations, layers, encoder and decoders."""

from .factory import build

__all__ = ["build"]
