"""What the engine costs: a training step through it, against the same arithmetic by hand.

Two ratios, each of runs that alternate in one process, so that a slow machine slows both sides:

1. `callback / hand-written`: a step of `Trainer` + `DomainAdversarialCallback` against a loop that
   does the same arithmetic (joint forward, task loss, reversed domain loss, clipping, both AdamW
   optimizers, learning-rate schedule) over the same loader. The plain Trainer's own overhead over
   a plain loop is measured beside it, because it is inside the first ratio.
2. `weight 0 / stock`: a run whose objective is off against the plain Trainer.

    python benchmarks/engine_overhead.py [--pairs 8] [--steps 10] [--device cuda]

About five minutes on two cores. Results: benchmarks/README.md.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from measure import Clock, in_turns, print_machine, print_table, ratio
from transformers import (
    BertForSequenceClassification,
    TrainerCallback,
    get_linear_schedule_with_warmup,
)
from workload import WITHOUT_DROPOUT, bert, random_rows, stack, step_seconds

from hf_adapt import DANN
from hf_adapt.alignment import DomainAdversarialCallback, DomainDiscriminator
from hf_adapt.engine.collating import DOMAIN, AdaptationCollator
from hf_adapt.engine.pairing import PairedDataset, StreamRows
from hf_adapt.engine.progress import dann_ramp
from hf_adapt.engine.streams import TARGET, TRAINING, StreamTable

ROWS, TOKENS, WARM_UP = 16, 64, 3


def make_model() -> BertForSequenceClassification:
    """Of MiniLM-L6's shape."""
    return bert(BertForSequenceClassification, 6, **WITHOUT_DROPOUT)


def source(steps: int) -> Any:
    return random_rows((steps + WARM_UP + 1) * ROWS, TOKENS, seed=1)


def target() -> Any:
    return random_rows(400, TOKENS, seed=2, labelled=False)


def with_trainer(steps: int, device: str, callback: TrainerCallback | None = None) -> float:
    """Median seconds of a step of a Trainer."""
    return step_seconds(
        make_model(),
        source(steps),
        ROWS,
        steps,
        WARM_UP,
        clock=Clock(device, wall=True),
        callbacks=[callback] if callback else [],
    )


class Reverse(torch.autograd.Function):
    """Gradient reversal, by hand."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: float) -> torch.Tensor:
        """The identity."""
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """The reversed gradient."""
        return -ctx.scale * gradient, None


def by_hand(steps: int, device: str, aligned: bool) -> float:
    """The same arithmetic in a loop, over the same loader; source rows alone unless aligned."""
    model = make_model().to(device)
    model.train()
    rows, collator = source(steps), stack
    if aligned:
        rows = PairedDataset(rows, [StreamRows([target()])], seed=42)
        table = StreamTable((TRAINING, TARGET))
        collator = AdaptationCollator(stack, table=table, label_names=["labels"])
    loader = torch.utils.data.DataLoader(rows, ROWS, shuffle=True, collate_fn=collator)
    total = steps + WARM_UP
    discriminator = DomainDiscriminator(384, 2).to(device)
    optimizers = [
        torch.optim.AdamW(model.parameters(), 1e-5, weight_decay=0.0, fused=True),
        torch.optim.AdamW(discriminator.parameters(), 1e-3, weight_decay=0.0),
    ]
    schedules = [get_linear_schedule_with_warmup(o, 0, total) for o in optimizers]
    ramp, clock = dann_ramp(), Clock(device, wall=True)
    clock.tick()
    for step, loaded in enumerate(loader):
        if step == total:
            break
        batch = {key: value.to(device) for key, value in loaded.items()}
        domain = batch.pop(DOMAIN, None)
        labels = batch.pop("labels")
        hidden = model.bert(**batch)
        logits = model.classifier(model.dropout(hidden.pooler_output))
        loss = F.cross_entropy(logits, labels)
        if aligned:
            mask = batch["attention_mask"].unsqueeze(-1).float()
            features = (hidden.last_hidden_state * mask).sum(1) / mask.sum(1)
            scores = discriminator(Reverse.apply(features, ramp(step / total)))
            loss = loss + F.cross_entropy(scores, domain)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if aligned:
            torch.nn.utils.clip_grad_norm_(discriminator.parameters(), 1.0)
        float(loss.detach())  # the Trainer reads its loss at every step, to filter NaN
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        clock.tick()
    return clock.median(WARM_UP)


def main() -> None:
    """Run the comparisons and print them as a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    steps, device = options.steps, options.device
    transformers.logging.set_verbosity_error()
    print_machine(device, "torch", "transformers", "accelerate", "datasets")
    assert DANN().hidden_sizes == (256,), "the hand-written discriminator is the default one"

    def adversarial(**settings: Any) -> float:
        callback = DomainAdversarialCallback(target_dataset=target(), **settings)
        return with_trainer(steps, device, callback)

    comparisons: list[dict[str, Callable[[], float]]] = [
        {
            "plain Trainer": lambda: with_trainer(steps, device),
            "plain loop": lambda: by_hand(steps, device, aligned=False),
        },
        {
            "callback": adversarial,
            "hand-written loop": lambda: by_hand(steps, device, aligned=True),
        },
        {
            "weight 0": lambda: adversarial(weight=0),
            "stock Trainer": lambda: with_trainer(steps, device),
        },
    ]
    lines = []
    for sides in comparisons:
        seconds = in_turns(sides, options.pairs)
        shown = " / ".join(f"{statistics.median(values):.3f}" for values in seconds.values())
        line = ratio(" / ".join(sides), *seconds.values())
        lines.append({**line, "seconds per step": shown})
    print_table(lines)


if __name__ == "__main__":
    main()
