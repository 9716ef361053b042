"""Clocks, ratios, processes and tables, for the benchmarks and the examples."""

import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from hf_adapt.experiments.tables import markdown
from hf_adapt.experiments.versions import versions


# ---------------------------------------------------------------- time
class Clock(TrainerCallback):
    """Note when each optimizer step of a Trainer, or each pass of a hand-written loop, ended.

    On a CPU it is the CPU time of the process that counts, because wall time would measure what
    else a shared machine is doing; on a GPU it is wall time, after all queued work.

    Args:
        device: "cpu" or "cuda".
        wall: Whether wall time counts on a CPU too.
    """

    def __init__(self, device: str = "cpu", wall: bool = False) -> None:
        self.device, self.wall = device, wall
        self.ticks: list[float] = []

    def tick(self) -> None:
        """Note the time; call it once before the first pass and after each."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        wall = self.wall or self.device == "cuda"
        self.ticks.append(time.perf_counter() if wall else time.process_time())

    def median(self, warm_up: int) -> float:
        """Median seconds of a step, without the first `warm_up` of them."""
        return statistics.median(b - a for a, b in itertools.pairwise(self.ticks[warm_up:]))

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.tick()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.tick()


def in_turns(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run all sides in turn, in the reverse order every second round; return each side's values."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            found[name].append(sides[name]())
        progress({name: round(values[-1], 4) for name, values in found.items()})
    return found


def ratio(comparison: str, one: Iterable[float], other: Iterable[float]) -> dict[str, str]:
    """A line of a table: median and quartiles of the ratios of two sides, round by round."""
    ratios = [a / b for a, b in zip(one, other, strict=True)]
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return {
        "comparison": comparison,
        "ratio": f"{middle:.3f}",
        "quartiles": f"{low:.3f}–{high:.3f}",
    }


# ---------------------------------------------------------------- processes
def in_fresh_process(
    script: str, *arguments: object, environment: Mapping[str, str] | None = None
) -> Any:
    """Run a script by itself and return the JSON value in the last line that it printed."""
    done = subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------- what is printed
def print_machine(device: str, *packages: str) -> None:
    """Print a JSON line of what the numbers below it were measured on."""
    where = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    line = {"machine": where, "threads": torch.get_num_threads(), **versions(*packages)}
    print(json.dumps(line), flush=True)


def progress(value: Any) -> None:
    """Print a value to the standard error, where it does not mix with the results."""
    print(f"# {json.dumps(value, ensure_ascii=False)}", file=sys.stderr, flush=True)


def print_table(lines: Sequence[Mapping[str, Any]]) -> None:
    """Print lines as a table in Markdown, with a dash where a line has no such cell."""
    head = list(dict.fromkeys(itertools.chain.from_iterable(lines)))
    cells = [[line.get(name, "–") for name in head] for line in lines]
    shown = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in cells]
    print(f"\n{markdown([head, *shown])}", flush=True)
