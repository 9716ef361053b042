"""What several tasks in one training cost: mixed steps against plain steps of each task.

Ratios of runs that alternate in one process, so that a slow machine slows both sides, on a BERT of
MiniLM-L6's shape whose every weight trains. Three tasks, 16 rows of 64 tokens of each in a step:
two heads that classify rows, and one that classifies tokens.

1. A mixed step against the sum of three plain Trainers' steps, without weighting, with uncertainty
   and with DWA: the aim is 1.05.
2. Gradient surgery against the mixed step: a forward and a backward for each of K tasks, where a
   forward is a third of a step, are (1 + 2K) / 3 = 2.33.
3. The same with three micro-batches of one task each: the aim is 1.10.

    python benchmarks/multitask.py [--rounds 5] [--device cuda]

About ten minutes on two cores. Results: benchmarks/README.md.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import transformers
from datasets import Dataset
from measure import Clock, in_turns, print_machine, print_table, ratio
from torch.utils.data import SequentialSampler
from transformers import BertForSequenceClassification, BertForTokenClassification, Trainer
from workload import WITHOUT_DROPOUT, bert, random_rows, stack, step_seconds

from hf_adapt import AdaptationCallback
from hf_adapt.multitask import DynamicWeightAverage, MultiTask, TaskSpec, Uncertainty, mix, pcgrad

ROWS, TOKENS, STEPS, WARM_UP = 16, 64, 4, 2
KINDS = {
    "sentiment": BertForSequenceClassification,
    "spam": BertForSequenceClassification,
    "tags": BertForTokenClassification,
}


class InOrder(Trainer):
    """Takes the rows as they stand, so that each batch has as many of each task."""

    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def task_rows(task: str) -> Dataset:
    """Rows of one task."""
    rows = random_rows((STEPS + WARM_UP + 1) * ROWS, TOKENS, seed=len(task))
    if task != "tags":
        return rows
    tags = np.random.default_rng(0).integers(0, 2, (len(rows), TOKENS)).tolist()
    return rows.remove_columns("labels").add_column("labels", tags)


def alone(task: str, device: str) -> float:
    """Median seconds of a plain Trainer's step."""
    model = bert(KINDS[task], 6, **WITHOUT_DROPOUT)
    return step_seconds(model, task_rows(task), ROWS, STEPS, WARM_UP, clock=Clock(device))


def together(device: str, pure: bool = False, **options: Any) -> float:
    """Median seconds of a step with the rows of all tasks.

    Args:
        device: Where.
        pure: Whether each task's rows are a micro-batch, or one micro-batch has all.
        options: Of `MultiTask`.
    """
    specs = {
        "sentiment": TaskSpec(),
        "spam": TaskSpec(num_labels=2),
        "tags": TaskSpec(num_labels=2, head="token_classification", collator=stack),
    }
    each = {task: task_rows(task) for task in KINDS}
    rows: Any = mix(each, sampling="equal")
    settings = {"gradient_accumulation_steps": len(KINDS) if pure else 1}
    if pure:
        named = [rows.add_column("task", [task] * len(rows)) for task, rows in each.items()]
        blocks = [
            [dict(row) for row in own.select(range(start, start + ROWS))]
            for start in range(0, len(named[0]), ROWS)
            for own in named
        ]
        rows = [row for block in blocks for row in block]
    return step_seconds(
        bert(KINDS["sentiment"], 6, **WITHOUT_DROPOUT),
        rows,
        ROWS if pure else ROWS * len(KINDS),
        STEPS,
        WARM_UP,
        clock=Clock(device),
        callbacks=[AdaptationCallback(MultiTask(specs, **options))],
        kind=InOrder,
        settings=settings,
    )


def main() -> None:
    """Run the comparisons and print them as a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    print_machine(options.device, "torch", "transformers", "accelerate", "datasets")
    device = options.device
    sides: dict[str, Callable[[], float]] = {
        "plain": lambda: sum(alone(task, device) for task in KINDS),
        "mixed": lambda: together(device),
        "uncertainty": lambda: together(device, weighting=Uncertainty()),
        "DWA": lambda: together(device, weighting=DynamicWeightAverage(window=2)),
        "PCGrad": lambda: together(device, surgery=pcgrad),
        "pure": lambda: together(device, pure=True),
        "pure PCGrad": lambda: together(device, pure=True, surgery=pcgrad),
    }
    found = in_turns(sides, options.rounds)
    lines = []
    for one, other, wanted in (
        ("mixed", "plain", "1.05"),
        ("uncertainty", "plain", "1.05"),
        ("DWA", "plain", "1.05"),
        ("PCGrad", "mixed", f"{(1 + 2 * len(KINDS)) / 3:.2f}"),
        ("pure", "mixed", ""),
        ("pure PCGrad", "pure", "1.10"),
        ("pure PCGrad", "mixed", ""),
    ):
        line = ratio(f"{one} / {other}", found[one], found[other])
        lines.append({**line, "wanted": f"at most {wanted}" if wanted else ""})
    print_table(lines)
    print(f"Three plain steps: {1000 * statistics.median(found['plain']):.0f} ms.")


if __name__ == "__main__":
    main()
