"""What every entity linker has: mentions, batches, datasets, settings."""

from __future__ import annotations

import copy
import hashlib
import json
import uuid
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from hf_adapt.knowledge.linking.folding import RULES
from hf_adapt.knowledge.linking.surfaces import Candidate, NamedEntities

FUNCTION = "function:"
"""How settings begin that name a function of the user's."""
MATCHERS = ("auto", "words", "ahocorasick")


@dataclass(frozen=True, slots=True)
class Mention:
    """A place in a text that names an entity: `text[start:end] == surface`, always.

    Args:
        start: Its first character.
        end: One more than its last character.
        surface: Its characters.
        candidates: The entities that it may mean, the likeliest first.
    """

    start: int
    end: int
    surface: str
    candidates: tuple[Candidate, ...]


class Linker(ABC):
    """Finds the mentions of entities in texts. A subclass says how: [`link`].

    Args:
        graph: The graph whose entities are found.
    """

    def __init__(self, graph: NamedEntities) -> None:
        self.graph = graph

    @abstractmethod
    def link(self, text: str) -> list[Mention]:
        """Find the mentions of a text, by start."""

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What the linker was made with, without the graph: values that JSON can hold."""

    def link_batch(self, texts: Iterable[str]) -> list[list[Mention]]:
        """Find the mentions of several texts.

        Args:
            texts: The texts.
        """
        return [self.link(text) for text in texts]

    @property
    def fingerprint(self) -> str:
        """Equal for linkers that find the same in every text: of the graph and the settings."""
        # "auto" and both matchers find the same, so a dataset that is cached stays good.
        settings = {key: value for key, value in self.settings.items() if value not in MATCHERS}
        told = json.dumps([RULES, settings, self.graph.fingerprint], sort_keys=True)
        for function in self._functions():
            told += _hash_of(function)
        return hashlib.sha256(told.encode()).hexdigest()[:32]

    def _functions(self) -> list[Callable[..., Any]]:
        """The functions of the user's that decide what is found."""
        return []

    def _without_graph(self) -> Self:
        """A copy for other processes, which link and ask nothing of the graph."""
        worker = copy.copy(self)
        del worker.graph
        return worker

    def map(
        self,
        dataset: Any,
        text_column: str | Sequence[str] = "text",
        tokenizer: Any = None,
        num_proc: int | None = None,
        **map_kwargs: Any,
    ) -> Any:
        """Add the mentions of each row to a dataset, and print how much of it they cover.

        The column `mentions` has a list of {"start", "end", "entities", "priors"} for each row,
        with "column", the index of the text column, if there are several. With a tokenizer the
        column `token_mentions` has the same by position in the row's `input_ids`.

        Args:
            dataset: A `datasets.Dataset`, `DatasetDict`, `IterableDataset` or
                `IterableDatasetDict`. The first two are cached by content, graph and settings;
                streams are linked as they are read, and nothing is printed.
            text_column: The column with the text, or several. A list of words counts as the words
                with a space between.
            tokenizer: Of the rows' `input_ids`; a fast one.
            num_proc: Processes.
            **map_kwargs: For the dataset's own `map`: batch_size, load_from_cache_file, ...

        Returns:
            The dataset with the column.

        Raises:
            TypeError: If it is no such dataset.
            ValueError: If it lacks the column.

        Example:
            >>> linked = linker.map(dataset, num_proc=4)  # doctest: +SKIP
            train: 8,211 of 10,605 rows (77.4 %) have a mention; 2.13 mentions a row; ...
        """
        from hf_adapt.knowledge.linking.mapping import map_dataset

        columns = (text_column,) if isinstance(text_column, str) else tuple(text_column)
        return map_dataset(self, dataset, columns, tokenizer, num_proc, map_kwargs)


def told(value: Any) -> Any:
    """A function by its name; anything else as it is."""
    if not callable(value):
        return value
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{FUNCTION}{kind.__module__}.{kind.__qualname__}"


def _hash_of(function: Callable[..., Any]) -> str:
    """Equal for functions of the user's that do the same, as far as that can be told."""
    # A spaCy pipeline; pickling one by value drags in half of its packages, and fails.
    to_bytes = getattr(function, "to_bytes", None)
    if callable(to_bytes):
        return hashlib.sha256(to_bytes()).hexdigest()
    from datasets.fingerprint import Hasher

    try:
        return str(Hasher.hash(function))
    except Exception as error:  # what pickling raises depends on what the function holds
        warnings.warn(
            f"The linker's function {told(function)!r} cannot be hashed ({error}), so datasets "
            "linked with it are not cached between runs.",
            stacklevel=4,
        )
        return uuid.uuid4().hex


def checked_text(text: Any) -> str:
    """The text itself.

    Raises:
        TypeError: If it is none.
    """
    if not isinstance(text, str):
        raise TypeError(
            f"A linker expects a text, got {type(text).__name__}; for several texts use link_batch."
        )
    return text
