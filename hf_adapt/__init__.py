"""Domain-adaptation plugins for the Hugging Face `Trainer`.

`AdaptationCallback` adds them to a Trainer: alignment to an unlabelled target (`alignment`),
gradual unfreezing (`unfreezing`), distillation (`distillation`), knowledge graphs (`knowledge`),
learning on without forgetting (`continual`) and several tasks at once (`multitask`). `evaluation`
and `report` say what came of it, also without target labels.

Example:
    ```python
    from hf_adapt import AdaptationCallback

    trainer.add_callback(AdaptationCallback(target_dataset=target))
    trainer.train()
    ```
"""

import ast
import pkgutil
from importlib import import_module
from importlib.util import find_spec
from typing import Any

__version__ = "0.2.0"

# The names of __init__.pyi are imported when they are first used, because torch and transformers
# take seconds to import, which `hf-adapt --help` does not need.
_MODULES = {
    alias.name: str(node.module)
    for node in ast.parse(pkgutil.get_data(__name__, "__init__.pyi") or b"").body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    """A public name, or a module of the package."""
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *(m.name for m in pkgutil.iter_modules(__path__))})
