"""With few labels, does a stronger teacher help a small student, in its domain and outside it?

Labels are a few hundred movie reviews; of tweets only texts are known. The teacher is
multilingual-e5-small, frozen, with a logistic regression on its sentences, from the same labels;
the student is three layers of all-MiniLM-L6-v2, whose tokenizer is another one:

    alone              trains on the labels
    distilled          and on what the teacher says of the same rows
    unlabelled         and of movie reviews and tweets without labels
    assistant          the same, with more layers
    assisted           learns from the assistant as `unlabelled` does from the teacher (Mirzadeh et
                       al. 2020, "Improved Knowledge Distillation via Teacher Assistant",
                       arXiv:1902.03393)

Nothing is chosen by tweets' labels, or by any test; the last model of each run is tested. Sizes,
epochs and the number of draws were settled for time, after a look at results of other settings, in
which the order was the same in the labels' domain.

    python benchmarks/distilled_classifier.py
    python benchmarks/distilled_classifier.py --seeds 2 --student_layers 2 --num_unlabelled 200
        --num_train_epochs 4 --methods alone unlabelled assistant assisted

Ten minutes of two cores each. Writes results.json, table.md and distillation.png to --output_dir;
the results are in docs/results.md. Every option of TrainingArguments can be given as well.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
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
)
from matplotlib.figure import Figure
from model_weights import E5_LICENCE, E5_PREFIX, e5_small_path
from results import grouped_bars, report, summarize
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from transformers import (
    AutoTokenizer,
    BertModel,
    BertPreTrainedModel,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_adapt import DistillationTrainer, Stream
from hf_adapt.distillation import CachedTeacher, student_from_teacher
from hf_adapt.experiments.summary import percent

METHODS = {
    "alone": "student alone",
    "distilled": "distilled",
    "unlabelled": "+ unlabelled text",
    "assistant": "assistant",
    "assisted": "student of assistant",
    "teacher": "teacher",
}
TRAINING_DEFAULTS = {"output_dir": "runs/distilled_classifier", "num_train_epochs": 6}


@dataclass
class ExampleArguments:
    source: str = option("movies", f"Domain with labels. {LICENCES['vader4']}", choices=DOMAINS)
    target: str = option("tweets", "Domain of which only texts are known", choices=DOMAINS)
    model_name_or_path: str | None = option(None, f"Of the student. Default: {MINILM_LICENCE}")
    teacher_name_or_path: str | None = option(None, f"A BERT. Default: {E5_LICENCE}")
    teacher_prefix: str = option(E5_PREFIX, "Put before every text that the teacher reads")
    student_layers: int = option(3, "Layers that the student keeps of its model")
    assistant_layers: int = option(6, "Layers that the assistant keeps of the same model")
    methods: list[str] = field(
        default_factory=lambda: ["alone", "distilled", "unlabelled"],
        metadata={"help": f"Any of: {', '.join(METHODS)}"},
    )
    seeds: int = option(3, "Runs of each method, each with other labelled rows, from --seed on")
    num_labels: int = option(200, "Labelled rows, the same for the teacher and the students")
    num_unlabelled: int = option(400, "Rows without labels, of each domain, at most")
    num_test: int = option(300, "Test rows of each domain, at most")
    max_length: int = option(64, "Tokens of a text that are read")
    temperature: float = option(2.0, "Both models' logits are divided by it")
    kd_weight: float = option(0.8, "Factor of the distillation term; that of the labels: 1 - it")

    def __post_init__(self) -> None:
        check_methods(self.methods, [name for name in METHODS if name != "teacher"])


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
    pair = load_pair(script.source, script.target, number, script.num_test)
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
    model = new_classifier(path, data.labels, MeanPooledClassifier).eval()
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


def train_student(
    method: str,
    script: ExampleArguments,
    args: TrainingArguments,
    data: Data,
    teacher: CachedTeacher,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Train some layers of a pretrained encoder in one of the ways, and test them.

    A teacher without a tokenizer of its own has the student's.
    """
    set_seed(args.seed)
    path = script.model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(path, model_max_length=script.max_length)
    layers = script.assistant_layers if method == "assistant" else script.student_layers
    model = student_from_teacher(new_classifier(path, data.labels), layers)
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
        if method != "distilled":
            rows = tokenized(data.texts, tokenizer, prefix)
            common["target_dataset"] = Stream(rows, ratio=2.0)
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
    start = time.perf_counter()
    trainer.train()
    found: dict[str, Any] = {"seconds": time.perf_counter() - start, "parameters": size_of(model)}
    for name, dataset in data.tests.items():
        truth, guess = predict(trainer, tokenized(dataset, tokenizer, prefix))
        found[name] = accuracy_score(truth, guess)
    return model, found


# ---------------------------------------------------------------- report
def table_rows(summary: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The table's cells, header first."""
    rows = [["method", *TESTS, "size", "retained", "seconds"]]
    for method, values in summary.items():
        cells = [percent(values[name]) for name in TESTS]
        shares = [values[name]["mean"] / summary["teacher"][name]["mean"] for name in TESTS]
        retained = " / ".join(f"{100 * share:.0f}%" for share in shares)
        size = f"{values['parameters']['mean'] / 1e6:.1f}M"
        rows.append([METHODS[method], *cells, size, retained, f"{values['seconds']['mean']:.0f}"])
    return rows


def plot(summary: dict[str, dict[str, Any]]) -> Figure:
    """Bars of the accuracy in and out of domain."""
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    series = {test: [values[test] for values in summary.values()] for test in TESTS}
    grouped_bars(axes, [METHODS[method].replace(" + ", "\n+ ") for method in summary], series)
    lowest = min(100 * score["mean"] for scores in series.values() for score in scores)
    bottom = max(0, lowest - 10)
    axes.set_ylim(bottom, None)
    for bar in axes.patches:
        # At the foot, where no deviation's line runs through it.
        x, height = bar.get_x() + bar.get_width() / 2, bar.get_height()
        axes.text(x, bottom + 0.5, f"{height:.1f}", ha="center", color="white", fontsize=8)
    axes.set_ylabel("accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    return figure


def main(argv: list[str] | None = None) -> None:
    script, args, console = parse(ExampleArguments, __doc__, argv, **TRAINING_DEFAULTS)
    console.print(f"[dim]{LICENCES['vader4']}\n{MINILM_LICENCE}\n{E5_LICENCE}[/dim]")
    script.model_name_or_path = script.model_name_or_path or str(minilm_path())
    script.teacher_name_or_path = script.teacher_name_or_path or str(e5_small_path())
    results: list[dict[str, Any]] = []

    def tested(method: str, seed: int, found: dict[str, Any]) -> None:
        results.append({"method": method, "seed": seed, **found})
        scores = {name: f"{found[name]:.3f}" for name in TESTS}
        console.print(f"[bold]{METHODS[method]}[/bold], seed {seed}: {scores}", highlight=False)

    for seed in range(args.seed, args.seed + script.seeds):
        data = load(script, seed)
        folder = Path(args.output_dir) / f"seed{seed}"
        run_args = changed(args, seed=seed, output_dir=str(folder))
        teacher, teacher_tokenizer, found = make_teacher(script, data)
        tested("teacher", seed, found)
        assistant = None
        for method in script.methods:
            # What the teacher says of a text is computed once and kept; in later epochs, and for
            # the next method, it is read.
            teaching = CachedTeacher(folder / "teacher", teacher=teacher), teacher_tokenizer
            if method == "assisted":
                teaching = (CachedTeacher(folder / "assistant", teacher=assistant),)
            model, found = train_student(method, script, run_args, data, *teaching)
            tested(method, seed, found)
            if method == "assistant":
                assistant = model
    if args.process_index != 0:
        return

    summary = summarize(results, METHODS, [*TESTS, "seconds", "parameters"])
    legend = (
        f"Accuracy in %, mean ± sd over {script.seeds} draw(s) of {len(data.train)} labelled rows "
        f"of {script.source}; out of domain: {script.target}. retained: share of the teacher's, in "
        f"/ out of domain. unlabelled text: {len(data.texts)} rows of both. seconds: of training."
    )
    figures = {"distillation.png": plot(summary)}
    rows = table_rows(summary)
    report(rows, legend, {"runs": results}, figures, Path(args.output_dir), console)


if __name__ == "__main__":
    run(main)
