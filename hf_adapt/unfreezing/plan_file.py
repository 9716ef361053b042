"""The YAML file of a plan, read with errors that name the line."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import yaml

from hf_adapt.unfreezing.phases import Phase
from hf_adapt.unfreezing.plateau import Plateau

KEYS = ("groups", "phases", "lr_multipliers", "rewarm_steps", "plateau")
PHASE_KEYS = ("at", "train", "add")
PLATEAU_KEYS = ("metric", "patience", "min_delta", "greater_is_better")


def read_plan_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and check a plan.

    Returns:
        The file's content by key: `groups` (name to patterns), `phases` (a list of `Phase`) and, if
        the file has them, `lr_multipliers`, `rewarm_steps` and `plateau`.

    Raises:
        ValueError: If something is wrong; the message starts with the file and the line.
        FileNotFoundError: If there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"There is no plan file {path}. Write one with unfreezing_plan(model, args).save(…). "
            "Schedules are passed as objects: LPFT(), Surgical('layer.0'), RandomLayers()."
        )
    return _Reader(Path(path)).read()


class _Reader:
    """Reads the nodes of the document, which have line numbers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.loader = yaml.SafeLoader("")

    def where(self, node: yaml.Node) -> str:
        return f"{self.path}, line {node.start_mark.line + 1}: "

    def fail(self, node: yaml.Node, message: str) -> NoReturn:
        raise ValueError(f"{self.where(node)}{message}")

    def read(self) -> dict[str, Any]:
        try:
            root = yaml.compose(self.path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f", line {mark.line + 1}" if mark is not None else ""
            problem = getattr(error, "problem", None) or error
            raise ValueError(f"{self.path}{where}: this is not YAML: {problem}.") from error
        if root is None:
            raise ValueError(f"{self.path} is empty: expected `groups:` and `phases:`.")
        nodes = self.mapping(root, KEYS, "the plan")
        for key in ("groups", "phases"):
            if key not in nodes:
                self.fail(root, f"the plan has no `{key}:`.")
        readers: dict[str, Callable[[yaml.Node], Any]] = {
            "groups": self.groups,
            "phases": self.phases,
            "lr_multipliers": self.lr_multipliers,
            "rewarm_steps": lambda node: self.number(node, int, "a whole number of steps"),
            "plateau": self.plateau,
        }
        content = {key: readers[key](node) for key, node in nodes.items()}
        known = list(content["groups"])
        for item in nodes["phases"].value:
            for key, value in self.mapping(item).items():
                if key != "at":
                    self.check_groups(value, known)
        for group in content.get("lr_multipliers", {}):
            if group not in known:
                self.unknown(self.key_nodes(nodes["lr_multipliers"])[group], "group", group, known)
        return content

    # ---- the parts of a plan ----

    def groups(self, node: yaml.Node) -> dict[str, tuple[str, ...]]:
        found = {name: self.names(value) for name, value in self.mapping(node).items()}
        if not found:
            self.fail(node, "`groups:` is empty: expected `name: [patterns]`, bottom first.")
        return found

    def phases(self, node: yaml.Node) -> list[Phase]:
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            self.fail(node, "the schedule is empty: `phases:` needs a list with a phase at 0.")
        phases: list[Phase] = []
        for item in node.value:
            keys = self.mapping(item, PHASE_KEYS, "a phase")
            if "at" not in keys or len(keys) != 2:
                self.fail(item, "a phase needs `at:` and one of `train:` and `add:`.")
            trained = self.names(keys.get("train", keys.get("add")))
            if "add" in keys:
                if not phases:
                    self.fail(item, "the first phase has nothing to `add:` to: write `train:`.")
                trained = (*trained, *phases[-1].train)
            if phases and phases[-1].at.unit == "plateau" and self.value(keys["at"]) != "plateau":
                self.fail(
                    keys["at"],
                    "the phase before waits for a plateau, which may come later or never: write "
                    "`at: plateau` here as well.",
                )
            try:
                phases.append(Phase(self.value(keys["at"]), trained, self.where(keys["at"])))
            except ValueError as error:
                self.fail(keys["at"], str(error))
        return phases

    def lr_multipliers(self, node: yaml.Node) -> dict[str, float]:
        kind = (int, float)
        nodes = self.mapping(node)
        return {k: float(self.number(v, kind, "a factor of 0 or more")) for k, v in nodes.items()}

    def plateau(self, node: yaml.Node) -> Plateau:
        keys = self.mapping(node, PLATEAU_KEYS, "the plateau rule")
        kinds: dict[str, Any] = {
            "metric": (str, "the name of a metric"),
            "patience": (int, "a whole number"),
            "min_delta": ((int, float), "a number"),
            "greater_is_better": ((bool, type(None)), "true, false or null"),
        }
        for key, value_node in keys.items():
            kind, expected = kinds[key]
            value = self.value(value_node)
            if not isinstance(value, kind) or (isinstance(value, bool) and key[0] != "g"):
                self.fail(value_node, f"expected {expected}, got {value!r}.")
        try:
            return Plateau(**{key: self.value(value) for key, value in keys.items()})
        except (ValueError, TypeError) as error:
            self.fail(node, str(error))

    # ---- nodes ----

    def value(self, node: yaml.Node) -> Any:
        return self.loader.construct_object(node, deep=True)

    def number(self, node: yaml.Node, kind: Any, expected: str) -> Any:
        value = self.value(node)
        if isinstance(value, bool) or not isinstance(value, kind) or value < 0:
            self.fail(node, f"expected {expected}, got {value!r}.")
        return value

    def names(self, node: yaml.Node | None) -> tuple[str, ...]:
        assert node is not None
        value = self.value(node)
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or not all(isinstance(item, str) for item in listed):
            self.fail(node, f"expected a name or a list of names, got {value!r}.")
        return tuple(listed)

    def check_groups(self, node: yaml.Node, known: list[str]) -> None:
        for item in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            pattern = self.value(item)
            try:
                found = pattern in known or any(re.fullmatch(pattern, name) for name in known)
            except re.error as error:
                self.fail(item, f"{pattern!r} is not a regular expression: {error}.")
            if not found:
                self.unknown(item, "group", pattern, known)

    def key_nodes(self, node: yaml.Node) -> dict[str, yaml.Node]:
        return {str(self.value(key)): key for key, _ in node.value}

    def mapping(
        self, node: yaml.Node, allowed: Iterable[str] | None = None, what: str = ""
    ) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode):
            self.fail(node, f"expected `key: value` lines, got {self.value(node)!r}.")
        found: dict[str, yaml.Node] = {}
        for key_node, value in node.value:
            key = str(self.value(key_node))
            if key in found:
                self.fail(key_node, f"{key!r} stands here twice.")
            if allowed is not None and key not in allowed:
                self.unknown(key_node, f"key of {what}", key, list(allowed))
            found[key] = value
        return found

    def unknown(self, node: yaml.Node, what: str, name: str, known: list[str]) -> NoReturn:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        if name == "rates":
            hint = " It is called 'lr_multipliers' now."
        self.fail(node, f"{name!r} is no {what}.{hint} Known: {', '.join(known)}.")
