"""Teacher and student: configurations, layers, encoder, decoders."""

from .factory import build

__all__ = ["build"]
