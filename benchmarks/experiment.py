"""What the examples share: options, a classifier, tests, and runs of several methods and seeds."""

import copy
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from domain_data import DataError
from rich.console import Console
from transformers import (
    AutoModelForSequenceClassification,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainingArguments,
)

from hf_adapt import Adaptation, alignment
from hf_adapt.experiments.settings import nearest
from hf_adapt.experiments.versions import installed
from hf_adapt.storage.text_file import write_text

DOMAINS = ("movies", "tweets", "products", "nyt")  # of the benchmark vader4
TESTS = ("in domain", "out of domain")

# Every other TrainingArgument keeps its own default; all can be given on the command line.
TRAINING_DEFAULTS = {
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "learning_rate": 3e-4,
    "logging_steps": 20,
    "disable_tqdm": False,
    "save_strategy": "no",
    "report_to": "none",
    "dataloader_pin_memory": torch.cuda.is_available(),
}


# ---------------------------------------------------------------- options
class QuietProgress(ProgressCallback):
    """The Trainer's progress bar with the loss beside it, of which nothing is left at the end."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.leave = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3g}", refresh=False)

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """Tests are short: no bar."""


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field of a dataclass that HfArgumentParser reads."""
    return field(default=default, metadata={"help": help, **metadata})


def check_methods(chosen: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a method that an example does not have."""
    if unknown := set(chosen) - set(known):
        raise ValueError(f"unknown --methods {sorted(unknown)}: choose from {list(known)}")


def method_of(name: str) -> Adaptation:
    """A method of `hf_adapt.alignment` with its defaults, by its class."""
    found = {each: getattr(alignment, each) for each in alignment.__all__}
    known = [
        n for n, each in found.items() if isinstance(each, type) and issubclass(each, Adaptation)
    ]
    if name not in known:
        raise DataError(f"--method {name!r} is unknown.{nearest(name, known)}")
    made: Adaptation = found[name]()
    return made


def parse(
    kind: type,
    description: str | None,
    argv: Sequence[str] | None,
    training: type[TrainingArguments] = TrainingArguments,
    **defaults: Any,
) -> tuple[Any, Any, Console]:
    """Read an example's options and TrainingArguments; the console is silent on other ranks."""
    parser = HfArgumentParser((kind, training), description=description)
    parser.set_defaults(**TRAINING_DEFAULTS | defaults)
    script, args, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown: {' '.join(unknown)} (--help lists what there is)")
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()  # else it tells each time that a head is new
    transformers.trainer.DEFAULT_PROGRESS_CALLBACK = QuietProgress
    return script, args, Console(quiet=args.process_index != 0)


def changed(args: TrainingArguments, **settings: Any) -> TrainingArguments:
    """A copy with other settings."""
    args = copy.copy(args)
    vars(args).update(settings)
    return args


def fingerprint(
    script: Any, args: TrainingArguments, ignored: Iterable[str], *data: Mapping[str, Any]
) -> str:
    """A name that changes with whatever changes a result: texts, settings and versions."""
    settings = {**asdict(script), **args.to_dict(), "processes": args.world_size}
    for name in ("output_dir", "logging_dir", "seed", *ignored):
        settings.pop(name, None)
    texts = [domain[split].to_dict() for domain in data for split in domain]
    described = json.dumps([settings, texts, installed()], sort_keys=True, default=str)
    return hashlib.sha256(described.encode()).hexdigest()[:12]


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """A value that was written to a file, or is made and written."""
    if not path.exists():
        write_text(path, json.dumps(make(), indent=2))
    return json.loads(path.read_text())


# ---------------------------------------------------------------- classifiers
def label_names(labels: Sequence[str]) -> dict[str, dict]:
    """The entries of a model's config that name the classes."""
    return {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def new_classifier(
    path: str,
    labels: Sequence[str],
    kind: Any = AutoModelForSequenceClassification,
    **options: Any,
) -> PreTrainedModel:
    """A pretrained encoder with a new head."""
    return kind.from_pretrained(path, **label_names(labels), **options)


def tokenized(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> datasets.Dataset:
    """The tokens of the column text, which takes their place."""
    return dataset.map(
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=max_length),
        batched=True,
        remove_columns="text",
    )


def predict(trainer: Trainer, dataset: datasets.Dataset) -> tuple[Any, Any]:
    """The labels of a data set, and the model's guesses."""
    predicted = trainer.predict(dataset)
    logits = predicted.predictions
    return predicted.label_ids, (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def run(main: Callable[[], None]) -> None:
    """Run an example; data or weights that are missing end it with a message, not a traceback."""
    try:
        main()
    except DataError as error:
        sys.exit(f"error: {error}")
