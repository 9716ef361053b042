"""Which rows a memory keeps: their hashes and ranks, and how groups share its size."""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import datasets
import numpy as np
import torch
from tqdm.auto import tqdm

from hf_adapt.continual.prepared_rows import CLASS_COLUMNS
from hf_adapt.continual.row_outputs import row_outputs

if TYPE_CHECKING:
    from transformers import Trainer

Policy = Literal["random", "balanced", "herding", "surprise"]

LOGITS = "replay_logits"
"""The column of what the model predicted when the row was stored."""


def shares(available: Sequence[int], size: int) -> list[int]:
    """How many rows each of several groups gets, as equally as they have them.

    Example:
        >>> shares([10, 1, 10], 8), shares([3, 3], 5)
        ([3, 1, 4], [2, 3])
    """
    taken, left = [0] * len(available), min(size, sum(available))
    order = sorted(range(len(available)), key=lambda i: (available[i], i))
    for number, i in enumerate(order):
        taken[i] = min(available[i], left // (len(order) - number))
        left -= taken[i]
    return taken


def herding_order(features: torch.Tensor, most: int | None = None) -> list[int]:
    r"""The order in which rows are taken so that the mean of the first k is near that of all.

    .. math::
        p_k = \arg\min_x \left\| \mu - \frac{1}{k}\Big(\phi(x) + \sum_{j<k} \phi(p_j)\Big) \right\|

    Reference:
        Rebuffi et al. 2017, "iCaRL", Alg. 4, arXiv:1611.07725.

    Args:
        features: A feature of each row.
        most: How many to order; all by default.

    Shape:
        - features: (N, D).

    Example:
        >>> herding_order(torch.tensor([[0.0], [1.0], [2.0], [9.0]]))
        [2, 1, 3, 0]
    """
    rows = features.double()
    mean, total = rows.mean(0), torch.zeros_like(rows[0])
    left = torch.ones(len(rows), dtype=torch.bool)
    order: list[int] = []
    for k in range(1, min(len(rows), most or len(rows)) + 1):
        distances = (mean - (rows + total) / k).norm(dim=1).masked_fill(~left, float("inf"))
        best = int(distances.argmin())
        order.append(best)
        left[best], total = False, total + rows[best]
    return order


def row_hash(row: Mapping[str, Any]) -> str:
    """A hash of a row's content, the same on every machine.

    Raises:
        TypeError: If a value has no content that could be hashed.
    """
    own = {name: _content(value) for name, value in row.items() if name != LOGITS}
    content = json.dumps(own, sort_keys=True, default=_plain)
    return hashlib.blake2b(content.encode(), digest_size=12).hexdigest()


def _content(value: Any) -> Any:
    """The bytes of an image or a sound, wherever they lie."""
    if isinstance(value, Mapping) and value.keys() == {"bytes", "path"}:
        return value["bytes"] or Path(value["path"]).read_bytes()
    return value


def _plain(value: Any) -> Any:
    """What JSON can write of an array, an image or bytes."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, bytes):
        return value.hex()
    if hasattr(value, "tobytes") and hasattr(value, "mode"):  # a PIL image
        return [value.mode, value.size, value.tobytes().hex()]
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if isinstance(value, timedelta | Decimal):
        return str(value)
    raise TypeError(
        f"Rows of a memory are recognised by their content, and a {type(value).__name__} has none "
        "that could be hashed. Keep columns of numbers, texts, bytes and images."
    )


def shown(rows: datasets.Dataset) -> Iterable[Mapping[str, Any]]:
    """The rows as they are stored, without a format or a transform."""
    for name, kind in rows.features.items():
        if isinstance(kind, datasets.Image | datasets.Audio):
            rows = rows.cast_column(name, type(kind)(decode=False))
    plain = rows.with_format(None)
    bar: Iterable[Mapping[str, Any]] = tqdm(
        plain, "Hashing rows", disable=len(plain) < 20_000, leave=False
    )
    return bar


def rank_of(content: str, seed: int) -> int:
    """A rank that a row's content and a seed decide, as good as random."""
    digest = hashlib.blake2b(f"{seed}/{content}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def check_options(policy: str, size: Any, trainer: Any, logits: bool) -> None:
    """Refuse options of a memory that are unknown, out of range or without a model to ask.

    Raises:
        ValueError: Saying which.
    """
    if policy not in get_args(Policy):
        known = ", ".join(map(repr, get_args(Policy)))
        raise ValueError(f"policy={policy!r} is unknown: use one of {known}.")
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"size={size} must be a whole number of rows, at least 1.")
    if trainer is None and (policy in ("herding", "surprise") or logits):
        what = "logits=True" if logits else f"policy={policy!r}"
        raise ValueError(
            f"{what} asks the model that knows the task: pass trainer=, a Trainer with that model."
        )


def as_dataset(rows: Any) -> datasets.Dataset:
    """A data set of another library as one of `datasets`."""
    listed = [rows[place] for place in range(len(rows))]
    if not all(isinstance(row, Mapping) for row in listed):
        raise TypeError(
            f"A memory stores rows with named columns; the rows of the {type(rows).__name__} are "
            f"{type(listed[0]).__name__}s. Make a datasets.Dataset of them."
        )
    made = datasets.Dataset.from_list([dict(row) for row in listed])
    tensors = any(isinstance(v, torch.Tensor) for row in listed[:1] for v in row.values())
    return made.with_format("torch") if tensors else made


def drawn(stream: Any, size: int, policy: str, seed: int) -> datasets.Dataset:
    """The rows of a stream that a random memory keeps, read once; no more than those are held."""
    if policy != "random":
        raise ValueError(
            f"policy={policy!r} compares all rows, and the old data set is a stream. Use "
            "policy='random', or make it map-style."
        )
    kept: list[tuple[int, str, Any]] = []
    members: set[str] = set()
    for row in tqdm(stream, "Reading the stream", leave=False):
        content = row_hash(row)
        item = (-rank_of(content, seed), content, dict(row))
        if content in members:
            continue  # equal rows are taken once
        members.add(content)
        if len(kept) < size:
            heapq.heappush(kept, item)
        else:
            members.discard(heapq.heappushpop(kept, item)[1])
    if not kept:
        raise ValueError("A memory needs rows, and the stream of the old task is empty.")
    rows = [row for *_, row in kept]
    return datasets.Dataset.from_list(rows, features=getattr(stream, "features", None))


def classes_of(rows: datasets.Dataset, by: str | None, policy: str) -> list[str]:
    """The class of each row.

    Raises:
        ValueError: If there is no column with one class for each row.
    """
    column = by or next((name for name in CLASS_COLUMNS if name in rows.column_names), None)
    found = None if column not in rows.column_names else rows.with_format(None)[column]
    if found is None or any(isinstance(value, list | dict | float) for value in found[:1]):
        raise ValueError(
            f"policy={policy!r} needs a column with one class for each row: pass by=. There is "
            f"{column or 'neither labels nor label'!r} among {', '.join(rows.column_names)}"
            f"{'' if found is None else ', which holds no classes'}. For other heads use "
            "policy='random'."
        )
    return [str(value) for value in found]


def model_ranks(
    policy: str, trainer: Trainer, rows: datasets.Dataset, classes: Sequence[str], size: int
) -> list[int | float]:
    """The ranks that a model gives: minus the loss, or the order of herding."""
    if policy == "surprise":
        losses = row_outputs(trainer, rows, "losses")[:, 0]
        return [-loss for loss in losses.nan_to_num(-math.inf).tolist()]
    features = row_outputs(trainer, rows, "features")
    ranks: list[int | float] = [size] * len(classes)
    for name in sorted(set(classes)):
        members = [place for place, own in enumerate(classes) if own == name]
        for rank, place in enumerate(herding_order(features[members], size)):
            ranks[members[place]] = rank
    return ranks
