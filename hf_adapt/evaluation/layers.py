"""How far apart source and target are in every layer of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_adapt.alignment.mmd import mmd_loss
from hf_adapt.engine.callback import collect_items
from hf_adapt.engine.item_outputs import LayerCollector, some_rows
from hf_adapt.evaluation.importance_weights import proxy_a_distance
from hf_adapt.evaluation.scores import strided
from hf_adapt.models.heads import has_head
from hf_adapt.models.layers import Stack, find_stacks
from hf_adapt.models.pooling import Pooling
from hf_adapt.models.structure import reader_of, unwrapped_base

if TYPE_CHECKING:
    from transformers import Trainer

FEWEST_ROWS = 10
"""Of each domain, for a cross-fitted classifier of the domains."""


MMD_ROWS = 1000
"""Of each domain: its time and memory grow with their square."""


@dataclass(frozen=True)
class LayerDistance:
    """The distances of the domains in one layer.

    Args:
        name: `"embeddings"`, `"layer.0"`, …; with several towers the tower comes first.
        a_distance: The proxy A-distance, from 0 (a linear classifier cannot tell the domains apart)
            to 2 (it always can).
        mmd: The squared maximum mean discrepancy, without bias: about 0 for equal domains.
    """

    name: str
    a_distance: float
    mmd: float


def layer_distances(
    trainer: Trainer,
    source_dataset: Any,
    target_dataset: Any,
    *,
    max_items: int = 2000,
    pooling: Pooling = "mean",
) -> list[LayerDistance]:
    """Measure the distance of source and target in the pooled output of every layer.

    It shows where a model tells the domains apart, and which `feature_layer` a method should align.
    A small distance is no proof of a good adaptation: features that have collapsed have none. The
    labels of both domains are hidden. Each data set goes through the model once.

    Reference:
        Ben-David et al. 2006, "Analysis of Representations for Domain Adaptation", NeurIPS, by
        [`proxy_a_distance`]; Gretton et al. 2012, "A Kernel Two-Sample Test", JMLR 13, Eq. 3, by
        [`mmd_loss`][hf_adapt.alignment.mmd.mmd_loss] with its median bandwidths.

    Args:
        trainer: Any Trainer with the model; it is changed in place, as by `adapt`.
        source_dataset: Source rows, prepared like `train_dataset`; best those not trained on.
        target_dataset: Target rows.
        max_items: So many rows of each domain are used at most, spread evenly (1,000 of them for
            the discrepancy). A torch stream is read to its end.
        pooling: How a row's feature is made of a layer's output.

    Returns:
        The embeddings (what the first layer is given) and each layer, bottom first; of an
        encoder-decoder, those of the encoder.

    Raises:
        ValueError: If a domain has fewer than 10 rows, no stack of layers is found, or the model
            takes no unlabelled rows or several sequences a row.

    Example:
        ```python
        for layer in layer_distances(trainer, source_dev, target):
            print(f"{layer.name:12} {layer.a_distance:.2f} {layer.mmd:.4f}")
        ```
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    names, inputs_of, layers = _layers(model)
    found = []
    for name, rows in (("source", source_dataset), ("target", target_dataset)):
        collector = LayerCollector(layers, inputs_of, pooling)
        items = strided(collect_items(trainer, some_rows(rows, max_items), collector), max_items)
        if len(items) < FEWEST_ROWS:
            raise ValueError(
                f"Expected at least {FEWEST_ROWS} rows in the {name}_dataset, got {len(items)}."
            )
        found.append(torch.split(items.features, collector.widths, dim=1))
    distances = []
    for name, source, target in zip(names, *found, strict=True):
        # The rows are in the order of their hashes: the first are any.
        mmd = mmd_loss(source[:MMD_ROWS], target[:MMD_ROWS], unbiased=True)
        distances.append(LayerDistance(name, proxy_a_distance(source, target), float(mmd)))
    return distances


def _layers(model: nn.Module) -> tuple[list[str], list[str], list[str]]:
    """Names of all that is measured, the modules whose input is, and those whose output is."""
    base = unwrapped_base(model)
    if has_head(base, "conditional_generation", "multiple_choice"):
        raise ValueError(
            f"layer_distances runs rows without labels, one sequence each, and "
            f"{type(base).__name__} does not take such rows. Give the Trainer its base model with "
            "a sequence-classification head."
        )
    modules, reads = dict(base.named_modules()), set(reader_of(base).modules())
    stacks = [stack for stack in find_stacks(base) if modules[stack.path] in reads]
    if not stacks:
        raise ValueError(
            f"No stack of layers in {type(base).__name__}: looked for a ModuleList or Sequential "
            "of layers of one class. Collect the features of modules that you name with "
            "collect_items(trainer, rows, feature_layer=...)."
        )

    def named(stack: Stack, own: str) -> str:
        return f"{stack.tower}.{own}".strip(".")

    names = [named(stack, "embeddings") for stack in stacks]
    names += [named(s, f"layer.{number}") for s in stacks for number in range(len(s.layers))]
    return names, [s.layers[0] for s in stacks], [layer for s in stacks for layer in s.layers]
