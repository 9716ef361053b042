"""A-GEM, against gradients by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer

from hf_adapt import adapt
from hf_adapt.continual import AGEM, ReplayMemory, agem_projection
from hf_adapt.engine.mixins import BatchTransform
from tests.helpers.data import collate, rows
from tests.helpers.models import bert, llama
from tests.helpers.trainers import (
    GradientRecorder,
    ScaledTrainer,
    StopAt,
    arguments,
    flat_gradient,
    same_bits,
    weights,
)


def opposite(data: Any) -> Any:
    """The same rows with other labels, so that the gradients point against each other."""
    return data.map(lambda row: {"labels": (row["labels"] + 1) % 3})


DATA = rows(8, 1)
AGAINST = opposite(DATA)


def trainer_of(folder: Path, memory: Any, cls: Any = Trainer, **settings: Any) -> Trainer:
    model = settings.pop("model", None) or bert()
    data = settings.pop("data", DATA)
    chosen = dict(max_grad_norm=1e6, per_device_train_batch_size=8, max_steps=1)
    trainer = cls(
        model,
        arguments(folder, **{**chosen, **settings}),
        train_dataset=data,
        data_collator=collate,
    )
    return trainer if memory is None else adapt(trainer, AGEM(memory, batch_size=8))


def gradient(model: Any, data: Any) -> torch.Tensor:
    """The gradient of the mean loss of rows."""
    model.zero_grad()
    model.train()(**collate(list(data))).loss.backward()
    return flat_gradient(model)


def projected(g: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """The formula on whole vectors."""
    return g - min(0.0, float(g @ r)) / float(r @ r) * r


@pytest.mark.parametrize(
    "g, r, expected",
    [
        ((-1.0, 1.0), (1.0, 0.0), (0.0, 1.0)),
        ((1.0, 1.0), (1.0, 0.0), (1.0, 1.0)),
        ((-2.0, 0.0), (1.0, 1.0), (-1.0, 1.0)),
        ((-1e-20, 1e-20), (1e-18, 0.0), (0.0, 1e-20)),  # no absolute epsilon
        ((1.0, 2.0), (0.0, 0.0), (1.0, 2.0)),
    ],
)
def test_projection(g: Any, r: Any, expected: Any) -> None:
    gradient, reference = torch.tensor(g), torch.tensor(r)
    # In pieces, as the parameters of a model are.
    factor, cosine = agem_projection(gradient.split(1), reference.split(1))
    torch.testing.assert_close(
        gradient - factor * reference, torch.tensor(expected), atol=1e-27, rtol=1e-5
    )
    assert -1 - 1e-5 <= float(cosine) <= 1 + 1e-5


@pytest.mark.parametrize("cls", [Trainer, ScaledTrainer])
@pytest.mark.parametrize("steps", [1, 4])
def test_the_step_is_projected_as_a_whole(cls: Any, steps: int, tmp_path: Path) -> None:
    """Also in micro-batches and under a loss scale, before it is counted in grad_norm."""
    expected = projected(gradient(bert(), DATA), gradient(bert(), AGAINST))
    recorder = GradientRecorder()
    trainer = trainer_of(
        tmp_path,
        AGAINST,
        cls,
        per_device_train_batch_size=8 // steps,
        gradient_accumulation_steps=steps,
    )
    trainer.add_callback(recorder)
    trainer.train()
    torch.testing.assert_close(recorder.gradients[0], expected, rtol=1e-3, atol=1e-6)
    log = trainer.state.log_history[0]
    assert log["agem/projected"] == 1 and log["agem/cosine"] < 0
    assert log["grad_norm"] == pytest.approx(float(expected.norm()), rel=1e-3)


def test_a_gradient_that_agrees_is_left_alone(tmp_path: Path) -> None:
    """By a bit, and so are dropout and the statistics of batches."""
    finals = []
    for memory in (None, DATA):
        trainer = trainer_of(tmp_path, memory, model=bert(dropout=True), max_steps=3)
        state = torch.get_rng_state()
        torch.manual_seed(3)
        trainer.train()
        torch.set_rng_state(state)
        finals.append(weights(trainer.model))
        if memory is not None:
            assert trainer.state.log_history[0]["agem/projected"] == 0
            assert trainer.state.log_history[0]["agem/cosine"] > 0
    assert same_bits(*finals)


def test_the_loss_on_the_memory_does_not_rise(tmp_path: Path) -> None:
    def loss(model: Any) -> float:
        return float(model.eval()(**collate(list(AGAINST))).loss.detach())

    found = []
    for memory in (None, AGAINST):
        trainer = trainer_of(tmp_path, memory, max_steps=30, learning_rate=0.2, optim="sgd")
        trainer.train()
        found.append(loss(trainer.model))
    start = loss(bert())
    assert found[0] > start + 0.5 and found[1] < start + 0.1


def test_rows_of_the_memory_are_a_function_of_the_step(tmp_path: Path) -> None:
    """So that a resumed run is the same bit for bit."""
    memory = ReplayMemory.from_dataset(opposite(rows(30, 2)), 25)
    settings = dict(save_strategy="steps", save_steps=2, max_steps=5, learning_rate=1e-2)
    whole = trainer_of(tmp_path / "whole", memory, model=bert(dropout=True), **settings)
    whole.train()
    part = trainer_of(tmp_path / "part", memory, model=bert(dropout=True), **settings)
    part.add_callback(StopAt(2))
    part.train()
    again = trainer_of(tmp_path / "part", memory, model=bert(dropout=True), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-2"))
    assert same_bits(weights(whole.model), weights(again.model))
    # All training rows in each step, and weights that do not move: only the memory's rows change.
    still = trainer_of(tmp_path, memory, max_steps=4, learning_rate=0.0)
    still.train()
    cosines = [e["agem/cosine"] for e in still.state.log_history if "agem/cosine" in e]
    assert len(set(np.round(cosines, 4))) == 4


def test_frozen_weights_tokens_and_a_memory_without_a_label(tmp_path: Path) -> None:
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    trainer = trainer_of(tmp_path, AGAINST, model=model)
    trainer.train()
    assert all(p.grad is None for p in model.bert.embeddings.parameters())
    language = rows(8, 1, "lm")
    trainer_of(tmp_path, rows(5, 2, "lm"), model=llama(), data=language, max_steps=2).train()
    nothing = DATA.map(lambda row: {"labels": -100})
    finals = []
    for memory in (None, nothing):
        trainer = trainer_of(tmp_path, memory)
        trainer.train()
        finals.append(weights(trainer.model))
    assert same_bits(*finals)


class Marks(BatchTransform):
    """Adds something to the batches."""

    name = "marks"

    def transform_batch(self, rows: Any, batch: Any) -> None:
        batch["token_type_ids"] = torch.ones_like(batch["input_ids"])


def test_a_method_that_changes_the_batches_is_refused(tmp_path: Path) -> None:
    """The memory's would be without what it adds."""
    trainer = adapt(trainer_of(tmp_path, AGAINST), Marks())
    with pytest.raises(ValueError, match="without what marks adds to the batches"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="memory has no rows"):
        AGEM([])
    with pytest.raises(TypeError, match=r"memory='old\.csv'"):
        AGEM("old.csv")
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        AGEM(DATA, batch_size=0)
    with pytest.raises(ValueError, match="not read by number"):
        AGEM(DATA.to_iterable_dataset())
    for wrong in (DATA.remove_columns("labels"), DATA.remove_columns("input_ids")):
        trainer = trainer_of(tmp_path, wrong)
        with pytest.raises(ValueError, match=r"The memory has no column '(labels|input_ids)'"):
            trainer.train()
        assert trainer.state.global_step == 0
    with pytest.raises(ValueError, match="The memory has the label 7"):
        trainer_of(tmp_path, DATA.map(lambda row: {"labels": 7})).train()
