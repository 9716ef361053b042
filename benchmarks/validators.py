"""What validators cost: each on many items, and all of them in an evaluation of a Trainer.

    python benchmarks/validators.py [--items 50000] [--rows 5000]

First the CPU seconds and the memory of each validator on random features of width 768 and logits of
20 classes, for 50,000 items of each domain. Then an evaluation of 5,000 target rows (and 500 source
rows) with LabelFreeValidation, against the stock Trainer's evaluation of the same rows. About five
minutes on two cores. Results: benchmarks/README.md.
"""

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
from measure import in_turns, print_machine, print_table, progress, ratio
from transformers import BertForSequenceClassification, Trainer, TrainingArguments
from workload import WITHOUT_DROPOUT, bert, random_rows

from hf_adapt import AdaptationCallback
from hf_adapt.evaluation import LabelFreeValidation, Neighborhoods, validators

WIDTH, CLASSES, TOKENS = 768, 20, 64


def megabytes() -> int:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def costs(items: int) -> list[dict[str, Any]]:
    """CPU seconds of each validator, and by how much memory the process has grown."""
    random = np.random.default_rng(0)
    labels = random.integers(0, CLASSES, items)
    directions = random.normal(size=(CLASSES, WIDTH)).astype(np.float32)

    def domain() -> tuple[Any, Any]:
        features = random.normal(size=(items, WIDTH)).astype(np.float32) + 0.3 * directions[labels]
        return features, (features @ directions.T / 20).astype(np.float32)

    (source, _), (target, logits) = domain(), domain()
    losses = random.random(items)
    sides: dict[str, Callable[[], float]] = {
        "entropy": lambda: validators.entropy(logits),
        "information_maximization": lambda: validators.information_maximization(logits),
        "nuclear_norm": lambda: validators.nuclear_norm(logits),
        "class_balance": lambda: validators.class_balance(logits),
        "ensemble_agreement (5 models)": lambda: validators.ensemble_agreement([logits] * 5),
        "neighbor_agreement": lambda: Neighborhoods(target, num_classes=CLASSES).agreement(logits),
        "class_ami": lambda: validators.class_ami(logits, target),
        "circular": lambda: validators.circular(target, logits, source, labels),
        "importance_weighted": lambda: validators.importance_weighted(source, losses, target),
        "deep_embedded": lambda: validators.deep_embedded(source, losses, target),
        "soft_neighborhood_density": lambda: validators.soft_neighborhood_density(logits),
    }
    before, lines = megabytes(), []
    for name, compute in sides.items():
        start = time.process_time()
        compute()
        line = {"validator": name, "CPU seconds": f"{time.process_time() - start:.1f}"}
        lines.append({**line, "memory MB": megabytes() - before})
        progress(lines[-1])
    total = sum(float(line["CPU seconds"]) for line in lines)
    return [
        *lines,
        {"validator": "all", "CPU seconds": f"{total:.1f}", "memory MB": megabytes() - before},
    ]


def evaluation(rows: int, width: int, rounds: int) -> dict[str, str]:
    """CPU time of an evaluation with all validators against one of the same rows without."""
    model = bert(BertForSequenceClassification, 6, width, **WITHOUT_DROPOUT)
    dev, target = random_rows(500, TOKENS), random_rows(rows, TOKENS, seed=2, labelled=False)

    def evaluated(validates: bool) -> float:
        args = TrainingArguments(
            "runs/validators", report_to=[], disable_tqdm=True, per_device_eval_batch_size=64
        )
        callbacks = [AdaptationCallback(LabelFreeValidation(target))] if validates else []
        trainer = Trainer(model, args, eval_dataset=dev, callbacks=callbacks)
        start = time.process_time()
        trainer.evaluate()
        if not validates:
            trainer.predict(target)
        return time.process_time() - start

    sides = {"with": lambda: evaluated(True), "without": lambda: evaluated(False)}
    found = in_turns(sides, rounds)
    return ratio("evaluation with validators / without", found["with"], found["without"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    datasets.disable_progress_bars()
    print_machine("cpu", "transformers", "torch", "scikit-learn")
    print_table(costs(given.items))
    print_table([evaluation(given.rows, given.width, given.rounds)])


if __name__ == "__main__":
    main()
