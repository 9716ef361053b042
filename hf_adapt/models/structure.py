"""The base model, the encoder and the feature module of a Hugging Face model."""

from __future__ import annotations

import difflib
from typing import cast

from torch import nn


def unwrapped_base(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, else the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    return cast(nn.Module, get_base_model()) if callable(get_base_model) else model


def is_a(model: nn.Module, endings: tuple[str, ...]) -> bool:
    """Whether the name of the model's class, or of a base class, has one of these endings."""
    return any(cls.__name__.endswith(endings) for cls in type(unwrapped_base(model)).__mro__)


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT's layers are in it; some of its releases leave `peft_config` when they merge."""
    return any(type(module).__module__.startswith("peft.") for module in model.modules())


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model has an encoder and a decoder."""
    return bool(
        getattr(getattr(unwrapped_base(model), "config", None), "is_encoder_decoder", False)
    )


def find_encoder(model: nn.Module) -> nn.Module | None:
    """The encoder of an encoder-decoder; None for other models, or if there is no access to it."""
    base = unwrapped_base(model)
    if is_encoder_decoder(base):
        # Some heads of transformers 4.57 do not pass it on.
        for owner in (base, getattr(base, "base_model", None)):
            get_encoder = getattr(owner, "get_encoder", None)
            if callable(get_encoder) and isinstance(encoder := get_encoder(), nn.Module):
                return encoder
    return None


def reader_of(model: nn.Module) -> nn.Module:
    """The module that reads the text: the encoder of an encoder-decoder, else the model itself.

    Raises:
        ValueError: If an encoder-decoder gives no access to its encoder.
    """
    base = unwrapped_base(model)
    if not is_encoder_decoder(base):
        return base
    if (encoder := find_encoder(base)) is not None:
        return encoder
    raise ValueError(f"{type(base).__name__} is an encoder-decoder without get_encoder().")


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
        ValueError: If there is no module of that name (similar names are listed), or no default.
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
    if (encoder := find_encoder(base)) is not None:
        return encoder
    headless = getattr(base, "base_model", None)
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
