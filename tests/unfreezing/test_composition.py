"""Unfreezing with adapters, gradient checkpointing, batch norm and dropout."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_adapt import GradualUnfreezingCallback
from hf_adapt.unfreezing import FreezeOnly, Phase
from hf_adapt.unfreezing.freezer import INPUT_GRADIENT_HOOKS
from tests.helpers.models import FIVE, bert
from tests.helpers.trainers import (
    arguments,
    same_bits,
    weights,
)
from tests.helpers.unfreezing import Watch, make, names_of


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
