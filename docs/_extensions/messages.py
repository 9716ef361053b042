"""The errors and warnings that the source can give, read from its text."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

TITLES = {
    "engine": "The Trainer and its streams",
    "models": "The model's structure",
    "alignment": "Domain adaptation",
    "distillation": "Distillation",
    "unfreezing": "Gradual unfreezing",
    "knowledge": "Knowledge graphs",
    "continual": "Learning on",
    "multitask": "Several tasks",
    "evaluation": "Evaluation",
    "experiments": "Experiments",
    "report": "Reports",
    "cli": "The command line",
    "storage": "Files",
}
WARNINGS = {"warning", "warn", "_warn", "warning_once"}
NOT_FOR_USERS = {"NotImplementedError", "AssertionError", "AttributeError", "Exit"}


class Message(NamedTuple):
    """What is raised or logged, and in which function or class."""

    kind: str
    text: str
    owner: str


def found(tree: ast.Module) -> Iterator[Message]:
    """All messages of a module, in the order of its lines."""
    for statement in tree.body:
        owner = getattr(statement, "name", "")
        for node in ast.walk(statement):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                call, kind = node.exc, _last(node.exc.func)
            elif isinstance(node, ast.Call) and _last(node.func) in WARNINGS:
                call, kind = node, "warning"
            else:
                continue
            text = _text(call.args[0], owner) if call.args else None
            if text and kind not in NOT_FOR_USERS and len(text.split()) > 2:
                yield Message(kind, text, owner)


def _last(function: ast.expr) -> str:
    return ast.unparse(function).rpartition(".")[2]


def _text(node: ast.expr, owner: str) -> str | None:
    """The text of a string in the source, in reStructuredText, with the names of its values."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        text = re.sub(r"%[-.\d]*[sdrfg]", "…", node.value)
        return re.sub(r"([\\*`|_])", r"\\\1", " ".join(text.split(" ")).replace("\n", " "))
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value, owner) or "…" for value in node.values)
    if isinstance(node, ast.FormattedValue):
        inner = node.value
        if ast.unparse(inner) == "type(self).__name__":
            return owner
        named = isinstance(inner, ast.Name) or (
            isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name)
        )
        name = _last(inner) if named else ""
        return rf"\ *{name.strip('_')}*\ " if name.strip("_") else "…"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _text(node.left, owner), _text(node.right, owner)
        return f"{left or '…'}{right or '…'}" if left or right else None
    return None


def pages(package: Path, find: Callable[..., str | None]) -> Iterator[tuple[str, str]]:
    """A page for each folder of the package, in reStructuredText."""
    for family, title in TITLES.items():
        heading = f"Messages: {title[0].lower()}{title[1:]}"
        parts = [heading, "=" * len(heading), ""]
        for file in sorted((package / family).rglob("*.py")):
            tree = ast.parse(file.read_text("utf-8"))
            told = list(dict.fromkeys(found(tree)))
            if not told:
                continue
            module = ".".join(file.relative_to(package).with_suffix("").parts)
            parts += [module, "-" * len(module), ""]
            parts += [(ast.get_docstring(tree) or "").partition("\n")[0], ""]
            for message in told:
                path = find(message.owner, None, f"hf_adapt.{module}") if message.owner else None
                owner = f":py:obj:`{message.owner} <{path}>`: " if path else ""
                kind = "warning" if message.kind == "warning" else message.kind
                parts += [f"- {owner}{message.text} *({kind})*", ""]
        yield family, "\n".join(parts)
