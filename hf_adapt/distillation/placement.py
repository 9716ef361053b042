"""The devices of a teacher's weights and of its inputs."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_adapt.models.layers import find_stacks

if TYPE_CHECKING:
    from transformers import Trainer


def on_device_of(weight: torch.Tensor | None, value: Any) -> Any:
    """A tensor on the device of a weight, and in its dtype if it is floating-point."""
    if weight is None or not isinstance(value, torch.Tensor):
        return value
    return value.to(weight.device, weight.dtype if value.is_floating_point() else None)


def may_be_moved(model: nn.Module) -> bool:
    """Whether the model may be moved: not one on several devices or in 8 bits."""
    spread = getattr(model, "hf_device_map", None) or {}
    return len(set(spread.values())) <= 1 and getattr(model, "hf_quantizer", None) is None


def sharded_teacher(trainer: Trainer, model: nn.Module) -> nn.Module:
    """The teacher, sharded as the student is."""
    accelerator = trainer.accelerator
    if trainer.is_deepspeed_enabled:
        import deepspeed  # type: ignore[import-not-found]

        config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
        # An engine without an optimizer knows two stages: everything, or nothing sharded.
        if config["zero_optimization"]["stage"] != 3:
            config["zero_optimization"]["stage"] = 0
        for key in ("optimizer", "scheduler"):
            config.pop(key, None)
        engine, *_ = deepspeed.initialize(model=model, config=config)
        sharded: nn.Module = engine.eval()
        return sharded
    if trainer.is_fsdp_enabled:
        from torch.distributed.fsdp import fully_shard

        modules = dict(model.named_modules())
        for stack in find_stacks(model):
            for layer in stack.layers:
                fully_shard(modules[layer])
        model.to(trainer.args.device)
        # Embeddings and head stay whole: losses without whole logits read the head's weight.
        fully_shard(model, reshard_after_forward=False)
        return model
    raise ValueError(
        "ModelTeacher(shard=True) shards the teacher as the student is, but this run uses neither "
        "FSDP nor DeepSpeed. Drop it, or pass device_map='auto' to spread the teacher."
    )
