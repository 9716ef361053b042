"""The width of a student: the settings of its config, and the slices of the teacher's tensors."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from hf_adapt.distillation.student.depth import (
    DepthSetting,
    find_depth_setting,
    integer_settings,
    shared_depth,
)
from hf_adapt.models.layers import Stack

_HEADS = re.compile(r"heads?$")
HEAD_SIZE = re.compile(r"^((attention_)?head_(dim|size)|d_kv|d_head|dim_head)$")
_INNER = re.compile(r"^(\w*intermediate_size|\w*ffn_dim|ffn_hidden_size|hidden_dim|d_ff|d_inner)$")
# Widths that most checkpoints set to the hidden size; then they follow it.
_FOLLOWERS = ("word_embed_proj_dim", "output_hidden_size", "embedding_size", "pooler_hidden_size")
_FUSED = re.compile(r"kv|KV|query_key|c_attn|in_proj|gate_up|weights_in|Wi$|fused|packed")
# Projections that lie one after the other in one tensor: how many, or those of query, key, value.
# 1: they are fused within each head, so that the leading rows are the leading heads.
_BLOCKS: Mapping[str, Mapping[str, int]] = {
    "gpt2": {"crossattention.c_attn": 2, ".attn.c_attn": 3},
    "modernbert": {"Wqkv": 3, "Wi": 2},
    "phi3": {"qkv_proj": -1, "gate_up_proj": 2},
    "gpt_neox": {"query_key_value": 1},
    "bloom": {"query_key_value": 1},
}
_UNKNOWN = (
    "No rule tells which part of the teacher's {0!r} of shape {1} the student's {2} is: it holds "
    "several things at once (a fused projection, groups of a convolution, entries by layer). "
    "Leave out `hidden_size`, or build the student by hand."
)


@dataclass(frozen=True)
class Widths:
    """How the dimensions of a narrower student relate to its teacher's."""

    pairs: frozenset[tuple[int, int]] = frozenset()
    qkv: tuple[tuple[int, int], ...] = ()
    blocks: Mapping[str, int] = field(default_factory=dict)
    transposed: bool = False


def narrow(
    model: PreTrainedModel,
    config: PretrainedConfig,
    stacks: Sequence[Stack],
    hidden_size: int,
    tower: str | None,
) -> Widths:
    """Set the width in `config`; return how each dimension changes."""
    place = _width_owner(model, stacks, tower)
    owner = DepthSetting(place, "").config(config)
    name = owner.attribute_map.get("hidden_size", "hidden_size")
    heads = _heads(type(model).__name__, owner, getattr(owner, name, None), hidden_size)
    given = [v for k, v in integer_settings(owner) if HEAD_SIZE.search(k)]
    old = int(getattr(owner, name))
    size = given[0] if given else old // max(heads.values())
    pairs = {(old, hidden_size)}
    for key, value in list(integer_settings(owner)):
        if key in heads or _INNER.search(key) or (key in _FOLLOWERS and value == old):
            new = value * hidden_size // old
            setattr(owner, key, new)
            pairs |= {(value, new), (value * size, new * size)} if key in heads else {(value, new)}
    if not any(_INNER.search(key) for key, _ in integer_settings(owner)):
        pairs.add((4 * old, 4 * hidden_size))  # GPT-2 and BLOOM
    setattr(owner, name, hidden_size)
    before = DepthSetting(place, "").config(model.config)
    names = ("num_attention_heads", *["num_key_value_heads"] * 2)
    counts = [(getattr(before, h, 0), getattr(owner, h, 0)) for h in names]
    qkv = tuple((was * size, now * size) for was, now in counts)
    kind = owner.model_type
    return Widths(frozenset(pairs), qkv, _BLOCKS.get(kind, {}), transposed=kind == "gpt2")


def _heads(model: str, owner: PretrainedConfig, width: Any, hidden_size: int) -> dict[str, int]:
    """The numbers of heads, if they stay integers at the new width."""
    # One key/value head serves all heads, however many; other numbers must stay in proportion.
    heads = {k: v for k, v in integer_settings(owner) if _HEADS.search(k) and v > 1}
    heads = {k: v for k, v in heads.items() if not HEAD_SIZE.search(k)}
    if type(width) is not int or not heads:
        raise ValueError(
            f"{model} has no heads to drop (width {width}, heads: {heads or 'none'}), so no "
            "narrower student follows from it. Leave out `hidden_size`."
        )
    unit = width // math.gcd(width, *heads.values())
    if not 0 < hidden_size <= width or hidden_size % unit:
        raise ValueError(
            f"hidden_size={hidden_size} does not fit {model}: expected a multiple of {unit} up to "
            f"its own {width}, so that its heads ({heads}) keep their size and proportion. Choose "
            "such a width, or none."
        )
    return heads


def _width_owner(
    model: PreTrainedModel, stacks: Sequence[Stack], tower: str | None
) -> tuple[str, ...]:
    """The config that holds the width of the chosen towers."""
    if shared_depth(model.config):
        return ()
    owners = {}
    for stack in stacks:
        fewer = range(len(stack.layers) - 1) or range(2)
        owners[stack.tower] = find_depth_setting(model, model.config, stacks, stack, fewer).owner
    chosen = set(owners.values()) if tower is None else {owners[tower]}
    if len(chosen) > 1:
        raise ValueError(
            f"The towers {', '.join(map(repr, owners))} have widths of their own. Name the one to "
            "make narrower with `tower=`, one at a time."
        )
    place = chosen.pop()
    together = [t for t, owner in owners.items() if owner == place]
    if tower is not None and together != [tower]:
        raise ValueError(
            f"The towers {', '.join(map(repr, together))} share one width. Leave out `tower=` and "
            'name the layers to keep instead: `layers={"encoder": 3}`.'
        )
    return place


def leading_slice(
    name: str, values: torch.Tensor, shape: Sequence[int], widths: Widths
) -> torch.Tensor:
    """The leading slice of a teacher's tensor, of each projection in it."""
    if values.shape == shape:
        return values
    module = name.rpartition(".")[0] or name
    blocks = next((n for end, n in widths.blocks.items() if module.endswith(end)), None)
    unknown = _UNKNOWN.format(name, tuple(values.shape), tuple(shape))
    if values.ndim != len(shape) or (blocks is None and _FUSED.search(module)):
        raise ValueError(unknown)
    # Outputs are the rows of a projection; the columns of GPT-2's Conv1D, which is transposed.
    output = values.ndim - 1 if widths.transposed else 0
    for dim, (old, new) in enumerate(zip(values.shape, shape, strict=True)):
        parts = [(old, new)]
        if blocks and dim == output:
            parts = [(old // blocks, new // blocks)] * blocks if blocks > 0 else list(widths.qkv)
        total = tuple(map(sum, zip(*parts, strict=True)))
        if total != (old, new) or not all(p[0] == p[1] or p in widths.pairs for p in parts):
            # Query, key and value of each head in turn: three times a known width.
            if blocks != 1 or old % 3 or (old // 3, new // 3) not in widths.pairs:
                raise ValueError(unknown)
        starts = itertools.accumulate((was for was, _ in parts), initial=0)
        pieces = [values.narrow(dim, at, now) for at, (_, now) in zip(starts, parts, strict=False)]
        values = torch.cat(pieces, dim)
    return values
