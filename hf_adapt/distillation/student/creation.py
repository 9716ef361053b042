"""A smaller model of the teacher's own class, started from the teacher's weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from hf_adapt.distillation.student.depth import Layers, kept_layers, shallower, shared_depth
from hf_adapt.distillation.student.weights import check_alike, drop_absent, fill, original_modules
from hf_adapt.distillation.student.width import Widths, narrow
from hf_adapt.models.layers import find_stacks
from hf_adapt.models.state import preserved_random_state
from hf_adapt.models.structure import has_adapters

Model = TypeVar("Model", bound=PreTrainedModel)


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
    shared = shared_depth(model.config)
    depths = {s.tower: shared or len(s.layers) for s in stacks}
    kept = kept_layers(type(model).__name__, depths, layers, tower)
    with preserved_random_state():
        config, widths = copy.deepcopy(model.config), Widths()
        if shared:
            config.num_hidden_layers = len(kept[stacks[0].tower])
            kept = {stacks[0].tower: range(1)}
        else:
            config = shallower(model, stacks, kept)
        if hidden_size is not None:
            widths = narrow(model, config, stacks, hidden_size, tower)
        # What `AutoModel.from_config` calls: the class itself, built in the teacher's dtype.
        student: Model = type(model)._from_config(  # type: ignore[no-untyped-call]
            config, dtype=model.dtype
        )
    drop_absent(model, student)
    table = original_modules(model, student, stacks, kept)
    check_alike(model, student, stacks, kept, narrowed=hidden_size is not None)
    fill(model, student, table, widths)
    if getattr(model, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(model.generation_config)
    student.to(model.device)  # type: ignore[arg-type]
    student.train(model.training)
    return student


def _check_teacher(model: nn.Module) -> None:
    name = type(model).__name__
    if has_adapters(model):
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
