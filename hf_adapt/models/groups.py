"""Ordered layer groups of any model, from bottom to top."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

from torch import nn
from transformers import PreTrainedModel

from hf_adapt.models.layers import Stack, find_stacks, is_checkpointed, is_under, prefixes

Kind = Literal["embeddings", "layer", "norm", "head", "other"]


Groups = Mapping[str, str | Sequence[str]] | Sequence["str | Sequence[str] | LayerGroup"]


_EMBEDDING = re.compile(
    r"embed|^rel(ative)?_(pos|att)|^pos(ition)?_(emb|bias)|^per_layer|prompt|tokens?$"
)


_BRIDGE = re.compile(
    r"multi_?modal|enc_to_dec|image_to_text|connector|aligner|resampler|^(mm_)?projector$"
)


_HEAD = re.compile(r"lm_head|score|fc|qa_outputs|\w*classifier|(text|visual|audio)_projection")


_LATE = re.compile(r"(^|_)(final|post|last|out|pooler)(_|$)|ln_f|norm_f")


# Where neither the order of registration nor the name tells where the forward uses a module.
_EXCEPTIONS = (
    # Normalises the relative position embeddings, not the output of the layers.
    (re.compile(r"Deberta(V2)?Encoder\.LayerNorm"), "embeddings"),
    # Runs beside the first layer and is added to its output.
    (re.compile(r"DebertaV2Encoder\.conv"), "bottom"),
    # Registered before the layers and applied after them, unlike in other encoders.
    (re.compile(r"\w+EncoderStableLayerNorm\.layer_norm|\w+ConformerEncoder\.layer_norm"), "norm"),
    (re.compile(r"T5Gemma\w*(En|De)coder\.norm"), "norm"),
    # Registered after the layers and applied before them.
    (re.compile(r"Qwen3\w+Encoder\.conv\w+"), "embeddings"),
)


@dataclass(frozen=True)
class LayerGroup:
    """Trainable parameters that are unfrozen together and share a learning rate.

    Args:
        name: `"embeddings"`, `"layer.0"`, …, `"norm"`, `"head"`; with several towers the tower
            comes first: `"encoder.layer.0"`.
        parameters: Names as in `model.named_parameters()`.
        kind: The kind of the group.
        tower: The tower that the group belongs to, `""` for none.
        level: 0 is the bottom. A final norm has the level of the top layer.
    """

    name: str
    parameters: tuple[str, ...]
    kind: Kind
    tower: str
    level: int


class _Place(NamedTuple):
    """The group of a parameter; groups of one `level` are unfrozen together."""

    level: tuple[int, int, int]  # tower, (embeddings, layer, bridge), index
    kind: Kind
    tower: str
    name: str


def matches(pattern: str, name: str) -> bool:
    r"""Whether a pattern matches a module or parameter.

    Args:
        pattern: The name of a module or parameter, or a regular expression for the whole name.
        name: The name of a parameter (or module).

    Returns:
        True if `pattern` is the name, a module that contains it, or an expression that matches it.

    Raises:
        ValueError: If the pattern is no valid regular expression.

    Example:
        >>> [matches("layer.1", name) for name in ("layer.1", "layer.1.weight", "layer.10.weight")]
        [True, True, False]
        >>> matches(r".*\.bias", "layer.1.bias")
        True
    """
    if name == pattern or name.startswith(f"{pattern}."):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ValueError(
            f"The pattern {pattern!r} is neither the name of a module or parameter nor a valid "
            f"regular expression ({error}). Name a module as `named_modules()` does, or correct "
            "the expression."
        ) from error


class _Layout:
    """The group of each parameter of a model, found from its stacks."""

    def __init__(self, model: nn.Module, stacks: Sequence[Stack]) -> None:
        self.stacks = stacks
        self.modules = dict(model.named_modules())
        self.order = {name: position for position, name in enumerate(self.modules)}
        self.lists = {stack.path: index for index, stack in enumerate(stacks)}
        self.around = {name for stack in stacks for name in prefixes(stack.path)}
        self.head_owners = self._above_base(model)

    def _unit(self, name: str) -> tuple[str, str]:
        """The outermost module around a parameter that contains no stack, and its parent."""
        names = prefixes(name)
        end = next(i for i, prefix in enumerate(names) if prefix not in self.around)
        return names[end], names[end - 1]

    def _scope(self, owner: str) -> list[int]:
        return [i for i, stack in enumerate(self.stacks) if is_under(stack.path, owner)]

    def _pretrained(self, name: str) -> bool:
        """Whether it is inside a module of transformers."""
        return any(isinstance(self.modules.get(n), PreTrainedModel) for n in prefixes(name))

    def _above_base(self, model: nn.Module) -> set[str]:
        """Modules around a stack whose other children are heads."""
        owners = set()
        for name in self.around - self.lists.keys():
            module, scope = self.modules[name], self._scope(name)
            if isinstance(module, PreTrainedModel):
                if module.base_model is not module:
                    owners.add(name)
            elif len(scope) == 1 and not self._pretrained(name):
                if self._pretrained(self.stacks[scope[0]].path):
                    owners.add(name)  # a user's own module around a base model, or PEFT's
        if len(self.stacks) == 1:  # heads beside an encoder that is no `base_model` (Whisper)
            units = [self._unit(name) for name, _ in model.named_parameters()]
            beside = [
                (unit, owner)
                for unit, owner in units
                if unit in self.modules and owner not in owners | self.lists.keys()
            ]
            inputs = [owner for unit, owner in beside if _EMBEDDING.search(unit.rpartition(".")[2])]
            for owner in sorted([owner for _, owner in beside[:1]] + inputs, key=len)[:1]:
                owners |= set(prefixes(owner)[:-1])
        return owners

    def place(self, name: str) -> _Place:
        """The group of one parameter."""
        unit, owner = self._unit(name)
        own = unit.rpartition(".")[2]
        if owner in self.lists:
            tower = self.lists[owner]
            return self._layer(tower, self.stacks[tower].layers.index(unit))
        scope = self._scope(owner)
        if owner in self.head_owners:
            return self._embeddings(scope) if "prompt" in own else self._head()
        if self._twin(unit, scope):
            return self._layer(scope[0], int(name.removeprefix(f"{unit}.").split(".")[0]))
        rule = f"{type(self.modules[owner]).__name__}.{own}"
        special = next((where for known, where in _EXCEPTIONS if known.fullmatch(rule)), None)
        if special == "bottom":
            return self._layer(scope[0], 0)
        if special == "norm":
            return self._norm(scope[0])
        if special or _EMBEDDING.search(own):
            return self._embeddings(scope)
        if len(scope) > 1:
            return self._between(unit, own, scope)
        return self._in_tower(unit, own, scope)

    def _twin(self, unit: str, scope: list[int]) -> bool:
        """Whether a list has one member for each layer, which runs together with it."""
        stack, module = self.stacks[scope[0]], self.modules.get(unit)
        return (
            len(scope) == 1
            and isinstance(module, nn.ModuleList)
            and len(module) == len(stack.layers) > 1
            and not is_checkpointed(self.modules[stack.path])
        )

    def _between(self, unit: str, own: str, scope: list[int]) -> _Place:
        """A module beside several towers."""
        if unit not in self.modules or _HEAD.fullmatch(own) or own == "head":
            return self._head()
        below = [i for i in scope if self.order[self.stacks[i].path] < self.order[unit]]
        if below == scope and _BRIDGE.search(own):  # registered after the towers it stands between
            below = scope[:-1]
        if not below:
            return self._embeddings(scope)
        if below[-1] == len(self.stacks) - 1:
            return self._head()
        tower = self._common_tower(scope)
        level = (below[-1], 2, self.order[unit])
        return _Place(level, "other", tower, f"{tower}.{own}".strip("."))

    def _in_tower(self, unit: str, own: str, scope: list[int]) -> _Place:
        """A module beside the layers of one tower."""
        (tower,) = scope
        stack = self.stacks[tower]
        if _HEAD.fullmatch(own):
            return self._head()
        module = self.modules.get(unit)
        before = self.order.get(unit, 0) < self.order[stack.path]
        if before and not _LATE.search(own):
            return self._embeddings(scope)
        if module is not None and _is_norm(module):
            return self._norm(tower)
        last = tower == len(self.stacks) - 1
        if last and "pool" not in own and not self._pretrained(stack.path):
            return self._head()
        return self._layer(tower, len(stack.layers) - 1)

    def _named(self, tower: int, name: str) -> tuple[str, str]:
        prefix = self.stacks[tower].tower
        return prefix, f"{prefix}.{name}".strip(".")

    def _layer(self, tower: int, index: int) -> _Place:
        return _Place((tower, 1, index), "layer", *self._named(tower, f"layer.{index}"))

    def _norm(self, tower: int) -> _Place:
        top = len(self.stacks[tower].layers) - 1
        return _Place((tower, 1, top), "norm", *self._named(tower, "norm"))

    def _embeddings(self, scope: list[int]) -> _Place:
        tower = self._common_tower(scope)
        return _Place((scope[0], 0, 0), "embeddings", tower, f"{tower}.embeddings".strip("."))

    def _head(self) -> _Place:
        return _Place((len(self.stacks), 0, 0), "head", "", "head")

    def _common_tower(self, scope: list[int]) -> str:
        names = [prefixes(self.stacks[i].tower) for i in scope]
        return max(set(names[0]).intersection(*names[1:]), key=len)


def layer_groups(model: nn.Module, groups: Groups | None = None) -> list[LayerGroup]:
    """The trainable parameters of a model, divided into layer groups from bottom to top.

    Each trainable parameter is in exactly one group. A tied weight counts once, under its first
    name, in the lowest of its groups: a head that is tied to the embeddings belongs to them.
    Embeddings that several towers share have the level of those of the first tower. Modules above
    a tower's layers (a pooler, a projection) belong to its top layer, and modules between towers
    (a multi-modal projector) are a group of their own. Frozen parameters are in no group, and
    empty groups are left out.

    Args:
        model: Any model; the adapters of a PEFT model are in the group of their layer.
        groups: None to find the groups, or the groups from bottom to top: a mapping from a group's
            name to a pattern or several (see `matches`), or a sequence of patterns, of lists of
            patterns or of `LayerGroup`s. Each has its own level.

    Returns:
        The groups, bottom first.

    Raises:
        ValueError: If nothing is trainable, no stack of layers is found, or not every trainable
            parameter is in exactly one of `groups`.

    Example:
        >>> from transformers import GPT2Config, GPT2ForSequenceClassification
        >>> config = GPT2Config(vocab_size=8, n_embd=4, n_layer=2, n_head=1)
        >>> model = GPT2ForSequenceClassification(config)
        >>> [(group.name, group.level) for group in layer_groups(model)]
        [('embeddings', 0), ('layer.0', 1), ('layer.1', 2), ('norm', 2), ('head', 3)]
        >>> groups = layer_groups(model, {"body": "transformer", "head": "score"})
        >>> groups[1].parameters
        ('score.weight',)
    """
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter: expected some with "
            "requires_grad=True. Divide the layers into groups before freezing them."
        )
    if groups is not None:
        return _given_groups(model, trainable, groups)
    stacks = find_stacks(model)
    if not stacks:
        raise ValueError(
            f"No stack of layers in {type(model).__name__}: looked for a ModuleList or Sequential "
            "of GradientCheckpointingLayer, or of two or more modules of one class. Pass "
            "groups={name: pattern, …}, bottom first, for example with "
            f"{_few([name for name, _ in model.named_children()])}."
        )
    layout = _Layout(model, stacks)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(id(parameter), []).append(name)
    members: dict[_Place, list[str]] = {}
    for tied in names.values():
        place = min((layout.place(name) for name in tied), key=lambda place: place.level)
        members.setdefault(place, []).append(tied[0])
    levels = sorted({place.level for place in members})
    return [
        LayerGroup(
            place.name, tuple(members[place]), place.kind, place.tower, levels.index(place.level)
        )
        for place in sorted(
            members, key=lambda place: (place.level, place.kind == "norm", len(place.name))
        )
    ]


def _is_norm(module: nn.Module) -> bool:
    """Whether all its parameters are those of norms."""
    owners = [m for m in module.modules() if any(True for _ in m.parameters(recurse=False))]
    return bool(owners) and all("norm" in type(owner).__name__.lower() for owner in owners)


def _few(names: Sequence[str], number: int = 5) -> str:
    more = f" and {len(names) - number} more" if len(names) > number else ""
    return ", ".join(map(repr, names[:number])) + more


def _given_groups(model: nn.Module, trainable: list[str], groups: Groups) -> list[LayerGroup]:
    """The user's groups, which must contain each trainable parameter exactly once."""
    found, group_of = [], dict[str, str]()
    for level, (name, patterns, kind) in enumerate(_entries(groups)):
        members = [p for p in trainable if any(matches(pattern, p) for pattern in patterns)]
        for pattern in patterns:
            if not any(matches(pattern, p) for p in trainable):
                raise ValueError(_matches_nothing(model, name, pattern))
        if twice := [p for p in members if p in group_of]:
            raise ValueError(
                f"The groups {group_of[twice[0]]!r} and {name!r} both hold {_few(twice, 1)}: "
                "expected each trainable parameter in one group. Make the patterns disjoint."
            )
        group_of.update(dict.fromkeys(members, name))
        found.append(LayerGroup(name, tuple(members), kind, "", level))
    if strays := [p for p in trainable if p not in group_of]:
        raise ValueError(
            f"{len(strays)} of {len(trainable)} trainable parameters are in no group: "
            f"{_few(strays)}. Expected the groups to cover all: add them to a group, or freeze "
            "them with requires_grad=False if they are not to learn."
        )
    return found


def _entries(groups: Groups) -> list[tuple[str, Sequence[str], Kind]]:
    """Name, patterns and kind of each of the user's groups."""
    if isinstance(groups, str) or not groups:
        raise ValueError(
            f"groups={groups!r}: expected a mapping from names to patterns, or a sequence of "
            "patterns, with at least one group. Pass groups={'all': '.*'} for a single one."
        )
    pairs: Iterable[tuple[str, str | Sequence[str] | LayerGroup]] = (
        groups.items()
        if isinstance(groups, Mapping)
        else ((g if isinstance(g, str) else f"group.{i}", g) for i, g in enumerate(groups))
    )
    entries: list[tuple[str, Sequence[str], Kind]] = []
    for name, given in pairs:
        if isinstance(given, LayerGroup):
            entries.append((given.name, given.parameters, given.kind))
        else:
            patterns = [given] if isinstance(given, str) else list(given)
            entries.append((name, patterns, _kind_named(name)))
    names = [name for name, _, _ in entries]
    if len(set(names)) < len(names):
        raise ValueError(f"Two groups have one name: found {_few(names)}; rename one of them.")
    return entries


def _kind_named(name: str) -> Kind:
    """The kind of a group, from its name."""
    own = re.sub(r"(^|\.)layer\.\d+$", ".layer", name).rpartition(".")[2]
    return cast(Kind, own) if own in ("embeddings", "layer", "norm", "head") else "other"


def _matches_nothing(model: nn.Module, group: str, pattern: str) -> str:
    """The message about a pattern that matches no trainable parameter."""
    message = f"In the group {group!r}, the pattern {pattern!r} matches no trainable parameter: "
    every = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if frozen := [name for name in every if matches(pattern, name)]:
        message += f"{_few(frozen, 3)} are frozen (requires_grad=False)"
        if hasattr(model, "peft_config"):
            return message + (
                ". They are base weights, which the adapter checkpoint does not contain: to train "
                "them, name their module in `modules_to_save=[...]` of the PEFT config."
            )
        return message + ". Unfreeze them before the groups are built, or leave the pattern out."
    known = [name for name, _ in model.named_modules() if name] + every
    near = difflib.get_close_matches(pattern, known, n=5, cutoff=0.3)
    return message + (
        f"expected the name of a module or parameter, or a regular expression for the whole name "
        f"of a parameter (such as '.*\\.bias'). Near names: {', '.join(near) or 'none'}."
    )
