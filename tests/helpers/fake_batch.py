"""A micro-batch made of tensors, for objectives without an engine."""

from types import SimpleNamespace

import torch


class FakeBatch:
    """Features, predictions and labels as an engine's batch gives them, and what is logged."""

    progress = 0.25
    model = SimpleNamespace(config=SimpleNamespace(problem_type=None))

    def __init__(
        self,
        features: torch.Tensor,
        domain: torch.Tensor,
        logits: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> None:
        self.given, self.predictions, self.known = (features, domain), logits, labels
        self.num_domains = int(domain.max()) + 1
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
        return self.known

    def log(
        self, name: str, value: torch.Tensor | float, count: torch.Tensor | float = 1.0
    ) -> None:
        """Keep what is logged."""
        self.logged[name] = (float(value), float(count))
