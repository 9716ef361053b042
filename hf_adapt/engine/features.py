"""Hidden states of a named layer of any model, and pooling that honours the mask."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
from torch import nn

Pooling = (
    Literal["auto", "mean", "cls", "last", "tokens"]
    | Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
)


def unwrapped_base(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, else the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    return cast(nn.Module, get_base_model()) if callable(get_base_model) else model


def find_feature_module(model: nn.Module, feature_layer: str | None) -> nn.Module:
    """The module whose output is the feature.

    Args:
        model: The unwrapped model (a PEFT model is looked through).
        feature_layer: A dotted module name, or None for the base model without its head: the
            encoder of an encoder-decoder, the first module of a sentence-transformer, the base
            model in a cross-encoder.

    Returns:
        The module to hook.

    Raises:
        ValueError: If there is no module of that name (near names are listed), or no default.
    """
    base = unwrapped_base(model)
    if feature_layer is not None:
        for root in (model, base):
            modules: dict[str, nn.Module] = dict(root.named_modules())
            if feature_layer in modules:
                return modules[feature_layer]
        names = [name for name, _ in base.named_modules() if name]
        near = difflib.get_close_matches(feature_layer, names, n=5, cutoff=0.3)
        raise ValueError(
            f"feature_layer={feature_layer!r} is not a module of {type(base).__name__}. "
            f"Near names: {', '.join(near) or 'none'}. "
            "`[name for name, _ in model.named_modules()]` lists them all."
        )
    headless = getattr(base, "base_model", None)
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        for owner in (base, headless):  # some heads of transformers 4.57 do not pass it on
            get_encoder = getattr(owner, "get_encoder", None)
            if callable(get_encoder) and isinstance(encoder := get_encoder(), nn.Module):
                return encoder
    if isinstance(headless, nn.Module) and headless is not base:
        return headless
    if any(cls.__name__ == "CrossEncoder" for cls in type(base).__mro__):
        return find_feature_module(cast(nn.Module, base.model), None)
    if isinstance(base, nn.Sequential) and len(base) > 0:  # sentence-transformers
        return base[0]
    raise ValueError(
        f"{type(base).__name__} has no base model without a head, so the feature layer must be "
        "named: pass feature_layer='...' with a module of the model, for example one of "
        f"{', '.join([name for name, _ in base.named_children()][:8])}."
    )


def hidden_state(output: Any) -> torch.Tensor | None:
    """The hidden state in a module's output, whatever form the output has."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, Mapping):
        for key in ("last_hidden_state", "token_embeddings", "sentence_embedding"):
            if isinstance(value := output.get(key), torch.Tensor):
                return value
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        for value in output:
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                return value
    return None


def hidden_and_mask(output: Any) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """The hidden state in a module's output, and the mask where the output holds one.

    A sentence-transformer's inputs have a mask per text column; its modules hand on the one that
    belongs to what they give.
    """
    if (hidden := hidden_state(output)) is None:
        return None
    mask = output.get("attention_mask") if isinstance(output, Mapping) else None
    return hidden, mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None


def _with_mask(
    hidden: torch.Tensor, mask: torch.Tensor | None, given: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The mask of the output, else the one its module was called with, where it fits."""
    if mask is None and isinstance(given, torch.Tensor) and given.shape == hidden.shape[:2]:
        mask = given
    return hidden, mask


class FeatureTap:
    """Keeps the outputs of one module while it is told to record.

    Gradient checkpointing runs the module once more during the backward, and evaluation runs it
    too: neither is seen, because recording is on only while a training loss is computed. Nor is a
    forward without gradients inside a loss that is trained (a teacher, a virtual adversary).
    """

    def __init__(self, module: nn.Module, extract: Callable[[Any], Any] = hidden_and_mask) -> None:
        self._extract = extract
        self._handle = module.register_forward_hook(self._hook, with_kwargs=True)
        self._recording = self._with_gradient = False
        self.captured: list[Any] = []

    def record(self) -> None:
        """Start anew; gradients are on or off throughout what is recorded, as they are now."""
        self.captured = []
        self._recording, self._with_gradient = True, torch.is_grad_enabled()

    def stop(self) -> None:
        """Record no more."""
        self._recording = False

    def _hook(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self._recording and torch.is_grad_enabled() == self._with_gradient:
            value = self._extract(output)
            if value is not None and self._extract is hidden_and_mask:
                hidden, mask = value
                value = _with_mask(hidden, mask, kwargs.get("attention_mask"))
            if value is not None:
                self.captured.append(value)

    def take(self) -> list[Any]:
        """What was captured, handed over: the tap is empty afterwards."""
        captured, self.captured = self.captured, []
        return captured

    def remove(self) -> None:
        """Take the hook off the module."""
        self._handle.remove()


def without_virtual_tokens(hidden: torch.Tensor, length: int, model: nn.Module) -> torch.Tensor:
    """A hidden state at the rows' own tokens, without those of a learned prompt before them.

    Args:
        hidden: (B, T, D); (B, V + T, D) under PEFT's prompt tuning and p-tuning.
        length: Number of the rows' own tokens, T.
        model: The model, asked for V.

    Shape:
        - output: (B, T, D).
    """
    configs = getattr(model, "peft_config", None) or {}
    active = getattr(model, "active_adapter", None)
    config = configs.get(active) if isinstance(active, str) and isinstance(configs, dict) else None
    extra = hidden.shape[1] - length
    if not getattr(config, "is_prompt_learning", False) or extra <= 0:
        return hidden
    return hidden[:, extra:] if extra == getattr(config, "num_virtual_tokens", 0) else hidden


def token_mask(
    hidden: torch.Tensor, attention_mask: torch.Tensor | None, model: nn.Module
) -> torch.Tensor:
    """Which positions of a hidden state are real, as (B, T) bool.

    Args:
        hidden: (B, T, D).
        attention_mask: (B, T) with 1 on real positions, or None if all are; for an audio model
            (B, samples), reduced to frames by the model's own rule.
        model: The model, asked for that rule.

    Raises:
        ValueError: If the mask does not fit the hidden state.
    """
    if attention_mask is None or attention_mask.ndim != 2:
        return hidden.new_ones(hidden.shape[:2], dtype=torch.bool)
    if attention_mask.shape == hidden.shape[:2]:
        return attention_mask.bool()
    reduce = getattr(unwrapped_base(model), "_get_feature_vector_attention_mask", None)
    if callable(reduce):  # audio: frames are fewer than samples
        return torch.as_tensor(reduce(hidden.shape[1], attention_mask)).bool()
    raise ValueError(
        f"The attention mask has shape {tuple(attention_mask.shape)} but the feature layer's "
        f"output is {tuple(hidden.shape)}: expected (B, T) and (B, T, D). Pass a callable "
        "pooling=, or a feature_layer whose output follows the tokens."
    )


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """Make one feature per row (or per token) of a hidden state, in float32.

    Args:
        hidden: (B, T, D); (B, D) is taken as pooled already, (B, C, H, W) as a feature map,
            which is averaged over H and W.
        mask: (B, T) bool, true on real positions. Padding on either side is honoured.
        pooling: `"mean"`, `"cls"` (first real token), `"last"` (last real token), `"tokens"`, or
            a callable `(hidden, mask) -> (B, D)`.

    Shape:
        - output: (B, D), or (number of real tokens, D) for `"tokens"`.

    Raises:
        ValueError: If `pooling` is unknown or the hidden state has another number of dimensions.

    Example:
        >>> hidden = torch.tensor([[[1.0], [3.0], [9.0]]])
        >>> mask = torch.tensor([[True, True, False]])
        >>> [pool(hidden, mask, how).tolist() for how in ("mean", "last", "tokens")]
        [[[2.0]], [[3.0]], [[1.0], [3.0]]]
    """
    hidden = hidden.float()
    if callable(pooling):
        return pooling(hidden, mask)
    if pooling not in ("mean", "cls", "last", "tokens"):
        raise ValueError(
            f"pooling={pooling!r} is unknown: use 'auto', 'mean', 'cls', 'last', 'tokens' or a "
            "callable (hidden, mask) -> (B, D)."
        )
    if hidden.ndim == 2:
        return hidden
    if hidden.ndim == 4:
        return hidden.mean(dim=(2, 3))
    if hidden.ndim != 3:
        raise ValueError(
            f"The feature layer's output has shape {tuple(hidden.shape)}; expected (B, D), "
            "(B, T, D) or (B, C, H, W). Pass a callable pooling=(hidden, mask) -> (B, D)."
        )
    if pooling == "mean":
        real = mask.unsqueeze(-1)
        return hidden.masked_fill(~real, 0.0).sum(1) / real.sum(1).clamp(min=1)
    if pooling == "tokens":
        return hidden[mask]
    order = mask.int() if pooling == "cls" else mask.flip(1).int()
    first = order.argmax(dim=1)
    index = first if pooling == "cls" else mask.shape[1] - 1 - first
    return hidden[torch.arange(len(hidden), device=hidden.device), index]
