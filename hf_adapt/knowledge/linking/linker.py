"""What every entity linker can do: link texts and datasets, and tell its settings."""

from __future__ import annotations

import copy
import hashlib
import json
import uuid
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import datasets
from datasets.fingerprint import Hasher

from hf_adapt.knowledge.graphs.graph import KnowledgeGraph
from hf_adapt.knowledge.linking.mention_columns import AddMentions, check_columns, coverage
from hf_adapt.knowledge.linking.mentions import Mention
from hf_adapt.knowledge.linking.normalization import RULES

FUNCTION = "function:"
"""How settings begin that name a function of the user's."""
MATCHERS = ("auto", "words", "ahocorasick")


class Linker(ABC):
    """Finds the mentions of a graph's entities in texts. A subclass says how: [`link`]."""

    def __init__(self, graph: KnowledgeGraph) -> None:
        self.graph = graph

    @abstractmethod
    def link(self, text: str) -> list[Mention]:
        """Find the mentions of a text, by start."""

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The options of the linker, without the graph: values that JSON can hold."""

    def link_batch(self, texts: Iterable[str]) -> list[list[Mention]]:
        """Find the mentions of several texts."""
        return [self.link(text) for text in texts]

    @property
    def fingerprint(self) -> str:
        """Equal for linkers that find the same in every text: of the graph and the settings."""
        # "auto" and both matchers find the same, so a dataset that is cached stays good.
        settings = {key: value for key, value in self.settings.items() if value not in MATCHERS}
        content = json.dumps([RULES, settings, self.graph.fingerprint], sort_keys=True)
        for function in self._functions():
            content += _hash_of(function)
        return hashlib.sha256(content.encode()).hexdigest()[:32]

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
        columns = (text_column,) if isinstance(text_column, str) else tuple(text_column)
        several = isinstance(dataset, datasets.DatasetDict | datasets.IterableDatasetDict)
        splits = dict(dataset) if several else {"": dataset}
        needed = columns if tokenizer is None else (*columns, "input_ids")
        for name, split in splits.items():
            if not isinstance(split, datasets.Dataset | datasets.IterableDataset):
                raise TypeError(
                    "linker.map expects a datasets.Dataset, DatasetDict, IterableDataset or "
                    f"IterableDatasetDict, got {type(split).__name__}. For a list of texts use "
                    "linker.link_batch."
                )
            check_columns(split, needed, name)
        add = AddMentions(self._without_graph(), columns, tokenizer)
        linked = {
            name: self._map_split(split, add, num_proc, map_kwargs, name)
            for name, split in splits.items()
        }
        return type(dataset)(linked) if several else linked[""]

    def _map_split(
        self, split: Any, add: AddMentions, num_proc: int | None, options: dict[str, Any], name: str
    ) -> Any:
        settings: dict[str, Any] = {"batched": True, "features": add.features(split), **options}
        if isinstance(split, datasets.IterableDataset):
            return split.map(add, **settings)
        # The linker tells itself what it would find: hashing a dictionary of a million names takes
        # seconds, and its bytes differ between runs that find the same.
        content = [split._fingerprint, self.fingerprint, add.columns]
        if add.aligner is not None:
            content.append(_hash_of_tokenizer(add.aligner.tokenizer))
        fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
        settings = {"new_fingerprint": fingerprint, "desc": "Linking", **settings}
        linked = split.map(add, num_proc=num_proc, **settings)
        if len(linked) > 0:
            print(f"{name}: " * bool(name) + coverage(linked, self.graph.num_entities))
        return linked


def name_of(value: Any) -> Any:
    """A function by its name; anything else as it is."""
    if not callable(value):
        return value
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{FUNCTION}{kind.__module__}.{kind.__qualname__}"


def check_text(text: Any) -> str:
    """The text itself."""
    if not isinstance(text, str):
        raise TypeError(
            f"A linker expects a text, got {type(text).__name__}; for several texts use link_batch."
        )
    return text


def _hash_of(function: Callable[..., Any]) -> str:
    """Equal for functions of the user's that do the same, as far as that can be told."""
    # A spaCy pipeline; pickling one by value drags in half of its packages, and fails.
    to_bytes = getattr(function, "to_bytes", None)
    if callable(to_bytes):
        return hashlib.sha256(to_bytes()).hexdigest()
    try:
        return str(Hasher.hash(function))
    except Exception as error:  # what pickling raises depends on what the function holds
        warnings.warn(
            f"The linker's function {name_of(function)!r} cannot be hashed ({error}), so datasets "
            "linked with it are not cached between runs.",
            stacklevel=4,
        )
        return uuid.uuid4().hex


def _hash_of_tokenizer(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return str(Hasher.hash(tokenizer))
    return hashlib.sha256(backend.to_str().encode()).hexdigest()
