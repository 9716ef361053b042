"""What may be cached: which models, which layers, and how a layer hands on its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_adapt.models.layers import Stack, find_stacks
from hf_adapt.models.structure import is_encoder_decoder

if TYPE_CHECKING:
    from transformers import Trainer


def wrapper_of(output: Any) -> Callable[[torch.Tensor], Any] | None:
    """How a layer wraps its hidden state, to do it again; None if it hands on other tensors."""
    if isinstance(output, torch.Tensor):
        return lambda hidden: hidden
    if isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor):
        rest = output[1:]
        if not any(isinstance(item, torch.Tensor) for item in rest):
            return lambda hidden: (hidden, *rest)
    return None


def skipping_forward(
    wrap: Callable[[torch.Tensor], Any], value: torch.Tensor | None
) -> Callable[..., Any]:
    """A forward that gives `value`, or hands its input on."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        if value is not None:
            return wrap(value)
        return wrap(args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()))))

    return forward


def why_not_kept(
    hidden: torch.Tensor, formats: Sequence[Any], rows: int, before: Any, after: Any
) -> str | None:
    """Why the output of a prefix cannot be kept, if so."""
    if hidden.requires_grad:
        return "something that trains lies below the frozen layers (a prompt, tied embeddings?)"
    if any(wrap is None for wrap in formats):
        return "its layers hand on more than a hidden state (a position bias, attention weights)"
    if hidden.ndim < 3 or len(hidden) != rows:
        return f"its output of shape {tuple(hidden.shape)} is not one entry per row of the batch"
    if not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
        return "it draws random numbers (dropout that evaluation mode does not turn off)"
    return None


def random_states() -> list[torch.Tensor]:
    """The states of torch's random streams."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states.append(torch.cuda.get_rng_state())
    return states


def output_tensors(output: Any) -> list[torch.Tensor]:
    """The floating-point tensors of a model's output, in float32."""
    values = output.values() if isinstance(output, Mapping) else output
    values = [values] if isinstance(values, torch.Tensor) else values
    return [v.float() for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]


def hooked_module(layers: Sequence[nn.Module]) -> str | None:
    """A module of the prefix, its output aside, that somebody has put a forward hook on."""
    for number, layer in enumerate(layers):
        for name, module in layer.named_modules():
            if number == len(layers) - 1 and not name:
                continue
            own = [h for h in module._forward_hooks.values() if not _of_transformers(h)]
            if own:
                return f"layer {number}" + (f" ({name})" if name else "")
    return None


def _of_transformers(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("transformers.")


def cacheable_stack(trainer: Trainer, model: nn.Module) -> Stack:
    """The stack whose lower layers can be cached.

    Raises:
        ValueError: If the model or the run can have no cached prefix.
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
            "cache_frozen_prefix does not work with FSDP, whose processes must all gather the same "
            "layers. Use DDP, or drop cache_frozen_prefix."
        )
    if trainer.args.torch_compile:
        raise ValueError(
            "cache_frozen_prefix changes which layers run from batch to batch, which "
            "torch_compile=True cannot follow. Drop one of the two."
        )
    return stacks[0]
