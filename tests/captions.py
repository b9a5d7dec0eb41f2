"""Texts of the small data that tests share."""

CAPTIONS = (
    "a red square on a wall",
    "two dogs run",
    "the blue hat",
    "a cat",
    "a bird and a boat",
    "one tree",
)
TEXTS_WITH_ANSWERS = (*CAPTIONS[:4], "yes", "no", "maybe", "0123456789.|!+")
