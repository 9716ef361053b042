"""The versions that a result depends on."""

from __future__ import annotations

import importlib.metadata
import platform


def versions(*packages: str) -> dict[str, str]:
    """The versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def installed() -> dict[str, str]:
    """The versions that a training run depends on."""
    return versions("hf-adapt", "transformers", "torch", "datasets", "accelerate", "scikit-learn")
