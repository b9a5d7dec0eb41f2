"""Models that answer: `load` one, and call its verbs."""

from narvl_plugin.api.loading import load
from narvl_plugin.api.model import Decoding, Model
from narvl_plugin.api.prediction import Alternative, FoundBox, FoundTriplet, HeatMap, Prediction, Query, Token

__all__ = [
    "Alternative",
    "Decoding",
    "FoundBox",
    "FoundTriplet",
    "HeatMap",
    "Model",
    "Prediction",
    "Query",
    "Token",
    "load",
]
