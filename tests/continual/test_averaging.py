"""Averages of a run's weights: what they are, and who sees them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
)

from hf_adapt import adapt
from hf_adapt.continual import AveragedWeights, ContinualMetrics
from hf_adapt.continual.averaging import points
from hf_adapt.engine.mixins import WeightTransform
from hf_adapt.unfreezing import GradualUnfreezing
from tests.helpers.adaptation import losses
from tests.helpers.data import collate, rows
from tests.helpers.models import bert, gpt2_config
from tests.helpers.trainers import ScaledTrainer, StopAt, arguments, same_bits, weights

STEPS = 8
SETTINGS: dict[str, dict[str, Any]] = {
    "ema": dict(decay=0.7),
    "soup": dict(start=0.5, every=0.25),
    "sfa": dict(every=0.25, beta=0.4),
}
KINDS = pytest.mark.parametrize("kind", SETTINGS)


class Watching(TrainerCallback):
    """Keeps the model's weights before the first step and after each."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen = [weights(kwargs["model"])]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(weights(kwargs["model"]))


def trainer_of(
    folder: Path, model: Any = None, cls: type[Trainer] = Trainer, labels: str = "row", **more: Any
) -> Trainer:
    callbacks = more.pop("callbacks", [])
    return cls(
        bert() if model is None else model,
        arguments(folder, **{"max_steps": STEPS, "learning_rate": 1e-2, **more}),
        train_dataset=rows(12, 1, labels),
        eval_dataset=rows(6, 3, labels),
        data_collator=collate,
        callbacks=callbacks,
    )


def trained(kind: Any, folder: Path, **settings: Any) -> tuple[Trainer, Watching]:
    watching = Watching()
    trainer = trainer_of(folder, callbacks=[watching], **settings)
    adapt(trainer, AveragedWeights(kind, **SETTINGS[kind])).train()
    return trainer, watching


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.allclose(one[name].double(), other[name].double(), atol=1e-6), name


# ---- what they are ----


@pytest.mark.parametrize("cls", [Trainer, ScaledTrainer])
def test_the_moving_average(cls: type[Trainer], tmp_path: Path) -> None:
    trainer, watching = trained("ema", tmp_path, cls=cls)
    expected = {name: value.double() for name, value in watching.seen[0].items()}
    for seen in watching.seen[1:]:
        expected = {name: 0.7 * e + 0.3 * seen[name].double() for name, e in expected.items()}
    assert_close(weights(trainer.model), expected)


def test_the_soup(tmp_path: Path) -> None:
    trainer, watching = trained("soup", tmp_path)
    ingredients = [watching.seen[step] for step in (4, 6, 8)]
    mean = {n: sum(each[n].double() for each in ingredients) / 3 for n in ingredients[0]}
    assert_close(weights(trainer.model), mean)


def test_going_back_to_the_start(tmp_path: Path) -> None:
    class Return(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.start = [p.detach().clone() for p in kwargs["model"].parameters()]

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step + 1 in (2, 4, 6, 8):
                for parameter, start in zip(kwargs["model"].parameters(), self.start, strict=True):
                    parameter.data = 0.6 * parameter.data + 0.4 * start

    plain = trainer_of(tmp_path, callbacks=[Return()])
    plain.train()
    trainer, watching = trained("sfa", tmp_path)
    assert_close(weights(trainer.model), weights(plain.model))
    assert same_bits(weights(trainer.model), watching.seen[-1]), "the raw weights are the result"


def test_a_decay_that_fits_the_run() -> None:
    """0.9999 in a run of 60 steps never leaves the start."""
    assert points(100, None, 0.25) == {25, 50, 75, 100}
    assert points(60, 0.75, 0.05) == {45, 48, 51, 54, 57, 60}
    assert points(3, 0.75, 0.05) == {2, 3}
    assert points(4, 0.0, 0.5) == {2, 4}


@pytest.mark.parametrize(("steps", "decay"), [(4, 0.0), (40, 0.75)])
def test_the_decay_by_default(steps: int, decay: float, tmp_path: Path) -> None:
    average, trainer = AveragedWeights(), trainer_of(tmp_path, max_steps=steps)
    adapt(trainer, average).train()
    assert average.average.decay == decay


# ---- who sees them ----


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("kind", ["ema", "soup"])
def test_evaluations_and_the_end_see_the_average(kind: Any, final: bool, tmp_path: Path) -> None:
    watching, average = Watching(), AveragedWeights(kind, **SETTINGS[kind], final=final)
    settings = dict(eval_strategy="steps", eval_steps=STEPS, save_strategy="steps", save_steps=8)
    trainer = trainer_of(tmp_path, callbacks=[watching], **settings)
    adapt(trainer, average).train()
    raw = watching.seen[-1]
    saved = type(trainer.model).from_pretrained(tmp_path / f"checkpoint-{STEPS}")
    assert same_bits(weights(saved), raw), "checkpoints keep the raw weights"
    assert same_bits(weights(trainer.model), raw) is not final
    during = losses(trainer, "eval_loss")[-1]
    assert (trainer.evaluate()["eval_loss"] == during) is final
    trainer.model.load_state_dict(dict(average.averaged_weights()), strict=False)
    assert trainer.evaluate()["eval_loss"] == during


@pytest.mark.parametrize("final", [True, False])
def test_the_final_weights_are_recorded(final: bool, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "a")
    trainer.eval_dataset = {"movies": rows(6, 3)}
    record = ContinualMetrics(metric="loss")
    adapt(trainer, record, AveragedWeights("ema", final=final, decay=0.9)).train()
    assert record.record.rows["movies"]["movies"] == trainer.evaluate()["eval_movies_loss"]


def test_a_second_run_does_not_begin_with_the_average_of_the_first(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "a")
    trainer.eval_dataset = {"movies": rows(6, 3), "tweets": rows(6, 4)}
    record = ContinualMetrics(metric="loss")
    adapt(trainer, record, AveragedWeights("ema", final=False, decay=0.9)).train()
    trainer.model.load_state_dict(bert().state_dict())
    (tmp_path / "continual_metrics.json").unlink()
    before = trainer.evaluate()["eval_movies_loss"]
    trainer.train()
    assert record.record.baseline is not None
    assert record.record.baseline["movies"] == before


@KINDS
def test_resumed_as_if_uninterrupted(kind: Any, tmp_path: Path) -> None:
    settings = dict(save_strategy="steps", save_steps=5, per_device_train_batch_size=1)
    whole, _ = trained(kind, tmp_path / "whole", **settings)
    stopped = trainer_of(tmp_path / "parts", callbacks=[StopAt(5)], **settings)
    adapt(stopped, AveragedWeights(kind, **SETTINGS[kind])).train()
    resumed = trainer_of(tmp_path / "parts", bert(seed=3), **settings)
    average = AveragedWeights(kind, **SETTINGS[kind])
    adapt(resumed, average).train(resume_from_checkpoint=str(tmp_path / "parts/checkpoint-5"))
    assert same_bits(weights(resumed.model), weights(whole.model))


def test_resumed_without_an_average(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = dict(save_strategy="steps", save_steps=5, max_steps=5)
    trainer_of(tmp_path, **settings).train()
    checkpoint = str(tmp_path / "checkpoint-5")
    adapt(trainer_of(tmp_path), AveragedWeights()).train(resume_from_checkpoint=checkpoint)
    assert "holds no AveragedWeights" in caplog.text

    adapt(trainer_of(tmp_path, **settings), AveragedWeights("soup")).train()
    with pytest.raises(ValueError, match=r"saved with AveragedWeights\('soup'\), this run has"):
        adapt(trainer_of(tmp_path), AveragedWeights()).train(resume_from_checkpoint=checkpoint)


def test_a_run_that_ends_before_the_soup(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_of(tmp_path, callbacks=[StopAt(2)])
    adapt(trainer, AveragedWeights("soup")).train()
    assert "ended at step 2, before the soup began (step 6)" in caplog.text


# ---- other models and methods ----


def test_adapters_alone_are_averaged(tmp_path: Path) -> None:
    model = get_peft_model(bert(), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    average, before = AveragedWeights(), weights(model)
    adapt(trainer_of(tmp_path, model), average).train()
    assert all("lora_" in n or "classifier" in n for n in average.average.weights)
    after = weights(model)
    assert {n for n in after if not torch.equal(after[n], before[n])} == set(
        average.average.weights
    )


def test_tied_weights_and_low_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(gpt2_config()).to(torch.bfloat16)
    average = AveragedWeights(decay=0.99)
    adapt(trainer_of(tmp_path, model, labels="lm", learning_rate=1e-4), average).train()
    kept = average.average.weights
    assert "lm_head.weight" not in kept
    assert {value.dtype for value in kept.values()} == {torch.float32}
    moved = kept["transformer.wte.weight"].bfloat16() != kept["transformer.wte.weight"]
    assert moved.any(), "small steps are not rounded away"
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(model.lm_head.weight, kept["transformer.wte.weight"].bfloat16())


def test_weights_that_are_unfrozen_later_are_averaged_too(tmp_path: Path) -> None:
    average, watching = AveragedWeights(decay=0.5), Watching()
    trainer = trainer_of(tmp_path, callbacks=[watching])
    adapt(trainer, average, GradualUnfreezing(every_steps=2)).train()
    name = "bert.embeddings.word_embeddings.weight"
    assert not torch.equal(average.average.weights[name], watching.seen[-1][name])
    assert torch.equal(weights(trainer.model)[name], average.average.weights[name])


def test_changes_of_other_methods_are_in_the_average(tmp_path: Path) -> None:
    class Shrink(WeightTransform):
        def after_optimizer_step(self, model: Any, learning_rates: Any) -> None:
            for parameter in model.parameters():
                parameter.zero_()

    trainer = trainer_of(tmp_path, max_steps=1)
    adapt(trainer, AveragedWeights(decay=0.0), Shrink()).train()
    assert not any(value.any() for value in trainer.model.parameters())


@KINDS
def test_batch_norm(kind: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    model = ResNetForImageClassification(config)
    images = [{"pixel_values": torch.randn(3, 8, 8), "labels": i % 3} for i in range(12)]
    watching = Watching()
    trainer = Trainer(
        model, arguments(tmp_path, max_steps=STEPS), train_dataset=images, callbacks=[watching]
    )
    adapt(trainer, AveragedWeights(kind, **SETTINGS[kind])).train()
    assert "averages the running statistics of" in caplog.text
    name = "resnet.embedder.embedder.normalization.running_mean"
    seen, final = [each[name] for each in watching.seen], weights(model)
    if kind == "soup":
        assert torch.allclose(final[name], (seen[4] + seen[6] + seen[8]) / 3)
    elif kind == "ema":
        expected = seen[0]
        for each in seen[1:]:
            expected = 0.7 * expected + 0.3 * each
        assert torch.allclose(final[name], expected)
    assert int(final[name.replace("running_mean", "num_batches_tracked")]) == STEPS


# ---- bad input ----


@pytest.mark.parametrize(
    ("arguments", "options", "expected"),
    [
        (["swa"], {}, r"'swa'\): expected one of ema, soup, sfa"),
        (["soup"], {"decay": 0.9}, r"'soup'\) has no decay; it is set by start, every"),
        (["sfa"], {"start": 0.5}, "has no start"),
        (["ema"], {"decay": 1.0}, r"AveragedWeights\(decay=1.0\)"),
        (["soup"], {"start": 1.0, "every": 0.0}, r"\(start=1.0, every=0.0\)"),
        (["sfa"], {"beta": 1.5}, "beta=1.5"),
    ],
)
def test_wrong_options(arguments: list[Any], options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        AveragedWeights(*arguments, **options)
