"""From columns of text to the arrays of a graph."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hf_adapt.knowledge.graphs.content import Content, Ids
from hf_adapt.knowledge.graphs.text_files import SHOWN, counted
from hf_adapt.knowledge.graphs.triples import Column, encode, is_missing, read_file
from hf_adapt.storage.string_table import StringTable

logger = logging.getLogger(__name__)

NameSource = Mapping[Any, str | Sequence[str | None] | None] | str | Path
"""Names of entities: `{key: name or names}`, or a csv or tsv file of (entity, name)."""


class Pairs(NamedTuple):
    """Rows of (entity, text), with a prior for each where there is one."""

    entities: Column
    texts: Column
    priors: npt.NDArray[np.float32] | None = None


def pairs_of(
    source: NameSource | None, what: str, separator: str | None = None, given_as: str | None = None
) -> Pairs | None:
    """Read rows of (entity, text) from a mapping or a file.

    Values of a mapping that are None, NaN or pandas' NA are left out, and counted in the log.
    """
    if source is None:
        return None
    if isinstance(source, (str, Path)):
        entities, texts = read_file(Path(source), ("entity", what), separator)
        return Pairs(entities, texts)
    if not isinstance(source, Mapping):
        raise TypeError(
            f"{what}s must be a mapping from entity to {what} or the path of a csv or tsv file of "
            f"(entity, {what}) rows; got a {type(source).__name__}."
        )
    given_as = given_as or f"{what}s={{...}}"
    if bad := [key for key in source if isinstance(key, (float, np.floating)) or is_missing(key)]:
        raise ValueError(
            f"{given_as}: expected keys that are text or whole numbers, got {bad[0]!r}"
            f"{f' and {len(bad) - 1:,} more' if len(bad) > 1 else ''}. Leave these entries out."
        )
    rows = [(str(key), text) for key, texts in source.items() for text in _several(texts)]
    given = [row for row in rows if type(row[1]) is str or not is_missing(row[1])]
    if len(given) < len(rows):
        number = counted(len(rows) - len(given), "missing value")
        first = next(key for key, text in rows if is_missing(text))
        logger.warning("%s: left out %s (None or NaN), the first of %r.", given_as, number, first)
    for key, text in given:
        if not isinstance(text, (str, bytes)):
            raise ValueError(f"Every {what} of {given_as} must be text; {key!r} has {text!r:.60}.")
        if not text.strip():
            raise ValueError(f"{given_as}: a {what!r} is empty, of {key!r}. Leave it out.")
    return pairs_from([key for key, _ in given], [text for _, text in given], what, given_as)


def _several(texts: Any) -> Iterable[Any]:
    is_one = isinstance(texts, (str, bytes)) or not isinstance(texts, Iterable)
    return (texts,) if is_one else texts


def pairs_from(
    entities: Any, texts: Any, what: str, source: str, priors: npt.NDArray[Any] | None = None
) -> Pairs:
    """Make rows of (entity, text) from two lists or Arrow arrays of strings."""
    return Pairs(encode(entities, "entity", source), encode(texts, what, source), priors)


def build(
    columns: Sequence[Column],
    names: Pairs | None = None,
    descriptions: Pairs | None = None,
    *,
    isolated: Any = None,
    in_order: bool = True,
    source: str = "The input",
) -> Content:
    """Build the arrays of a graph.

    Entities with a name or among `isolated`, Arrow strings, need no triple. They are numbered as
    they first appear, or by key where the source has no order (`in_order=False`).
    """
    head, relation, tail = columns
    if len(head) == 0:
        raise ValueError(
            f"{source} holds no triples: the graph would be empty. Expected at least one (head, "
            "relation, tail)."
        )
    keys, codes = _in_order(*_entities(head, tail))
    relations, kinds = _in_order(relation.indices.to_numpy(), relation.dictionary)
    for extra in (names.entities.dictionary if names else None, isolated):
        if extra is not None:
            keys = pc.unique(pa.concat_arrays([keys, extra]))
    if not in_order:
        keys, codes = _taken(keys, pc.sort_indices(keys).to_numpy(), codes)
        relations, kinds = _taken(relations, pc.sort_indices(relations).to_numpy(), kinds)
    if max(len(keys), len(head)) >= 2**31:
        raise ValueError(
            f"{source} has {len(keys):,} entities and {len(head):,} triples; a graph holds fewer "
            "than 2,147,483,648 of each. Take a part of it."
        )
    triples = sort_triples(codes[::2], kinds, codes[1::2], len(keys), len(relations))
    table = StringTable(keys)
    return Content(
        table, relations, triples, *_names(names, table), _descriptions(descriptions, table)
    )


def _entities(head: Column, tail: Column) -> tuple[npt.NDArray[np.int32], Any]:
    """Head, tail, head, tail, … of all rows as numbers of common values."""
    both = pa.concat_arrays([head.dictionary, tail.dictionary]).dictionary_encode()
    number = both.indices.to_numpy()
    codes = np.empty(2 * len(head), np.int32)
    codes[::2] = number[: len(head.dictionary)][head.indices.to_numpy()]
    codes[1::2] = number[len(head.dictionary) :][tail.indices.to_numpy()]
    return codes, both.dictionary


def _taken(
    values: Any, order: npt.NDArray[Any], codes: npt.NDArray[np.int32]
) -> tuple[Any, npt.NDArray[np.int32]]:
    """Values in an order, of which codes that never appear may be left out, and the new codes."""
    number = np.zeros(len(values), np.int32)
    number[order] = np.arange(len(order), dtype=np.int32)
    return values.take(pa.array(order)), number[codes]


def _in_order(codes: npt.NDArray[np.int32], values: Any) -> tuple[Any, npt.NDArray[np.int32]]:
    """The values in the order in which they first appear, without those that never do."""
    return _taken(values, pc.unique(pa.array(codes)).to_numpy(), codes)


def sort_triples(
    heads: npt.NDArray[Any],
    relations: npt.NDArray[Any],
    tails: npt.NDArray[Any],
    num_entities: int,
    num_relations: int,
) -> npt.NDArray[np.int32]:
    """Sort triples by head, relation and tail, and keep each once: (T, 3) int32."""
    if num_entities**2 * num_relations >= 2**63:
        return np.unique(np.stack([heads, relations, tails], axis=1).astype(np.int32), axis=0)
    # All three in one number: a sort takes a tenth.
    keys = heads.astype(np.int64)
    for number, more in ((num_relations, relations), (num_entities, tails)):
        keys *= number
        keys += more
    keys.sort()
    keys = keys[np.concatenate([[True], keys[1:] != keys[:-1]])[: len(keys)]]
    triples = np.empty((len(keys), 3), np.int32)
    rest, triples[:, 2] = np.divmod(keys, num_entities)
    triples[:, 0], triples[:, 1] = np.divmod(rest, num_relations)
    return triples


def _names(pairs: Pairs | None, keys: StringTable) -> tuple[Any, Any]:
    """The names of each entity in the order given, each once, and their priors."""
    if pairs is None or len(pairs.texts) == 0:
        return None, None
    entities, texts = _rows(pairs, keys), pairs.texts.indices.to_numpy()
    _, first = np.unique(entities * len(pairs.texts.dictionary) + texts, return_index=True)
    rows = np.sort(first)
    rows = rows[np.argsort(entities[rows], kind="stable")]
    offsets = np.zeros(len(keys) + 1, np.int64)
    np.cumsum(np.bincount(entities[rows], minlength=len(keys)), out=offsets[1:])
    names = pairs.texts.dictionary.take(pa.array(texts[rows]))
    lists = partial(pa.LargeListArray.from_arrays, pa.array(offsets))
    return lists(names), None if pairs.priors is None else lists(pa.array(pairs.priors[rows]))


def _rows(pairs: Pairs, keys: StringTable) -> Ids:
    """The number of each pair's entity, -1 if it is unknown."""
    rows: Ids = keys.find_all(pairs.entities.dictionary)[pairs.entities.indices.to_numpy()]
    return rows


def _descriptions(pairs: Pairs | None, keys: StringTable) -> Any:
    """One description for each entity, empty where there is none."""
    if pairs is None or len(pairs.texts) == 0:
        return None
    entities, texts = _rows(pairs, keys), pairs.texts.indices.to_numpy()
    if len(unknown := pc.unique(pairs.entities.filter(pa.array(entities < 0)))):
        raise ValueError(
            f"{len(unknown):,} descriptions are of entities that have neither a triple nor a name "
            f"(dangling ids): {_shown(unknown.to_pylist())}. Add triples or names for them, or "
            "leave the descriptions out."
        )
    chosen = np.full(len(keys), -1, np.int64)
    chosen[entities[::-1]] = texts[::-1]  # the first one counts
    if len(other := np.flatnonzero(chosen[entities] != texts)):
        raise ValueError(
            f"{len(other):,} descriptions differ from an earlier one of the same entity: "
            f"{_shown([keys[entity] for entity in np.unique(entities[other]).tolist()])}. Keep one "
            "each, or pass the others as names."
        )
    values = pa.concat_arrays([pairs.texts.dictionary, pa.array([""], pa.large_string())])
    return values.take(pa.array(chosen % len(values)))


def _shown(keys: Sequence[str]) -> str:
    return ", ".join(map(repr, keys[:SHOWN])) + " …" * (len(keys) > SHOWN)
