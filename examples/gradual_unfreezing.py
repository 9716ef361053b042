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

import copy
import json
import shlex
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from domain_data import LICENCES, MINILM_LICENCE, DataError, load_pair, minilm_path
from domain_shift_text import option, versions, write
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.metrics import accuracy_score
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_adapt import GradualUnfreezingCallback
from hf_adapt.engine.progress import slanted_triangular
from hf_adapt.unfreezing import LPFT, Surgical, unfreezing_plan

DOMAINS = ("movies", "tweets", "products", "nyt")

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

# Every other TrainingArgument keeps its own default; all can be given on the command line.
TRAINING_DEFAULTS = {
    "output_dir": "runs/gradual_unfreezing",
    "num_train_epochs": 4,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "learning_rate": 3e-4,
    "logging_steps": 1,
    "disable_tqdm": True,
    "save_strategy": "no",
    "report_to": "none",
    "dataloader_pin_memory": torch.cuda.is_available(),
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
        if unknown := set(self.methods) - set(METHODS):
            raise ValueError(f"unknown --methods {sorted(unknown)}: choose from {list(METHODS)}")


def load(script: ExampleArguments) -> tuple[Dataset, dict[str, Dataset], list[str]]:
    """Training rows of the source; test rows of every domain, and `dev` of the source."""
    tests = {}
    for domain in DOMAINS:
        pair = load_pair("vader4", script.source, domain, script.num_train, script.num_test)
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
    transformers.logging.set_verbosity_error()  # else it tells each time that the head is new
    model = AutoModelForSequenceClassification.from_pretrained(
        script.model_name_or_path,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    transformers.logging.set_verbosity_warning()

    def tokenized(dataset: Dataset) -> Dataset:
        return dataset.map(
            lambda rows: tokenizer(rows["text"], truncation=True, max_length=script.max_length),
            batched=True,
            remove_columns="text",
        )

    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=tokenized(train),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.remove_callback(PrinterCallback)  # the rates of every step are for the plot
    make_callback = METHODS[method]
    if make_callback is not None:
        trainer.add_callback(make_callback())

    start = time.perf_counter()
    trainer.train()
    result: dict[str, Any] = {"method": method, "seed": args.seed}
    result["seconds"] = time.perf_counter() - start
    for domain, dataset in tests.items():
        predicted = trainer.predict(tokenized(dataset))
        guess = predicted.predictions.argmax(-1)
        result[domain] = accuracy_score(predicted.label_ids, guess)
    result["rates"] = [
        {key.removeprefix("learning_rate/"): value for key, value in entry.items()
         if key.startswith("learning_rate/")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]  # fmt: skip
    return result


def summarize(results: list[dict[str, Any]], source: str) -> dict[str, dict[str, Any]]:
    """Mean and standard deviation over seeds, in the source's domain and outside."""
    outside = [domain for domain in DOMAINS if domain != source]
    summary: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        runs = [result for result in results if result["method"] == method]
        if not runs:
            continue
        columns = {
            "dev": [run["dev"] for run in runs],
            "in domain": [run[source] for run in runs],
            "out of domain": [statistics.mean(run[d] for d in outside) for run in runs],
            **{domain: [run[domain] for run in runs] for domain in outside},
            "seconds": [run["seconds"] for run in runs],
        }
        summary[method] = {
            name: (statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)
            for name, values in columns.items()
        }
    return summary


def table_rows(summary: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The table's cells, header first."""

    def cell(name: str, mean: float, deviation: float | None) -> str:
        if name == "seconds":
            return f"{mean:.0f}"
        text = f"{100 * mean:.1f}"
        return text if deviation is None else f"{text} ± {100 * deviation:.1f}"

    names = [name for name in next(iter(summary.values())) if name != "dev"]
    return [["method", *names]] + [
        [method, *(cell(name, *values[name]) for name in names)]
        for method, values in summary.items()
    ]


def plot(summary: dict[str, dict[str, Any]], results: list[dict[str, Any]], path: Path) -> None:
    """Accuracies in and out of domain; which groups trained when, and at which rate."""
    shown = [m for m in ("lp-ft", "gradual") if m in summary]
    figure = Figure(figsize=(5.2 + 3.4 * len(shown), 3.8), layout="constrained")
    first, *others = figure.subplots(
        1, 1 + len(shown), width_ratios=[1.4, *([1] * len(shown))], squeeze=False
    )[0]
    for offset, (name, colour) in enumerate(
        [("in domain", "#9aa5b1"), ("out of domain", "#2a78c2")]
    ):
        bars = first.bar(
            [i + 0.4 * offset for i in range(len(summary))],
            [100 * values[name][0] for values in summary.values()],
            yerr=[100 * (values[name][1] or 0) for values in summary.values()],
            width=0.38,
            capsize=3,
            color=colour,
            label=name,
        )
        first.bar_label(bars, fmt="%.1f", label_type="center", color="white", fontsize=8)
    first.set_xticks([i + 0.2 for i in range(len(summary))], list(summary))
    lowest = min(100 * v[n][0] for v in summary.values() for n in ("in domain", "out of domain"))
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
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser((ExampleArguments, TrainingArguments), description=__doc__)
    parser.set_defaults(**TRAINING_DEFAULTS)
    script, args = parser.parse_args_into_dataclasses(argv)
    console = Console(quiet=args.process_index != 0)
    datasets.disable_progress_bars()
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
            run_args = copy.copy(args)
            run_args.seed = seed
            run_args.output_dir = str(Path(args.output_dir) / f"{method}-seed{seed}")
            results.append(train_and_test(method, script, run_args, train, tests, labels))
            scores = {name: f"{results[-1][name]:.3f}" for name in tests}
            console.print(f"  {scores}", highlight=False)
    if args.process_index != 0:
        return

    summary = summarize(results, script.source)
    rows = table_rows(summary)
    legend = (
        f"Accuracy in %, mean ± sd over {script.seeds} seed(s), trained on {len(train)} rows of "
        f"{script.source}. out of domain: mean of the other three. seconds: of training."
    )
    table = Table(caption=legend, caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in rows[0]:
        table.add_column(heading.replace(" ", "\n"), no_wrap=True)
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)
    output_dir = Path(args.output_dir)
    about = {"command": shlex.join(["python", *sys.argv]), "versions": versions()}
    write(output_dir / "results.json", json.dumps({**about, "runs": results}, indent=2))
    markdown = [f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
    write(output_dir / "table.md", "\n".join([*markdown, "", legend]) + "\n")
    plot(summary, results, output_dir / "unfreezing.png")
    console.print(f"wrote results.json, table.md and unfreezing.png to {output_dir}")


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"error: {error}")
