"""The schedule against loops written by hand; frozen is frozen; accumulation."""

from pathlib import Path

import pytest
import torch
from transformers import get_linear_schedule_with_warmup

from hf_adapt import GradualUnfreezingCallback
from hf_adapt.unfreezing import RandomLayers
from tests.helpers.models import bert, llama
from tests.helpers.trainers import (
    GradientRecorder,
    cosine_and_ratio,
    weights,
)
from tests.helpers.unfreezing import GROUPS, STEPS, Watch, make, names_of


def expected_groups(step: int) -> set[str]:
    """Four groups over eight steps: one more every two."""
    return set(GROUPS[: step // 2 + 1])


# ---- the arithmetic ----


def test_a_run_is_the_loop_written_by_hand(tmp_path: Path) -> None:
    """Freezing, decayed rates, re-warm-up, clipping, weight decay that spares biases and norms."""
    trainer = make(tmp_path, weight_decay=0.1, optim="adamw_torch", warmup_steps=2)
    reference = bert()
    trainer.add_callback(GradualUnfreezingCallback(layer_decay=0.5, rewarm_steps=3))
    batches = []
    original = trainer.training_step
    trainer.training_step = lambda m, i, *a: (batches.append(dict(i)), original(m, i, *a))[1]
    trainer.train()

    groups = names_of(reference)
    named = dict(reference.named_parameters())
    decayed = set(trainer.get_decay_parameter_names(reference))
    assert 0 < len(decayed) < len(named)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p], "weight_decay": 0.1 if n in decayed else 0.0, "name": n}
            for n, p in named.items()
        ],
        lr=1e-3,
    )
    scheduler = get_linear_schedule_with_warmup(optimizer, 2, STEPS)
    reference.train()
    for step, batch in enumerate(batches):
        rates = [group["lr"] for group in optimizer.param_groups]
        for depth, group in enumerate(GROUPS):
            trains = depth <= step // 2
            warm = min(1.0, (step - 2 * depth + 1) / 3) if depth else 1.0
            for name in groups[group]:
                named[name].requires_grad_(trains)
                for part in optimizer.param_groups:
                    if part["name"] == name:
                        part["lr"] *= 0.5**depth * warm
        optimizer.zero_grad()
        reference(**batch).loss.backward()
        trained = [p for p in reference.parameters() if p.grad is not None]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        for part, rate in zip(optimizer.param_groups, rates, strict=True):
            part["lr"] = rate
        scheduler.step()
    found, wanted = weights(trainer.model), weights(reference)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-7)
    start = weights(bert())
    assert all(not torch.equal(found[name], start[name]) for name in named)


OPTIMIZERS = {
    "adamw_torch": dict(optim="adamw_torch", weight_decay=0.1),
    "adamw_torch_fused": dict(optim="adamw_torch_fused", weight_decay=0.1),
    "adafactor": dict(optim="adafactor", weight_decay=0.1),
    "momentum": dict(optim="sgd", optim_args="momentum=0.9", weight_decay=0.1),
    "rmsprop": dict(optim="rmsprop", optim_args="momentum=0.9", weight_decay=0.1),
    "nadam": dict(optim="adamw_torch", weight_decay=0.1, lr_scheduler_type="cosine"),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_frozen_does_not_move_by_a_bit_and_unfrozen_is_trained(kind: str, tmp_path: Path) -> None:
    settings = dict(OPTIMIZERS[kind])
    if kind == "momentum":
        settings.pop("optim_args")
    watch = Watch()
    model = bert(dropout=True)
    names = names_of(model)
    # Random layers freeze again what has momentum and decay behind it: the hard case.
    schedule = RandomLayers(num_layers=1, every_steps=1, always=["head"])
    trainer = make(tmp_path, model, callbacks=[watch], **settings)
    if kind == "momentum":
        parts = [{"params": list(model.parameters()), "weight_decay": 0.1}]
        trainer.optimizer = torch.optim.SGD(parts, lr=0.1, momentum=0.9)
    trainer.add_callback(GradualUnfreezingCallback(schedule))
    trainer.train()
    phases = [e["unfreezing/trainable_parameters"] for e in trainer.state.log_history[:STEPS]]
    assert len(watch.moved) == STEPS
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    seen = set()
    for moved, number in zip(watch.moved, phases, strict=True):
        layers = [g for g in ("layer.0", "layer.1") if moved & set(names[g])]
        assert len(layers) == 1
        seen.add(layers[0])
        allowed = {*names["head"], *names[layers[0]]}
        assert moved <= allowed
        assert sum(sizes[n] for n in allowed) == number
        still = allowed - moved
        # A key's bias has no gradient but rounding: softmax does not see it.
        assert all(n.endswith("key.bias") for n in still), still
    assert seen == {"layer.0", "layer.1"}, "both must have rested after having trained"


def test_each_phase_trains_what_it_says(tmp_path: Path) -> None:
    watch = Watch()
    trainer = make(tmp_path, callbacks=[watch], weight_decay=0.1)
    names = names_of(trainer.model)
    trainer.add_callback(GradualUnfreezingCallback())
    trainer.train()
    for step, moved in enumerate(watch.moved):
        groups = {group for group, members in names.items() if moved & set(members)}
        assert groups == expected_groups(step)
        number = trainer.state.log_history[step]["unfreezing/trainable_parameters"]
        assert number == sum(
            p.numel()
            for n, p in trainer.model.named_parameters()
            if any(n in names[g] for g in expected_groups(step))
        )


@pytest.mark.parametrize("head", ["sequence", "token", "lm"])
def test_one_batch_of_8_is_8_batches_of_1(head: str, tmp_path: Path) -> None:
    """Also through the transitions: they happen only between optimizer steps."""
    found = []
    for size, steps in ((8, 1), (1, 8)):
        recorder = GradientRecorder()
        trainer = make(
            tmp_path,
            llama() if head == "lm" else bert(head),
            labels={"sequence": "row", "token": "token", "lm": "lm"}[head],
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=4,
            adam_epsilon=1e-3,
            callbacks=[recorder],
        )
        trainer.add_callback(GradualUnfreezingCallback(layer_decay=0.7))
        # What is frozen at the time of recording has no gradient; all count as zero.
        recorder.model = None
        trainer.train()
        found.append(recorder.gradients)
    sizes = [gradient.numel() for gradient in found[0]]
    assert sizes == sorted(sizes) and len(set(sizes)) == 4, "a transition in each step"
    for one, other in zip(*found, strict=True):
        cosine, ratio = cosine_and_ratio(one, other)
        assert cosine > 0.99999 and ratio == pytest.approx(1.0, abs=1e-3)
