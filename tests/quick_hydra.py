"""Hydra without the copies that it makes of all registered configurations whenever it composes one.

They take half of the time, a tenth of a second and more. Nothing else changes: what a composition reads of the store it
copies once again.
"""

from typing import Any

from hydra.core.config_store import ConfigStore


def copy_of_store(self: ConfigStore, memo: dict[int, Any]) -> ConfigStore:
    """Return the one store there is."""
    return self


ConfigStore.__deepcopy__ = copy_of_store  # type: ignore[attr-defined]
