"""The pull of weights towards those of a start: its gradient, its proximal step, its penalty."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from hf_adapt.continual.adapters import AdaptedWeight

CPU_BLOCK = 2**17
"""Numbers worked on at once on a CPU: what is between two steps of a formula stays in its cache."""
DEVICE_BLOCK = 2**26
"""The same on an accelerator, where each operation has a cost of its own and memory is scarce."""

Rates = Mapping[nn.Parameter, float]


class WeightPull:
    r"""Pulls parameters towards their starts: λ/2 · Σ F (θ - θ*)², computed in float32.

    Where most rows of a weight have F = 0, as the embeddings of words that the old task lacks, only
    the others are worked on.

    Args:
        weights: The parameters.
        starts: Their starts θ*, of the same shapes.
        importances: Their F, or None for 1 throughout.
    """

    def __init__(
        self,
        weights: Sequence[nn.Parameter],
        starts: Sequence[torch.Tensor],
        importances: Sequence[torch.Tensor] | None,
    ) -> None:
        self.weights = weights
        limit = max((float(f.max()) for f in importances or () if f.numel()), default=1.0)
        self._largest = limit or 1.0
        self._rows: list[torch.Tensor | None] = [None] * len(weights)
        if importances is not None:
            self._rows = [_known_rows(each) for each in importances]
        self.starts = [self._part(i, start) for i, start in enumerate(starts)]
        self.importances = None
        if importances is not None:
            self.importances = [self._part(i, f) for i, f in enumerate(importances)]
        self._old: list[torch.Tensor] = []

    def _part(self, i: int, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of a tensor, of the shape of weight i, that are worked on: itself or a copy."""
        rows = self._rows[i]
        return tensor if rows is None else tensor[rows]

    def _write(self, i: int, tensor: torch.Tensor, part: torch.Tensor) -> None:
        """Write what has become of these rows, if they are a copy."""
        if (rows := self._rows[i]) is not None:
            tensor.index_copy_(0, rows, part)

    def _fixed(self, chosen: Sequence[int]) -> list[list[torch.Tensor]]:
        """The starts and, if there are any, the importances of some of the weights."""
        given = [self.starts] if self.importances is None else [self.starts, self.importances]
        return [[each[i] for i in chosen] for each in given]

    def add_gradient(self, strength: float) -> None:
        """Write λ F (θ - θ*) onto the gradients; a weight without one takes no part in the step."""
        whole = {i: g for i, weight in enumerate(self.weights) if (g := weight.grad) is not None}
        chosen = list(whole)
        own = [self._part(i, self.weights[i].detach()) for i in chosen]
        gradients = [self._part(i, g) for i, g in whole.items()]
        for gradient, given, start, *importance in _blocks(gradients, own, *self._fixed(chosen)):
            distance = torch._foreach_sub(given, start)
            for factor in importance:
                torch._foreach_mul_(distance, factor)
            torch._foreach_add_(gradient, distance, alpha=strength)
        for (i, g), part in zip(whole.items(), gradients, strict=True):
            self._write(i, g, part)

    def move(self, strength: float, rates: Rates) -> None:
        r"""The proximal step θ ← θ + (θ* - θ) ηλF / (1 + ηλF), each at its own rate η."""
        for rate, chosen in _by_rate(self.weights, rates).items():
            factor = rate * strength
            own = [self._part(i, self.weights[i].detach()) for i in chosen]
            for moved, start, *importance in _blocks(own, *self._fixed(chosen)):
                if not importance:
                    torch._foreach_lerp_(moved, start, factor / (1 + factor))
                    continue
                shares = torch._foreach_mul(importance[0], factor)
                distance = torch._foreach_sub(start, moved)
                torch._foreach_mul_(distance, shares)
                torch._foreach_add_(shares, 1.0)
                torch._foreach_addcdiv_(moved, distance, shares)
            for i, part in zip(chosen, own, strict=True):
                self._write(i, self.weights[i].detach(), part)

    def remember(self) -> None:
        """Keep the weights before a step."""
        own = [self._part(i, weight.detach()) for i, weight in enumerate(self.weights)]
        if not self._old:
            self._old = [torch.empty_like(w) for w in own]
        torch._foreach_copy_(self._old, own)

    def shorten(self, strength: float) -> None:
        r"""Shorten the step to θ_old + (1 - λ F / max F) (θ_new - θ_old)."""
        assert self.importances is not None
        own = [self._part(i, weight.detach()) for i, weight in enumerate(self.weights)]
        for moved, old, importance in _blocks(own, self._old, self.importances):
            ratios = torch._foreach_mul(importance, -strength / self._largest)
            torch._foreach_add_(ratios, 1.0)
            for weight, before, ratio in zip(moved, old, ratios, strict=True):
                weight.copy_(torch.lerp(before, weight, ratio))
        for i, part in enumerate(own):
            self._write(i, self.weights[i].detach(), part)

    def penalty(self) -> torch.Tensor:
        """Σ F (θ - θ*)² / 2."""
        total = torch.zeros((), dtype=torch.float32, device=self.starts[0].device)
        own = [self._part(i, weight.detach()) for i, weight in enumerate(self.weights)]
        for given, start, *importance in _blocks(own, *self._fixed(range(len(own))), write=False):
            distance = torch._foreach_sub(given, start)
            torch._foreach_mul_(distance, distance)
            for factor in importance:
                torch._foreach_mul_(distance, factor)
            total += torch.stack([each.sum() for each in distance]).sum()
        return total / 2


def _known_rows(importance: torch.Tensor) -> torch.Tensor | None:
    """The rows of a matrix with an F above 0, where they are less than half; None else."""
    if importance.ndim < 2 or not importance.numel():
        return None
    rows = importance.flatten(1).any(1).nonzero().flatten()
    return rows if 2 * len(rows) < len(importance) else None


class LowRankPull:
    r"""Pulls the change of LoRA weights: λ/2 · Σ F (ΔW - ΔW*)² with ΔW = s · B A, in float32.

    Args:
        adapted: The weight with its factors.
        start: The factors A and B at the start.
        importance: F of W, or None for 1 throughout.
    """

    def __init__(
        self,
        adapted: AdaptedWeight,
        start: tuple[torch.Tensor, torch.Tensor],
        importance: torch.Tensor | None,
    ) -> None:
        self.adapted, self.start = adapted, start
        self.importance = None if importance is None else adapted.of_change(importance).float()

    def _slope(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """F (ΔW - ΔW*)."""
        a0, b0 = (each.float() for each in self.start)
        distance = (b @ a - b0 @ a0).mul_(self.adapted.scaling)
        return distance if self.importance is None else distance.mul_(self.importance)

    def _factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.adapted.a.detach().float(), self.adapted.b.detach().float()

    def add_gradient(self, strength: float) -> None:
        """Write the penalty's gradient onto those of A and B, by the chain rule."""
        a, b = self._factors()
        slope = self._slope(a, b).mul_(self.adapted.scaling * strength)
        for factor, gradient in ((self.adapted.a, b.T @ slope), (self.adapted.b, slope @ a.T)):
            if factor.grad is not None:
                factor.grad.add_(gradient.to(factor.grad.dtype))

    def move(self, strength: float, rates: Rates) -> None:
        r"""A proximal step of B, then of A, stable for any strength.

        B ← B - ηλ G / (1 + ηλ D): D is a diagonal majoriser of the penalty's Hessian in B,
        D_ir = s² Σ_j F_ij |A_rj| Σ_q |A_qj|, so that the step never passes the minimum of its
        bound; and likewise A.
        """
        scale = self.adapted.scaling
        a, b = self._factors()
        if factor := rates.get(self.adapted.b, 0.0) * strength:
            bound = self._weighed(a.abs() * a.abs().sum(0)).mul_(scale**2 * factor)
            b = b - (self._slope(a, b) @ a.T).mul_(scale * factor) / (1 + bound)
            self.adapted.b.copy_(b)
        if factor := rates.get(self.adapted.a, 0.0) * strength:
            b = self.adapted.b.detach().float()
            sizes = (b.abs() * b.abs().sum(1, keepdim=True)).T
            bound = self._weighed(sizes, columns=True).mul_(scale**2 * factor)
            a = a - (b.T @ self._slope(a, b)).mul_(scale * factor) / (1 + bound)
            self.adapted.a.copy_(a)

    def _weighed(self, sizes: torch.Tensor, columns: bool = False) -> torch.Tensor:
        """Σ_j F_ij sizes_rj as (out, r); with `columns` Σ_i sizes_ri F_ij as (r, in)."""
        if self.importance is not None:
            return sizes @ self.importance if columns else self.importance @ sizes.T
        return sizes.sum(1, keepdim=True) if columns else sizes.sum(1)[None].clone()

    def penalty(self) -> torch.Tensor:
        """Σ F (ΔW - ΔW*)² / 2."""
        a, b = self._factors()
        a0, b0 = (each.float() for each in self.start)
        distance = (b @ a - b0 @ a0).mul_(self.adapted.scaling).square_()
        return (distance if self.importance is None else distance.mul_(self.importance)).sum() / 2


def _by_rate(weights: Sequence[nn.Parameter], rates: Rates) -> dict[float, list[int]]:
    """The numbers of the parameters that the optimizer has moved, by its rate."""
    found: dict[float, list[int]] = {}
    for index, weight in enumerate(weights):
        if rate := rates.get(weight, 0.0):
            found.setdefault(rate, []).append(index)
    return found


def _blocks(
    *tensors: Sequence[torch.Tensor], write: bool = True
) -> Iterator[list[list[torch.Tensor]]]:
    """Lists of pieces of tensors, of limited size and at least float32.

    Args:
        tensors: Lists with tensors of the same shapes.
        write: Whether what is done to the first list is written back.
    """
    block: list[list[torch.Tensor]] = [[] for _ in tensors]
    size = 0
    for each in zip(*tensors, strict=True):
        limit = CPU_BLOCK if each[0].device.type == "cpu" else DEVICE_BLOCK
        rows = max(1, limit // max(1, each[0][:1].numel())) if each[0].ndim else 1
        for pieces in zip(*(t.split(rows) if t.ndim else (t,) for t in each), strict=True):
            for part, piece in zip(block, pieces, strict=True):
                part.append(piece)
            size += pieces[0].numel()
            if size >= limit:
                yield from _in_float32(block, write)
                block, size = [[] for _ in tensors], 0
    if block[0]:
        yield from _in_float32(block, write)


def _in_float32(block: list[list[torch.Tensor]], write: bool) -> Iterator[list[list[torch.Tensor]]]:
    whole = [[t.float() if t.dtype.itemsize < 4 else t for t in tensors] for tensors in block]
    yield whole
    for given, made in zip(block[0], whole[0], strict=True) if write else ():
        if made is not given:
            given.copy_(made)
