"""The stacks of layers in a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

_List = nn.ModuleList | nn.Sequential


_INPUT_CONVOLUTION = re.compile(r"embed|feature_extractor|conv_layers")


@dataclass(frozen=True)
class Stack:
    """A list of layers that follow one another.

    Args:
        path: Module name of the list, such as `"bert.encoder.layer"`.
        tower: `""` if the model has one stack, else a short name that is unique among its stacks,
            such as `"encoder"` and `"decoder"`.
        layers: Module names of the layers, bottom first.
    """

    path: str
    tower: str
    layers: tuple[str, ...]


def is_under(name: str, module: str) -> bool:
    """Whether a name is that of a module, or of a parameter or module inside it."""
    return not module or name == module or name.startswith(f"{module}.")


def prefixes(name: str) -> list[str]:
    """The names of the modules around a name, the whole model ("") first, and the name itself."""
    parts = name.split(".") if name else []
    return [".".join(parts[:end]) for end in range(len(parts) + 1)]


def _outermost(paths: Iterable[str]) -> list[str]:
    kept: list[str] = []
    for path in paths:  # a module comes before those inside it
        if not any(is_under(path, outer) for outer in kept):
            kept.append(path)
    return kept


def _classes(layers: nn.Module) -> set[type[nn.Module]]:
    """The classes of a list's members, looking into PEFT's `modules_to_save`."""
    originals = (getattr(layer, "original_module", layer) for layer in layers.children())
    return {type(layer) for layer in originals}


def is_checkpointed(layers: nn.Module) -> bool:
    """Whether the members of a list are `GradientCheckpointingLayer`s."""
    return all(issubclass(cls, GradientCheckpointingLayer) for cls in _classes(layers))


def find_stacks(model: nn.Module) -> list[Stack]:
    """The model's towers of layers, in the order of registration.

    A stack is an outermost `ModuleList` (or `Sequential`) of `GradientCheckpointingLayer`s or, in
    a base model that has none, of at least two modules of one class: a stage counts as a layer.
    ALBERT, whose layers share their weights, is a stack of one layer. Frozen stacks count, so the
    names do not depend on what is frozen.

    Args:
        model: Any model, including PEFT models.

    Returns:
        The stacks; empty if there is none.

    Example:
        >>> layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        >>> find_stacks(nn.ModuleDict({"embed": nn.Embedding(9, 4), "layers": layers}))
        [Stack(path='layers', tower='', layers=('layers.0', 'layers.1'))]
    """
    modules = dict(model.named_modules())
    lists = {
        path: module
        for path, module in modules.items()
        if isinstance(module, _List)
        and not isinstance(module, ParametrizationList)
        and any(True for _ in module.parameters())
    }
    paths = _towers([path for path in lists if is_checkpointed(lists[path])], lists)
    parts = _parts_without(paths, modules)
    alike = [
        path
        for path, layers in lists.items()
        if len(_classes(layers)) == 1 and any(is_under(path, part) for part in parts)
    ]
    several = [path for path in alike if len(lists[path]) > 1]
    paths += _without_twins(_towers(several if several or paths else alike, lists), lists)
    paths.sort(key=list(modules).index)
    names = _tower_names(paths)
    return [
        Stack(path, names[path], tuple(f"{path}.{own}".strip(".") for own in lists[path]._modules))
        for path in paths
    ]


def _towers(paths: Sequence[str], lists: Mapping[str, _List]) -> list[str]:
    """The outermost lists: stages rather than their blocks, layers rather than convolutions."""

    def lifted(path: str) -> str:
        for outer in prefixes(path)[:-1]:
            if outer in lists and len(lists[outer]) > 1:
                classes = _classes(lists[outer])
                if len(classes) == 1 and not issubclass(classes.pop(), PreTrainedModel):
                    return outer
        return path

    outer = _outermost(dict.fromkeys(map(lifted, paths)))
    layers = [p for p in outer if not _INPUT_CONVOLUTION.search(".".join(p.split(".")[-2:]))]
    return layers or outer


def _parts_without(paths: Sequence[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """The base models that contain none of the stacks found; a head is not a base model."""
    names = {id(module): name for name, module in modules.items()}
    bases = {
        name: names.get(id(module.base_model), name)
        for name, module in modules.items()
        if isinstance(module, PreTrainedModel)
    }
    if not bases:
        return [] if paths else [""]
    parts = [
        part
        for part in bases
        if not any(is_under(path, part) for path in paths)
        and all(
            is_under(part, bases[name]) for name in bases if name != part and is_under(part, name)
        )
    ]
    return [bases[part] for part in _outermost(parts)]


def _without_twins(paths: Sequence[str], lists: Mapping[str, _List]) -> list[str]:
    """One of several lists that are side by side and run together (XLM, SegFormer)."""
    first: dict[object, str] = {}
    for path in paths:
        parent, _, own = path.rpartition(".")
        together = isinstance(lists[path], nn.ModuleList) and "coder" not in own
        first.setdefault((parent, len(lists[path])) if together else path, path)
    return list(first.values())


def _tower_names(paths: Sequence[str]) -> dict[str, str]:
    """Short unique names of the paths: their first parts that differ."""
    if len(paths) == 1:
        return {paths[0]: ""}
    parts = {path: path.split(".") for path in paths}
    depth = 0
    while paths and len({".".join(part[: depth + 1]) for part in parts.values()}) == 1:
        depth += 1
    names: dict[str, str] = {}
    for first in dict.fromkeys(part[depth] for part in parts.values()):
        rest = {".".join(p[depth + 1 :]): path for path, p in parts.items() if p[depth] == first}
        for tail, name in _tower_names(list(rest)).items():
            names[rest[tail]] = f"{first}.{name}".strip(".")
    return names
