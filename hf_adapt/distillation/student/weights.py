"""The weights of a student: each tensor is the teacher's, of the layers that are kept."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_adapt.distillation.student.width import HEAD_SIZE, Widths, leading_slice
from hf_adapt.models.layers import Stack

# What may differ between a layer and its copy: the index, stochastic depth, T5's block 0.
_MAY_DIFFER = re.compile(
    r"idx|index|layer_id|layer_num|training|drop|relative_attention_bias|checkpointing"
)


def drop_absent(model: nn.Module, student: nn.Module) -> None:
    """Drop modules that the teacher was built without, such as with `add_pooling_layer=False`."""
    for path, module in student.named_modules():
        try:
            original = model.get_submodule(path)
        except AttributeError:
            continue
        for name, _ in list(module.named_children()):
            if getattr(original, name, module) is None:
                setattr(module, name, None)


def original_modules(
    model: nn.Module,
    student: nn.Module,
    stacks: Sequence[Stack],
    kept: Mapping[str, Sequence[int]],
) -> dict[str, str]:
    """The teacher's module for each module of the student: the layers and the lists beside them.

    Lists beside the layers shrink with them: XLM's norms, the box heads of a DETR.
    """
    table: dict[str, str] = {}
    lists = {n: m for n, m in student.named_modules() if isinstance(m, nn.ModuleList)}
    for path in {**lists, **{stack.path: None for stack in stacks}}:
        try:
            original = model.get_submodule(path)
        except AttributeError:
            continue  # inside a layer that only this index has
        names, old = list(student.get_submodule(path)._modules), list(original._modules)
        fitting = [
            s for s in stacks if (len(old), len(names)) == (len(s.layers), len(kept[s.tower]))
        ]
        if len(names) == len(old) or not fitting:
            continue  # a list that changed without a tower is found by the shapes
        nearest = max(fitting, key=lambda s: _common(s.path, path))
        for name, index in zip(names, kept[nearest.tower], strict=True):
            table[f"{path}.{name}"] = f"{path}.{old[index]}"
    return table


def _common(one: str, other: str) -> int:
    """How many leading parts two names share."""
    same = [a == b for a, b in zip(one.split("."), other.split("."), strict=False)]
    return [*same, False].index(False)


def _original(name: str, table: Mapping[str, str]) -> str:
    parts = name.split(".")
    for end in range(1, len(parts)):
        prefix = ".".join(parts[:end])
        if prefix in table:
            return ".".join([table[prefix], *parts[end:]])
    return name


def check_alike(
    model: nn.Module,
    student: nn.Module,
    stacks: Sequence[Stack],
    kept: Mapping[str, Sequence[int]],
    narrowed: bool,
) -> None:
    """Refuse a student whose layers would compute something else with the same weights.

    Some patterns depend on the index (a full attention every third layer, no norm in layer 0); if
    the config cannot express them at the new indices, the student would be wrong silently.
    """
    for stack in stacks:
        names = student.get_submodule(stack.path)._modules
        for index, name in zip(kept[stack.tower], names, strict=True):
            pair = (
                student.get_submodule(f"{stack.path}.{name}".strip(".")),
                model.get_submodule(stack.layers[index]),
            )
            ours, theirs = (_traits(layer, narrowed) for layer in pair)
            for key in sorted(ours.keys() | theirs.keys()):
                if ours.get(key) != theirs.get(key):
                    raise ValueError(
                        f"Layer {index} of the teacher cannot be layer {name} of a student: its "
                        f"{key!r} would be {ours.get(key)!r} instead of {theirs.get(key)!r}, as "
                        f"{type(model).__name__} derives it from the index. Keep other layers (all "
                        "up to this one, or every n-th in step with the pattern)."
                    )


def _traits(layer: nn.Module, narrowed: bool) -> dict[str, object]:
    """The class and plain attributes of each module of a layer: what it computes with weights."""
    found: dict[str, object] = {}
    for path, module in layer.named_modules():
        if _MAY_DIFFER.search(path):
            continue
        found[path] = type(module).__name__
        for name, value in vars(module).items():
            plain = isinstance(value, int | float | str | tuple | None)
            sized = narrowed and not HEAD_SIZE.search(name)
            if plain and not name.startswith("_") and not _MAY_DIFFER.search(name) and not sized:
                found[f"{path}.{name}".strip(".")] = value
        if getattr(module, "scale_attn_by_inverse_layer_idx", False):  # GPT-2
            found[f"{path}.layer_idx"] = getattr(module, "layer_idx", None)
    return found


def fill(
    model: PreTrainedModel, student: PreTrainedModel, table: Mapping[str, str], widths: Widths
) -> None:
    """Give each tensor of the student the teacher's values, dtype and device."""
    state = model.state_dict()
    given = state | dict(model.named_buffers())  # those too that are not saved
    own = student.state_dict(keep_vars=True)
    used: set[str] = set()
    filled: dict[int, torch.Tensor] = {}
    buffers = dict(student.named_buffers())
    narrowed = widths != Widths()
    for name, tensor in {**buffers, **own}.items():
        source = _original(name, table)
        # What only the first layer has (T5's relative positions) is taken from the first layer.
        source = source if source in given else name
        if source not in given:
            raise ValueError(
                f"The teacher {type(model).__name__} has no weight for the student's {name!r}: its "
                "class builds more from the config than the teacher has. Build the teacher with "
                "the default arguments of its class."
            )
        used.add(source)
        if narrowed and not (name in own and (tensor.requires_grad or name in buffers)):
            continue  # follows from the width: sinusoidal positions, Gemma's scale of embeddings
        if name in own or given[source].shape == tensor.shape:
            values = leading_slice(name, given[source], tensor.shape, widths)
            first = filled.setdefault(id(tensor), values)
            if first is not values and not torch.equal(first, values):
                raise ValueError(
                    f"The student ties {name!r} to another weight, as its config says, but the "
                    "teacher's two differ. Set `model.config.tie_word_embeddings = False`."
                )
            tensor.data = values.detach().to(model.device, copy=True)
    kept = tuple(f"{place}." for place in table.values())
    lost = [name for name in state if name.startswith(kept) and name not in used] if kept else []
    if lost:
        raise ValueError(
            f"The student has no place for {len(lost)} weights of the layers kept, such as "
            f"{lost[0]!r}: layers of {type(model).__name__} differ by index. Keep other layers."
        )
