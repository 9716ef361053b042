"""The engine: the only place that touches the Trainer."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if not TYPE_CHECKING:  # a type checker would take every name for one of ours

    def __getattr__(name: str) -> Any:
        """A module of the engine: they are imported when they are asked for."""
        if name.startswith("_") or find_spec(f"{__name__}.{name}") is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return import_module(f"{__name__}.{name}")
