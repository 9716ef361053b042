"""A YAML file whose keys remember their lines, so that an error can name them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

KeyPath = tuple[str | int, ...]
TEXT = "tag:yaml.org,2002:str"


class ConfigError(ValueError):
    """A setting is wrong; the message names where it stands and what is expected."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but `3e-4` is a number as in YAML 1.2, and all keys are texts, also `no`."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys are the texts that stand in the file."""
        self.flatten_mapping(node)
        for key, _ in node.value:
            key.tag = TEXT
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


class Settings:
    """The content of a configuration, and where each of its keys was given.

    Args:
        values: The content.
        lines: Where the keys stand, by their path.
    """

    def __init__(self, values: dict[str, Any], lines: Mapping[KeyPath, str] | None = None) -> None:
        self.values = values
        self._places = dict(lines or {})

    @classmethod
    def read(cls, file: str | Path) -> Settings:
        """Read a YAML file.

        Raises:
            ConfigError: If it is missing, no YAML, no mapping, or has a key twice.
        """
        try:
            text = Path(file).read_text(encoding="utf-8-sig")
        except OSError as error:
            raise ConfigError(f"{file} cannot be read: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            raise ConfigError(
                f"{file}:{line}: this is not UTF-8. Save the file as UTF-8."
            ) from error
        return cls.parse(text, str(file))

    @classmethod
    def parse(cls, text: str, name: str) -> Settings:
        """Read YAML.

        Args:
            text: The content.
            name: What errors call it.

        Raises:
            ConfigError: If it is no YAML, no mapping, or has a key twice.
        """
        try:
            loader = _Loader(text)
        except yaml.reader.ReaderError as error:
            line = text[: error.position].count("\n") + 1
            raise ConfigError(
                f"{name}:{line}: the character {chr(error.character)!r} is not allowed in YAML."
            ) from error
        try:
            node = loader.get_single_node()
            lines: dict[KeyPath, str] = {}
            if node is not None:
                _note_lines(node, (), name, lines)
            values = None if node is None else loader.construct_document(node)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise ConfigError(f"{name}:{line}: {error.problem}.") from error
        finally:
            loader.dispose()
        if not isinstance(values, dict):
            raise ConfigError(f"{name} must hold keys such as model:, data: and methods:.")
        return cls(values, lines)

    def set(self, path: KeyPath, value: Any, origin: str) -> None:
        """Override a value; `origin` is what an error calls the place, such as a flag."""
        inner: Any = self.values
        for key in path[:-1]:
            if not isinstance(inner.get(key), dict):
                inner[key] = {}
            inner = inner[key]
        inner[path[-1]] = value
        self._places = {p: o for p, o in self._places.items() if p[: len(path)] != path}
        self._places[path] = origin

    def error(self, path: KeyPath, problem: str) -> ConfigError:
        """An error that names the place of a key, or else of what it stands in."""
        for length in range(len(path), 0, -1):
            if path[:length] in self._places:
                return ConfigError(f"{self._places[path[:length]]}: {problem}")
        return ConfigError(problem)

    def unknown(self, path: KeyPath, known: Iterable[str], what: str) -> ConfigError:
        """An error about a name that does not exist, with the nearest one that does."""
        names = list(known)
        return self.error(path, f"{what} {path[-1]!r} is unknown.{nearest(str(path[-1]), names)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest one, and all.

    Example:
        >>> nearest("MDM", ["DANN", "MMD"])
        ' Did you mean MMD? Known: DANN, MMD.'
    """
    names = list(known)
    lower = {other.lower().replace("-", "_"): other for other in names}
    close = difflib.get_close_matches(name.lower().replace("-", "_"), lower, n=1)
    hint = f" Did you mean {lower[close[0]]}?" if close else ""
    return f"{hint} Known: {', '.join(names)}."


def _note_lines(node: yaml.Node, path: KeyPath, file: str, lines: dict[KeyPath, str]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*path, str(key.value))
            place = f"{file}:{key.start_mark.line + 1}"
            if inner in lines and key.value != "<<":
                raise ConfigError(f"{place}: the key {key.value!r} stands here a second time.")
            lines[inner] = place
            _note_lines(value, inner, file, lines)
    elif isinstance(node, yaml.ScalarNode):
        if path[:1] == ("pairs",):  # names of domains, as keys are
            node.tag = TEXT
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            lines[*path, number] = f"{file}:{value.start_mark.line + 1}"
            _note_lines(value, (*path, number), file, lines)
