"""Checks of whether the frozen layers of a model can be cached."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_adapt.models.layers import Stack, find_stacks
from hf_adapt.models.structure import is_encoder_decoder
from hf_adapt.unfreezing.prefix.layers import PrefixOutput

if TYPE_CHECKING:
    from transformers import Trainer


def why_not_cached(output: PrefixOutput, rows: int) -> str | None:
    """Why the output of a prefix cannot be cached; None if it can.

    Args:
        output: What the layers returned for a batch.
        rows: Number of rows in the batch.
    """
    hidden = output.hidden
    assert hidden is not None
    if _reaches_parameter(hidden):
        return "something that trains lies below the frozen layers (a prompt, tied embeddings?)"
    if None in output.wrappers:
        return "its layers hand on more than a hidden state (a position bias, attention weights)"
    if hidden.ndim < 3 or len(hidden) != rows:
        return f"its output of shape {tuple(hidden.shape)} is not one entry per row of the batch"
    states = zip(output.random_before, output.random_after, strict=True)
    if not all(torch.equal(before, after) for before, after in states):
        return "it draws random numbers (dropout that evaluation mode does not turn off)"
    return None


def _reaches_parameter(output: torch.Tensor) -> bool:
    """Whether a gradient flows from a tensor to a parameter, not only to perturbed embeddings."""
    nodes, seen = [output.grad_fn], set[Any]()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(getattr(node, "variable", None), nn.Parameter):
            return True
        nodes += [following for following, _ in node.next_functions]
    return False


def output_tensors(output: Any) -> list[torch.Tensor]:
    """The floating-point tensors of a model's output, in float32."""
    values = output.values() if isinstance(output, Mapping) else output
    values = [values] if isinstance(values, torch.Tensor) else values
    return [v.float() for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]


def hooked_module(layers: Sequence[nn.Module]) -> str | None:
    """A module inside the prefix that has a forward hook, other than those of transformers."""
    for number, layer in enumerate(layers):
        for name, module in layer.named_modules():
            if number == len(layers) - 1 and not name:
                continue
            if any(not _is_of_transformers(hook) for hook in module._forward_hooks.values()):
                return f"layer {number}" + (f" ({name})" if name else "")
    return None


def hooks_of(modules: Collection[nn.Module]) -> set[int]:
    """The ids of the hooks on the forward of modules."""
    return {
        number
        for module in modules
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for number in hooks
    }


def modules_within(model: nn.Module, parameters: Collection[int]) -> set[nn.Module]:
    """The modules that have only parameters with these ids, and all that is inside of them."""
    found, wanted = set[nn.Module](), set(parameters)
    for module in model.modules():
        own = {id(p) for p in module.parameters()}
        if own and own <= wanted:
            found.update(module.modules())
    return found


def _is_of_transformers(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("transformers.")


def cacheable_stack(trainer: Trainer, model: nn.Module) -> Stack:
    """The stack whose lower layers can be cached.

    Raises:
        ValueError: If the prefix of this model, or in this run, cannot be cached.
    """
    stacks = find_stacks(model)
    if len(stacks) != 1 and not is_encoder_decoder(model):
        raise ValueError(
            f"cache_frozen_prefix needs a model with one stack of layers, or an encoder–decoder; "
            f"{type(model).__name__} has {len(stacks)}: {', '.join(s.path for s in stacks)}. Drop "
            "cache_frozen_prefix."
        )
    if trainer.is_fsdp_enabled:
        raise ValueError(
            "cache_frozen_prefix is not supported with FSDP, whose processes must all gather the "
            "same layers. Use DDP, or drop cache_frozen_prefix."
        )
    if trainer.args.torch_compile:
        raise ValueError(
            "cache_frozen_prefix changes which layers run from batch to batch, which "
            "torch_compile=True cannot follow. Drop one of the two."
        )
    return stacks[0]
