"""The depth of a student: which layers are kept, and the setting of the config that says so."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedModel

from hf_adapt.models.layers import Stack

Layers = int | Sequence[int]
"""The number of layers to keep, or their indices."""

_DEPTH = re.compile(r"layers?$|depth$")
# Lists with an entry for each layer; by name, for a list of convolutions may be just as long.
_PER_LAYER = re.compile(r"layer_types$|^attention_layers$|^no_rope_layers$|^attention_window$")


class DepthSetting(NamedTuple):
    """The attribute of a config, or of a config inside it, that holds the depth of a tower."""

    owner: tuple[str, ...]
    attribute: str

    def config(self, root: PretrainedConfig) -> Any:
        """The config that owns the attribute, inside the model's config."""
        for name in self.owner:
            root = getattr(root, name)
        return root


def shared_depth(config: PretrainedConfig) -> int:
    """The depth of a model whose layers share one set of weights (ALBERT), else 0."""
    if getattr(config, "num_hidden_groups", 0) == 1:
        return int(config.num_hidden_layers)
    return 0


def kept_layers(
    name: str,
    depths: Mapping[str, int],
    layers: Layers | Mapping[str, Layers],
    tower: str | None,
) -> dict[str, Sequence[int]]:
    """The indices of the layers that are kept, for each tower."""
    if not depths:
        raise ValueError(
            f"{name} has no stack of layers (no ModuleList of alike layers), so there are no "
            "layers to drop. Build the student by hand."
        )
    if not isinstance(layers, Mapping):
        layers = dict.fromkeys(depths if tower is None else [tower], layers)
    elif tower is not None:
        raise ValueError("Give a mapping of layers or `tower`, not both.")
    unknown = [t for t in layers if t not in depths]
    if unknown or not layers:
        raise ValueError(
            f"{name} has no tower {', '.join(map(repr, unknown))}. Its towers: "
            + ", ".join(f"{t!r} ({depth} layers)" for t, depth in depths.items())
            + ". Name one of them."
        )
    return {
        t: _indices(layers[t], depth, f" of {t}" if t else "") if t in layers else range(depth)
        for t, depth in depths.items()
    }


def _indices(layers: Layers, depth: int, of: str) -> Sequence[int]:
    if isinstance(layers, bool | str) or not isinstance(layers, int | Sequence):
        raise TypeError(
            f"Expected a number of layers or a sequence of their indices, got {layers!r}."
        )
    if isinstance(layers, int):
        if not 1 <= layers <= depth:
            raise ValueError(f"Expected 1 to {depth} layers{of} (the teacher's), got {layers}.")
        # Halves are rounded up in integers: Python's `round` goes to the even neighbour.
        gaps = max(layers - 1, 1)
        return [(2 * i * (depth - 1) + gaps) // (2 * gaps) for i in range(layers)]
    chosen = list(layers)
    increasing = all(low < high for low, high in itertools.pairwise(chosen))
    if not chosen or not increasing or chosen[0] < 0 or chosen[-1] >= depth:
        raise ValueError(
            f"Expected increasing indices of layers{of} from 0 to {depth - 1}, at least one, got "
            f"{chosen}. Leave out repeated ones, sort them, and count from 0."
        )
    return chosen


def shallower(
    model: PreTrainedModel, stacks: Sequence[Stack], kept: Mapping[str, Sequence[int]]
) -> PretrainedConfig:
    """The config with fewer layers, whose model has the requested depths."""
    config = copy.deepcopy(model.config)
    for stack in stacks:
        if len(kept[stack.tower]) < len(stack.layers):
            setting = find_depth_setting(model, config, stacks, stack, kept[stack.tower])
            config = _resized(config, setting, kept[stack.tower], len(stack.layers))
    return config


def find_depth_setting(
    model: PreTrainedModel,
    config: PretrainedConfig,
    stacks: Sequence[Stack],
    stack: Stack,
    kept: Sequence[int],
) -> DepthSetting:
    """Find by trial the setting of the depth of one tower and of no other.

    Names differ between architectures, and some are only mirrors of another. Built on the meta
    device from the config as it would be saved, a trial costs no memory and proves the round trip.
    """
    depth = len(stack.layers)
    try:
        expected = _depths(type(model), config, stacks) | {stack.tower: len(kept)}
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot be built again from its config, as the student must be "
            f"({type(error).__name__}: {error}). Keep all that its constructor needs in the config."
        ) from error
    for setting in _settings(config, depth):
        try:
            found = _depths(type(model), _resized(config, setting, kept, depth), stacks)
        except Exception:  # a config that its class refuses, in whatever way, is the wrong one
            continue
        if found == expected:
            return setting
    tower = f" of the tower {stack.tower!r}" if stack.tower else ""
    raise ValueError(
        f"{type(model).__name__} cannot have {len(kept)} of its {depth} layers{tower}: no setting "
        f"of {type(config).__name__} changes the length of {stack.path!r} alone. Its layers are "
        "stages, or follow from a list of sizes. Name the towers to shrink "
        '(`layers={"decoder": 3}`), or build the student by hand.'
    )


def _settings(
    config: PretrainedConfig, depth: int, owner: tuple[str, ...] = ()
) -> Iterator[DepthSetting]:
    for name, value in integer_settings(config):
        if value == depth and _DEPTH.search(name):
            yield DepthSetting(owner, name)
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield from _settings(value, depth, (*owner, name))


def _depths(
    cls: type[PreTrainedModel], config: PretrainedConfig, stacks: Sequence[Stack]
) -> dict[str, int]:
    with torch.device("meta"):
        model = cls(type(config).from_dict(copy.deepcopy(config.to_dict())))
    return {s.tower: len(model.get_submodule(s.path)._modules) for s in stacks}


def _resized(
    config: PretrainedConfig, setting: DepthSetting, kept: Sequence[int], depth: int
) -> PretrainedConfig:
    """A copy with the new depth; lists with an entry for each layer keep those of the kept ones."""
    config = copy.deepcopy(config)
    owner = setting.config(config)
    for name, value in list(vars(owner).items()):
        if isinstance(value, list | tuple) and len(value) == depth and _PER_LAYER.search(name):
            setattr(owner, name, [value[i] for i in kept])
    setattr(owner, setting.attribute, len(kept))
    # BART's family keeps a second count, which transformers 4 writes into config.json.
    if setting.attribute == "encoder_layers" and "num_hidden_layers" in vars(owner):
        owner.num_hidden_layers = len(kept)
    stages = getattr(owner, "stage_names", None) or ()
    if len(stages) == depth + 1:  # what a backbone returns: the stem or a layer, by its number
        places = {0: 0, depth: len(kept)} | {old + 1: new + 1 for new, old in enumerate(kept)}
        old_indices = list(owner.out_indices)
        owner.stage_names = stages[: len(kept) + 1]
        owner.out_indices = [places[index % (depth + 1)] for index in old_indices]
    if "attention_layers" in vars(owner):  # GPT-Neo's shorthand, which is what a load reads
        owner.attention_types = [[[kind], 1] for kind in owner.attention_layers]
    return config


def integer_settings(config: PretrainedConfig) -> Iterator[tuple[str, int]]:
    """The settings of a config that are integers."""
    yield from ((key, value) for key, value in vars(config).items() if type(value) is int)
