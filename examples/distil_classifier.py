"""With few labels, does a stronger teacher help a small student, in its domain and outside it?

Labels are a few hundred movie reviews; of tweets only texts are known. The teacher is
multilingual-e5-small, frozen, with a logistic regression on its sentences, from the same labels;
the student is three layers of all-MiniLM-L6-v2, whose tokenizer is another one:

    student alone      trains on the labels
    distilled          and on what the teacher says of the same rows
    + unlabelled text  and of movie reviews and tweets without labels

Nothing is chosen by tweets' labels, or by any test; the last model of each run is tested.

Measured with three draws (accuracy in %, movies / tweets, mean ± sd): student alone 71.4 ± 0.4 /
58.8 ± 8.1, distilled 72.6 ± 2.5 / 62.0 ± 2.7, with unlabelled text 73.4 ± 1.3 / 68.1 ± 9.6,
teacher 80.7 ± 2.4 / 69.0 ± 11.0. Unlabelled text brings the student's accuracy on tweets near its
teacher's, which differs much from draw to draw: where the teacher is bad at tweets (59 % with seed
42), the student follows it there and is better off alone. Sizes, epochs and the number of draws
were settled for time, after a look at results of other settings, in which the order was the same
in the labels' domain. About ten minutes on two cores.

    python examples/distil_classifier.py
    python examples/distil_classifier.py --seeds 5 --num_labels 100
    python examples/distil_classifier.py --source tweets --target nyt --student_layers 6

Writes results.json, table.md and distillation.png to --output_dir. Every option of
TrainingArguments can be given as well.
"""

import copy
import json
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from datasets import Dataset, concatenate_datasets
from domain_data import LICENCES, MINILM_LICENCE, DataError, load_pair, minilm_path
from domain_shift_text import option, versions, write
from matplotlib.figure import Figure
from model_weights import E5_LICENCE, E5_PREFIX, e5_small_path
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertModel,
    BertPreTrainedModel,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_adapt import DistillationTrainer
from hf_adapt.distillation import CachedTeacher, student_from_teacher

DOMAINS = ("movies", "tweets", "products", "nyt")
METHODS = {
    "alone": "student alone",
    "distilled": "distilled",
    "unlabelled": "+ unlabelled text",
    "teacher": "teacher",
}
TESTS = ("in domain", "out of domain")

# Every other TrainingArgument keeps its own default; all can be given on the command line.
TRAINING_DEFAULTS = {
    "output_dir": "runs/distil_classifier",
    "num_train_epochs": 6,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "learning_rate": 3e-4,
    "logging_steps": 20,
    "disable_tqdm": True,
    "save_strategy": "no",
    "report_to": "none",
    "dataloader_pin_memory": torch.cuda.is_available(),
}


@dataclass
class ExampleArguments:
    source: str = option("movies", f"Domain with labels. {LICENCES['vader4']}", choices=DOMAINS)
    target: str = option("tweets", "Domain of which only texts are known", choices=DOMAINS)
    model_name_or_path: str | None = option(None, f"Of the student. Default: {MINILM_LICENCE}")
    teacher_name_or_path: str | None = option(None, f"A BERT. Default: {E5_LICENCE}")
    teacher_prefix: str = option(E5_PREFIX, "Put before every text that the teacher reads")
    student_layers: int = option(3, "Layers that the student keeps of its model")
    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": f"Any of: {', '.join(METHODS)}"}
    )
    seeds: int = option(3, "Runs of each method, each with other labelled rows, from --seed on")
    num_labels: int = option(200, "Labelled rows, the same for the teacher and the students")
    num_unlabelled: int = option(400, "Rows without labels, of each domain, at most")
    num_test: int = option(300, "Test rows of each domain, at most")
    max_length: int = option(64, "Tokens of a text that are read")
    temperature: float = option(2.0, "Both models' logits are divided by it")
    kd_weight: float = option(0.8, "Factor of the distillation term; that of the labels: 1 - it")

    def __post_init__(self) -> None:
        if unknown := set(self.methods) - set(METHODS):
            raise ValueError(f"unknown --methods {sorted(unknown)}: choose from {list(METHODS)}")


# ---------------------------------------------------------------- data
@dataclass
class Data:
    """Rows with the columns text and label, but for `texts`, which has no label."""

    train: Dataset
    texts: Dataset
    tests: dict[str, Dataset]
    labels: list[str]


def load(script: ExampleArguments, seed: int) -> Data:
    """A few rows of the source with labels; more of it, and of the target, without."""
    number = script.num_labels + script.num_unlabelled
    pair = load_pair("vader4", script.source, script.target, number, script.num_test)
    source = pair.source["train"].shuffle(seed=seed)
    labelled = min(script.num_labels, len(source) // 2)
    rest = source.select(range(labelled, len(source))).remove_columns("label")
    target = pair.target_unlabelled
    target = target.select(range(min(script.num_unlabelled, len(target))))
    return Data(
        train=source.select(range(labelled)),
        texts=concatenate_datasets([rest, target]),
        tests={
            "in domain": pair.source["test"],
            "out of domain": pair.target["test"],
        },
        labels=pair.labels,
    )


def tokenized(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, prefix: str) -> Dataset:
    """The student's tokens, and the text as the teacher wants it."""

    def rows(batch: dict[str, Any]) -> dict[str, Any]:
        encoded = tokenizer(batch["text"], truncation=True)
        return dict(encoded) | {"teacher_text": [prefix + text for text in batch["text"]]}

    return dataset.map(rows, batched=True, remove_columns="text")


# ---------------------------------------------------------------- teacher
class MeanPooledClassifier(BertPreTrainedModel):
    """A BERT whose sentences are means over tokens, as E5's are, and a linear head."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def pooled(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.bert(input_ids, attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1)
        return (hidden * mask).sum(1) / mask.sum(1)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any
    ) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(
            logits=self.classifier(self.pooled(input_ids, attention_mask))
        )


def label_names(labels: Sequence[str]) -> dict[str, dict]:
    return {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def batches(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, prefix: str, size: int = 32
) -> Iterator[dict[str, torch.Tensor]]:
    for start in range(0, len(dataset), size):
        texts = [prefix + text for text in dataset[start : start + size]["text"]]
        rows = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        yield {name: rows[name] for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def make_teacher(
    script: ExampleArguments, data: Data
) -> tuple[MeanPooledClassifier, PreTrainedTokenizerBase, dict[str, Any]]:
    """The larger encoder, frozen, and a logistic regression on its sentences as the head.

    With labels this few a linear head is about as good as fine-tuning, and takes seconds. Its
    regularization is chosen by cross-validation on the labelled rows.
    """
    start = time.perf_counter()
    path = script.teacher_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(path, model_max_length=script.max_length)
    transformers.logging.set_verbosity_error()  # else it tells that the head is new
    model = MeanPooledClassifier.from_pretrained(path, **label_names(data.labels)).eval()
    transformers.logging.set_verbosity_warning()
    rows = list(batches(data.train, tokenizer, script.teacher_prefix))
    sentences = torch.cat([model.pooled(**batch) for batch in rows]).numpy()
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        {"logisticregression__C": np.logspace(-4, 0, 5)},
        cv=3,
    ).fit(sentences, data.train["label"][:])
    scaler, regression = (step for _, step in search.best_estimator_.steps)
    weight = regression.coef_ / scaler.scale_
    bias = regression.intercept_ - weight @ scaler.mean_
    # A regression of two classes has one logit, that of the second class against the first.
    if len(data.labels) == 2:
        weight, bias = np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
    model.classifier.weight.copy_(torch.from_numpy(weight))
    model.classifier.bias.copy_(torch.from_numpy(bias))
    found: dict[str, Any] = {"seconds": time.perf_counter() - start, "parameters": size_of(model)}
    for name, dataset in data.tests.items():
        rows = list(batches(dataset, tokenizer, script.teacher_prefix))
        guess = torch.cat([model(**batch).logits.argmax(-1) for batch in rows])
        found[name] = accuracy_score(dataset["label"][:], guess)
    return model, tokenizer, found


# ---------------------------------------------------------------- students
def size_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def new_student(
    script: ExampleArguments, data: Data, layers: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Some layers of a pretrained encoder, with a new head."""
    transformers.logging.set_verbosity_error()
    model = AutoModelForSequenceClassification.from_pretrained(
        script.model_name_or_path, **label_names(data.labels)
    )
    transformers.logging.set_verbosity_warning()
    tokenizer = AutoTokenizer.from_pretrained(
        script.model_name_or_path, model_max_length=script.max_length
    )
    return student_from_teacher(model, layers), tokenizer


def train_student(
    method: str,
    script: ExampleArguments,
    args: TrainingArguments,
    data: Data,
    teacher: Any = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    layers: int | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]:
    """Train a student in one of the ways and test it."""
    set_seed(args.seed)
    model, tokenizer = new_student(script, data, layers or script.student_layers)
    prefix = script.teacher_prefix if teacher_tokenizer is not None else ""
    common: dict[str, Any] = {
        "model": model,
        "args": args,
        "train_dataset": tokenized(data.train, tokenizer, prefix),
        "processing_class": tokenizer,
        "data_collator": DataCollatorWithPadding(tokenizer),
    }
    if method == "alone":
        trainer = Trainer(**common)
    else:
        # Rows without labels are distilled alone. A step sees twice as many of them as of the
        # labelled ones; two thirds of a batch are then texts that the teacher alone knows about.
        if method == "unlabelled":
            common |= {
                "target_dataset": tokenized(data.texts, tokenizer, prefix),
                "target_ratio": 2.0,
            }
        if teacher_tokenizer is not None:  # it is not the student's: give it the text instead
            common |= {
                "teacher_processing_class": teacher_tokenizer,
                "text_column": "teacher_text",
            }
        trainer = DistillationTrainer(
            **common,
            teacher=teacher,
            temperature=script.temperature,
            kd_weight=script.kd_weight,
            ce_weight=1 - script.kd_weight,
        )
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    found: dict[str, Any] = {"seconds": time.perf_counter() - start, "parameters": size_of(model)}
    for name, dataset in data.tests.items():
        predicted = trainer.predict(tokenized(dataset, tokenizer, prefix))
        found[name] = accuracy_score(predicted.label_ids, predicted.predictions.argmax(-1))
    return model, tokenizer, found


# ---------------------------------------------------------------- report
def summarize(results: list[dict[str, Any]], methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Mean and standard deviation over seeds, and the share of the teacher's accuracy."""
    teacher = [run for run in results if run["method"] == "teacher"]
    summary: dict[str, dict[str, Any]] = {}
    for method in methods:
        runs = [run for run in results if run["method"] == method]
        if not runs:
            continue
        values: dict[str, Any] = {"parameters": runs[0]["parameters"]}
        for name in (*TESTS, "seconds"):
            column = [run[name] for run in runs]
            deviation = statistics.stdev(column) if len(column) > 1 else None
            values[name] = (statistics.mean(column), deviation)
        for name in TESTS:
            whole = statistics.mean(run[name] for run in teacher)
            values[f"retained {name}"] = values[name][0] / whole
        summary[method] = values
    return summary


def table_rows(
    summary: dict[str, dict[str, Any]], names: dict[str, str], tests: Sequence[str] = TESTS
) -> list[list[str]]:
    """The table's cells, header first."""

    def cell(mean: float, deviation: float | None) -> str:
        return f"{100 * mean:.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")

    rows = [["method", *tests, "size", "retained", "seconds"]]
    for method, values in summary.items():
        retained = " / ".join(f"{100 * values[f'retained {name}']:.0f}%" for name in tests)
        rows.append(
            [
                names[method],
                *(cell(*values[name]) for name in tests),
                f"{values['parameters'] / 1e6:.1f}M",
                retained,
                f"{values['seconds'][0]:.0f}",
            ]
        )
    return rows


def report(
    rows: list[list[str]], legend: str, document: dict, output_dir: Path, console: Console
) -> None:
    """Print the table; write it and the numbers."""
    table = Table(
        caption=legend,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,  # all columns fit in 80 characters
        collapse_padding=True,
    )
    for heading in rows[0]:
        table.add_column(heading.replace(" ", "\n"), no_wrap=True)
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)
    about = {"command": shlex.join(["python", *sys.argv]), "versions": versions()}
    write(output_dir / "results.json", json.dumps({**about, **document}, indent=2))
    markdown = [f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
    write(output_dir / "table.md", "\n".join([*markdown, "", legend]) + "\n")


def plot(summary: dict[str, dict[str, Any]], names: dict[str, str], path: Path) -> None:
    """Bars of the accuracy in and out of domain."""
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    for offset, (test, colour) in enumerate(zip(TESTS, ("#9aa5b1", "#2a78c2"), strict=True)):
        axes.bar(
            [i + 0.4 * offset for i in range(len(summary))],
            [100 * values[test][0] for values in summary.values()],
            yerr=[100 * (values[test][1] or 0) for values in summary.values()],
            width=0.38,
            capsize=3,
            color=colour,
            label=test,
        )
    ticks = [names[method].replace(" + ", "\n+ ") for method in summary]
    axes.set_xticks([i + 0.2 for i in range(len(summary))], ticks)
    lowest = min(100 * values[test][0] for values in summary.values() for test in TESTS)
    bottom = max(0, lowest - 10)
    axes.set_ylim(bottom, None)
    for bar in axes.patches:
        # At the foot, where no deviation's line runs through it.
        x, height = bar.get_x() + bar.get_width() / 2, bar.get_height()
        axes.text(x, bottom + 0.5, f"{height:.1f}", ha="center", color="white", fontsize=8)
    axes.set_ylabel("accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    figure.savefig(path, dpi=150)


def prepare(script: ExampleArguments, console: Console) -> None:
    """Fetch what is needed, and say whose it is."""
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    console.print(f"[dim]{LICENCES['vader4']}[/dim]")
    if script.model_name_or_path is None:
        console.print(f"[dim]{MINILM_LICENCE}[/dim]")
        script.model_name_or_path = str(minilm_path())
    if script.teacher_name_or_path is None:
        console.print(f"[dim]{E5_LICENCE}[/dim]")
        script.teacher_name_or_path = str(e5_small_path())


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser((ExampleArguments, TrainingArguments), description=__doc__)
    parser.set_defaults(**TRAINING_DEFAULTS)
    script, args = parser.parse_args_into_dataclasses(argv)
    console = Console(quiet=args.process_index != 0)
    prepare(script, console)

    results = []
    for seed in range(args.seed, args.seed + script.seeds):
        data = load(script, seed)
        run_args = copy.copy(args)
        run_args.seed, run_args.output_dir = seed, str(Path(args.output_dir) / f"seed{seed}")
        teacher, teacher_tokenizer, of_teacher = make_teacher(script, data)
        for method in dict.fromkeys(["teacher", *script.methods]):
            console.print(f"[bold]{METHODS[method]}[/bold], seed {seed}")
            found = of_teacher
            if method != "teacher":
                # What the teacher says of a text is computed once and kept; in later epochs, and
                # for the next method, it is read.
                cached = CachedTeacher(Path(run_args.output_dir) / "teacher", teacher=teacher)
                *_, found = train_student(method, script, run_args, data, cached, teacher_tokenizer)
            results.append({"method": method, "seed": seed, **found})
            scores = {name: f"{found[name]:.3f}" for name in TESTS}
            console.print(f"  {scores}", highlight=False)
    if args.process_index != 0:
        return

    output_dir = Path(args.output_dir)
    summary = summarize(results, list(METHODS))
    legend = (
        f"Accuracy in %, mean ± sd over {script.seeds} draw(s) of {len(data.train)} labelled rows "
        f"of {script.source}; out of domain: {script.target}. retained: share of the teacher's, in "
        f"/ out of domain. unlabelled text: {len(data.texts)} rows of both. seconds: of training."
    )
    report(table_rows(summary, METHODS), legend, {"runs": results}, output_dir, console)
    plot(summary, METHODS, output_dir / "distillation.png")
    console.print(f"wrote results.json, table.md and distillation.png to {output_dir}")


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"error: {error}")
