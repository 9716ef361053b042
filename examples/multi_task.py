"""One model for sentiment, spam and the words' tags: is it as good as a model for each?

Fine-tunes MiniLM-L6 on the sentiment of movie reviews, on spam in SMS, and on the part-of-speech
tags of newspapers: three models first, then one with a head for each task, in one training with as
many steps as the three together.

    python examples/multi_task.py
    python examples/multi_task.py --num_train 1000 --num_train_epochs 2

Measured with the first command (seed 42; accuracy of sentiment / macro-F1 of spam / accuracy of
tags, in %): 76.5 / 97.5 / 92.6 of the three models, 78.5 / 95.8 / 94.0 of the one. A step of it has
a third as many rows of each task as one of the three; with as many, and so a third of the steps, it
was worse (docs/results.md). Two and a half minutes of CPU time. Each task of the one model is saved
in --output_dir, as a plain model. Every option of TrainingArguments can be given as well;
benchmarks/task_mixtures.py compares weights and gradient surgery over seeds.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, Trainer, set_seed

from hf_adapt import AdaptationCallback
from hf_adapt.multitask import MultiTask, TaskSpec, mix

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # what the examples share
from domain_data import MINILM_LICENCE, minilm_path
from experiment import new_classifier, option, parse, run
from three_tasks import ABOUT, NAMES, SCORED, load_tasks

from hf_adapt.experiments.training import first_groups, freeze


@dataclass
class ExampleArguments:
    model_name_or_path: str | None = option(None, f"Folder or hub id. Default: {MINILM_LICENCE}")
    num_train: int = option(320, "Training rows of each task")
    num_test: int = option(400, "Test rows of each task, at most")
    max_length: int = option(32, "Tokens of a text that are read")
    freeze_layers: int = option(3, "Train neither the embeddings nor the first layers, for speed")


def main(argv: list[str] | None = None) -> None:
    script, args, console = parse(ExampleArguments, __doc__, argv, output_dir="runs/multi_task")
    console.print(f"[dim]{ABOUT}\n{MINILM_LICENCE}[/dim]")
    path = script.model_name_or_path or str(minilm_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    sizes = dict.fromkeys(NAMES, script.num_train)
    tasks = load_tasks(tokenizer, sizes, script.num_test, script.max_length)

    def make_trainer(name: str, rows: Any) -> Trainer:
        """A plain Trainer of one task."""
        set_seed(args.seed)
        task = tasks[name]
        model = new_classifier(path, task.labels, task.kind)
        freeze(model, first_groups(model, script.freeze_layers))
        return Trainer(
            model,
            args,
            train_dataset=rows,
            processing_class=tokenizer,
            data_collator=task.collator,
            compute_metrics=task.metrics,
        )

    alone = {}
    for name, task in tasks.items():
        trainer = make_trainer(name, task.train)
        trainer.train()
        alone[name] = trainer.evaluate(task.test)["eval_score"]

    trainer = make_trainer("sentiment", mix({name: task.train for name, task in tasks.items()}))
    specs = {
        "sentiment": TaskSpec(),  # the Trainer's own
        "spam": TaskSpec(num_labels=tasks["spam"].labels, metrics=tasks["spam"].metrics),
        "tags": TaskSpec(
            num_labels=tasks["tags"].labels,
            head="token_classification",
            metrics=tasks["tags"].metrics,
        ),
    }
    multi_task = MultiTask(specs)
    trainer.add_callback(AdaptationCallback(multi_task))
    trainer.train()
    together = trainer.evaluate({name: task.test for name, task in tasks.items()})

    console.print(f"{SCORED}:")
    for name in NAMES:
        score = together[f"eval_{name}_score"]
        console.print(f"{name}: {100 * alone[name]:.1f} alone, {100 * score:.1f} together")
        multi_task.export(name, Path(args.output_dir) / name)
    console.print(f"The three tasks of the one model are in {args.output_dir}.")


if __name__ == "__main__":
    run(main)
