"""What the tests share lies in tests/helpers: no test module is imported by another file."""

import ast
from pathlib import Path

TESTS = Path(__file__).parent


def imported(path: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


def test_no_test_module_is_imported() -> None:
    found = {(path.name, name) for path in TESTS.rglob("*.py") for name in imported(path)}
    assert not [pair for pair in found if pair[1].startswith("tests.") and ".test_" in pair[1]]
