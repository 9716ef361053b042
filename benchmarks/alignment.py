"""What each method of alignment costs: its training step against the same batch without the term.

Both sides run through the engine with the same two-domain batch of 64 + 64 rows, in turns in one
process; the baseline is an objective on the same features whose value is 0. Then the memory of
target rows: how long a lookup of one batch takes in 100,000 rows of width 768.

    python benchmarks/alignment.py [--rounds 5] [--methods mmd,coral] [--width 384]

About fifteen minutes on two cores. Results: benchmarks/README.md.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from measure import Clock, in_turns, print_machine, print_table, ratio
from transformers import BertForSequenceClassification
from workload import WITHOUT_DROPOUT, bert, random_rows, step_seconds

from hf_adapt import Adaptation, AdaptationCallback, Objective
from hf_adapt import alignment as a
from hf_adapt.alignment.row_bank import RowBank

ROWS, TOKENS, WARM_UP, STEPS = 64, 32, 3, 6
BANK_ROWS, BANK_WIDTH = 100_000, 768


class Nothing(Objective):
    """Reads features and predictions, and adds 0."""

    needs_streams = ("target",)

    def loss(self, batch: Any) -> torch.Tensor:
        return batch.features()[0].sum() * 0.0 + batch.logits()[0].sum() * 0.0


# Each with the forwards of all rows that a step needs beyond the first.
METHODS: dict[str, tuple[Callable[[], list[Adaptation]], float]] = {
    "mmd": (lambda: [a.MMD()], 0),
    "coral": (lambda: [a.CORAL()], 0),
    "cmd": (lambda: [a.CMD()], 0),
    "jmmd": (lambda: [a.JMMD()], 0),
    "deep_jdot": (lambda: [a.DeepJDOT()], 0),
    "afn": (lambda: [a.AFN()], 0),
    "mcc": (lambda: [a.MCC()], 0),
    "bnm": (lambda: [a.BNM()], 0),
    "information_maximization": (lambda: [a.InformationMaximization()], 0),
    "entropy_minimization": (lambda: [a.EntropyMinimization()], 0),
    "dann": (lambda: [a.DANN()], 0),
    "cdan": (lambda: [a.CDAN()], 0),
    "mdd": (lambda: [a.MDD()], 0),
    "mcd": (lambda: [a.MCD()], 0),
    "importance_weighting": (lambda: [a.ImportanceWeighting()], 0),
    "atdoc": (lambda: [a.ATDOC(0.2)], 0),
    "aad": (lambda: [a.AaD()], 0),
    "supervised_contrastive": (lambda: [a.SupervisedContrastive()], 0),
    "rdrop": (lambda: [a.RDrop()], 1),
    "fgm": (lambda: [a.FGM()], 1),
    "vat": (lambda: [a.VAT()], 2),
}


def step(make: Callable[[], list[Adaptation]], width: int, device: str) -> float:
    """Median seconds of a step of 64 source and 64 target rows."""
    model = bert(BertForSequenceClassification, 2, width, **WITHOUT_DROPOUT)
    callback = AdaptationCallback(
        *make(), target_dataset=random_rows(256, TOKENS, seed=2, labelled=False)
    )
    rows = random_rows((STEPS + WARM_UP + 1) * ROWS, TOKENS)
    clock = Clock(device)
    return step_seconds(model, rows, ROWS, STEPS, WARM_UP, clock=clock, callbacks=[callback])


def lookup(device: str) -> dict[str, Any]:
    """Seconds to find the five nearest of 100,000 rows for a batch of 64."""
    generator = torch.Generator().manual_seed(0)
    bank = RowBank()
    features = F.normalize(torch.randn(BANK_ROWS, BANK_WIDTH, generator=generator))
    bank.fill(torch.randint(-(2**62), 2**62, (BANK_ROWS,), generator=generator), x=features)
    bank.to(torch.device(device))
    keys = bank.keys[:ROWS]
    found = []
    for _ in range(12):
        begin = time.process_time() if device == "cpu" else time.perf_counter()
        places, _ = bank.find(keys)
        similarity = bank.values["x"][places] @ bank.values["x"].T
        similarity.topk(5, dim=1).indices.sum().item()
        end = time.process_time() if device == "cpu" else time.perf_counter()
        found.append(end - begin)
    finds = []
    for _ in range(50):
        begin = time.perf_counter()
        bank.find(keys)
        finds.append(time.perf_counter() - begin)
    megabytes = bank.values["x"].numel() * 4 / 2**20
    return {
        "rows × width": f"{BANK_ROWS:,} × {BANK_WIDTH}",
        "find 64 keys, ms": f"{1000 * statistics.median(finds):.2f}",
        "and their 5 neighbours, ms": f"{1000 * statistics.median(found):.1f}",
        "memory, MiB": f"{megabytes:.0f}",
    }


def main() -> None:
    """Run the comparisons and print them as tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    print_machine(options.device, "torch", "transformers", "accelerate")
    print_table([lookup(options.device)])
    lines = []
    for name in options.methods:
        make, forwards = METHODS[name]
        sides = {
            name: lambda make=make: step(make, options.width, options.device),
            "no term": lambda: step(lambda: [Nothing()], options.width, options.device),
        }
        seconds = in_turns(sides, options.rounds)
        line = ratio(f"{name} / no term", *seconds.values())
        lines.append({**line, "further forwards": f"{forwards:g}"})
    print_table(lines)


if __name__ == "__main__":
    main()
