"""Consolidation, against trainings that are followed by hand."""

import copy
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import Trainer

from hf_adapt import adapt
from hf_adapt.continual import (
    MAS,
    SI,
    Consolidation,
    Fisher,
    fisher_diagonal,
    pulls,
    save_importance,
)
from hf_adapt.continual.adapters import HeldWeights
from hf_adapt.continual.pulls import LowRankPull, WeightPull
from tests.helpers.data import collate, rows
from tests.helpers.models import bert
from tests.helpers.points import Point, descent
from tests.helpers.trainers import GradientRecorder, StopAt, arguments, same_bits, weights


def trainer_of(model: Any, folder: Path, *adaptations: Consolidation, **settings: Any) -> Trainer:
    data = rows(12, 1)
    trainer = Trainer(
        model, arguments(folder, **settings), train_dataset=data, data_collator=collate
    )
    return adapt(trainer, *adaptations) if adaptations else trainer


def penalties(trainer: Trainer) -> list[float]:
    key = "consolidation/penalty"
    return [entry[key] for entry in trainer.state.log_history if key in entry]


# ---- the three forms ----


@pytest.mark.parametrize("form", ["decoupled", "gradient"])
def test_both_forms_end_at_the_minimum_of_the_penalised_loss(form: Any, tmp_path: Path) -> None:
    model = Point(0.0, 0.0, 0.0)
    fisher = {"theta": torch.tensor([3.0, 0.0, 1.0])}
    trainer = descent(model, tmp_path, 600)
    adapt(trainer, Consolidation(fisher, strength=2.0, form=form)).train()
    torch.testing.assert_close(model.theta.detach(), torch.tensor([0.25, 1.0, 0.5]))
    assert penalties(trainer) == pytest.approx([2.0 / 2 * (3 * 0.25**2 + 0.5**2)], rel=1e-4)


def test_the_decoupled_form_is_stable_where_the_gradient_diverges(tmp_path: Path) -> None:
    found = {}
    for form in ("decoupled", "gradient"):
        model = Point(0.0)
        consolidation = Consolidation({"theta": torch.tensor([300.0])}, 1.0, form=form)
        adapt(descent(model, tmp_path, 600, logging_nan_inf_filter=False), consolidation).train()
        found[form] = model.theta.detach()
    torch.testing.assert_close(found["decoupled"], torch.tensor([2 / 302]))
    assert round(found["decoupled"].item(), 6) == 0.006623
    assert not found["gradient"].isfinite()


@pytest.mark.parametrize("form", ["decoupled", "gradient", "rates"])
def test_a_weight_without_importance_is_untouched(form: Any, tmp_path: Path) -> None:
    """By a bit, whatever happens to the others; those move as a loop by hand moves them."""
    plain, model = Point(0.3, 0.7), Point(0.3, 0.7)
    descent(plain, tmp_path, 30).train()
    consolidation = Consolidation({"theta": torch.tensor([0.0, 4.0])}, 0.5, form=form)
    adapt(descent(model, tmp_path, 30), consolidation).train()
    theta = 0.7
    for _ in range(30):
        step = -0.01 * 2 * (theta - 1)
        if form == "decoupled":
            theta = (theta + step + 0.01 * 2 * 0.7) / (1 + 0.01 * 2)
        elif form == "gradient":
            theta += step - 0.01 * 2 * (theta - 0.7)
        else:
            theta += (1 - 0.5 * 4 / 4) * step
    assert torch.equal(model.theta[0], plain.theta[0])
    assert model.theta[1].item() == pytest.approx(theta, rel=1e-6) != plain.theta[1].item()


@pytest.mark.parametrize("form", ["decoupled", "gradient", "rates"])
def test_a_schedule_that_is_zero_is_the_plain_trainer(form: Any, tmp_path: Path) -> None:
    finals, known = [], fisher_diagonal(bert(), rows(4, 2), collate)
    for strength in (None, 0.0, lambda progress: 0.0):
        model = bert()
        given = [] if strength is None else [Consolidation(known, strength, form=form)]
        trainer_of(model, tmp_path, *given).train()
        finals.append(weights(model))
    assert same_bits(finals[0], finals[1]) and same_bits(finals[0], finals[2])


def test_a_schedule_is_followed(tmp_path: Path) -> None:
    model = Point(0.0)
    trainer = descent(model, tmp_path, 4, logging_steps=1)
    known = {"theta": torch.ones(1)}
    adapt(trainer, Consolidation(known, lambda p: 100 * p, form="gradient")).train()
    theta = 0.0
    for step in range(4):
        theta -= 0.01 * (2 * (theta - 1) + 25 * step * theta)
    assert model.theta.item() == pytest.approx(theta, rel=1e-5)


def test_the_gradient_is_that_of_the_penalty_and_is_clipped(tmp_path: Path) -> None:
    """Of AdamW's first step nothing shows in the weights: the gradients are compared."""
    start, known = bert(seed=1), fisher_diagonal(bert(), rows(4, 2), collate)
    recorded = []
    for given in ([], [Consolidation(known, 5.0, form="gradient", start=start)]):
        recorder = GradientRecorder()
        trainer = trainer_of(bert(), tmp_path, *given, max_steps=1, max_grad_norm=1e6)
        trainer.add_callback(recorder)
        trainer.train()
        recorded.append((recorder.gradients[0], trainer.state.log_history[0]))
    own = dict(bert().named_parameters())
    there = dict(start.named_parameters())
    penalty = sum(5.0 / 2 * (known[n] * (p - there[n].detach()) ** 2).sum() for n, p in own.items())
    expected = torch.autograd.grad(penalty, list(own.values()))
    flat = torch.cat([each.double().flatten() for each in expected])
    torch.testing.assert_close(recorded[1][0] - recorded[0][0], flat, rtol=1e-4, atol=1e-6)
    log = recorded[1][1]
    assert log["grad_norm"] == pytest.approx(float(recorded[1][0].norm()), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pulls_of_weights_of_any_shape(dtype: torch.dtype, monkeypatch: Any) -> None:
    """In blocks of a few numbers, against the formula in one line."""
    monkeypatch.setattr(pulls, "CPU_BLOCK", 8)
    torch.manual_seed(0)
    shapes = [(5, 3), (2, 20), (1,), (), (3, 2, 2)]
    own = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    starts = [torch.randn(shape).to(dtype) for shape in shapes]
    known = [torch.rand(shape) for shape in shapes]
    rates = {weight: 0.1 * (1 + index % 2) for index, weight in enumerate(own[:-1])}
    for importances in (known, None):
        before = [weight.detach().clone() for weight in own]
        factors = [3.0 * rates.get(weight, 0.0) for weight in own]
        pull = WeightPull(own, starts, importances)
        ones = [torch.ones(shape) for shape in shapes]
        used = importances or ones
        total = sum(
            (f * (b.float() - s.float()) ** 2).sum()
            for f, b, s in zip(used, before, starts, strict=True)
        )
        torch.testing.assert_close(pull.penalty(), total / 2)
        with torch.no_grad():
            pull.move(3.0, rates)
        for new, old, start, f, c in zip(own, before, starts, used, factors, strict=True):
            wanted = (old.double() + c * f * start.double()) / (1 + c * f)
            torch.testing.assert_close(new.detach(), wanted.to(dtype))
            assert c or torch.equal(new, old), "the optimizer has left it out"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_importance_are_left_out(dtype: torch.dtype, monkeypatch: Any) -> None:
    """Of a matrix with few others; what is left is as if they had been worked on, by a bit."""
    known, found = [torch.zeros(9, 3), torch.zeros(4, 2), torch.rand(3, 3)], []
    known[0][[2, 7]] = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 3.0]])
    for skips in (True, False):
        if not skips:
            monkeypatch.setattr(pulls, "_known_rows", lambda importance: None)
        torch.manual_seed(0)
        own = [torch.nn.Parameter(torch.randn(f.shape).to(dtype)) for f in known]
        pull = WeightPull(own, [torch.randn(f.shape).to(dtype) for f in known], known)
        assert [len(start) for start in pull.starts] == ([2, 0, 3] if skips else [9, 4, 3])
        values = [pull.penalty()]
        for weight in own:
            weight.grad = torch.randn(weight.shape).to(dtype)
        pull.add_gradient(2.0)
        values += [weight.grad.clone() for weight in own if weight.grad is not None]
        with torch.no_grad():
            pull.move(3.0, dict.fromkeys(own, 0.1))
            pull.remember()
            for weight in own:
                weight.add_(1.0)
            pull.shorten(0.5)
        found.append([*values, *(weight.detach() for weight in own)])
    torch.testing.assert_close(found[0][0], found[1][0])  # a sum, in another order
    assert all(map(torch.equal, found[0][1:], found[1][1:]))


# ---- LoRA ----


def lora(seed: int = 0, **config: Any) -> Any:
    """A model with an adapter that has been trained a little."""
    torch.manual_seed(seed)
    model = get_peft_model(bert(), LoraConfig(target_modules=["query", "dense"], **config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.3)
    return model


def changes(model: Any) -> dict[str, torch.Tensor]:
    """The changes of the weights by the adapters, from their products."""
    return {e.name: e.scaling * (e.b @ e.a).detach() for e in HeldWeights.of(model).adapted}


@pytest.mark.parametrize("config", [{}, {"use_rslora": True, "r": 4}, {"lora_alpha": 32}])
@pytest.mark.parametrize("weighted", [True, False])
def test_lora_is_pulled_by_the_gradient_of_its_change(config: Any, weighted: bool) -> None:
    model = lora(**config)
    held = HeldWeights.of(model)
    starts = {name: value + 0.1 for name, value in held.now().items()}
    assert len(held.adapted) == 9 and not held.plain
    for each in held.adapted:
        known = torch.rand_like(each.weight) if weighted else None
        pull = LowRankPull(each, held.factors_of(each, starts), known)
        a0, b0 = held.factors_of(each, starts)
        change = each.scaling * (each.b @ each.a - b0 @ a0)
        penalty = ((1.0 if known is None else known) * change**2).sum() / 2
        torch.testing.assert_close(pull.penalty(), penalty.detach())
        each.a.grad, each.b.grad = torch.zeros_like(each.a), torch.zeros_like(each.b)
        pull.add_gradient(7.0)
        for factor, gradient in zip(
            (each.a, each.b), torch.autograd.grad(7.0 * penalty, (each.a, each.b)), strict=True
        ):
            torch.testing.assert_close(factor.grad, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("strength", [1e-2, 1.0, 1e2, 1e6])
@torch.no_grad()
def test_proximal_steps_of_lora_are_stable(strength: float, weighted: bool) -> None:
    model = lora()
    held = HeldWeights.of(model)
    starts = held.now()
    for factor in held.factors.values():
        factor.add_(torch.randn_like(factor))
    for each in held.adapted[:3]:
        known = torch.rand_like(each.weight) ** 4 if weighted else None
        pull = LowRankPull(each, held.factors_of(each, starts), known)
        seen = [float(pull.penalty())]
        for _ in range(30):
            pull.move(strength, {each.a: 1.0, each.b: 1.0})
            seen.append(float(pull.penalty()))
        assert all(later <= earlier * (1 + 1e-5) for earlier, later in pairwise(seen))
        assert seen[-1] < seen[0] * (0.2 if strength >= 1 else 1.0)


def test_a_small_proximal_step_of_lora_is_a_gradient_step() -> None:
    model = lora()
    held = HeldWeights.of(model)
    each = held.adapted[0]
    starts = {name: value + 0.1 for name, value in held.now().items()}
    pull = LowRankPull(each, held.factors_of(each, starts), torch.rand_like(each.weight))
    each.a.grad, each.b.grad = torch.zeros_like(each.a), torch.zeros_like(each.b)
    pull.add_gradient(1.0)
    before = each.a.detach().clone(), each.b.detach().clone()
    with torch.no_grad():
        pull.move(1.0, {each.a: 1e-4, each.b: 1e-4})
    for factor, old in zip((each.a, each.b), before, strict=True):
        torch.testing.assert_close(factor - old, -1e-4 * factor.grad, rtol=0.05, atol=2e-7)


@pytest.mark.parametrize("form", ["decoupled", "gradient"])
@pytest.mark.parametrize("source", [None, Fisher(rows(4, 2))])
def test_lora_stays_near_the_start(form: Any, source: Any, tmp_path: Path) -> None:
    moved = []
    for strength in (0.0, 3000.0 if form == "decoupled" else 30.0):
        model = lora()
        start = changes(model)
        consolidation = Consolidation(source, strength, form=form)
        trainer_of(model, tmp_path, consolidation, learning_rate=1e-2, max_steps=15).train()
        now = changes(model)
        known = None if source is None else fisher_diagonal(lora(), rows(4, 2), collate)
        moved.append(
            sum(
                float(((1.0 if known is None else known[n]) * (now[n] - start[n]) ** 2).sum())
                for n in now
            )
        )
    assert moved[1] < 0.5 * moved[0]


# ---- which weights, and where to ----


def test_a_new_head_is_left_free(tmp_path: Path) -> None:
    """Where all weights matter alike; an importance knows whether the head matters."""
    data = rows(4, 2)
    cases: list[tuple[Any, Mapping[str, Any], bool]] = [
        (None, {}, False),
        (None, {"skip": []}, True),
        (MAS(data), {}, True),
        (Fisher(data), {"skip": "classifier"}, False),
        (None, {"start": bert()}, True),
    ]
    for source, options, is_held in cases:
        model = bert()
        start = weights(model)
        held = Consolidation(source, 1e9, **options)
        trainer_of(model, tmp_path, held, learning_rate=1e-2).train()
        for name in ("classifier.weight", "bert.pooler.dense.bias"):
            gap = (model.state_dict()[name] - start[name]).abs().max()
            assert (gap < 1e-4) == (is_held or name.startswith("bert")), (source, options, name)


def test_frozen_weights_are_left_alone(tmp_path: Path) -> None:
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    consolidation = Consolidation(Fisher(rows(4, 2)), save_to=tmp_path / "ewc")
    trainer_of(model, tmp_path, consolidation).train()
    again = Consolidation(tmp_path / "ewc")
    trainer_of(model, tmp_path, again).train()
    model.bert.encoder.requires_grad_(False)
    with pytest.raises(ValueError, match=r"32 do not train in this one: bert\.encoder"):
        trainer_of(model, tmp_path, again).train()


def test_a_start_is_pulled_to(tmp_path: Path) -> None:
    start = bert(seed=1)
    named = {n: p.detach() for n, p in start.named_parameters() if not n.startswith("classifier")}
    for given in (start, named):
        model = bert()
        pulled = Consolidation(strength=1e7, start=given)
        trainer_of(model, tmp_path, pulled, learning_rate=1e-2, weight_decay=0.0).train()
        for name, value in named.items():
            torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-4)
        gap = (model.classifier.weight - start.classifier.weight).abs().max()
        assert (gap > 1e-3) == (given is named)


# ---- saved and resumed ----


def sources(folder: Path) -> dict[str, Any]:
    data = rows(4, 2)
    if not (folder / "ewc").exists():
        save_importance(folder / "ewc", fisher_diagonal(bert(), data, collate), bert())
    return {
        "l2": Consolidation(),
        "fisher": Consolidation(Fisher(data), form="gradient"),
        "rates": Consolidation(MAS(data), form="rates"),
        "si": Consolidation(SI(previous=folder / "ewc"), save_to=folder / "si"),
        "folder": Consolidation(folder / "ewc"),
    }


@pytest.mark.parametrize("source", ["l2", "fisher", "rates", "si", "folder"])
def test_a_resumed_run_is_the_same_bit_for_bit(source: str, tmp_path: Path) -> None:
    finals = []
    settings = dict(save_strategy="steps", save_steps=2, max_steps=5, learning_rate=1e-2)
    for stop in (None, 2):
        folder, model = tmp_path / str(stop), bert(dropout=True)
        trainer = trainer_of(model, folder, sources(tmp_path)[source], **settings)
        if stop is not None:
            trainer.add_callback(StopAt(stop))
            trainer.train()
            model = bert(dropout=True)
            trainer = trainer_of(model, folder, sources(tmp_path)[source], **settings)
        trainer.train(resume_from_checkpoint=None if stop is None else str(folder / "checkpoint-2"))
        saved = torch.load(folder / "checkpoint-4" / "adaptation_optimizer.pt")["adaptations"]
        finals.append((weights(model), saved["consolidation"]))
    assert same_bits(finals[0][0], finals[1][0])
    assert finals[0][1].keys() == finals[1][1].keys()
    if source == "si":
        assert same_bits(finals[0][1]["path"], finals[1][1]["path"])
    if source == "folder":
        assert finals[0][1].keys() == {"key"}, "what lies in a folder is not saved again"


def test_what_cannot_be_resumed(tmp_path: Path) -> None:
    settings = dict(save_strategy="steps", save_steps=2, max_steps=4)
    trainer_of(bert(), tmp_path / "plain", **settings).train()
    trainer = trainer_of(bert(), tmp_path, Consolidation(), **settings)
    with pytest.raises(ValueError, match="was saved without Consolidation"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-2"))
    known = sources(tmp_path)["folder"]
    trainer_of(bert(), tmp_path / "folder", known, **settings).train()
    save_importance(tmp_path / "ewc", fisher_diagonal(bert(), rows(4, 3), collate), bert())
    trainer = trainer_of(bert(), tmp_path, known, **settings)
    with pytest.raises(ValueError, match="has been written again since"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "folder" / "checkpoint-2"))
    trainer_of(bert(), tmp_path / "l2", Consolidation(), **settings).train()
    trainer = trainer_of(bert(), tmp_path, Consolidation(Fisher(rows(3, 1))), **settings)
    with pytest.raises(ValueError, match=r"another importance \(Fisher\) than it began with"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "l2" / "checkpoint-2"))


# ---- bad input ----


@pytest.mark.parametrize(
    "options, message",
    [
        ({"form": "loss"}, "form='loss' is unknown: use 'decoupled', 'gradient', 'rates'"),
        ({"strength": -1.0}, "strength=-1.0 must be a finite number >= 0"),
        ({"strength": float("nan")}, "strength=nan must be"),
        ({"importance": Fisher(rows(2, 1)), "form": "rates", "strength": 2.0}, ">= 0 and <= 1"),
        ({"form": "rates"}, "form='rates' needs an importance"),
        ({"save_to": "folder"}, "importance=None has none"),
        ({"importance": SI(), "start": {}}, "drop start="),
        ({"importance": Fisher}, r"got type: None .* Fisher\(rows\)"),
        ({"importance": rows(2, 1)}, "got Dataset"),
        ({"start": "bert-base"}, "start= is a str: expected a model"),
        ({"importance": "nowhere"}, "There is no nowhere"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        Consolidation(**options)


def test_an_importance_goes_with_the_model_into_adapters_and_back(tmp_path: Path) -> None:
    model = bert()
    adapt(
        trainer_of(model, tmp_path), Consolidation(Fisher(rows(4, 2)), save_to=tmp_path / "ewc")
    ).train()
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2)
    finals = []
    for resume in (None, str(tmp_path / "out" / "checkpoint-2")):
        torch.manual_seed(3)
        adapted = get_peft_model(copy.deepcopy(model), config)
        trainer = trainer_of(
            adapted, tmp_path / "out", max_steps=3, save_strategy="steps", save_steps=2
        )
        adapt(trainer, Consolidation(tmp_path / "ewc", 1e4)).train(resume_from_checkpoint=resume)
        finals.append(weights(adapted))
        entries = [e for e in trainer.state.log_history if "consolidation/penalty" in e]
        assert entries[-1]["consolidation/penalty"] > 0
    assert same_bits(*finals)


TEXTS = datasets.Dataset.from_dict({"text": ["good", "bad"], "labels": [0, 1]})


def test_what_does_not_fit_the_model_is_refused_before_training(tmp_path: Path) -> None:
    known = fisher_diagonal(bert(), rows(4, 2), collate)
    save_importance(tmp_path / "ewc", known, bert())
    wide, other = bert(num_labels=5), bert(seed=1)
    bad = {**known, "classifier.bias": -known["classifier.bias"]}
    cases: list[tuple[Any, Consolidation, str]] = [
        (other, Consolidation(tmp_path / "ewc"), r"another model: .* weights differ .*\(by up to"),
        (wide, Consolidation(tmp_path / "ewc"), r"has the shape .* skip=\[.*classifier\.weight"),
        (wide, Consolidation(start=bert()), r"start= has the shape \(3, 16\) .* skip="),
        (other, Consolidation(start={"w": torch.ones(2)}), "start= has none of the weights"),
        (other, Consolidation({"w": torch.ones(2)}), "1 do not train in this one: w"),
        (other, Consolidation(bad), "negative or not finite for classifier.bias"),
        (other, Consolidation(skip=".*"), "holds no weight"),
        (other, Consolidation(skip=["clasifier"]), r"skip=\['clasifier'\] names no weight"),
        (other, Consolidation(Fisher(TEXTS)), "reads tokenised rows"),
        (lora(), Consolidation(SI()), "SI follows single weights"),
        (
            get_peft_model(bert(), IA3Config(target_modules=["query"], feedforward_modules=[])),
            Consolidation(),
            "has a IA3 adapter",
        ),
        (
            get_peft_model(bert(), LoraConfig(target_modules=["word_embeddings"])),
            Consolidation(),
            r"Embedding that trains .*: expected one LoRA adapter on a linear layer",
        ),
    ]
    for model, consolidation, message in cases:
        trainer = trainer_of(model, tmp_path, consolidation)
        with pytest.raises(ValueError, match=message):
            trainer.train()
        assert trainer.state.global_step == 0
    skipping = Consolidation(tmp_path / "ewc", skip="classifier")
    fitting = bert(num_labels=5)
    fitting.load_state_dict(
        {n: v for n, v in weights(bert()).items() if "classifier" not in n}, strict=False
    )
    trainer_of(fitting, tmp_path, skipping).train()
