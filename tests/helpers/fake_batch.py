"""A micro-batch made of tensors, for objectives without an engine."""

from collections.abc import Sequence
from types import SimpleNamespace

import torch


class FakeBatch:
    """Features, predictions and labels as an engine's batch gives them, and what is logged."""

    model = SimpleNamespace(config=SimpleNamespace(problem_type=None))

    def __init__(
        self,
        features: torch.Tensor,
        domain: torch.Tensor | Sequence[int],
        logits: torch.Tensor | None = None,
        labels: torch.Tensor | Sequence[int] | None = None,
        further: "FakeBatch | None" = None,
        progress: float = 0.25,
    ) -> None:
        self.given = features, torch.as_tensor(domain)
        self.predictions, self.known, self.further = logits, labels, further
        self.num_domains = max(2, int(self.given[1].max()) + 1)
        self.progress = progress
        self.logged: dict[str, tuple[float, float]] = {}

    def features(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The features and their domains."""
        return self.given

    def logits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The predictions and their domains."""
        assert self.predictions is not None
        return self.predictions, self.given[1]

    def labels(self, of: str = "logits") -> torch.Tensor:
        """The labels, -100 for the target."""
        assert self.known is not None
        return torch.as_tensor(self.known)

    def forward(self) -> "FakeBatch":
        """The further forward that was given."""
        assert self.further is not None
        return self.further

    def log(
        self, name: str, value: torch.Tensor | float, count: torch.Tensor | float = 1.0
    ) -> None:
        """Keep what is logged."""
        self.logged[name] = (float(value), float(count))
