"""The schedule against loops written by hand; frozen is frozen; resume; accumulation."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, get_linear_schedule_with_warmup

from hf_adapt import (
    DANN,
    LPFT,
    FreezeOnly,
    GradualUnfreezing,
    GradualUnfreezingCallback,
    Phase,
    Plateau,
    RandomLayers,
    Surgical,
    adapt,
    slanted_triangular,
)
from hf_adapt.unfreezing.freezing import INPUT_GRADIENT_HOOKS
from tests.helpers.data import collate, rows
from tests.helpers.models import FIVE, bert, llama
from tests.helpers.trainers import (
    GradientRecorder,
    StopAt,
    arguments,
    cosine_and_ratio,
    same_bits,
    weights,
)
from tests.helpers.unfreezing import STEPS, Watch, make, names_of

GROUPS = ["head", "layer.1", "layer.0", "embeddings"]  # of the tiny BERT, top first


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


# ---- resume ----


SCHEDULES: dict[str, Any] = {
    "gradual": lambda: GradualUnfreezingCallback(layer_decay=0.5, rewarm_steps=3),
    "random": lambda: GradualUnfreezingCallback(
        RandomLayers(num_layers=1, every_steps=2, always=["head"])
    ),
    "plateau": lambda: GradualUnfreezingCallback(Plateau("eval_loss", patience=1, min_delta=0.5)),
}


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_resume_is_bit_exact_in_a_phase_and_on_its_boundary(
    kind: str, step: int, tmp_path: Path
) -> None:
    """Two steps a phase: 1, 3 and 5 lie inside one, 2 and 4 on a boundary."""
    settings: dict[str, Any] = dict(
        save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=2
    )
    whole = make(tmp_path / "whole", bert(dropout=True), **settings)
    whole.add_callback(SCHEDULES[kind]())
    whole.train()
    first = make(tmp_path / "part", bert(dropout=True), **settings)
    first.add_callback(SCHEDULES[kind]())
    first.add_callback(StopAt(step))
    first.train()
    second = make(tmp_path / "part", bert(dropout=True), **settings)
    second.add_callback(SCHEDULES[kind]())
    second.train(resume_from_checkpoint=str(tmp_path / "part" / f"checkpoint-{step}"))
    assert second.state.global_step == whole.state.global_step == STEPS
    assert same_bits(weights(whole.model), weights(second.model))
    states = [t.optimizer.state_dict()["state"] for t in (whole, second)]
    assert states[0].keys() == states[1].keys()
    for key in states[0]:
        assert same_bits(states[0][key], states[1][key])
    logs = [
        [e["unfreezing/phase"] for e in t.state.log_history if "unfreezing/phase" in e]
        for t in (whole, second)
    ]
    assert logs[0] == logs[1] and len(set(logs[0])) > 1


def test_a_plateau_adds_a_group(tmp_path: Path) -> None:
    """With min_delta=9 nothing is an improvement but the first value: one group per evaluation."""
    trainer = make(tmp_path, eval_strategy="steps", eval_steps=1)
    callback = GradualUnfreezingCallback(Plateau("eval_loss", patience=2, min_delta=9.0))
    trainer.add_callback(callback)
    trainer.train()
    phases = [e["unfreezing/phase"] for e in trainer.state.log_history if "unfreezing/phase" in e]
    # The first evaluation is the best; the 2nd and 3rd are not better: phase 1 from step 3 on.
    assert phases == [0, 0, 0, 1, 1, 2, 2, 3]


def test_a_plateau_of_a_metric_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    trainer = make(tmp_path, eval_strategy="steps", eval_steps=1)
    trainer.add_callback(GradualUnfreezingCallback(Plateau("eval_f1")))
    with pytest.raises(ValueError, match=r"waits for 'eval_f1', .* It gave: .*eval_loss"):
        trainer.train()


def test_a_plateau_of_one_of_several_evaluation_sets(tmp_path: Path) -> None:
    trainer = make(tmp_path, eval_strategy="steps", eval_steps=1)
    trainer.eval_dataset = {"source": rows(6, 9), "target": rows(6, 8)}
    trainer.add_callback(GradualUnfreezingCallback(Plateau("eval_source_loss", min_delta=9.0)))
    trainer.train()
    phases = [e["unfreezing/phase"] for e in trainer.state.log_history if "unfreezing/phase" in e]
    assert phases == [0, 0, 1, 2, 3, 3, 3, 3]


@pytest.mark.parametrize(
    ("options", "phase", "says"),
    [({}, 1, True), ({"every_steps": 2}, 2, False), ({"every_epochs": 0.25}, 2, False)],
)
def test_resuming_to_more_steps_says_what_is_frozen_again(
    options: dict[str, Any], phase: int, says: bool, tmp_path: Path, caplog: Any
) -> None:
    """Shares of the run are shares of the longer one; steps and epochs stay where they were."""
    short: dict[str, Any] = dict(max_steps=6, save_strategy="steps", save_steps=3)
    first = make(tmp_path, **short)
    first.add_callback(GradualUnfreezingCallback(until="layer.0", **options))
    first.train()
    for number, steps, warns in ((6, 24, says), (3, 6, False)):
        caplog.clear()
        longer = make(tmp_path / "more", max_steps=steps)
        longer.add_callback(GradualUnfreezingCallback(until="layer.0", **options))
        longer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{number}"))
        assert ("freezes layer.1, layer.0 again" in caplog.text) == warns
        assert ("every_steps=" in caplog.text and "step 6 of 24" in caplog.text) == warns
        if steps == 24:
            log = [entry for entry in longer.state.log_history if entry["step"] == 7]
            assert log[0]["unfreezing/phase"] == (0 if says else phase)


def test_a_plateau_is_remembered_when_another_adaptation_joins_at_resume(tmp_path: Path) -> None:
    settings: dict[str, Any] = dict(
        save_strategy="steps", save_steps=4, eval_strategy="steps", eval_steps=1
    )
    phases = []
    for checkpoint in (None, str(tmp_path / "checkpoint-4")):
        trainer = make(tmp_path, **settings)
        trainer.add_callback(GradualUnfreezingCallback(Plateau("eval_loss", min_delta=9.0)))
        if checkpoint:
            adapt(trainer, DANN(hidden_sizes=(4,)), target_dataset=rows(8, 2, None, low=20))
        trainer.train(resume_from_checkpoint=checkpoint)
        log = trainer.state.log_history
        phases.append([e["unfreezing/phase"] for e in log if "unfreezing/phase" in e])
    assert phases[0] == phases[1]


def test_a_plateau_needs_evaluations(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.add_callback(GradualUnfreezingCallback(Plateau()))
    with pytest.raises(ValueError, match="eval_strategy"):
        trainer.train()


# ---- rates ----


def test_the_rate_of_each_group_is_logged_and_the_auxiliary_one_is_untouched(
    tmp_path: Path,
) -> None:
    """The discriminator follows the run's own schedule, whatever rate a layer has."""
    trainer = make(tmp_path, learning_rate=1e-3, lr_scheduler_type="linear")
    dann = DANN(hidden_sizes=(4,), learning_rate=0.01)
    adapt(trainer, dann, target_dataset=rows(8, 2, None, low=20))
    adapt(trainer, GradualUnfreezing(LPFT("50%"), layer_decay=0.5))
    auxiliary = []

    class Read(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            optimizer = trainer._adaptation_memory.optimizer.optimizer
            auxiliary.append(optimizer.param_groups[0]["lr"])

    trainer.add_callback(Read())
    trainer.train()
    for step in range(STEPS):
        base = 1 - step / STEPS
        entry = trainer.state.log_history[step]
        assert auxiliary[step] == pytest.approx(0.01 * base)
        for depth, group in enumerate(GROUPS):
            factor = 0.5**depth if depth == 0 or step >= STEPS // 2 else 0.0
            assert entry[f"learning_rate/{group}"] == pytest.approx(
                1e-3 * base * factor, rel=1e-3, abs=1e-12
            )
        assert "loss/dann" in entry and entry["unfreezing/phase"] == int(step >= STEPS // 2)


def test_the_slanted_triangle_takes_the_place_of_the_schedule(tmp_path: Path) -> None:
    rate = slanted_triangular(0.25)
    trainer = make(tmp_path, learning_rate=1e-3, warmup_steps=3, lr_scheduler_type="cosine")
    dann = DANN(hidden_sizes=(4,), learning_rate=0.01)
    adapt(trainer, dann, target_dataset=rows(8, 2, None, low=20))
    trainer.add_callback(GradualUnfreezingCallback(Surgical("layer.0"), rate_schedule=rate))
    trainer.train()
    for step in range(STEPS):
        entry = trainer.state.log_history[step]
        expected = pytest.approx(1e-3 * rate(step / STEPS), rel=1e-3)
        assert entry["learning_rate/layer.0"] == expected
        if FIVE:  # 4.57 logs the rate of the step to come
            assert entry["learning_rate"] == expected
    trainer.train()  # a second run makes its schedule anew
    assert trainer.state.log_history[0]["learning_rate/layer.0"] == pytest.approx(
        1e-3 * rate(0.0), rel=1e-3
    )


def test_two_schedules_are_refused(tmp_path: Path) -> None:
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    trainer = Trainer(
        model,
        arguments(tmp_path),
        train_dataset=rows(8, 1),
        data_collator=collate,
        optimizers=(optimizer, scheduler),
    )
    trainer.add_callback(GradualUnfreezingCallback(rate_schedule=slanted_triangular()))
    with pytest.raises(ValueError, match="a run has one"):
        trainer.train()


def test_importance_slows_a_group_down_and_1_freezes_it(tmp_path: Path) -> None:
    watch = Watch()
    trainer = make(tmp_path, callbacks=[watch], weight_decay=0.1)
    names = names_of(trainer.model)
    trainer.add_callback(
        GradualUnfreezingCallback(
            FreezeOnly("embeddings"),
            importance={"layer.0": 1.0, "layer.1": 0.75, "head": lambda progress: progress},
        )
    )
    trainer.train()
    assert not any(moved & set(names["layer.0"]) for moved in watch.moved)
    for step in range(STEPS):
        entry = trainer.state.log_history[step]
        base = entry["learning_rate/layer.1"] / 0.25
        assert entry["learning_rate/head"] == pytest.approx(base * (1 - step / STEPS), rel=1e-3)


# ---- composition ----


def test_with_lora_adapters_are_scheduled_layer_by_layer(tmp_path: Path) -> None:
    from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(bert(), LoraConfig(task_type="SEQ_CLS", r=2, init_lora_weights=False))
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    watch = Watch()
    trainer = make(tmp_path, model, callbacks=[watch], max_steps=6)
    trainer.add_callback(GradualUnfreezingCallback())
    trainer.train()
    grown = [watch.moved[i] for i in (0, 2, 4)]
    assert all("classifier" in name for name in grown[0]) and grown[0]
    assert all("classifier" in n or "layer.1." in n for n in grown[1])
    assert any("layer.1." in n for n in grown[1]) and any("layer.0." in n for n in grown[2])
    assert set().union(*watch.moved) == trainable
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    model.save_pretrained(tmp_path / "adapter")
    base = bert()
    base.save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "adapter", num_labels=3
    )
    assert same_bits(weights(model), weights(loaded))


def test_base_weights_under_lora_are_refused_with_the_way_out(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(bert(), LoraConfig(task_type="SEQ_CLS", r=2))
    trainer = make(tmp_path, model)
    trainer.add_callback(
        GradualUnfreezingCallback(
            groups={
                "embeddings": "base_model.model.bert.embeddings",
                "rest": ".*lora.*|.*classifier.*",
            }
        )
    )
    with pytest.raises(ValueError, match="modules_to_save"):
        trainer.train()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_changes_nothing_and_skips_the_prefix(
    checkpointing: bool, tmp_path: Path
) -> None:
    """With the hook on the embeddings, frozen layers would run again in the backward."""
    model = bert(num_hidden_layers=4, dropout=True)
    calls: list[bool] = []
    forward = model.bert.encoder.layer[0].attention.forward
    model.bert.encoder.layer[0].attention.forward = lambda *a, **k: (
        calls.append(torch.is_grad_enabled()),
        forward(*a, **k),
    )[1]
    settings = {"gradient_checkpointing": True} if checkpointing else {}
    trainer = make(tmp_path, model, max_steps=4, **settings)
    schedule = [Phase(0, ["head", "layer.3"]), Phase(2, r".*")]
    trainer.add_callback(GradualUnfreezingCallback(schedule))
    at_step = []

    class Count(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            at_step.append(len(calls))

    trainer.add_callback(Count())
    trainer.train()
    probe = at_step[0] - 1  # the engine looks at the first batch once or twice
    per_step = [at_step[0] - probe, *(b - a for a, b in itertools.pairwise(at_step))]
    assert per_step == ([1, 1, 2, 2] if checkpointing else [1, 1, 1, 1])
    if not checkpointing:
        return
    hooks = [h.__name__ for m in model.modules() for h in m._forward_hooks.values()]
    if FIVE:  # 4.57 puts the hook on under PEFT only
        assert set(hooks) & set(INPUT_GRADIENT_HOOKS), "given back after the run"
    plain = make(tmp_path, bert(num_hidden_layers=4, dropout=True), max_steps=4)
    plain.add_callback(GradualUnfreezingCallback(schedule))
    plain.train()
    for name, value in weights(plain.model).items():
        torch.testing.assert_close(value, weights(model)[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("by_hand", [False, True])
def test_checkpointed_layers_above_a_frozen_bottom_are_trained(
    by_hand: bool, reentrant: bool | None, tmp_path: Path
) -> None:
    """The reentrant form, transformers 4's default, would silently give them no gradient."""
    kwargs = None if reentrant is None else {"use_reentrant": reentrant}
    model = bert()
    settings: dict[str, Any] = {}
    if by_hand:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        model.enable_input_require_grads()
    else:
        settings = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
    watch = Watch()
    trainer = make(tmp_path, model, callbacks=[watch], max_steps=2, **settings)
    names = names_of(model)
    trainer.add_callback(GradualUnfreezingCallback(FreezeOnly("embeddings")))
    trainer.train()
    moved = set().union(*watch.moved)
    layers = {n for g in ("layer.0", "layer.1") for n in names[g]}
    assert layers - moved <= {n for n in layers if n.endswith("key.bias")}
    plain = make(tmp_path, bert(), max_steps=2)
    plain.add_callback(GradualUnfreezingCallback(FreezeOnly("embeddings")))
    plain.train()
    for name, value in weights(plain.model).items():
        torch.testing.assert_close(value, weights(model)[name], rtol=1e-5, atol=1e-6)


def test_dropout_beside_adapters_that_train_stays_live(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(bert(num_hidden_layers=3), LoraConfig(task_type="SEQ_CLS", r=2))
    layers = model.base_model.model.bert.encoder.layer
    seen: dict[int, set[bool]] = {0: set(), 2: set()}
    for number in seen:
        dropout = layers[number].output.dropout
        dropout.register_forward_pre_hook(
            lambda module, args, n=number: (
                seen[n].add(module.training) if torch.is_grad_enabled() else None
            )
        )
    trainer = make(tmp_path, model, max_steps=2)
    trainer.add_callback(GradualUnfreezingCallback(FreezeOnly("layer.0"), frozen_dropout=False))
    trainer.train()
    assert seen == {0: {False}, 2: {True}}


# ---- batch norm and dropout of frozen parts ----


class Normed(nn.Module):
    """Two blocks with batch norm and dropout, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)) for _ in range(2)]
        )
        self.head = nn.Linear(4, 3)
        self.dropped: list[float] = []

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        hidden = inputs
        for number, block in enumerate(self.blocks):
            hidden = block(hidden)
            if number == 0 and self.training and torch.is_grad_enabled():
                self.dropped.append(float((hidden == 0).float().mean()))
        logits = self.head(hidden)
        loss = nn.functional.cross_entropy(logits, labels) if labels is not None else None
        return {"loss": loss, "logits": logits}


def vectors() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [{"inputs": torch.randn(4, generator=generator) + 3, "labels": i % 3} for i in range(32)]


@pytest.mark.parametrize(
    ("options", "statistics_move", "drops"),
    [
        ({}, False, True),
        ({"frozen_batch_norm": False}, True, True),
        ({"frozen_dropout": False}, False, False),
    ],
)
def test_batch_norm_and_dropout_of_frozen_parts(
    options: dict[str, bool], statistics_move: bool, drops: bool, tmp_path: Path
) -> None:
    model = Normed()
    before = weights(model)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=vectors())
    schedule = FreezeOnly("layer.0")
    trainer.add_callback(GradualUnfreezingCallback(schedule, **options))
    trainer.train()
    after = weights(model)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert ("blocks.0.1.running_mean" in moved) == statistics_move
    assert "blocks.1.1.running_mean" in moved, "what trains follows the data"
    assert not moved & {"blocks.0.0.weight", "blocks.0.1.weight"}
    assert (max(model.dropped) > 0.2) == drops
    assert all(module.training == model.training for module in model.modules())


# ---- what a run leaves behind ----


def test_a_run_leaves_no_trace(tmp_path: Path) -> None:
    trainer = make(tmp_path, gradient_checkpointing=True)
    trainer.add_callback(GradualUnfreezingCallback(until="layer.1"))
    trainer.train()
    assert all(p.requires_grad for p in trainer.model.parameters())
    assert len(trainer.optimizer.param_groups) == 2
    assert trainer.args.ddp_find_unused_parameters is None
    assert trainer._adaptation_run is None


def test_a_failed_run_leaves_no_trace(tmp_path: Path) -> None:
    class Fail(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                raise RuntimeError("interrupted")

    trainer = make(tmp_path)
    trainer.add_callback(GradualUnfreezingCallback(LPFT()))
    trainer.add_callback(Fail())
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer.train()
    assert all(p.requires_grad for p in trainer.model.parameters())
    assert len(trainer.optimizer.param_groups) == 2


def test_the_author_s_own_frozen_parameters_stay_frozen(tmp_path: Path) -> None:
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    watch = Watch()
    trainer = make(tmp_path, model, callbacks=[watch], weight_decay=0.1)
    trainer.add_callback(GradualUnfreezingCallback())
    trainer.train()
    assert not any("embeddings" in name for moved in watch.moved for name in moved)
    assert not any(p.requires_grad for p in model.bert.embeddings.parameters())


@pytest.mark.skipif(not FIVE, reason="the plain Trainer of 4.57 is not bit-exact on resume")
def test_a_checkpoint_is_the_plain_trainer_s(tmp_path: Path) -> None:
    """Same files, same optimizer groups: a plain Trainer goes on from it."""
    trainer = make(tmp_path, save_strategy="steps", save_steps=4)
    trainer.add_callback(GradualUnfreezingCallback(layer_decay=0.5))
    trainer.train()
    plain = make(tmp_path / "plain", bert(), save_strategy="steps", save_steps=4)
    plain.train()
    names = [
        {p.name for p in (folder / "checkpoint-4").iterdir()}
        for folder in (tmp_path, tmp_path / "plain")
    ]
    assert names[0] == names[1]
    plain = make(tmp_path / "plain", bert())
    plain.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert plain.state.global_step == STEPS


def test_a_second_run_starts_anew(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.add_callback(GradualUnfreezingCallback())
    for _ in range(2):
        trainer.train()
        phases = [entry["unfreezing/phase"] for entry in trainer.state.log_history[:STEPS]]
        assert phases == [0, 0, 1, 1, 2, 2, 3, 3]


# ---- refusals ----


def test_a_parameter_missing_from_the_optimizer_is_named(tmp_path: Path) -> None:
    """Frozen when the optimizer was made: the classic silent failure."""
    model = bert()
    model.bert.requires_grad_(False)
    trainer = make(tmp_path, model)
    trainer.create_optimizer()
    model.bert.requires_grad_(True)
    trainer.add_callback(GradualUnfreezingCallback())
    with pytest.raises(ValueError, match=r"trains bert\.embeddings.* and \d+ more, but the opt"):
        trainer.train()


@pytest.mark.parametrize(
    ("make_callback", "message"),
    [
        (lambda: GradualUnfreezingCallback(every_steps=3), r"beyond the last of the run's 8"),
        (lambda: GradualUnfreezingCallback(every_epochs=2), r"beyond the last of the run's 8"),
        (lambda: GradualUnfreezingCallback([Phase(8, "head")]), "first phase starts at 8"),
        (lambda: GradualUnfreezingCallback([Phase(0, "hed")]), "Did you mean 'head'"),
        (lambda: GradualUnfreezingCallback([Phase(0, [])]), "trains no group"),
        (
            lambda: GradualUnfreezingCallback([Phase(0, "head"), Phase(5, ".*"), Phase(2, "head")]),
            "in the order in which they start",
        ),
        (lambda: GradualUnfreezingCallback([Phase(0, "head"), Phase("plateau", ".*")]), "no `plat"),
        (
            lambda: GradualUnfreezingCallback(
                [Phase(0, "head"), Phase("plateau", ".*"), Phase(5, "head")]
            ),
            "comes after one that waits for a plateau",
        ),
        (lambda: GradualUnfreezingCallback(groups={"a": ".*", "b": "bert"}), "'a' and 'b' both"),
        (lambda: GradualUnfreezingCallback(groups={"a": "bert"}), r"in no group: 'classifier"),
        (lambda: GradualUnfreezingCallback(groups={"a": "bret"}), "matches no"),
        (
            lambda: GradualUnfreezingCallback(Surgical("layer.0"), rates={"layer.0": 0.0}),
            "nothing would learn",
        ),
    ],
)
def test_bad_input_is_refused_before_training(
    make_callback: Any, message: str, tmp_path: Path
) -> None:
    watch = Watch()
    trainer = make(tmp_path, callbacks=[watch])
    trainer.add_callback(make_callback())
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert not watch.moved
    assert all(p.requires_grad for p in trainer.model.parameters())


def test_two_schedules_of_what_is_frozen_are_refused(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.add_callback(GradualUnfreezingCallback())
    adapt(trainer, GradualUnfreezing(LPFT(), name="other"))
    with pytest.raises(ValueError, match="both decide what is frozen"):
        trainer.train()


def test_rates_that_an_optimizer_would_ignore_are_refused(tmp_path: Path) -> None:
    from transformers.optimization import Adafactor, AdafactorSchedule

    def build(**options: Any) -> Trainer:
        trainer = make(tmp_path)
        trainer.optimizer = Adafactor(trainer.model.parameters())  # relative_step=True
        trainer.lr_scheduler = AdafactorSchedule(trainer.optimizer)
        trainer.add_callback(GradualUnfreezingCallback(**options))
        return trainer

    build().train()  # freezing alone is fine
    with pytest.raises(ValueError, match="makes its own learning rates"):
        build(layer_decay=0.5).train()


@pytest.mark.parametrize(
    ("make_callback", "error", "message"),
    [
        (lambda: GradualUnfreezingCallback([]), ValueError, "schedule is empty"),
        (lambda: GradualUnfreezingCallback([3]), TypeError, r"list of Phase\(at, train\); got int"),
        (lambda: GradualUnfreezingCallback(5), TypeError, r"list of Phase\(at, train\); got int"),
        (lambda: GradualUnfreezingCallback(every_step=5), TypeError, "no option every_step"),
        (
            lambda: GradualUnfreezingCallback(LPFT(), every_steps=5),
            ValueError,
            "every_steps belong to the default schedule",
        ),
        (lambda: GradualUnfreezingCallback(rewarm_steps=-1), ValueError, "must be 0 or more"),
        (
            lambda: GradualUnfreezingCallback(cache_frozen_prefix=True, frozen_dropout=True),
            ValueError,
            "Drop frozen_dropout=True",
        ),
        (lambda: GradualUnfreezingCallback("nowhere.yaml"), FileNotFoundError, "nowhere.yaml"),
    ],
)
def test_contradictions_are_refused_at_once(
    make_callback: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_callback()
