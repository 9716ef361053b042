"""One model for sentiment, spam and the words' tags: is it as good as a model for each?

Fine-tunes MiniLM-L6 on the sentiment of movie reviews, of which few have labels, on spam in SMS,
and on the part-of-speech tags of newspapers: alone, and together with a head for each task, with
the losses weighed in several ways and with gradient surgery. Every run sees the same number of
rows of each task: a step of a mixture has as many as one step of each single run.

    python benchmarks/task_mixtures.py --seeds 3 --bf16 true --use_cpu true

Five minutes of one CPU core for a seed. Writes results.json, table.md, and a heat map of what a
step on one task does to the others to --output_dir, where each run's numbers are kept: the same
command goes on where it stopped. Results: docs/results.md. Every option of TrainingArguments can
be given as well.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from domain_data import MINILM_LICENCE, minilm_path
from experiment import changed, check_methods, fingerprint, kept, new_classifier, option, parse, run
from results import report, summarize
from three_tasks import ABOUT, NAMES, SCORED, SPLITS, LoadedTask, load_tasks
from transformers import AutoTokenizer, Trainer, TrainingArguments, set_seed

from hf_adapt import AdaptationCallback
from hf_adapt.experiments.summary import percent
from hf_adapt.experiments.training import first_groups, freeze
from hf_adapt.multitask import (
    MultiTask,
    TaskSpec,
    Uncertainty,
    affinity_plot,
    mix,
    pcgrad,
    relative_gain,
)

ALONE, MIXTURE, TUNED = "alone", "mixture", "tuned weights"
METHODS: dict[str, Callable[[], dict[str, Any]]] = {
    ALONE: dict,  # a plain Trainer for each task
    MIXTURE: lambda: {"diagnose_every": 10},
    "uncertainty": lambda: {"weighting": Uncertainty()},
    "PCGrad": lambda: {"surgery": pcgrad},
    "sentiment × 3": lambda: {"weighting": {"sentiment": 3.0}},
    "sentiment × ⅓": lambda: {"weighting": {"sentiment": 1 / 3}},
}
WEIGHTS = (MIXTURE, "sentiment × 3", "sentiment × ⅓")  # the best on development rows is TUNED


@dataclass
class ExampleArguments:
    model_name_or_path: str | None = option(None, f"Folder or hub id. Default: {MINILM_LICENCE}")
    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": f"Any of: {', '.join(METHODS)}"}
    )
    seeds: int = option(1, "Runs of each method, with seeds from --seed on")
    few: int = option(100, "Training rows of sentiment")
    num_train: int = option(320, "Training rows of each other task; rows of each in an epoch")
    num_test: int = option(400, "Test rows of each task, at most; half as many for development")
    max_length: int = option(32, "Tokens of a text that are read")
    freeze_layers: int = option(3, "Train neither the embeddings nor the first layers, for speed")

    def __post_init__(self) -> None:
        check_methods([ALONE, *self.methods], METHODS)


def cell(
    method: str,
    script: ExampleArguments,
    args: TrainingArguments,
    path: str,
    tokenizer: Any,
    tasks: dict[str, LoadedTask],
) -> dict[str, Any]:
    """One run of a method: its scores on development and test rows, and its seconds of CPU."""
    found: dict[str, Any] = {"method": method, "seed": args.seed}
    began = time.process_time()

    def trained(names: tuple[str, ...]) -> Trainer:
        """A Trainer of one task or of several; the first one's model, collator and metrics."""
        own, batch = tasks[names[0]], args.per_device_train_batch_size
        set_seed(args.seed)
        model = new_classifier(path, own.labels, own.kind)
        freeze(model, first_groups(model, script.freeze_layers))
        trainer = Trainer(
            model=model,
            args=changed(args, per_device_train_batch_size=batch * len(names)),
            train_dataset=mix(
                {name: tasks[name].train for name in names},
                sampling="equal",
                size=script.num_train * len(names),
                column="task" if len(names) > 1 else None,
            ),
            processing_class=tokenizer,
            data_collator=own.collator,
            compute_metrics=own.metrics,
        )
        if len(names) > 1:
            specs = {
                "sentiment": TaskSpec(),  # the Trainer's own
                "spam": TaskSpec(num_labels=tasks["spam"].labels, metrics=tasks["spam"].metrics),
                "tags": TaskSpec(
                    num_labels=tasks["tags"].labels,
                    head="token_classification",
                    metrics=tasks["tags"].metrics,
                ),
            }
            trainer.add_callback(AdaptationCallback(MultiTask(specs, **METHODS[method]())))
        trainer.train()
        return trainer

    runs = [(name,) for name in NAMES] if method == ALONE else [NAMES]
    trainers = [(names, trained(names)) for names in runs]
    found["seconds"] = time.process_time() - began
    for names, trainer in trainers:
        for split in SPLITS[1:]:
            rows = {name: getattr(tasks[name], split) for name in names}
            scores = trainer.evaluate(rows, metric_key_prefix=split)
            found |= {f"{split} {name}": scores[f"{split}_{name}_score"] for name in names}
    affinity = Path(args.output_dir, "task_affinity.json")
    if affinity.exists():
        found["affinity"] = json.loads(affinity.read_text())["affinity"]
    return found


def gain(found: dict[str, Any], alone: dict[str, Any], split: str) -> float:
    """How much better a run is than the single runs of its seed (Δm)."""
    both = ({name: each[f"{split} {name}"] for name in NAMES} for each in (found, alone))
    return relative_gain(*both)


def main(argv: list[str] | None = None) -> None:
    script, args, console = parse(
        ExampleArguments, __doc__, argv, output_dir="runs/task_mixtures", num_train_epochs=3
    )
    console.print(f"[dim]{ABOUT}\n{MINILM_LICENCE}[/dim]")
    path = script.model_name_or_path or str(minilm_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    sizes = {**dict.fromkeys(NAMES, script.num_train), "sentiment": script.few}
    tasks = load_tasks(tokenizer, sizes, script.num_test, script.max_length)
    data = ({split: getattr(task, split) for split in SPLITS} for task in tasks.values())
    folder = Path(args.output_dir)
    cells = folder / fingerprint(script, args, ("methods", "seeds"), *data)
    results: list[dict[str, Any]] = []
    for seed in range(args.seed, args.seed + script.seeds):
        own: dict[str, dict[str, Any]] = {}
        for method in dict.fromkeys([ALONE, *script.methods]):
            name = f"{method.replace(' ', '_')}-{seed}"
            given = changed(args, seed=seed, output_dir=str(cells / name))
            make = partial(cell, method, script, given, path, tokenizer, tasks)
            own[method] = kept(cells / f"{name}.json", make)
            scores = ", ".join(f"{task} {own[method][f'test {task}']:.3f}" for task in NAMES)
            console.print(f"{method}, seed {seed}: {scores}", highlight=False)
        candidates = [own[name] for name in WEIGHTS if name in own]
        if len(candidates) > 1:
            best = max(candidates, key=lambda each: gain(each, own[ALONE], "dev"))
            seconds = sum(each["seconds"] for each in candidates)
            own[TUNED] = {**best, "chosen": best["method"], "method": TUNED, "seconds": seconds}
        for each in own.values():
            each["gain"] = gain(each, own[ALONE], "test")
        results += own.values()

    if args.process_index != 0:
        return
    shown = [*(f"test {name}" for name in NAMES), "gain"]
    summary = summarize(results, [*METHODS, TUNED], [*shown, "seconds"])
    rows = [["method", *NAMES, "Δm", "seconds"]]
    for method, values in summary.items():
        means = [percent(values[key]) for key in shown]
        rows.append([method, *means, f"{values['seconds']['mean']:.0f}"])
    counts = ", ".join(f"{len(task.train)} of {name}" for name, task in tasks.items())
    legend = (
        f"{SCORED}, mean ± sd over {script.seeds} seed(s); training rows: {counts}. "
        "Δm: mean relative gain on the single runs. seconds: CPU time. "
        f"{TUNED}: of {', '.join(WEIGHTS)} the best on development rows, the seconds of all."
    )
    mixtures = [each for each in results if each["method"] == MIXTURE]
    maps = [np.array(each["affinity"], dtype=float) for each in mixtures]
    figures = {"affinity.png": affinity_plot(np.mean(maps, axis=0), NAMES)} if maps else {}
    report(rows, legend, {"runs": results}, figures, folder, console)


if __name__ == "__main__":
    run(main)
