"""With few labels, which layers should train when, in the domain of the labels and outside it?

Fine-tunes one sentence encoder on a few hundred labelled movie reviews in four ways, and tests
each on movie reviews and, without having seen anything of them, on tweets, product reviews and
newspaper editorials:

    full     everything trains from the start
    head     the head alone (a linear probe)
    lp-ft    the head alone in the first half, then everything
    gradual  the head first, then one layer group more per phase, from the top; each layer at a
             smaller rate than the one above it, under a slanted triangular schedule (ULMFiT)

Each way but the first is one line: a `GradualUnfreezingCallback`. Nothing is chosen on the test
domains: rates and the number of epochs were settled on the development rows of the movie reviews,
and the last model of each run is tested.

    python examples/gradual_unfreezing.py
    python examples/gradual_unfreezing.py --num_train 100 --seeds 5
    python examples/gradual_unfreezing.py --source tweets --learning_rate 2e-4

Takes about six minutes on two CPU cores. Writes results.json, table.md and unfreezing.png to
--output_dir. Every option of TrainingArguments can be given as well.
"""

import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from matplotlib.figure import Figure
from sklearn.metrics import accuracy_score
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_adapt import GradualUnfreezingCallback
from hf_adapt.engine.progress import slanted_triangular
from hf_adapt.unfreezing import LPFT, Surgical, unfreezing_plan

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # what the examples share
from domain_data import LICENCES, MINILM_LICENCE, load_pair, minilm_path
from experiment import (
    DOMAINS,
    TESTS,
    changed,
    check_methods,
    new_classifier,
    option,
    parse,
    predict,
    run,
    tokenized,
)
from results import grouped_bars, report, summarize

from hf_adapt.experiments.summary import percent

# A new head needs a larger rate than the pretrained layers; the plain script has one rate.
METHODS = {
    "full": None,
    "head": lambda: GradualUnfreezingCallback(Surgical("head"), lr_multipliers={"head": HEAD_RATE}),
    "lp-ft": lambda: GradualUnfreezingCallback(LPFT("50%"), lr_multipliers={"head": HEAD_RATE}),
    "gradual": lambda: GradualUnfreezingCallback(
        layer_decay=LAYER_DECAY,
        lr_multipliers={"head": HEAD_RATE},
        rewarm_steps=5,
        lr_schedule=slanted_triangular(),
    ),
}
HEAD_RATE, LAYER_DECAY = 10.0, 0.8

TRAINING_DEFAULTS = {
    "output_dir": "runs/gradual_unfreezing",
    "num_train_epochs": 4,
    "logging_steps": 1,  # the rates of every step are for the plot
}


@dataclass
class ExampleArguments:
    source: str = option("movies", f"Domain with labels. {LICENCES['vader4']}", choices=DOMAINS)
    model_name_or_path: str | None = option(None, f"Folder or hub id. Default: {MINILM_LICENCE}")
    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": f"Any of: {', '.join(METHODS)}"}
    )
    seeds: int = option(3, "Runs of each method, with seeds from --seed on")
    num_train: int = option(240, "Labelled training rows")
    num_test: int = option(500, "Test rows of each domain, at most")
    max_length: int = option(64, "Tokens of a text that are read")

    def __post_init__(self) -> None:
        check_methods(self.methods, METHODS)


def load(script: ExampleArguments) -> tuple[Dataset, dict[str, Dataset], list[str]]:
    """Training rows of the source; test rows of every domain, and `dev` of the source."""
    tests = {}
    for domain in DOMAINS:
        pair = load_pair(script.source, domain, script.num_train, script.num_test)
        tests[domain] = pair.target["test"]
    return pair.source["train"], {"dev": pair.source["dev"], **tests}, pair.labels


def train_and_test(
    method: str,
    script: ExampleArguments,
    args: TrainingArguments,
    train: Dataset,
    tests: dict[str, Dataset],
    labels: list[str],
) -> dict[str, Any]:
    """Fine-tune once; return the accuracies, the seconds, and the rate of each group by step."""
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    model = new_classifier(script.model_name_or_path, labels)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=tokenized(train, tokenizer, script.max_length),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.remove_callback(PrinterCallback)
    make_callback = METHODS[method]
    if make_callback is not None:
        trainer.add_callback(make_callback())

    start = time.perf_counter()
    trainer.train()
    result: dict[str, Any] = {"method": method, "seed": args.seed}
    result["seconds"] = time.perf_counter() - start
    for domain, dataset in tests.items():
        truth, guess = predict(trainer, tokenized(dataset, tokenizer, script.max_length))
        result[domain] = accuracy_score(truth, guess)
    result["rates"] = [
        {key.removeprefix("learning_rate/"): value for key, value in entry.items()
         if key.startswith("learning_rate/")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]  # fmt: skip
    return result


def table_rows(summary: dict[str, dict[str, Any]], names: list[str]) -> list[list[str]]:
    """The table's cells, header first."""
    rows = [["method", *names, "seconds"]]
    for method, values in summary.items():
        cells = [percent(values[name]) for name in names]
        rows.append([method, *cells, f"{values['seconds']['mean']:.0f}"])
    return rows


def plot(summary: dict[str, dict[str, Any]], results: list[dict[str, Any]]) -> Figure:
    """Accuracies in and out of domain; which groups trained when, and at which rate."""
    shown = [m for m in ("lp-ft", "gradual") if m in summary]
    figure = Figure(figsize=(5.2 + 3.4 * len(shown), 3.8), layout="constrained")
    first, *others = figure.subplots(
        1, 1 + len(shown), width_ratios=[1.4, *([1] * len(shown))], squeeze=False
    )[0]
    series = {name: [values[name] for values in summary.values()] for name in TESTS}
    for bars in grouped_bars(first, list(summary), series):
        first.bar_label(bars, fmt="%.1f", label_type="center", color="white", fontsize=8)
    lowest = min(100 * score["mean"] for scores in series.values() for score in scores)
    first.set_ylim(max(0, lowest - 10), None)
    first.set_ylabel("accuracy, %")
    first.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize=8)
    for axes, method in zip(others, shown, strict=True):
        rates = next(run["rates"] for run in results if run["method"] == method)
        groups = list(rates[0])
        top = max(max(step.values()) for step in rates)
        relative = [[step[group] / top for step in rates] for group in groups]
        image = axes.imshow(
            [[value if value > 0 else float("nan") for value in row] for row in relative],
            aspect="auto",
            origin="lower",
            norm="log",
            cmap="Blues",
            vmin=1e-3,
        )
        axes.set_yticks(range(len(groups)), groups, fontsize=7)
        axes.set_xlabel("optimizer step")
        axes.set_title(f"{method}: rate of each group", fontsize=9)
        figure.colorbar(image, ax=axes, label="relative to the largest")
    return figure


def main(argv: list[str] | None = None) -> None:
    script, args, console = parse(ExampleArguments, __doc__, argv, **TRAINING_DEFAULTS)
    console.print(f"[dim]{LICENCES['vader4']}[/dim]")
    train, tests, labels = load(script)
    if script.model_name_or_path is None:
        console.print(f"[dim]{MINILM_LICENCE}[/dim]")
        script.model_name_or_path = str(minilm_path())
    if "gradual" in script.methods:
        config = AutoConfig.from_pretrained(script.model_name_or_path, num_labels=len(labels))
        with torch.device("meta"):  # shapes are enough
            empty = AutoModelForSequenceClassification.from_config(config)
        plan = unfreezing_plan(
            empty,
            args,
            train_dataset=train,
            layer_decay=LAYER_DECAY,
            lr_multipliers={"head": HEAD_RATE},
        )
        console.print(
            f"The plan of [bold]gradual[/bold]:\n{plan}\n", highlight=False, soft_wrap=True
        )

    results = []
    for seed in range(args.seed, args.seed + script.seeds):
        for method in script.methods:
            console.print(f"[bold]{method}[/bold], seed {seed}")
            folder = Path(args.output_dir) / f"{method}-seed{seed}"
            run_args = changed(args, seed=seed, output_dir=str(folder))
            found = train_and_test(method, script, run_args, train, tests, labels)
            results.append(found)
            scores = {name: f"{found[name]:.3f}" for name in tests}
            console.print(f"  {scores}", highlight=False)
    if args.process_index != 0:
        return

    outside = [domain for domain in DOMAINS if domain != script.source]
    for found in results:
        found["in domain"] = found[script.source]
        found["out of domain"] = statistics.mean(found[domain] for domain in outside)
    names = [*TESTS, *outside]
    summary = summarize(results, METHODS, [*names, "seconds"])
    legend = (
        f"Accuracy in %, mean ± sd over {script.seeds} seed(s), trained on {len(train)} rows of "
        f"{script.source}. out of domain: mean of the other three. seconds: of training."
    )
    figures = {"unfreezing.png": plot(summary, results)}
    rows = table_rows(summary, names)
    report(rows, legend, {"runs": results}, figures, Path(args.output_dir), console)


if __name__ == "__main__":
    run(main)
