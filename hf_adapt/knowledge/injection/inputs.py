"""What a batch says of its mentions: the tensors beside `input_ids`."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch

PREFIX = "knowledge_"
REQUIRED = ("spans", "entities", "priors", "vectors")
NAMES = tuple(PREFIX + name for name in (*REQUIRED, "neighbours", "relations"))
"""The names of the inputs."""


@dataclass(frozen=True)
class Knowledge:
    """The mentions of a batch, their candidates and what the graph says of these.

    Shape:
        - spans: (B, M, 2) long: first and past-the-last token position; absent mentions are
          (0, 0).
        - entities: (B, M, K) long, -1 for absent candidates.
        - priors: (B, M, K) float, 0 for absent candidates, else they add up to 1 for a mention.
        - vectors: (B, M, K, D) float.
        - neighbours: (B, M, K, N, D) float, relations: (B, M, K, N) long, -1 for absent ones;
          None where an injector reads no neighbours.

    Each is a tensor whose first dimension is the row, so that it is sliced, gathered, expanded to
    beams and moved to a device as every other input is.
    """

    spans: torch.Tensor
    entities: torch.Tensor
    priors: torch.Tensor
    vectors: torch.Tensor
    neighbours: torch.Tensor | None = None
    relations: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    """The attention mask of the forward, (B, T); not an input of its own."""

    def __post_init__(self) -> None:
        rows, mentions = self.spans.shape[:2]
        if self.spans.shape[2:] != (2,) or self.vectors.shape[:2] != (rows, mentions):
            raise ValueError(
                f"knowledge_spans has shape {tuple(self.spans.shape)} and knowledge_vectors "
                f"{tuple(self.vectors.shape)}; expected (B, M, 2) and (B, M, K, D)."
            )

    @property
    def candidate_mask(self) -> torch.Tensor:
        """Which candidates there are, (B, M, K) bool."""
        return self.entities >= 0

    def inputs(self) -> dict[str, torch.Tensor]:
        """The tensors as the model's inputs, by name."""
        values = {name: getattr(self, name.removeprefix(PREFIX)) for name in NAMES}
        return {name: value for name, value in values.items() if value is not None}

    def to(self, device: torch.device) -> Knowledge:
        """The same on a device."""
        moved = {name.removeprefix(PREFIX): v.to(device) for name, v in self.inputs().items()}
        return replace(self, **moved)

    def without(self, mentions: torch.Tensor) -> Knowledge:
        """The same without some of the mentions, (B, M) bool."""
        keep = ~mentions
        return replace(
            self,
            spans=self.spans * keep.unsqueeze(-1),
            entities=self.entities.masked_fill(mentions.unsqueeze(-1), -1),
            priors=self.priors * keep.unsqueeze(-1),
            vectors=self.vectors * keep[..., None, None],
        )

    def token_mask(self, length: int) -> torch.Tensor:
        """Which tokens belong to which mention, (B, M, length) bool."""
        at = torch.arange(length, device=self.spans.device)
        return (at >= self.spans[..., :1]) & (at < self.spans[..., 1:])


def take_knowledge(inputs: MutableMapping[str, Any]) -> Knowledge | None:
    """Remove the tensors of a batch's mentions from its inputs."""
    found = {name: inputs.pop(name) for name in NAMES if name in inputs}
    return knowledge_of({name: value for name, value in found.items() if value is not None})


def knowledge_of(inputs: Mapping[str, Any]) -> Knowledge | None:
    """The mentions in a batch's inputs, which keep them; None where there are none."""
    found = {name.removeprefix(PREFIX): inputs[name] for name in NAMES if name in inputs}
    if not found:
        return None
    missing = [name for name in REQUIRED if name not in found]
    if missing:
        raise ValueError(
            f"The inputs hold {', '.join(PREFIX + n for n in found)} without "
            f"{', '.join(PREFIX + n for n in missing)}: pass all that the collator made."
        )
    return Knowledge(**found)
