"""What every method must hold, one row of the table after the other."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertForSequenceClassification, Trainer

from hf_adapt import DANN, Adaptation, Distillation, Objective
from hf_adapt.unfreezing import GradualUnfreezing, Phase
from tests.helpers.distributed import Job, assert_same, logs, marks, results
from tests.helpers.methods import (
    COUPLED,
    METHODS,
    SUMS,
    assert_equal,
    make_trainer,
    state_of,
    target,
)
from tests.helpers.models import bert
from tests.helpers.trainers import (
    PLAIN_FILES,
    GradientRecorder,
    ScaledTrainer,
    cosine_and_ratio,
    same_bits,
    weights,
)

# ---- accumulation ----


def gradients(folder: Path, name: str, micro: int, steps: int, number: int) -> list[torch.Tensor]:
    """Those of optimizer steps that move nothing."""
    recorder, adaptations = GradientRecorder(), METHODS[name].make()
    for adaptation in adaptations:
        adaptation.learning_rate = 1e-12
    make_trainer(
        folder,
        adaptations,
        callbacks=[recorder],
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=steps,
        max_steps=number,
        max_grad_norm=0,
        learning_rate=0.0,
    ).train()
    assert recorder.gradients[0].abs().max() > 0
    return recorder.gradients


@pytest.mark.parametrize("name", SUMS)
def test_eight_micro_batches_of_one_row_are_one_of_eight(name: str, tmp_path: Path) -> None:
    (many,), (one,) = (gradients(tmp_path, name, *sizes, 1) for sizes in ((1, 8), (8, 1)))
    assert cosine_and_ratio(many, one) == pytest.approx((1.0, 1.0), abs=1e-5)


@pytest.mark.parametrize("name", COUPLED)
def test_a_step_is_the_mean_over_its_micro_batches(name: str, tmp_path: Path) -> None:
    """Of the same rows: which rows a row brings along depends on its number in the epoch."""
    (step,) = gradients(tmp_path, name, 4, 3, 1)
    alone = torch.stack(gradients(tmp_path, name, 4, 1, 3)).mean(0)
    assert (step - alone).norm() / alone.norm() < 1e-5


# ---- resume, target labels, the saved model ----


@dataclass
class Run:
    """What a run has left."""

    folder: Path
    model: dict[str, torch.Tensor]
    state: dict[str, Any]
    logs: list[dict[str, Any]]


def train(folder: Path, name: str, resume: Path | None = None, labels: int | None = None) -> Run:
    """Six steps of two micro-batches with dropout, a checkpoint after the third."""
    adaptations = METHODS[name].make()
    trainer = make_trainer(
        folder,
        adaptations,
        bert(dropout=True),
        target(labels),
        max_steps=6,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=3,
        seed=11,
    )
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return Run(folder, weights(trainer.model), state_of(adaptations), trainer.state.log_history)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """An uninterrupted run of a method, trained once."""
    return functools.cache(lambda name: train(tmp_path_factory.mktemp("whole"), name))


def assert_same_run(one: Run, other: Run) -> None:
    assert same_bits(one.model, other.model)
    assert_equal(one.state, other.state)
    for a, b in zip(one.logs[-4:-1], other.logs[-4:-1], strict=True):
        assert a == b


@pytest.mark.parametrize("name", METHODS)
def test_interrupted_and_resumed_is_uninterrupted(name: str, whole: Any, tmp_path: Path) -> None:
    run = whole(name)
    assert_same_run(run, train(tmp_path, name, resume=run.folder / "checkpoint-3"))


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.uses_target])
def test_target_labels_change_nothing(name: str, whole: Any, tmp_path: Path) -> None:
    assert_same_run(whole(name), train(tmp_path, name, labels=5))


@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_loads_plainly(name: str, whole: Any, caplog: Any) -> None:
    run = whole(name)
    folder = run.folder / "checkpoint-6"
    names = {path.name for path in folder.iterdir()}
    assert PLAIN_FILES <= names
    own = {"adaptation.safetensors", "adaptation_optimizer.pt", *METHODS[name].files}
    assert names - PLAIN_FILES <= own
    model, info = BertForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert not [record for record in caplog.records if record.name.startswith("transformers")]
    saved, corrected = weights(model), METHODS[name].corrects
    for key in corrected:
        assert not torch.equal(saved.pop(key), run.model[key])
    assert same_bits(saved, {k: v for k, v in run.model.items() if k not in corrected})


# ---- beside what else a run may have ----


def lora() -> Any:
    torch.manual_seed(3)
    return get_peft_model(
        bert(dropout=True), LoraConfig(task_type="SEQ_CLS", r=4, init_lora_weights=False)
    )


def beside(
    folder: Path,
    name: str,
    *others: Adaptation,
    model: Any = None,
    labels: str = "row",
    **settings: Any,
) -> Trainer:
    """Three steps whose loss is what its terms say; the term has reached the model."""
    make = METHODS[name].make if labels == "row" else METHODS[name].for_tokens
    adaptations = [*(make or METHODS[name].make)(), *others]
    model = bert(dropout=True) if model is None else model
    before = weights(model)
    settings |= {"gradient_accumulation_steps": 2, "labels": labels}
    trainer = make_trainer(folder, adaptations, model, **settings)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 3
    objectives = [a for a in adaptations if isinstance(a, Objective)]
    for step, entry in enumerate(entries):
        assert all(math.isfinite(v) for v in entry.values() if isinstance(v, float)), entry
        if any("/weight/" in key for key in entry):
            continue  # tasks are weighed, which their own tests check
        progress = step / 3
        share = math.prod(objective.base_weight(progress) for objective in objectives)
        loss = share * entry["loss/task"] + sum(
            objective.term_weight(progress) * entry[f"loss/{objective.name}"]
            for objective in objectives
        )
        streams = {n: s for a in adaptations for n, s in a.provided_streams().items()}
        loss += sum(float(s.weight) * entry[f"loss/{n}"] for n, s in streams.items())
        assert entry["loss"] == pytest.approx(loss, rel=1e-4, abs=2e-4)  # 4.57 rounds it
    after = weights(trainer.model)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert not same_bits(before, after)
    return trainer


SETTINGS: dict[str, dict[str, Any]] = {
    "bf16": {"bf16": True},
    "smoothing": {"label_smoothing_factor": 0.1},
    "checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", METHODS)
def test_beside_options_of_the_trainer(name: str, setting: str, tmp_path: Path) -> None:
    refusal = METHODS[name].refuses_checkpointing if setting == "checkpointing" else None
    if refusal is None:
        beside(tmp_path, name, **SETTINGS[setting])
        return
    with pytest.raises(ValueError, match=refusal):
        beside(tmp_path, name, **SETTINGS[setting])


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if not row.uses_target])
def test_a_loss_scale_changes_nothing(name: str, tmp_path: Path) -> None:
    """What works on weights and gradients sees them without the scale of fp16."""
    finals = []
    for cls in (Trainer, ScaledTrainer):
        adaptations = METHODS[name].make()
        # SGD: Adam turns the rounding of small gradients into whole steps.
        trainer = make_trainer(
            tmp_path, adaptations, cls=cls, max_steps=4, optim="sgd", learning_rate=0.1
        )
        trainer.train()
        finals.append(weights(trainer.model))
        logs = [e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e]
        finals[-1]["norms"] = torch.tensor(logs)
    for one, other in zip(*(final.values() for final in finals), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_beside_adapters(name: str, tmp_path: Path) -> None:
    model, refusal = lora(), METHODS[name].refuses_adapters
    if refusal is not None:
        with pytest.raises(ValueError, match=refusal):
            beside(tmp_path, name, model=model)
        return
    frozen = {k: v.clone() for k, v in model.named_parameters() if not v.requires_grad}
    trainer = beside(tmp_path, name, model=model)
    assert all(torch.equal(frozen[k], v) for k, v in model.named_parameters() if k in frozen)
    assert trainer.state.global_step == 3


@pytest.mark.parametrize("name", METHODS)
def test_beside_unfreezing(name: str, tmp_path: Path) -> None:
    """From the top, but for the embeddings; the head alone would not do where a method keeps it."""
    model = bert(dropout=True)
    before = weights(model)
    top = ["head", "layer.1"]
    phases = [Phase(0, top), Phase(1, [*top, "layer.0"])]
    beside(tmp_path, name, GradualUnfreezing(phases), model=model)
    for key, value in weights(model).items():
        stays = "embeddings" in key or key.startswith(METHODS[name].keeps)
        assert torch.equal(before[key], value) == stays, key


@pytest.mark.parametrize("name", METHODS)
def test_beside_distillation(name: str, tmp_path: Path) -> None:
    trainer = beside(tmp_path, name, Distillation(bert(seed=1)))
    assert trainer.state.log_history[0]["loss/distillation"] > 0


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if not row.uses_target])
def test_beside_an_adaptation_to_a_target(name: str, tmp_path: Path) -> None:
    trainer = beside(tmp_path, name, DANN(ramp=None, hidden_sizes=(8,)))
    assert trainer.state.log_history[0]["loss/dann"] > 0


@pytest.mark.parametrize("name", METHODS)
def test_on_heads_that_classify_tokens(name: str, tmp_path: Path) -> None:
    refusal = METHODS[name].refuses_tokens
    if refusal is None:
        beside(tmp_path, name, model=bert("token", dropout=True), labels="token")
        return
    with pytest.raises(ValueError, match=refusal):
        beside(tmp_path, name, model=bert("token", dropout=True), labels="token")


# ---- two processes ----

JOBS = {name: Job("tests.helpers.method_script", {"method": name}) for name in METHODS}


def distributed(test: Any) -> Any:
    for mark in marks:
        test = mark(test)
    return test


@distributed
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_are_one(
    name: str, two_processes: Path, one_process: Callable[[Job], Path]
) -> None:
    two, other = results(two_processes / name), results(two_processes / name, 1)
    assert two["gradient"].abs().max() > 0
    assert_same(two, other, rtol=0, atol=0)
    method = METHODS[name]
    if method.accumulation is None:
        return
    sizes = (8, 1) if method.accumulation == "rows" else (4, 2)
    alone = one_process(JOBS[name].alone(*sizes))
    one = results(alone)
    assert (one["gradient"] - two["gradient"]).norm() / one["gradient"].norm() < 1e-5
    assert_same(one, two, rtol=1e-4, atol=1e-6)
    for a, b in zip(logs(alone), logs(two_processes / name), strict=True):
        for key in (key for key in a if key.startswith("loss")):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-4), key
