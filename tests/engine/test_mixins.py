"""The rarer abilities of an adaptation, each used by a toy of its own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, Trainer

from hf_adapt import MMD, AdaptationTrainer, Distillation, Objective, Stream, adapt
from hf_adapt.engine.adaptation import Adaptation
from hf_adapt.engine.callback import AdaptationCallback
from hf_adapt.engine.gradients import check_whole_gradients
from hf_adapt.engine.mixins import (
    EvaluationObserver,
    GradientTransform,
    LossCombiner,
    WeightAverage,
    WeightTransform,
)
from tests.helpers.data import collate, rows
from tests.helpers.models import FIVE, bert, llama
from tests.helpers.trainers import GradientRecorder, ScaledTrainer, arguments, same_bits, weights

TARGET = rows(9, 2, None)


def trainer_in(
    folder: Path, cls: type[Trainer] = Trainer, labels: str = "row", **settings: Any
) -> Trainer:
    model = llama() if labels == "lm" else bert("token" if labels == "token" else "sequence")
    return cls(
        model,
        arguments(folder, **settings),
        train_dataset=rows(12, 1, labels),
        eval_dataset=rows(6, 3, labels),
        data_collator=collate,
    )


# ---- labels and further forwards of a batch ----


class Relearned(Objective):
    """The task's own loss once more, from the batch's predictions and labels."""

    def loss(self, batch: Any) -> torch.Tensor:
        logits, domain = batch.logits()
        labels = batch.labels()
        assert len(logits) == len(labels) == len(domain)
        return F.cross_entropy(logits, labels, ignore_index=-100)


counts_first_tokens = pytest.mark.skipif(
    not FIVE, reason="the Trainer of 4.57 counts first tokens, which no token predicts"
)


@pytest.mark.parametrize("labels", ["row", "token", pytest.param("lm", marks=counts_first_tokens)])
def test_labels_are_aligned_with_the_predictions(labels: str, tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, labels=labels)
    adapt(trainer, Relearned(), target_dataset=rows(9, 2, None)).train()
    for entry in trainer.state.log_history[:3]:
        assert entry["loss/relearned"] == pytest.approx(entry["loss/task"], rel=1e-5)


class PooledLabels(Objective):
    """Asks for a label of each pooled feature."""

    def loss(self, batch: Any) -> torch.Tensor:
        features, _ = batch.features()
        return features[batch.labels("features") != -100].square().mean()


def test_labels_of_features(tmp_path: Path) -> None:
    adapt(trainer_in(tmp_path), PooledLabels(pooling="mean"), target_dataset=TARGET).train()
    tagger = trainer_in(tmp_path, labels="token")
    adapt(tagger, PooledLabels(pooling="tokens")).train()
    tagger = trainer_in(tmp_path, labels="token")
    adapt(tagger, PooledLabels(pooling="mean"))
    with pytest.raises(ValueError, match=r"items of features\(\) are rows: they have no labels"):
        tagger.train()


@counts_first_tokens
def test_labels_without_a_mask(tmp_path: Path) -> None:
    def bare(features: Any) -> dict[str, torch.Tensor]:
        batch = collate(features, length=10)
        del batch["attention_mask"]
        return batch

    trainer = trainer_in(tmp_path, labels="lm")
    trainer.data_collator = bare
    adapt(trainer, Relearned()).train()
    entry = trainer.state.log_history[0]
    assert entry["loss/relearned"] == pytest.approx(entry["loss/task"], rel=1e-5)


def test_vectors_of_labels(tmp_path: Path) -> None:
    class Vectors(Objective):
        def loss(self, batch: Any) -> torch.Tensor:
            logits, _ = batch.logits()
            return F.binary_cross_entropy_with_logits(logits, batch.labels())

    def as_wide_as_labels(features: Any) -> dict[str, torch.Tensor]:
        batch = collate(features, length=10)
        return {**batch, "labels": F.one_hot(batch["labels"], 10).float()}

    model = bert(num_labels=10, problem_type="multi_label_classification")
    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows(12, 1))
    trainer.data_collator = as_wide_as_labels
    adapt(trainer, Vectors()).train()
    entry = trainer.state.log_history[0]
    assert entry["loss/vectors"] == pytest.approx(entry["loss/task"], rel=1e-5)


class Masked(Objective):
    """The distance between the features of the rows and of the same rows with masked tokens."""

    def __init__(self, streams: Any = None) -> None:
        super().__init__(weight=0.5, name="masked")
        self.which, self.batches = streams, []

    def loss(self, batch: Any) -> torch.Tensor:
        def mask(inputs: dict[str, Any]) -> dict[str, Any]:
            assert "labels" in inputs
            return {**inputs, "input_ids": inputs["input_ids"].clamp(max=9)}

        plain, domain = batch.features()
        further = batch.forward(mask, self.which)
        masked, there = further.features()
        if self.which is not None:
            plain = plain[batch.is_in(domain, *self.which)]
        assert plain.shape == masked.shape and len(further.logits()[0]) == len(there)
        self.batches.append((plain, masked, batch.parts[0].inputs))
        return (plain - masked).square().mean()


@pytest.mark.parametrize("streams", [None, ("target",)])
def test_a_further_forward(streams: Any, tmp_path: Path) -> None:
    trainer, masked = trainer_in(tmp_path), Masked(streams)
    adapt(trainer, masked, target_dataset=TARGET)
    model = trainer.model
    start = weights(model)
    trainer.train()
    plain, seen, inputs = masked.batches[1]  # the first is the probe's
    model.load_state_dict(start)
    ids = inputs["input_ids"].clamp(max=9)
    hidden = model.train().bert(ids, inputs["attention_mask"])[0]
    real = inputs["attention_mask"].unsqueeze(-1)
    expected = (hidden * real).sum(1) / real.sum(1)
    torch.testing.assert_close(seen, expected[-len(seen) :])
    assert not torch.allclose(plain, seen) and seen.requires_grad
    # The task's loss is that of a run without it.
    alone = trainer_in(tmp_path)
    adapt(alone, MMD(), target_dataset=TARGET).train()
    first = [t.state.log_history[0]["loss/task"] for t in (trainer, alone)]
    assert first[0] == first[1]


def test_a_further_forward_under_accumulation(tmp_path: Path) -> None:
    gradients = []
    for size in (1, 4):
        recorder = GradientRecorder()
        trainer = trainer_in(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            max_steps=1,
        )
        trainer.add_callback(recorder)
        adapt(trainer, Masked()).train()
        gradients.append(recorder.gradients[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)


class Sparse(Objective):
    """A further forward of rows that a micro-batch often has not."""

    streams = ("memory",)

    def loss(self, batch: Any) -> torch.Tensor:
        features, domain = batch.forward(streams=("memory",)).features()
        assert len(features) == len(domain)
        return features.square().sum()


@pytest.mark.parametrize("forward", ["joint", "separate"])
def test_a_further_forward_of_no_rows(forward: Any, tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, per_device_train_batch_size=1, max_steps=4)
    stream = Stream(rows(4, 4, None), ratio=0.25, forward=forward)
    adapt(trainer, Sparse(), streams={"memory": stream}).train()
    losses = [e["loss/sparse"] for e in trainer.state.log_history if "loss/sparse" in e]
    assert sum(loss > 0 for loss in losses) == 1


class Further(Objective):
    """Predictions of a further forward, whatever the first one has."""

    uses_logits = False

    def loss(self, batch: Any) -> torch.Tensor:
        return batch.forward().logits()[0].square().mean()


def test_a_further_forward_beside_a_fused_loss_has_predictions(tmp_path: Path) -> None:
    trainer, teacher = trainer_in(tmp_path, labels="lm"), llama(1)
    adapt(trainer, Distillation(teacher, chunked=True), Further()).train()
    assert trainer.state.log_history[0]["loss/further"] > 0


class Asking(Adaptation):
    """Asks for features, which are captured for objectives."""

    def build_modules(self, batch: Any) -> None:
        batch.features()


def test_features_that_no_objective_names(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    adapt(trainer, Asking())
    with pytest.raises(ValueError, match="captured for the layers that objectives name"):
        trainer.train()


# ---- combining losses ----


class Sum(LossCombiner):
    """The weighted sum, by hand."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self.seen: list[Any] = []

    def combine(
        self, losses: Mapping[str, torch.Tensor], weights: Mapping[str, float], batch: Any
    ) -> torch.Tensor:
        self.seen.append((set(losses), dict(weights)))
        return self.scale * sum(weights[name] * losses[name] for name in losses)


def test_a_combiner_takes_the_place_of_the_sum(tmp_path: Path) -> None:
    gradients = []
    for combiner in (None, Sum(), Sum(2.0)):
        recorder = GradientRecorder()
        trainer = trainer_in(
            tmp_path, gradient_accumulation_steps=3, max_steps=2, max_grad_norm=0.0
        )
        trainer.add_callback(recorder)
        others = [] if combiner is None else [combiner]
        adapt(trainer, MMD(weight=0.3), Relearned(), *others, target_dataset=TARGET).train()
        gradients.append(recorder.gradients[0])
        if combiner is not None:
            names, factors = combiner.seen[0]
            assert names == {"task", "mmd", "relearned"} == set(factors)
            assert factors == {"task": 1.0, "mmd": 0.3, "relearned": 1.0}
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(gradients[2], 2 * gradients[0], rtol=1e-5, atol=1e-8)


class Unweighted(Objective):
    """Turns the task's loss off, which is NaN where there are no labels."""

    def base_weight(self, progress: float) -> float:
        return 0.0

    def loss(self, batch: Any) -> torch.Tensor:
        return batch.features()[0].square().mean()


def test_a_combiner_is_not_given_a_loss_that_is_nan_and_does_not_count(tmp_path: Path) -> None:
    logged = []
    for combiner in ([], [Sum()]):
        trainer = trainer_in(tmp_path, labels="token")
        trainer.train_dataset = rows(12, 1, "token").map(
            lambda row: {"labels": [-100] * len(row["labels"])}
        )
        adapt(trainer, Unweighted(), *combiner).train()
        logged.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
    assert logged[0] == pytest.approx(logged[1]) and logged[0][0] > 0


def test_two_combiners_are_refused(tmp_path: Path) -> None:
    trainer, second = trainer_in(tmp_path), Sum()
    second.name = "second"
    adapt(trainer, Sum(), second)
    with pytest.raises(ValueError, match="sum and second both combine the losses"):
        trainer.train()


# ---- gradients before clipping ----


class Scaled(GradientTransform):
    """Multiplies all gradients."""

    def __init__(self, factor: float) -> None:
        self.factor, self.calls = factor, 0

    def transform_gradients(self, model: nn.Module) -> None:
        self.calls += 1
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(self.factor)


def test_gradients_are_changed_once_a_step_before_they_are_clipped(tmp_path: Path) -> None:
    norms = []
    for factor in (1.0, 0.5):
        halved = Scaled(factor)
        trainer = trainer_in(tmp_path, gradient_accumulation_steps=3, learning_rate=0.0)
        adapt(trainer, halved).train()
        assert halved.calls == 3
        norms.append([e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e])
    assert norms[1] == pytest.approx([norm / 2 for norm in norms[0]])


def test_gradients_are_seen_without_the_loss_scale(tmp_path: Path) -> None:
    class Seen(Scaled):
        def transform_gradients(self, model: nn.Module) -> None:
            super().transform_gradients(model)
            self.largest = max(float(p.grad.abs().max()) for p in model.parameters())

    largest, finals = [], []
    for cls in (Trainer, ScaledTrainer):
        seen, trainer = Seen(0.5), trainer_in(tmp_path, cls, max_steps=2)
        adapt(trainer, seen).train()
        largest.append(seen.largest)
        finals.append(weights(trainer.model))
    assert largest[0] == pytest.approx(largest[1], rel=1e-4)
    for one, other in zip(finals[0].values(), finals[1].values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


class Overflowing(ScaledTrainer):
    """A gradient is infinite from the second step on."""

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 1:
            model.classifier.weight.register_hook(lambda g: g * float("inf"))
        return super().training_step(model, *args, **kwargs)


def test_an_overflowing_step_is_left_to_the_scaler(tmp_path: Path) -> None:
    scaled, trainer = Scaled(0.5), trainer_in(tmp_path, Overflowing)
    adapt(trainer, scaled).train()
    assert scaled.calls == 1, "the second and third step overflowed"
    assert all(bool(torch.isfinite(p).all()) for p in trainer.model.parameters())


@pytest.mark.parametrize("transform", [Scaled(1.0), pytest.param("moved", id="moved")])
def test_sharded_gradients_and_weights_are_refused(transform: Any) -> None:
    adaptation = Moved() if transform == "moved" else transform
    for sharded in ("is_fsdp_enabled", "is_deepspeed_enabled"):
        settings = {"is_fsdp_enabled": False, "is_deepspeed_enabled": False, sharded: True}
        with pytest.raises(ValueError, match=f"{adaptation.name} works on whole gradients"):
            check_whole_gradients(SimpleNamespace(**settings), [adaptation])


# ---- weights around the steps of the optimizer ----


class Moved(WeightTransform):
    """Adds the step's learning rate to one weight."""

    def __init__(self) -> None:
        self.before: list[float] = []
        self.rates: list[set[float]] = []

    def before_optimizer_step(self, model: nn.Module) -> None:
        self.before.append(float(model.classifier.bias[0]))

    def after_optimizer_step(
        self, model: nn.Module, learning_rates: Mapping[nn.Parameter, float]
    ) -> None:
        self.rates.append(set(learning_rates.values()))
        assert len(learning_rates) == sum(p.requires_grad for p in model.parameters())
        model.classifier.bias.add_(learning_rates[model.classifier.bias])


@pytest.mark.parametrize("cls", [Trainer, ScaledTrainer])
def test_weights_are_changed_after_each_step_at_its_own_rate(
    cls: type[Trainer], tmp_path: Path
) -> None:
    moved, trainer = Moved(), trainer_in(tmp_path, cls, optim="sgd", max_grad_norm=1e-30)
    start = trainer.model.classifier.bias.detach().clone()
    adapt(trainer, moved).train()
    rates = [1e-3, 1e-3 * 2 / 3, 1e-3 / 3]
    assert [each for (each,) in moved.rates] == pytest.approx(rates)
    moves = torch.tensor([sum(rates[:step]) for step in range(3)])
    torch.testing.assert_close(torch.tensor(moved.before), start[0] + moves)
    torch.testing.assert_close(trainer.model.classifier.bias, start + sum(rates))


def test_weights_are_left_alone_where_a_step_was_skipped(tmp_path: Path) -> None:
    moved, trainer = Moved(), trainer_in(tmp_path, Overflowing)
    adapt(trainer, moved).train()
    assert len(moved.before) == 3 and len(moved.rates) == 1


# ---- observers of evaluations ----


class Confidence(EvaluationObserver):
    """The mean probability of the predicted class, and what it saw."""

    columns = ("word",)

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.words: list[str] = []

    def begin_evaluation(self, trainer: Trainer, prefix: str) -> None:
        self.calls.append(prefix)
        self.sum, self.count, self.words = 0.0, 0, []

    def observe(
        self, inputs: Mapping[str, Any], columns: Mapping[str, Sequence[Any]], outputs: Any
    ) -> None:
        assert set(inputs) == {"input_ids", "attention_mask", "labels"}
        self.sum += float(outputs.softmax(-1).max(-1).values.sum())
        self.count += len(inputs["labels"])
        self.words += columns["word"]

    def end_evaluation(self, metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
        assert f"{prefix}_loss" in metrics
        return {f"{prefix}_confidence": self.sum / self.count}


@pytest.mark.parametrize("way", ["callback", "adapt", "trainer"])
def test_an_observer_sees_every_evaluation(way: str, tmp_path: Path) -> None:
    observer = Confidence()
    data = rows(6, 3)
    data = data.add_column("word", [f"w{i}" for i in range(6)])
    settings: dict[str, Any] = dict(
        model=bert(),
        args=arguments(tmp_path, eval_strategy="steps", eval_steps=2, max_steps=2),
        train_dataset=rows(12, 1),
        eval_dataset=data,
        data_collator=collate,
    )
    if way == "trainer":
        trainer = AdaptationTrainer(objectives=[observer], **settings)
    elif way == "adapt":
        trainer = adapt(Trainer(**settings), observer)
    else:
        trainer = Trainer(**settings, callbacks=[AdaptationCallback(observer)])
    trainer.train()
    logged = next(e for e in trainer.state.log_history if "eval_loss" in e)
    assert 1 / 3 < logged["eval_confidence"] < 1 and observer.calls == ["eval"]
    assert observer.words == [f"w{i}" for i in range(6)]
    after = trainer.predict(data)
    assert after.metrics["test_confidence"] == pytest.approx(logged["eval_confidence"])
    assert observer.calls == ["eval", "test"] and after.predictions.shape == (6, 3)


def test_an_observer_by_callback_sees_an_evaluation_before_training(tmp_path: Path) -> None:
    observer = Confidence()
    observer.columns = ()
    observer.observe = lambda inputs, columns, outputs: setattr(observer, "count", 1)
    trainer = trainer_in(tmp_path)
    trainer.add_callback(AdaptationCallback(observer))
    assert "eval_confidence" in trainer.evaluate()
    assert "test_confidence" in trainer.predict(rows(4, 5)).metrics


# ---- the end of a run ----


class Finishing(Adaptation):
    """Writes down how a run ends."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def finish(self, trainer: Trainer) -> None:
        assert trainer.state.global_step == 3
        self.events.append("finish")

    def close(self) -> None:
        self.events.append("close")


def test_finish_is_called_where_a_run_ends_well(tmp_path: Path) -> None:
    good, bad = Finishing(), Finishing()
    adapt(trainer_in(tmp_path), good).train()

    class Failing(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("out of luck")

    failing = trainer_in(tmp_path, Failing)
    with pytest.raises(RuntimeError, match="out of luck"):
        adapt(failing, bad).train()
    assert good.events == ["finish", "close"] and bad.events == ["close"]


class Clumsy(Adaptation):
    """Fails to close."""

    def close(self) -> None:
        raise RuntimeError("closed badly")


def test_an_adaptation_that_fails_to_close_leaves_no_hooks_of_others(tmp_path: Path) -> None:
    trainer, good = trainer_in(tmp_path), Finishing()
    before = sum(len(m._forward_hooks) for m in trainer.model.modules())
    adapt(trainer, Clumsy(), good, MMD(), target_dataset=TARGET)
    with pytest.raises(RuntimeError, match="closed badly"):
        trainer.train()
    assert sum(len(m._forward_hooks) for m in trainer.model.modules()) == before
    assert good.events == ["finish", "close"]


# ---- averaged weights ----


class Zero(WeightAverage):
    """An average whose classifier is zero, which an evaluation shows."""

    def __init__(self, replaces_final: bool) -> None:
        self.replaces_final = replaces_final

    def begin(self, trainer: Trainer) -> None:
        self.model = trainer.model

    def averaged_weights(self) -> dict[str, torch.Tensor]:
        names = ("classifier.weight", "classifier.bias")
        return {name: torch.zeros_like(self.model.state_dict()[name]) for name in names}


@pytest.mark.parametrize("replaces_final", [False, True])
def test_averaged_weights_are_swapped_in(replaces_final: bool, tmp_path: Path) -> None:
    settings: dict[str, Any] = dict(
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=2, max_steps=2
    )
    plain = trainer_in(tmp_path / "plain", **settings)
    plain.train()
    trainer = trainer_in(tmp_path / "averaged", **settings)
    adapt(trainer, Zero(replaces_final)).train()
    evaluated = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    assert evaluated == pytest.approx([torch.tensor(3.0).log().item()] * 2)
    saved = type(plain.model).from_pretrained(tmp_path / "averaged" / "checkpoint-2")
    assert same_bits(weights(saved), weights(plain.model)), "checkpoints keep the raw weights"
    final = weights(trainer.model)
    if replaces_final:
        assert not final["classifier.weight"].any() and not final["classifier.bias"].any()
    else:
        assert same_bits(final, weights(plain.model))


class Counted(WeightAverage):
    """An average that is the number of optimizer steps, kept in the checkpoint."""

    replaces_final = True

    def __init__(self) -> None:
        self.steps = 0.0

    def before_step(self, step: int) -> None:
        self.steps += 1.0

    def averaged_weights(self) -> dict[str, torch.Tensor]:
        return {"classifier.bias": torch.full((3,), self.steps)}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


def test_an_average_is_restored_before_the_first_batch(tmp_path: Path) -> None:
    settings: dict[str, Any] = dict(save_strategy="steps", save_steps=3, max_steps=3)
    finals = []
    for resume in (None, str(tmp_path / "checkpoint-3")):  # the second run has nothing left to do
        trainer = trainer_in(tmp_path, **settings)
        adapt(trainer, Counted()).train(resume_from_checkpoint=resume)
        finals.append(weights(trainer.model)["classifier.bias"].tolist())
    assert finals == [[3.0] * 3] * 2


def test_an_average_of_tied_weights(tmp_path: Path) -> None:
    class Tied(WeightAverage):
        def begin(self, trainer: Trainer) -> None:
            self.kept = {k: v.clone() for k, v in trainer.model.state_dict().items()}

        def averaged_weights(self) -> dict[str, torch.Tensor]:
            return self.kept

    torch.manual_seed(0)
    shape = dict(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    model = GPT2LMHeadModel(GPT2Config(**shape))
    assert "lm_head.weight" not in dict(model.named_parameters())
    trainer = Trainer(
        model,
        arguments(tmp_path, eval_strategy="steps", eval_steps=1),
        train_dataset=rows(12, 1, "lm"),
        eval_dataset=rows(6, 3, "lm"),
        data_collator=collate,
    )
    adapt(trainer, Tied()).train()
    losses = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    assert len(set(losses)) == 1, "the first weights are evaluated each time"


def test_an_average_does_not_replace_the_best_model(tmp_path: Path) -> None:
    best = dict(load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps")
    trainer = trainer_in(tmp_path, eval_steps=1, save_steps=1, **best)
    with pytest.raises(ValueError, match="load_best_model_at_end=True"):
        adapt(trainer, Zero(True)).train()


# ---- hooks without their mixin ----


def test_hooks_that_would_never_be_called_are_refused() -> None:
    class Forgetful(Objective):
        def lr_multipliers(self, step: int) -> dict[nn.Parameter, float]:
            return {}

    with pytest.raises(TypeError, match=r"Forgetful has lr_multipliers.*LearningRateControl"):
        AdaptationCallback(Forgetful())
