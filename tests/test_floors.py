"""The package's floors: imports go only downwards, and never in a circle.

Imports inside functions and under TYPE_CHECKING count as well.
"""

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).parents[1]

FLOORS = (
    ("storage", "models"),
    ("engine",),
    ("alignment", "distillation", "knowledge", "unfreezing"),
    ("continual",),
    ("multitask",),
    ("arguments",),
    ("evaluation",),
    ("experiments",),
    ("report",),
    ("cli",),
    ("",),  # hf_adapt itself, which exports names of all of them
)
EXCEPTIONS = {
    ("hf_adapt.cli", "hf_adapt"): "--version prints the version of the package",
    (
        "hf_adapt.engine.plan",
        "hf_adapt.alignment.recommended",
    ): "a target that is given without adaptations is adapted to by the recommended ones",
}
"""Pairs of (folder or module, module that it may import from a floor above), with the reason."""


def modules() -> dict[str, set[str]]:
    """Each module of the package, with the modules that it imports."""
    files = sorted((ROOT / "hf_adapt").rglob("*.py*"))
    files = [file for file in files if file.suffix in (".py", ".pyi")]
    names = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files}
    names = {file: name.removesuffix(".__init__") for file, name in names.items()}
    found: dict[str, set[str]] = {name: set() for name in names.values()}
    for file, name in names.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: imports inside the package are absolute"
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    found[name].add(full if full in found else str(node.module))
            elif isinstance(node, ast.Import):
                found[name].update(alias.name for alias in node.names)
    return {name: (found[name] & found.keys()) - {name} for name in found}


def is_in(module: str, folder: str) -> bool:
    return module == folder or module.startswith(f"{folder}.")


def floor(module: str) -> tuple[int, str]:
    folder = [*module.split("."), ""][1]
    return next(i for i, folders in enumerate(FLOORS) if folder in folders), folder


def test_imports_go_downwards() -> None:
    upwards = [
        (module, other)
        for module, others in modules().items()
        for other in others
        if floor(module) != floor(other)
        and floor(other)[0] >= floor(module)[0]
        and not any(is_in(module, m) and other == o for m, o in EXCEPTIONS)
    ]
    assert sorted(upwards) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    graphlib.TopologicalSorter(modules()).prepare()  # its error shows the circle
