"""Scores of captions, boxes and answers; `registered.py` tells fairseq of the scorers."""
