"""Columns that an adaptation sees and the model does not; the weight of the task's own loss."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from hf_adapt import MMD, Objective, adapt
from hf_adapt.engine.collating import COLUMNS, AdaptationCollator, take_columns
from hf_adapt.engine.streams import Stream
from tests.helpers.data import collate, rows
from tests.helpers.models import bert
from tests.helpers.trainers import (
    GradientRecorder,
    arguments,
    cosine_and_ratio,
    same_bits,
    weights,
)


def with_words(number: int, seed: int, labels: str | None = "row") -> Any:
    made = rows(number, seed, labels).to_list()
    import datasets

    return datasets.Dataset.from_list(
        [{**row, "word": f"{seed}-{row['input_ids'][0]}"} for row in made]
    )


class Reader(Objective):
    """Looks at a column; its term is 0."""

    columns = ("word",)

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[list[str], list[int]]] = []

    def loss(self, batch: Any) -> torch.Tensor:
        for part in batch.parts:
            self.seen.append((part.columns["word"], part.inputs["input_ids"][:, 0].tolist()))
        return batch.features()[0].sum() * 0.0


@pytest.mark.parametrize("target", [None, "joint", "separate"])
@pytest.mark.parametrize("as_dataset", [True, False])
def test_columns_come_with_their_rows(target: Any, as_dataset: bool, tmp_path: Path) -> None:
    source, reader = with_words(12, 1), Reader()
    signatures: list[Any] = []

    class Strict(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            assert set(inputs) <= {"input_ids", "attention_mask", "labels"}
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = Strict(
        model=bert(),
        args=arguments(tmp_path, eval_strategy="steps", eval_steps=1),
        train_dataset=source if as_dataset else source.to_list(),
        eval_dataset=rows(4, 3),
        data_collator=collate,
    )
    given = dict(target_dataset=Stream(with_words(5, 2, None), forward=target)) if target else {}
    adapt(trainer, reader, **given)
    trainer.train()
    signatures = list(trainer._signature_columns or [])
    assert "word" not in signatures
    assert trainer.data_collator is collate
    assert len(reader.seen) >= 3
    for words, first in reader.seen:
        assert [word.partition("-")[2] for word in words] == [str(value) for value in first]
    prefixes = {word.partition("-")[0] for words, _ in reader.seen for word in words}
    assert prefixes == ({"1", "2"} if target else {"1"})


def test_a_column_that_no_longer_fits_is_refused() -> None:
    collator = AdaptationCollator(collate, ["word"])
    batch = collator([{**row, "word": "x"} for row in rows(3, 1)])
    assert batch[COLUMNS] == {"word": ["x", "x", "x"]}
    with pytest.raises(ValueError, match="'word' has 3 values for a batch of 2 rows"):
        take_columns(batch, 2)
    with pytest.raises(TypeError, match="data collator that returns a dict"):
        AdaptationCollator(lambda given: [given], ["word"])(list(rows(2, 1)))


class Lighter(Objective):
    """Halves the task's own loss."""

    def base_weight(self, progress: float) -> float:
        return 0.5

    def loss(self, batch: Any) -> torch.Tensor:
        return batch.features()[0].sum() * 0.0


def test_the_weight_of_the_tasks_own_loss(tmp_path: Path) -> None:
    def gradient(*objectives: Objective) -> torch.Tensor:
        recorder = GradientRecorder()
        trainer = Trainer(
            model=bert(),
            args=arguments(tmp_path, max_steps=1, max_grad_norm=0.0),
            train_dataset=rows(8, 1),
            data_collator=collate,
            callbacks=[recorder],
        )
        if objectives:
            adapt(trainer, *objectives)
        trainer.train()
        return recorder.gradients[0]

    plain, half, quarter = gradient(), gradient(Lighter()), gradient(Lighter(), Lighter(name="b"))
    assert cosine_and_ratio(plain, half) == pytest.approx((1.0, 2.0), abs=1e-6)
    assert cosine_and_ratio(plain, quarter) == pytest.approx((1.0, 4.0), abs=1e-6)


class Apart(Objective):
    """Two components over different items."""

    def num_items(self, rows: Any) -> Any:
        part = rows.parts[0]
        return {"rows": torch.tensor(len(part.domain)), "tokens": part.token_counts.sum()}

    def loss(self, batch: Any) -> Any:
        part = batch.parts[0]
        hidden = next(iter(part.hidden.values()))
        mask = part.attention_mask.bool()
        return {
            "rows": (hidden[:, 0].square().sum(), torch.tensor(len(hidden))),
            "tokens": ((hidden[mask] + 1).square().sum(), mask.sum()),
        }


def test_components_are_counted_apart(tmp_path: Path) -> None:
    def run(size: int, steps: int) -> tuple[torch.Tensor, dict[str, float]]:
        recorder = GradientRecorder()
        trainer = Trainer(
            model=bert(),
            args=arguments(
                tmp_path,
                max_steps=1,
                max_grad_norm=0.0,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=steps,
            ),
            train_dataset=rows(8, 1),
            data_collator=collate,
            callbacks=[recorder],
        )
        adapt(trainer, Apart())
        trainer.train()
        return recorder.gradients[0], trainer.state.log_history[0]

    (whole, log), (cut, other) = run(8, 1), run(1, 8)
    assert cosine_and_ratio(whole, cut) == pytest.approx((1.0, 1.0), abs=1e-5)
    for name in ("apart/rows", "apart/tokens", "loss/apart"):
        assert log[name] == pytest.approx(other[name], rel=1e-4)


def test_nothing_is_left_on_a_trainer_whose_run_failed(tmp_path: Path) -> None:
    class Failing(Reader):
        def loss(self, batch: Any) -> torch.Tensor:
            raise RuntimeError("on purpose")

    trainer = Trainer(
        model=bert(),
        args=arguments(tmp_path),
        train_dataset=with_words(8, 1),
        data_collator=collate,
    )
    before = weights(trainer.model)
    adapt(trainer, Failing())
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.train()
    assert trainer.data_collator is collate
    assert trainer._adaptation_active == ()
    assert same_bits(before, weights(trainer.model))
    assert MMD.uses_logits is False
