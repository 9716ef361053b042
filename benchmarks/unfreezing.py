"""What freezing saves: the time of a training step with the lower k of 12 layers frozen.

All runs alternate in one process. On a CPU it is one thread and its CPU time that count: wall time,
and threads that wait for one another, would measure what else a shared machine is doing.

1. `k of 12 frozen / full`, against T(k) = F + B (1 - k/12): F is a forward without gradients, B the
   rest of a full step, both measured here.
2. `stock checkpointing / ours`, k = 9: a Trainer with gradient checkpointing and the same
   parameters frozen by hand, against the callback.
3. `full / cached prefix`, k = 6 and 9: from the second epoch on.

    python benchmarks/unfreezing.py [--rounds 5] [--steps 8] [--device cuda]

About seven minutes on two cores. Results: benchmarks/README.md.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import transformers
from measure import Clock, in_turns, print_machine, print_table, ratio
from transformers import BertForSequenceClassification
from workload import bert, random_rows, stack, step_seconds

from hf_adapt import GradualUnfreezingCallback
from hf_adapt.unfreezing import FreezeOnly

LAYERS, ROWS, TOKENS, WARM_UP = 12, 16, 64, 3


def make_model() -> BertForSequenceClassification:
    """A BERT of 12 layers of width 384 (33M parameters)."""
    return bert(BertForSequenceClassification, LAYERS)


def lower(k: int) -> FreezeOnly:
    """The embeddings and the lower k layers."""
    return FreezeOnly("embeddings", *(f"layer.{i}" for i in range(k)))


def step(
    steps: int,
    device: str,
    callback: GradualUnfreezingCallback | None = None,
    frozen_by_hand: int = 0,
    first_epoch: bool = False,
    **settings: Any,
) -> float:
    """Median seconds of a step after the warm-up, or after a first epoch of `steps` steps."""
    warm_up = steps + WARM_UP if first_epoch else WARM_UP
    model = make_model()
    if frozen_by_hand:
        for module in (model.bert.embeddings, *model.bert.encoder.layer[:frozen_by_hand]):
            module.requires_grad_(False)
    return step_seconds(
        model,
        random_rows(steps * ROWS if first_epoch else (warm_up + steps) * ROWS, TOKENS),
        ROWS,
        steps,
        warm_up,
        clock=Clock(device),
        callbacks=[callback] if callback else [],
        settings=settings,
    )


def forward(steps: int, device: str) -> float:
    """Median seconds of a forward in training mode, without gradients."""
    model = make_model().to(device).train()
    batch = {k: v.to(device) for k, v in stack(list(random_rows(ROWS, TOKENS))).items()}
    clock = Clock(device)
    clock.tick()
    for _ in range(steps + WARM_UP):
        with torch.no_grad():
            float(model(**batch).loss)
        clock.tick()
    return clock.median(WARM_UP)


def main() -> None:
    """Run all sides in turn and print the ratios as a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps, device = options.steps, options.device
    transformers.logging.set_verbosity_error()
    print_machine(device, "torch", "transformers", "accelerate", "datasets")

    def ours(k: int, cached: bool = False, **settings: Any) -> float:
        callback = GradualUnfreezingCallback(lower(k), cache_frozen_prefix=cached)
        return step(steps, device, callback, first_epoch=cached, **settings)

    checkpointing = {"gradient_checkpointing": True}
    sides: dict[str, Callable[[], float]] = {
        "forward": lambda: forward(steps, device),
        "full": lambda: step(steps, device),
        **{f"k={k}": lambda k=k: ours(k) for k in (3, 6, 9, 11)},
        "stock checkpointing k=9": lambda: step(steps, device, frozen_by_hand=9, **checkpointing),
        "our checkpointing k=9": lambda: ours(9, **checkpointing),
        **{f"cached k={k}": lambda k=k: ours(k, cached=True) for k in (6, 9)},
    }
    seconds = in_turns(sides, options.rounds)
    full = seconds["full"]
    lines = [ratio(f"k={k} / full", seconds[f"k={k}"], full) for k in (3, 6, 9, 11)]
    for k in (3, 6, 9, 11):
        pairs = zip(seconds["forward"], full, strict=True)
        expected = [f + (whole - f) * (1 - k / LAYERS) for f, whole in pairs]
        lines.append(ratio(f"k={k} / T({k})", seconds[f"k={k}"], expected))
    stock, our = "stock checkpointing k=9", "our checkpointing k=9"
    lines.append(ratio(f"{stock} / {our}", seconds[stock], seconds[our]))
    for k in (6, 9):
        lines.append(ratio(f"full / cached k={k}", full, seconds[f"cached k={k}"]))
    print_table(lines)


if __name__ == "__main__":
    main()
