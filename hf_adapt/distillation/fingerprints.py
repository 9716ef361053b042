"""Hashes by which a cache recognises a teacher, a tokenizer and a row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hf_adapt.distillation.signals import tensor_bytes
from hf_adapt.models.structure import unwrapped_base
from hf_adapt.storage.row_store import row_keys

WITHOUT_EFFECT = (
    "architectures",
    "dtype",  # the dtype of each weight is hashed
    "problem_type",  # models set it when they see labels
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
"""Settings that change when a model is saved or used, and do not change its predictions."""


def teacher_fingerprint(module: nn.Module | None) -> str | None:
    """A hash of a teacher's weights, class and settings; None where there is no model."""
    if module is None:
        return None
    digest = hashlib.blake2b(digest_size=12)
    digest.update(type(module).__name__.encode())
    config = getattr(unwrapped_base(module), "config", None)
    settings: dict[str, Any] = getattr(config, "to_diff_dict", dict)()
    # What weights do not show: the number of heads, the window, the base of rotations, ...
    digest.update(json.dumps(_with_effect(settings), sort_keys=True, default=str).encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(tensor_bytes(value))
    return digest.hexdigest()


def _with_effect(settings: Mapping[Any, Any]) -> dict[str, Any]:
    """The settings, at all depths, that may change a prediction."""
    return {
        str(key): _with_effect(value) if isinstance(value, Mapping) else value
        for key, value in settings.items()
        if key not in WITHOUT_EFFECT and not str(key).startswith("_")
    }


def sampled_fingerprint(module: nn.Module) -> str:
    """A fast hash of a sample of a model's weights."""
    digest = hashlib.blake2b(digest_size=12)
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        if not value.is_meta:  # offloaded
            flat = value.detach().flatten()
            digest.update(tensor_bytes(flat[:: max(1, flat.numel() // 64)]))
    return digest.hexdigest()


def tokenizer_fingerprint(processing_class: Any) -> str | None:
    """A hash of a tokenizer's vocabulary and rules; None where there is no tokenizer."""
    backend = getattr(processing_class, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        for state_of_last_call in ("padding", "truncation"):
            rules.pop(state_of_last_call, None)
    elif hasattr(processing_class, "get_vocab"):
        rules = {"class": type(processing_class).__name__, "vocab": processing_class.get_vocab()}
    else:
        return None
    content = json.dumps(rules, sort_keys=True).encode()
    return hashlib.blake2b(content, digest_size=12).hexdigest()


def item_keys(teacher_inputs: Mapping[str, Any], mask: torch.Tensor) -> list[bytes]:
    """A hash of each row's inputs and of which of its items are distilled.

    Args:
        teacher_inputs: The teacher's inputs.
        mask: (B,) or (B, T), the items that are distilled.
    """
    size = len(mask)
    mask = mask.cpu()
    tensors = {
        key: value.cpu()
        for key, value in teacher_inputs.items()
        if isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == size
    }
    decoder = {key: tensors.pop(key) for key in list(tensors) if key.startswith("decoder_")}
    # Absent means 0, so a student that takes no segments finds what was stored with them.
    segments = tensors.pop("token_type_ids", None)
    attention = tensors.get("attention_mask")
    if mask.ndim == 2 and attention is not None and attention.shape == mask.shape and not decoder:
        tensors["item_mask"] = mask
        mask = mask.any(1)
    keys, spans = row_keys(tensors)
    whole = []
    for row, key in enumerate(keys):
        digest = hashlib.blake2b(key, digest_size=16)
        if mask.ndim == 1 and not bool(mask[row]):
            digest.update(b"not distilled")
        if mask.ndim == 2:  # what follows the last item has no influence on it
            chosen = mask[row].nonzero().flatten()
            end = int(chosen[-1]) + 1 if len(chosen) else 0
            for name in sorted(decoder):
                digest.update(name.encode() + tensor_bytes(decoder[name][row, :end]))
            digest.update(tensor_bytes(mask[row, :end]))
        if segments is not None and bool(segments[row].any()):
            low, high = spans[row] if spans is not None else (0, segments.shape[1])
            digest.update(b"token_type_ids" + tensor_bytes(segments[row, low:high]))
        whole.append(digest.digest())
    return whole
