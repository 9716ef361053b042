"""A shortened `run_glue.py` of transformers, with the options of hf_adapt.

What hf_adapt adds is marked: an import, the classes of the parser, and a line after the Trainer.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_adapt import AdaptationArguments, DistillationArguments  # hf_adapt


@dataclass
class DataTrainingArguments:
    """The files of the task."""

    train_file: str = field(metadata={"help": "A csv file with the training rows."})
    validation_file: str | None = field(default=None, metadata={"help": "The same to evaluate on."})
    max_seq_length: int = field(default=32, metadata={"help": "Longer texts are truncated."})


@dataclass
class ModelArguments:
    """The model."""

    model_name_or_path: str = field(metadata={"help": "Folder or hub id of the model."})


def make_parser() -> HfArgumentParser:
    own = (ModelArguments, DataTrainingArguments, TrainingArguments)
    added = (AdaptationArguments, DistillationArguments)  # hf_adapt
    return HfArgumentParser((*own, *added))  # type: ignore[arg-type]


def main(words: Sequence[str]) -> Trainer:
    parser = make_parser()
    if len(words) == 1 and words[0].endswith(".json"):
        parsed = parser.parse_json_file(words[0])
    elif len(words) == 1 and words[0].endswith((".yaml", ".yml")):
        parsed = parser.parse_yaml_file(words[0])
    else:
        parsed = parser.parse_args_into_dataclasses(list(words))
    model_args, data_args, training_args, *adaptation_args = parsed
    set_seed(training_args.seed)

    files = {"train": data_args.train_file}
    if data_args.validation_file is not None:
        files["validation"] = data_args.validation_file
    raw_datasets = datasets.load_dataset("csv", data_files=files)
    label_list = sorted(raw_datasets["train"].unique("label"))
    label_to_id = {name: number for number, name in enumerate(label_list)}

    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(model_args.model_name_or_path)
    model.config.id2label = {number: str(name) for name, number in label_to_id.items()}

    def preprocess_function(examples: Any) -> Any:
        result = tokenizer(
            examples["sentence"], max_length=data_args.max_seq_length, truncation=True
        )
        if "label" in examples:
            result["label"] = [label_to_id[name] for name in examples["label"]]
        return result

    def compute_metrics(p: Any) -> dict[str, float]:
        return {"accuracy": float((np.argmax(p.predictions, axis=1) == p.label_ids).mean())}

    prepared = raw_datasets.map(preprocess_function, batched=True)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=prepared["train"],
        eval_dataset=prepared.get("validation"),
        compute_metrics=compute_metrics,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    for each in adaptation_args:  # hf_adapt
        each.add_to(trainer, lambda rows: rows.map(preprocess_function, batched=True))
    trainer.train()
    trainer.save_model()
    if "validation" in prepared:
        trainer.log_metrics("eval", trainer.evaluate())
    return trainer


if __name__ == "__main__":
    main(sys.argv[1:])
