"""A mixture's shares and its order, whatever reads it; and what is refused."""

from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import Trainer

from hf_adapt import MMD, adapt
from hf_adapt.multitask import (
    EpochCallback,
    annealed,
    mix,
    mixing_probabilities,
    quotas,
    temperature,
)
from tests.helpers.data import MapStyle, RowStream, collate, rows
from tests.helpers.models import FIVE, bert
from tests.helpers.trainers import arguments, same_bits, weights


def numbered(size: int, first: int = 0) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"x": list(range(first, first + size))})


BIG, SMALL = numbered(50), numbered(7, 1000)
BOTH = {"big": BIG, "small": SMALL}


def read(mixture: Any, epoch: int = 0) -> list[tuple[str, int]]:
    mixture.set_epoch(epoch)
    return [(row["task"], row["x"]) for row in mixture]


@pytest.mark.parametrize(
    ("sampling", "counts"),
    [
        ("proportional", [50, 7]),
        ("equal", [29, 28]),
        (temperature(2), quotas(mixing_probabilities([50, 7], 2), 57)),
        ({"big": 0.9, "small": 0.1}, [51, 6]),
    ],
)
def test_quotas_are_exact_all_along(sampling: Any, counts: list[int]) -> None:
    mixture = mix(BOTH, sampling)
    names = [name for name, _ in read(mixture)]
    assert [names.count(name) for name in BOTH] == counts
    for start in range(0, 40):
        window = names[start : start + 17]
        assert abs(window.count("small") - 17 * counts[1] / 57) <= 1 + 1e-9


def test_each_row_is_used_equally_often_over_the_epochs() -> None:
    mixture = mix(BOTH, {"big": 0.3, "small": 0.7}, size=20)
    seen = Counter(x for epoch in range(10) for _, x in read(mixture, epoch))
    assert {seen[x] for x in range(1000, 1007)} == {20}
    assert {seen[x] for x in range(50)} <= {1, 2} and sum(seen.values()) == 200
    assert read(mixture, 3) == read(mix(BOTH, {"big": 0.3, "small": 0.7}, size=20), 3)
    assert read(mixture, 3) != read(mixture, 4)
    assert read(mixture) != read(mix(BOTH, {"big": 0.3, "small": 0.7}, size=20, seed=1))


def test_annealed_shares_change_with_the_epoch() -> None:
    mixture = mix(BOTH, annealed(epochs=2, least=0.0), size=100)
    counts = [Counter(name for name, _ in read(mixture, epoch)) for epoch in (0, 1, 5)]
    assert [count["small"] for count in counts] == [12, 50, 50]
    later = [x for name, x in read(mixture, 1) if name == "small"]
    assert max(Counter(later).values()) - min(Counter(later).values()) <= 2


@pytest.mark.parametrize("kind", [list, MapStyle, RowStream])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_and_epochs_give_the_same_rows(kind: Any, workers: int) -> None:
    made = {name: kind(data) for name, data in BOTH.items()}
    mixture = mix(made, "equal", size=24)
    loader = DataLoader(
        mixture,
        batch_size=4,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=lambda batch: [(row["task"], row["x"]) for row in batch],
    )
    for epoch in (0, 1):
        mixture.set_epoch(epoch)
        found = [row for batch in loader for row in batch]
        if kind is not RowStream:
            assert found == read(mix(BOTH, "equal", size=24), epoch)
        else:  # several workers take turns by the batch
            assert sorted(found) == sorted(read(mix(made, "equal", size=24), epoch))
            assert Counter(name for name, _ in found) == {"big": 12, "small": 12}


def test_rows_are_processed_by_their_task() -> None:
    mixture = mix(BOTH, processing={"small": lambda row: {"x": -row["x"]}}, column=None)
    found = list(mixture)
    assert all(row.keys() == {"x"} for row in found)
    assert sum(row["x"] < 0 for row in found) == 7
    assert mixture[-1] == found[-1]
    with pytest.raises(IndexError, match="57 is none of the 57 rows"):
        mixture[57]


# ---- in a Trainer ----


SAVED = 7 if FIVE else 3
"""The plain Trainer of 4.57 is not bit-exact in a second epoch either."""


def trainer_on(folder: Path, **settings: Any) -> Trainer:
    given = {"one": rows(13, 1), "other": rows(5, 2, low=30)}
    return Trainer(
        bert(dropout=True),
        arguments(folder, max_steps=-1, num_train_epochs=3, seed=3, **settings),
        train_dataset=mix(given, temperature(2)),
        data_collator=collate,
    )


@pytest.mark.parametrize("is_adapted", [False, True])
def test_a_resumed_run_is_an_uninterrupted_one(is_adapted: bool, tmp_path: Path) -> None:
    def run(folder: Path, resume: Any = None) -> Any:
        trainer = trainer_on(folder, save_strategy="steps", save_steps=SAVED)
        trainer.add_callback(EpochCallback())
        if is_adapted:
            trainer.remove_callback(EpochCallback)
            adapt(trainer, MMD(), target_dataset=rows(9, 3, None))
        trainer.train(resume_from_checkpoint=resume)
        assert int(trainer.train_dataset.epoch) == 2
        return weights(trainer.model)

    whole = run(tmp_path / "whole")
    assert same_bits(
        whole, run(tmp_path / "again", str(tmp_path / "whole" / f"checkpoint-{SAVED}"))
    )


# ---- what is refused ----


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mix({}), "got none"),
        (lambda: mix({"a": numbered(3), "b": numbered(0)}), "'b' is empty"),
        (lambda: mix(BOTH, {"big": 0.5, "smal": 0.5}), "sampling names smal"),
        (lambda: mix(BOTH, {"big": 0.5}), "add up to 0.5"),
        (lambda: mix(BOTH, "even"), "sampling='even' is unknown"),
        (lambda: mix(BOTH, size=0), "size=0 must be at least 1"),
        (lambda: mix(BOTH, processing={"x": str}), "processing names x"),
        (lambda: mix({"a": BIG, "b": RowStream(SMALL)}), "b are streams and a are not"),
        (lambda: mix({"b": RowStream(SMALL)}), "The sizes of streams are not known"),
        (lambda: annealed(epochs=2, least=3), "least=3 must lie"),
    ],
)
def test_what_cannot_be_mixed(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_what_is_no_data_set_or_ends() -> None:
    with pytest.raises(TypeError, match=r"datasets\['a'\]='text' is a str"):
        mix({"a": "text"})
    empty = mix({"a": RowStream(numbered(0))}, "equal", size=3)
    with pytest.raises(ValueError, match="gave no row: it is empty"):
        next(iter(empty))
    assert isinstance(torch.utils.data.DataLoader(empty), DataLoader)
