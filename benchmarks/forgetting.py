"""What a classifier forgets of an old task when it learns a new one, and what keeps it.

Fine-tunes MiniLM-L6 on the old task, then on the new one: once as any script would (plain), once
with each method, and once on the rows of both (joint). With `sms email` both tasks have the same
classes. With `movies sms` the new task has classes of its own: the head grows from two to four, and
scores are among all four. The last model of each run is tested.

    python benchmarks/forgetting.py --bf16 true --use_cpu true
    python benchmarks/forgetting.py --tasks movies sms --num_train_epochs 4 --methods plain replay

About half a minute a run on one idle core. Each run's numbers are kept in --output_dir: the same
command goes on where it stopped, and several may run at once. Writes results.json, table.md and
forgetting.png there.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from domain_data import LICENCES, MINILM_LICENCE, minilm_path
from experiment import changed, check_methods, fingerprint, kept, new_classifier, option, parse, run
from matplotlib.figure import Figure
from results import report, summarize
from transformers import AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments, set_seed
from two_tasks import Task, accuracies, grown, load_tasks, task_trainer

from hf_adapt import Adaptation, adapt
from hf_adapt.continual import (
    AGEM,
    AveragedWeights,
    Consolidation,
    Fisher,
    KeepPredictions,
    Replay,
    ReplayMemory,
    continual_metrics,
    interpolate,
)
from hf_adapt.experiments.plots import GREY
from hf_adapt.experiments.summary import percent

MEMORY_SIZE = 100  # rows of the old task that are seen again


@dataclass(frozen=True)
class Start:
    """A model that knows the old task, saved, and what it may learn next."""

    path: Path
    old: Task
    new: Task
    labels: list[str]
    tokenizer: Any
    freeze_layers: int
    args: TrainingArguments

    def memory(self, size: int = MEMORY_SIZE) -> ReplayMemory:
        """Some rows of the old task."""
        return ReplayMemory.from_dataset(self.old.train, size=size)

    def learn(self, *adaptations: Adaptation, rows: Dataset | None = None) -> Trainer:
        """Train on the new task, or on other rows, with some methods; return the Trainer."""
        set_seed(self.args.seed)
        model = grown(self.path, self.labels)
        return self.train(model, rows or self.new.train, *adaptations)

    def train(self, model: PreTrainedModel, rows: Dataset, *adaptations: Adaptation) -> Trainer:
        """Train a model on some rows with some methods; return the Trainer."""
        trainer = task_trainer(model, self.tokenizer, self.args, rows, self.freeze_layers)
        adapt(trainer, *adaptations).train()
        return trainer

    def between(self, alpha: float) -> Trainer:
        """Train without any method, and go part of the way back to the start."""
        trainer = self.learn()
        trainer.model = interpolate(self.path, trainer.model, alpha)
        return trainer

    def scores(self, trainer: Trainer) -> dict[str, float]:
        """Accuracies on both tasks."""
        found = {}
        for name, task in (("old", self.old), ("new", self.new)):
            found[name], found[f"{name}, own classes"] = accuracies(trainer, task)
        return found


METHODS: dict[str, Callable[[Start], Trainer]] = {
    "plain": lambda start: start.learn(),
    "replay": lambda start: start.learn(Replay(start.memory())),
    "replay, 200 rows": lambda start: start.learn(Replay(start.memory(200))),
    "KL to start": lambda start: start.learn(KeepPredictions(start=str(start.path))),
    "L2-SP": lambda start: start.learn(Consolidation()),
    "EWC": lambda start: start.learn(Consolidation(Fisher(start.old.train))),
    "EMA": lambda start: start.learn(AveragedWeights("ema")),
    "SFA": lambda start: start.learn(AveragedWeights("sfa")),
    "interpolation": lambda start: start.between(0.5),
    "A-GEM": lambda start: start.learn(AGEM(start.memory())),
    "replay + KL": lambda start: start.learn(
        Replay(start.memory()), KeepPredictions(start=str(start.path), on="replay")
    ),
    "joint": lambda start: start.learn(
        rows=concatenate_datasets([start.old.train, start.new.train])
    ),
}


@dataclass
class BenchmarkArguments:
    tasks: list[str] = field(
        default_factory=lambda: ["sms", "email"],
        metadata={"help": "The old and the new task: domains of vader4 or spam2"},
    )
    model_name_or_path: str | None = option(None, f"Folder or hub id. Default: {MINILM_LICENCE}")
    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": f"Any of: {', '.join(METHODS)}"}
    )
    seeds: int = option(3, "Runs of each method, with seeds from --seed on")
    num_train: int = option(480, "Training rows of each task")
    num_test: int = option(500, "Test rows of each task, at most")
    max_length: int = option(48, "Tokens of a text that are read")
    freeze_layers: int = option(3, "Train neither the embeddings nor the first layers, for speed")

    def __post_init__(self) -> None:
        check_methods(self.methods, METHODS)


def learn_old(start: Start, model_path: str) -> dict[str, float]:
    """Fine-tune on the old task and save the model; return its accuracies on both tasks."""
    set_seed(start.args.seed)
    trainer = start.train(new_classifier(model_path, start.old.labels), start.old.train)
    trainer.save_model(str(start.path))
    trainer.model = grown(start.path, start.labels)
    return start.scores(trainer)


def cell(method: str, start: Start, before: dict[str, float]) -> dict[str, Any]:
    """One run of a method: its scores, and its seconds of CPU time."""
    began = time.process_time()
    trainer = METHODS[method](start)
    seconds = time.process_time() - began
    after = start.scores(trainer)
    matrix = [[scores["old"], scores["new"]] for scores in (before, after)]
    return {
        "method": method,
        "seed": start.args.seed,
        "seconds": seconds,
        **{f"{name}, before": score for name, score in before.items()},
        **{f"{name}, after": score for name, score in after.items()},
        **continual_metrics(matrix),
    }


REFERENCES = {"plain": "X", "joint": "*"}  # and how they are marked in the plot
OWN = "old, own classes, after"
COLUMNS = {
    "old before": "old, before",
    "old after": "old, after",
    "own classes": OWN,
    "forgetting": "forgetting",
    "new": "new, after",
    "learning accuracy": "learning_accuracy",
}


def table_rows(summary: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The table's cells, header first; the share of plain's forgetting that a method removes."""
    shown = dict(COLUMNS)
    if all(values[OWN] == values["old, after"] for values in summary.values()):
        shown.pop("own classes")  # both tasks have the same
    rows = [["method", *shown, "removed", "seconds"]]
    lost = summary["plain"]["forgetting"]["mean"] if "plain" in summary else 0
    for method, values in summary.items():
        known = lost > 0 and method != "plain"
        share = f"{100 * (1 - values['forgetting']['mean'] / lost):.0f} %" if known else "–"
        cells = [percent(values[name]) for name in shown.values()]
        rows.append([method, *cells, share, f"{values['seconds']['mean']:.0f}"])
    return rows


AXES = {
    "forgetting": "forgetting: points of accuracy that the old task has lost",
    "learning_accuracy": "learning accuracy, %",
}


def plot(
    results: list[dict[str, Any]],
    summary: dict[str, dict[str, Any]],
    title: str,
    labels: dict[str, str] = AXES,
    scale: float = 100,
) -> Figure:
    """Forgetting against learning: a large dot for each method, a small one for a run."""
    figure = Figure(figsize=(7.6, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, (method, values) in enumerate(summary.items()):
        style = {"color": f"C{number % 10}", "marker": "os"[number // 10]}
        if method in REFERENCES:
            style = {"color": GREY, "marker": REFERENCES[method]}
        runs = [[scale * run[key] for key in labels] for run in results if run["method"] == method]
        axes.scatter(*zip(*runs, strict=True), s=12, alpha=0.4, **style)
        axes.scatter(*(scale * values[key]["mean"] for key in labels), s=48, label=method, **style)
    across, up = labels.values()
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    script, args, console = parse(
        BenchmarkArguments, __doc__, argv, output_dir="runs/forgetting", num_train_epochs=2
    )
    console.print(f"[dim]{LICENCES['vader4']}\n{LICENCES['spam2']}\n{MINILM_LICENCE}[/dim]")
    path = script.model_name_or_path or str(minilm_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    old, new, labels = load_tasks(
        script.tasks, tokenizer, script.num_train, script.num_test, script.max_length
    )
    folder = Path(args.output_dir) / "-".join(script.tasks)
    data = {"train": old.train, "test": old.test}, {"train": new.train, "test": new.test}
    cells = folder / fingerprint(script, args, ("methods", "seeds"), *data)
    results = []
    for seed in range(args.seed, args.seed + script.seeds):
        own = changed(args, seed=seed, output_dir=str(cells / f"model-{seed}"))
        start = Start(Path(own.output_dir), old, new, labels, tokenizer, script.freeze_layers, own)
        before = kept(cells / f"start-{seed}.json", partial(learn_old, start, path))
        for method in script.methods:
            made = partial(cell, method, start, before)
            found = kept(cells / f"{method.replace(' ', '_')}-{seed}.json", made)
            results.append(found)
            console.print(
                f"{method}, seed {seed}: old {found['old, before']:.3f} → "
                f"{found['old, after']:.3f}, new {found['new, after']:.3f}",
                highlight=False,
            )
    summary = summarize(results, METHODS, [*COLUMNS.values(), "seconds"])
    title = f"{script.tasks[0]}, then {script.tasks[1]}"
    legend = (
        f"Accuracy in %, mean ± sd over {script.seeds} seed(s); {len(old.train)} and "
        f"{len(new.train)} training rows, among {len(labels)} classes. "
        "own classes: of the old task, after. removed: of plain's forgetting. seconds: CPU time."
    )
    figures = {"forgetting.png": plot(results, summary, title)}
    report(table_rows(summary), legend, {"runs": results}, figures, folder, console, title)


if __name__ == "__main__":
    run(main)
