"""From columns of text to the arrays of a graph."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hf_adapt.knowledge.graphs.content import Content, Ids
from hf_adapt.knowledge.graphs.text_files import counted
from hf_adapt.knowledge.graphs.triples import Column, encode, is_missing, read_file
from hf_adapt.knowledge.strings import StringTable

logger = logging.getLogger(__name__)

NameSource = Mapping[Any, str | Sequence[str | None] | None] | str | Path
"""Names of entities: `{key: name or names}`, or a csv or tsv file of (entity, name)."""


@dataclass(frozen=True)
class Pairs:
    """Rows of (entity, text), with a prior for each where there is one."""

    entities: Column
    texts: Column
    priors: npt.NDArray[np.float32] | None = None


def pairs_of(
    source: NameSource | None, what: str, separator: str | None = None, given_as: str | None = None
) -> Pairs | None:
    """Rows of (entity, text) from a mapping or a file.

    What a mapping has as None, NaN or pandas' NA is left out, and counted in the log.

    Args:
        source: A mapping from entity to a text or several, a path, or None.
        what: The name of the texts' column, `"name"` or `"description"`.
        separator: Between the cells of a text file.
        given_as: What errors call a mapping, `names={...}` where it is None.

    Raises:
        ValueError: If the file is malformed, a key is missing, or a text is empty or none.
        TypeError: If it is neither.
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
    listed = [_several(texts) for texts in source.values()]
    keys = [str(key) for key, texts in zip(source, listed, strict=True) for _ in texts]
    flat = [t if type(t) is str or not is_missing(t) else None for texts in listed for t in texts]
    try:
        texts = pa.array(flat, pa.large_string())
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        rows = zip(keys, flat, strict=True)
        shown = [f"{key!r} has {t!r:.60}" for key, t in rows if not (t is None or _is_text(t))]
        raise ValueError(f"Every {what} of {given_as} must be text; {shown[0]}.") from error
    entities = pa.array(keys, pa.large_string())
    if texts.null_count:
        first = entities.filter(texts.is_null())[0].as_py()
        entities, texts = entities.filter(texts.is_valid()), texts.drop_null()
        logger.warning(
            "%s: left out %s (None or NaN), the first of %r.",
            given_as,
            counted(len(flat) - len(texts), "missing value"),
            first,
        )
    blank = pc.index(pc.utf8_trim_whitespace(texts), "").as_py()
    if blank >= 0:
        raise ValueError(
            f"{given_as}: a {what!r} is empty, of {entities[blank].as_py()!r}. Leave it out."
        )
    return pairs_from(entities, texts, what, given_as)


def _several(texts: Any) -> list[Any]:
    return [texts] if _is_text(texts) or not isinstance(texts, Iterable) else list(texts)


def _is_text(value: Any) -> bool:
    return isinstance(value, (str, bytes))


def pairs_from(
    entities: Any,
    texts: Any,
    what: str,
    source: str,
    priors: npt.NDArray[np.float32] | None = None,
) -> Pairs:
    """Rows of (entity, text) from two Arrow arrays."""
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
    """The arrays of a graph.

    Args:
        columns: Heads, relations and tails.
        names: Of entities, the first of each being its label. An entity that is in no triple is
            kept, without neighbours.
        descriptions: Of entities that have a triple or a name, one each.
        isolated: Arrow strings: keys of entities that are kept although in no triple.
        in_order: Entities and relations are numbered as they first appear; else in the order of
            their keys, for sources that have no order.
        source: For errors.

    Raises:
        ValueError: If there is no triple, or a description is of an unknown entity or differs
            from another of the same entity.
    """
    head, relation, tail = columns
    if len(head.codes) == 0:
        raise ValueError(
            f"{source} holds no triples: the graph would be empty. Expected at least one (head, "
            "relation, tail)."
        )
    keys, heads, tails = _entities(head, tail)
    for extra in (names.entities.values if names else None, isolated):
        if extra is not None:
            keys = pc.unique(pa.concat_arrays([keys, extra]))
    relations, relation_codes = _compact(relation.codes, relation.values)
    if not in_order:
        keys, (heads, tails) = _sorted(keys, heads, tails)
        relations, (relation_codes,) = _sorted(relations, relation_codes)
    if max(len(keys), len(heads)) >= 2**31:
        raise ValueError(
            f"{source} has {len(keys):,} entities and {len(heads):,} triples; a graph holds fewer "
            "than 2,147,483,648 of each. Take a part of it."
        )
    triples = sort_triples(heads, relation_codes, tails, len(keys), len(relations))
    table = StringTable.from_arrow(keys)
    name_table, offsets, priors = _names(names, table)
    return Content(
        table,
        StringTable.from_arrow(relations),
        triples,
        name_table,
        offsets,
        priors,
        _descriptions(descriptions, table),
    )


def _entities(head: Column, tail: Column) -> tuple[Any, Any, Any]:
    """Keys of heads and tails in the order in which rows first name them, and each row's two."""
    both = pa.concat_arrays([head.values, tail.values]).dictionary_encode()
    number = both.indices.to_numpy()
    codes = np.empty((len(head.codes), 2), np.int32)
    codes[:, 0] = number[: len(head.values)][head.codes]
    codes[:, 1] = number[len(head.values) :][tail.codes]
    keys, codes_in_order = _compact(codes.reshape(-1), both.dictionary)
    pairs = codes_in_order.reshape(-1, 2)
    return keys, pairs[:, 0], pairs[:, 1]


def _compact(codes: npt.NDArray[np.int32], values: Any) -> tuple[Any, npt.NDArray[np.int32]]:
    """Values numbered in the order in which they first appear, without those that never do."""
    first = np.full(len(values), len(codes), np.int64)
    first[codes[::-1]] = np.arange(len(codes) - 1, -1, -1)  # the last one written is the first
    order = np.argsort(first, kind="stable")[: np.count_nonzero(first < len(codes))]
    number = np.zeros(len(values), np.int32)
    number[order] = np.arange(len(order), dtype=np.int32)
    return values.take(pa.array(order)), number[codes]


def _sorted(values: Any, *codes: npt.NDArray[np.int32]) -> tuple[Any, list[Any]]:
    order = pc.sort_indices(values)
    number = np.empty(len(values), np.int32)
    number[order.to_numpy()] = np.arange(len(values), dtype=np.int32)
    return values.take(order), [number[code] for code in codes]


def sort_triples(
    heads: npt.NDArray[Any],
    relations: npt.NDArray[Any],
    tails: npt.NDArray[Any],
    num_entities: int,
    num_relations: int,
) -> npt.NDArray[np.int32]:
    """Triples in the order of head, relation and tail, each once, (T, 3) int32."""
    if num_entities**2 * num_relations < 2**63:  # all three in one number: a sort takes a tenth
        keys = heads.astype(np.int64)
        keys *= num_relations
        keys += relations
        keys *= num_entities
        keys += tails
        keys.sort()
        keys = keys[np.concatenate([[True], keys[1:] != keys[:-1]])] if len(keys) else keys
        triples = np.empty((len(keys), 3), np.int32)
        rest, triples[:, 2] = np.divmod(keys, num_entities)
        triples[:, 0], triples[:, 1] = np.divmod(rest, num_relations)
        return triples
    triples = np.stack([heads, relations, tails], axis=1).astype(np.int32)
    triples = triples[np.lexsort((tails, relations, heads))]
    other: npt.NDArray[np.bool_] = (triples[1:] != triples[:-1]).any(axis=1)
    return np.compress(np.concatenate([[True], other]), triples, axis=0)


def _names(
    names: Pairs | None, keys: StringTable
) -> tuple[StringTable | None, Ids | None, npt.NDArray[np.float32] | None]:
    """The names in the order of their entities; of one entity in the order given, each once."""
    if names is None or len(names.entities.codes) == 0:
        return None, None, None
    entities = keys.find_all(names.entities.values)[names.entities.codes]
    texts = names.texts.codes
    pair = entities * len(names.texts.values) + texts
    _, first = np.unique(pair, return_index=True)
    rows = np.sort(first)
    rows = rows[np.argsort(entities[rows], kind="stable")]
    offsets = np.zeros(len(keys) + 1, np.int64)
    np.cumsum(np.bincount(entities[rows], minlength=len(keys)), out=offsets[1:])
    table = StringTable.from_arrow(names.texts.values.take(pa.array(texts[rows])))
    priors = None if names.priors is None else names.priors[rows].astype(np.float32)
    return table, offsets, priors


def _descriptions(descriptions: Pairs | None, keys: StringTable) -> StringTable | None:
    """One description for each entity, empty where there is none."""
    if descriptions is None or len(descriptions.entities.codes) == 0:
        return None
    found = keys.find_all(descriptions.entities.values)
    used = np.unique(descriptions.entities.codes)
    if len(unknown := used[found[used] < 0]):
        shown = [descriptions.entities.values[int(i)].as_py() for i in unknown[:5]]
        raise ValueError(
            f"{len(unknown):,} descriptions are of entities that have neither a triple nor a name "
            f"(dangling ids): {', '.join(map(repr, shown))}{' …' * (len(unknown) > 5)}. Add "
            "triples or names for them, or leave the descriptions out."
        )
    entities, texts = found[descriptions.entities.codes], descriptions.texts.codes
    chosen = np.full(len(keys), -1, np.int64)
    chosen[entities[::-1]] = texts[::-1]
    if len(other := np.flatnonzero(chosen[entities] != texts)):
        shown = [keys[int(entity)] for entity in np.unique(entities[other])[:5]]
        raise ValueError(
            f"{len(other):,} descriptions differ from an earlier one of the same entity: "
            f"{', '.join(map(repr, shown))}{' …' * (len(other) > 5)}. Keep one each, or pass the "
            "others as names."
        )
    values = pa.concat_arrays([descriptions.texts.values, pa.array([""], pa.large_string())])
    return StringTable.from_arrow(values.take(pa.array(chosen % len(values))))
