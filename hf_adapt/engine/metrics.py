"""Averages of what is logged, kept on the device: one host sync per logging step."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object


class MetricAverager:
    """Weighted means of named values over micro-batches, steps and processes."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, torch.Tensor] = {}

    def add(
        self, name: str, value: torch.Tensor | float, count: torch.Tensor | float = 1.0
    ) -> None:
        """Add a mean over `count` items; nothing is copied to the host."""
        device = self._accelerator.device
        count = torch.as_tensor(count, dtype=torch.float32, device=device).detach()
        value = torch.as_tensor(value, dtype=torch.float32, device=device).detach()
        value = torch.where(count > 0, value * count, torch.zeros_like(value))  # a mean of none
        if name in self._sums:
            self._sums[name] += value
            self._counts[name] += count
        else:
            self._sums[name], self._counts[name] = value.clone(), count.clone()

    def drain(self) -> dict[str, float]:
        """The means over all processes since the last call, which are then forgotten."""
        names = sorted(self._sums)
        if self._accelerator.num_processes > 1:
            # A process may have logged a name that another has not: the tensors must agree.
            names = sorted(set(gather_object(names)))
        if not names:
            return {}
        zero = torch.zeros((), device=self._accelerator.device)
        table = torch.stack(
            [torch.stack([self._sums.get(n, zero), self._counts.get(n, zero)]) for n in names]
        )
        if self._accelerator.num_processes > 1:
            table = self._accelerator.reduce(table, reduction="sum")
        self._sums, self._counts = {}, {}
        return {n: s / c for n, (s, c) in zip(names, table.tolist(), strict=True) if c > 0}


class FiniteGuard:
    """Stops a run whose terms become NaN or infinite, naming the term.

    On an accelerator the flags are copied to the host without waiting and read one optimizer
    step later (and before anything is saved), so the check costs no synchronisation.
    """

    def __init__(self) -> None:
        self._values: dict[str, torch.Tensor] = {}
        self._in_flight: tuple[int, list[str], torch.Tensor, torch.cuda.Event | None] | None = None

    def add(self, name: str, value: torch.Tensor) -> None:
        """Add a micro-batch's value of a term; NaN and infinity survive the sum."""
        value = value.detach()
        self._values[name] = self._values[name] + value if name in self._values else value

    def end_step(self, step: int) -> None:
        """Queue the check of this optimizer step's values, and read the one before."""
        self.check()
        if not self._values:
            return
        flags = torch.stack([torch.isfinite(v) for v in self._values.values()])
        event = None
        if flags.is_cuda:
            flags = flags.to("cpu", non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._in_flight = (step, list(self._values), flags, event)
        self._values = {}
        if event is None:
            self.check()

    def check(self) -> None:
        """Read the flags in flight.

        Raises:
            FloatingPointError: If a term was not finite; says which and at which step.
        """
        if self._in_flight is None:
            return
        step, names, flags, event = self._in_flight
        self._in_flight = None
        if event is not None:
            event.synchronize()
        bad = [name for name, finite in zip(names, flags.tolist(), strict=True) if not finite]
        if bad:
            raise FloatingPointError(
                f"The term {', '.join(bad)} is NaN or infinite at step {step}: training was "
                "stopped and nothing was saved after it; checkpoints saved before are intact. "
                "Lower the learning rate or the term's weight, or train in bf16 instead of fp16."
            )
