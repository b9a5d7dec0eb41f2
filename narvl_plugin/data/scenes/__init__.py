"""The embedded data set: images composed of emoji art, with captions and rows for each task."""

from narvl_plugin.data.scenes.art import ArtError
from narvl_plugin.data.scenes.nouns import NOUNS, plural
from narvl_plugin.data.scenes.writer import TASKS, SceneSettingError, write_scenes

__all__ = ["NOUNS", "TASKS", "ArtError", "SceneSettingError", "plural", "write_scenes"]
