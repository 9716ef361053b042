"""A smaller model of the teacher's own class, started from the teacher's weights."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_adapt.models.layers import Stack, find_stacks
from hf_adapt.models.state import preserved_random_state

Layers = int | Sequence[int]
"""How many layers to keep, or the indices of those to keep."""
Model = TypeVar("Model", bound=PreTrainedModel)

_DEPTH = re.compile(r"layers?$|depth$")
# Lists with an entry for each layer; by name, for a list of convolutions may be just as long.
_PER_LAYER = re.compile(r"layer_types$|^attention_layers$|^no_rope_layers$|^attention_window$")
# What may differ between a layer and its copy: the index, stochastic depth, T5's block 0.
_MAY_DIFFER = re.compile(
    r"idx|index|layer_id|layer_num|training|drop|relative_attention_bias|checkpointing"
)

_HEADS = re.compile(r"heads?$")
_HEAD_SIZE = re.compile(r"^((attention_)?head_(dim|size)|d_kv|d_head|dim_head)$")
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


class _Setting(NamedTuple):
    """The attribute of a config, or of a config inside it, that holds the depth of a tower."""

    owner: tuple[str, ...]
    attribute: str

    def config(self, root: PretrainedConfig) -> Any:
        for name in self.owner:
            root = getattr(root, name)
        return root


@dataclass(frozen=True)
class _Widths:
    """How the dimensions of a narrower student relate to its teacher's."""

    pairs: frozenset[tuple[int, int]] = frozenset()
    qkv: tuple[tuple[int, int], ...] = ()
    blocks: Mapping[str, int] = field(default_factory=dict)
    transposed: bool = False


def student_from_teacher(
    model: Model,
    layers: Layers | Mapping[str, Layers],
    hidden_size: int | None = None,
    tower: str | None = None,
) -> Model:
    """A shallower (and, if asked, narrower) model of the same class with the teacher's weights.

    Starting from the teacher's own layers is what makes short distillation work. A number of
    layers is spread evenly and keeps the first and the last, rounding halves up: 6 of 12 are 0, 2,
    4, 7, 9, 11 and 3 of 12 are 0, 6, 11, the choice of DistilBERT's and DistilBART's released
    code; one layer is the first.

    Reference:
        Sanh et al. 2019, "DistilBERT", section 2, arXiv:1910.01108 (one layer out of two).
        Shleifer & Rush 2020, "Pre-trained Summarization Distillation", section 3,
        arXiv:2010.13002 ("shrink and fine-tune").

    Args:
        model: The teacher: a plain model, neither quantised nor with adapters. It is not changed.
        layers: How many layers to keep, or the increasing indices of those to keep; for every
            tower, or a mapping such as `{"encoder": 3, "decoder": [0, 2]}` with the tower names of
            `find_stacks`. Towers that are not named keep all their layers.
        hidden_size: Width of the student. The size of a head stays, so the numbers of heads and the
            inner width of the feed-forward layers shrink in proportion. The weights are the leading
            slice of each teacher tensor, which only starts training: a slice chosen by importance
            is better (Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge
            Distillation", arXiv:2407.14679) and is the caller's to make.
        tower: Shrink this tower only.

    Returns:
        A new model on the teacher's device, with its dtypes, attention implementation, generation
        config and training mode. It shares no memory with the teacher, and is trainable even if
        the teacher is frozen.

    Raises:
        TypeError: If `model` is no `PreTrainedModel` (a PEFT model is none), or `layers` is neither
            a number nor indices.
        ValueError: If the layers or the width do not fit, or if no config of the model's class can
            express the student, as with stages (Swin, ConvNeXt) and with layers that differ.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> size = dict(hidden_size=16, num_attention_heads=4, intermediate_size=32, vocab_size=9)
        >>> teacher = BertModel(BertConfig(num_hidden_layers=4, **size))
        >>> student = student_from_teacher(teacher, layers=[0, 3], hidden_size=8)
        >>> student.config.num_hidden_layers, student.config.num_attention_heads
        (2, 2)
    """
    _check_teacher(model)
    stacks = find_stacks(model)
    shared = _shared_depth(model.config)
    depths = {s.tower: shared or len(s.layers) for s in stacks}
    kept = _kept_layers(type(model).__name__, depths, layers, tower)
    with preserved_random_state():
        config, widths = copy.deepcopy(model.config), _Widths()
        if shared:
            config.num_hidden_layers = len(kept[stacks[0].tower])
            kept = {stacks[0].tower: range(1)}
        else:
            config = _shallower(model, stacks, kept)
        if hidden_size is not None:
            widths = _narrow(model, config, stacks, hidden_size, tower)
        # What `AutoModel.from_config` calls: the class itself, built in the teacher's dtype.
        student: Model = type(model)._from_config(  # type: ignore[no-untyped-call]
            config, dtype=model.dtype
        )
    _drop_absent(model, student)
    table = _places(model, student, stacks, kept)
    _check_alike(model, student, stacks, kept, narrowed=hidden_size is not None)
    _fill(model, student, table, widths)
    if getattr(model, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(model.generation_config)
    student.to(model.device)  # type: ignore[arg-type]
    student.train(model.training)
    return student


def _check_teacher(model: nn.Module) -> None:
    name = type(model).__name__
    # Not `peft_config`: some releases of PEFT leave it on a merged model.
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise TypeError(
            f"Expected a plain teacher, got {name} with PEFT adapters, whose weights lie beside "
            "the layers. Merge them first: `student_from_teacher(model.merge_and_unload(), ...)`."
        )
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"Expected a transformers PreTrainedModel, got {name}. Pass the model itself, "
            "unwrapped (`accelerator.unwrap_model(model)`)."
        )
    if getattr(model, "hf_quantizer", None) or getattr(model.config, "quantization_config", None):
        raise ValueError(
            f"The teacher {name} is quantised: its packed weights cannot start a student. Load it "
            "without `quantization_config` (in bfloat16, say) and quantise the student afterwards."
        )
    away = [n for n, p in model.named_parameters() if p.is_meta]
    if away:
        raise ValueError(
            f"{len(away)} weights of the teacher are offloaded (meta device), such as {away[0]!r}. "
            "Load it without `device_map`."
        )


def _shared_depth(config: PretrainedConfig) -> int:
    """The depth of a model whose layers share one set of weights (ALBERT), else 0."""
    if getattr(config, "num_hidden_groups", 0) == 1:
        return int(config.num_hidden_layers)
    return 0


def _kept_layers(
    name: str,
    depths: Mapping[str, int],
    layers: Layers | Mapping[str, Layers],
    tower: str | None,
) -> dict[str, Sequence[int]]:
    """The indices kept of each tower."""
    if not depths:
        raise ValueError(
            f"{name} has no stack of layers (no ModuleList of alike layers), so there is nothing "
            "to leave out. Build the student by hand."
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


def _shallower(
    model: PreTrainedModel, stacks: Sequence[Stack], kept: Mapping[str, Sequence[int]]
) -> PretrainedConfig:
    """The config with fewer layers: the one whose model has the depths asked for."""
    config = copy.deepcopy(model.config)
    for stack in stacks:
        if len(kept[stack.tower]) < len(stack.layers):
            setting = _find_setting(model, config, stacks, stack, kept[stack.tower])
            config = _resized(config, setting, kept[stack.tower], len(stack.layers))
    return config


def _find_setting(
    model: PreTrainedModel,
    config: PretrainedConfig,
    stacks: Sequence[Stack],
    stack: Stack,
    kept: Sequence[int],
) -> _Setting:
    """Find by trial what sets the depth of one tower and of no other.

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
) -> Iterator[_Setting]:
    for name, value in _integers(config):
        if value == depth and _DEPTH.search(name):
            yield _Setting(owner, name)
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
    config: PretrainedConfig, setting: _Setting, kept: Sequence[int], depth: int
) -> PretrainedConfig:
    """A copy with the new depth, and the entries of the kept layers in lists that have one each."""
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


def _narrow(
    model: PreTrainedModel,
    config: PretrainedConfig,
    stacks: Sequence[Stack],
    hidden_size: int,
    tower: str | None,
) -> _Widths:
    """Set the width in `config`; returns how each dimension changes."""
    place = _width_owner(model, stacks, tower)
    owner = _Setting(place, "").config(config)
    name = owner.attribute_map.get("hidden_size", "hidden_size")
    heads = _heads(type(model).__name__, owner, getattr(owner, name, None), hidden_size)
    given = [v for k, v in _integers(owner) if _HEAD_SIZE.search(k)]
    old = int(getattr(owner, name))
    size = given[0] if given else old // max(heads.values())
    pairs = {(old, hidden_size)}
    for key, value in list(_integers(owner)):
        if key in heads or _INNER.search(key) or (key in _FOLLOWERS and value == old):
            new = value * hidden_size // old
            setattr(owner, key, new)
            pairs |= {(value, new), (value * size, new * size)} if key in heads else {(value, new)}
    if not any(_INNER.search(key) for key, _ in _integers(owner)):
        pairs.add((4 * old, 4 * hidden_size))  # GPT-2 and BLOOM
    setattr(owner, name, hidden_size)
    before = _Setting(place, "").config(model.config)
    names = ("num_attention_heads", *["num_key_value_heads"] * 2)
    counts = [(getattr(before, h, 0), getattr(owner, h, 0)) for h in names]
    qkv = tuple((was * size, now * size) for was, now in counts)
    kind = owner.model_type
    return _Widths(frozenset(pairs), qkv, _BLOCKS.get(kind, {}), transposed=kind == "gpt2")


def _heads(model: str, owner: PretrainedConfig, width: Any, hidden_size: int) -> dict[str, int]:
    """The numbers of heads, if they stay whole at the new width."""
    # One key/value head serves all heads, however many; other numbers must stay in proportion.
    heads = {k: v for k, v in _integers(owner) if _HEADS.search(k) and v > 1}
    heads = {k: v for k, v in heads.items() if not _HEAD_SIZE.search(k)}
    if type(width) is not int or not heads:
        raise ValueError(
            f"{model} has no heads to leave out (width {width}, heads: {heads or 'none'}), so no "
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


def _integers(config: PretrainedConfig) -> Iterator[tuple[str, int]]:
    yield from ((key, value) for key, value in vars(config).items() if type(value) is int)


def _width_owner(
    model: PreTrainedModel, stacks: Sequence[Stack], tower: str | None
) -> tuple[str, ...]:
    """The config that holds the width of the chosen towers."""
    if _shared_depth(model.config):
        return ()
    owners = {}
    for stack in stacks:
        fewer = range(len(stack.layers) - 1) or range(2)
        owners[stack.tower] = _find_setting(model, model.config, stacks, stack, fewer).owner
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


def _drop_absent(model: nn.Module, student: nn.Module) -> None:
    """Leave out what the teacher was built without, such as `add_pooling_layer=False`."""
    for path, module in student.named_modules():
        try:
            original = model.get_submodule(path)
        except AttributeError:
            continue
        for name, _ in list(module.named_children()):
            if getattr(original, name, module) is None:
                setattr(module, name, None)


def _places(
    model: nn.Module,
    student: nn.Module,
    stacks: Sequence[Stack],
    kept: Mapping[str, Sequence[int]],
) -> dict[str, str]:
    """Module name in the student → in the teacher, of each layer and of what goes with it.

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


def _check_alike(
    model: nn.Module,
    student: nn.Module,
    stacks: Sequence[Stack],
    kept: Mapping[str, Sequence[int]],
    narrowed: bool,
) -> None:
    """Refuse a student whose layers compute something else with the same weights.

    Some patterns depend on the index (a full attention every third layer, no norm in layer 0); if
    the config cannot carry them over to the new indices, the student would be wrong in silence.
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
    """The class and plain attributes of each module of a layer: what it does, less its weights."""
    found: dict[str, object] = {}
    for path, module in layer.named_modules():
        if _MAY_DIFFER.search(path):
            continue
        found[path] = type(module).__name__
        for name, value in vars(module).items():
            plain = isinstance(value, int | float | str | tuple | None)
            sized = narrowed and not _HEAD_SIZE.search(name)
            if plain and not name.startswith("_") and not _MAY_DIFFER.search(name) and not sized:
                found[f"{path}.{name}".strip(".")] = value
        if getattr(module, "scale_attn_by_inverse_layer_idx", False):  # GPT-2
            found[f"{path}.layer_idx"] = getattr(module, "layer_idx", None)
    return found


def _fill(
    model: PreTrainedModel, student: PreTrainedModel, table: Mapping[str, str], widths: _Widths
) -> None:
    """Give each tensor of the student the teacher's values, dtype and device."""
    state = model.state_dict()
    given = state | dict(model.named_buffers())  # those too that are not saved
    own = student.state_dict(keep_vars=True)
    used: set[str] = set()
    filled: dict[int, torch.Tensor] = {}
    buffers = dict(student.named_buffers())
    narrowed = widths != _Widths()
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
            values = _leading(name, given[source], tensor.shape, widths)
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


def _leading(
    name: str, values: torch.Tensor, shape: Sequence[int], widths: _Widths
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


_UNKNOWN = (
    "No rule tells which part of the teacher's {0!r} of shape {1} the student's {2} is: it holds "
    "several things at once (a fused projection, groups of a convolution, entries by layer). "
    "Leave out `hidden_size`, or build the student by hand."
)
