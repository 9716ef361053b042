"""Where the source and the targets come from: data sets, streams, lists, a domain column."""

from __future__ import annotations

import math
from typing import Any

import datasets
import pytest
import torch
from transformers import (
    Trainer,
)

from hf_adapt import (
    AdaptationCallback,
)
from hf_adapt.engine.streams import Stream
from tests.helpers.adaptation import (
    SOURCE,
    TARGET,
    InputRecorder,
    RecordingCollator,
    assert_adapted,
    losses,
    terms,
)
from tests.helpers.data import MapStyle, RowStream, collate, rows
from tests.helpers.libraries import BATCH
from tests.helpers.models import bert
from tests.helpers.trainers import arguments

OTHER = rows(7, seed=2, labels=None, low=34, high=50)
TARGETS: dict[str, tuple[Any, Any, int]] = {
    "dataset": (SOURCE, TARGET, 2),
    "torch-datasets": (MapStyle(SOURCE), MapStyle(TARGET), 2),
    "lists-of-rows": (SOURCE.to_list(), TARGET.to_list(), 2),
    "formatted": (SOURCE.with_format("torch"), TARGET.with_format("torch"), 2),
    "transformed": (SOURCE.with_transform(lambda batch: batch), TARGET, 2),
    "several": (SOURCE, [TARGET, OTHER], 3),
    "named": (SOURCE, {"mail": TARGET, "news": OTHER}, 3),
    "hf-streams": (SOURCE.to_iterable_dataset(), TARGET.to_iterable_dataset(), 2),
    "torch-streams": (RowStream(SOURCE), RowStream(TARGET), 2),
    "stream-and-map": (SOURCE.to_iterable_dataset(), TARGET, 2),
    "streams": (RowStream(SOURCE), [RowStream(TARGET), RowStream(OTHER)], 3),
}


@pytest.mark.parametrize("remove_unused_columns", [True, False])
@pytest.mark.parametrize("name", TARGETS)
def test_kinds_of_source_and_target(name: str, remove_unused_columns: bool, tmp_path: Any) -> None:
    source, target, domains = TARGETS[name]
    collator = RecordingCollator()
    objectives = terms()
    trainer = Trainer(
        model=bert(),
        args=arguments(tmp_path, max_steps=5, remove_unused_columns=remove_unused_columns),
        train_dataset=source,
        data_collator=collator,
        callbacks=[AdaptationCallback(*objectives, target_dataset=target)],
    )
    trainer.train()
    assert trainer.state.global_step == 5
    assert_adapted(trainer, "loss/mmd", "loss/information_maximization")
    assert objectives[0].module[-1].out_features == domains
    assert [len(b) for b in collator.sources()] == [len(b) for b in collator.targets()]
    assert {row for batch in collator.sources() for row in batch} == {
        tuple(row["input_ids"]) for row in SOURCE
    }


def with_domain(*values: Any) -> datasets.Dataset:
    """Rows of several domains in one dataset, all labelled; the first value's are the source's."""
    parts = []
    for i, value in enumerate(values):
        part = rows(12, seed=i, low=34 if i else 5, high=64 if i else 34)
        parts.append(part.add_column("domain", [value] * len(part)))
    return datasets.concatenate_datasets(parts).shuffle(seed=0)


@pytest.mark.parametrize(
    ("values", "source_domain"),
    [
        ((0, 1), None),
        (("source", "mail"), None),
        (("reviews", "mail"), "reviews"),
        ((0, 1, 2), None),
        ((2, 0, 1), 2),
        (("source", "mail", "news"), None),
    ],
)
@pytest.mark.parametrize("remove_unused_columns", [True, False])
def test_a_domain_column_splits_the_training_set(
    values: tuple[Any, ...], source_domain: Any, remove_unused_columns: bool, tmp_path: Any
) -> None:
    collator, model, objectives = RecordingCollator(), bert(), terms()
    recorder = InputRecorder(model)
    trainer = Trainer(
        model=model,
        args=arguments(
            tmp_path,
            max_steps=-1,
            num_train_epochs=1,
            remove_unused_columns=remove_unused_columns,
        ),
        train_dataset=with_domain(*values),
        data_collator=collator,
        callbacks=[
            AdaptationCallback(*objectives, target_dataset=Stream(source_domain=source_domain))
        ],
    )
    trainer.train()
    assert trainer.state.global_step == 3, "an epoch is one pass over the 12 source rows"
    assert_adapted(trainer)
    assert objectives[0].module[-1].out_features == len(values)
    for inputs, sources in zip(recorder.inputs, collator.sources(), strict=True):
        assert len(sources) == BATCH
        assert (inputs["labels"] != -100).tolist() == [True] * BATCH + [False] * BATCH


@pytest.mark.parametrize("values", [(0, 1), ("source", "mail")])
def test_a_domain_column_splits_a_stream(values: tuple[Any, Any], tmp_path: Any) -> None:
    collator = RecordingCollator()
    trainer = Trainer(
        model=bert(),
        args=arguments(tmp_path, max_steps=4),
        train_dataset=with_domain(*values).to_iterable_dataset(),
        data_collator=collator,
        callbacks=[AdaptationCallback(*terms())],
    )
    trainer.train()
    assert_adapted(trainer)
    assert [len(batch) for batch in collator.sources()] == [BATCH] * len(collator.batches)
    assert [len(batch) for batch in collator.targets()] == [BATCH] * len(collator.batches)


def collate_with_domain(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    batch = collate(features)
    if "domain" in features[0]:
        batch["domain"] = torch.tensor([row["domain"] for row in features])
    return batch


def test_evaluation_data_may_have_a_domain_column(tmp_path: Any) -> None:
    dev = with_domain(0, 1).select(range(6))
    model, given = bert(), set()
    # Many models swallow an argument they do not know: look at what they are given.
    model.register_forward_pre_hook(lambda _, args, kwargs: given.update(kwargs), with_kwargs=True)
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, remove_unused_columns=False, eval_strategy="steps", eval_steps=2),
        train_dataset=with_domain(0, 1),
        eval_dataset=dev,
        data_collator=collate_with_domain,
        callbacks=[AdaptationCallback(*terms())],
    )
    trainer.train()
    assert all(map(math.isfinite, losses(trainer, "eval_loss")))
    assert losses(trainer, "eval_loss")
    with_column = trainer.evaluate()["eval_loss"]
    without = trainer.evaluate(dev.remove_columns("domain"))["eval_loss"]
    assert with_column == without
    assert len(trainer.predict(dev).predictions) == 6
    assert "input_ids" in given and "domain" not in given
