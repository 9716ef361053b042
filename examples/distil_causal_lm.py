"""Half the layers of a language model are gone. Do the rest learn faster from the whole model?

Every second layer of SmolLM2-135M-Instruct trains on movie reviews: as any script would, and from
the whole model's predictions beside, whose logits are never held as a whole. The perplexity is
measured on movie reviews and on newspaper text, which nothing is trained on.

    python examples/distil_causal_lm.py
    python examples/distil_causal_lm.py --max_steps 300 --student_layers 20
    python examples/distil_causal_lm.py --model_name_or_path FOLDER_OR_HUB_ID

Measured with the first command (seed 42; perplexity of movie reviews / newspaper text): the whole
model 115 / 88, the student 841 / 1,620 with cross-entropy alone and 642 / 1,086 distilled. The same
steps teach more, and 40 are far too few to reach the teacher. Four minutes of CPU time. Needs the
package gguf for the default weights. The distilled student is saved in --output_dir. Every option
of TrainingArguments can be given as well.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, Trainer, default_data_collator, set_seed

from hf_adapt import DistillationTrainer
from hf_adapt.distillation import student_from_teacher

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # what the examples share
from domain_data import LICENCES
from experiment import option, parse, run
from language_models import TEXTS, load_model, perplexities, rows_of
from model_weights import SMOLLM2_LICENCE, smollm2_path

DEFAULTS = {
    "output_dir": "runs/distil_causal_lm",
    "max_steps": 40,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "warmup_steps": 5,
}


@dataclass
class ExampleArguments:
    train: str = option("movies", f"Texts to learn. {LICENCES['vader4']}", choices=TEXTS)
    other: str = option("nyt", "Texts that are tested only", choices=TEXTS)
    model_name_or_path: str | None = option(None, f"Of the teacher. Default: {SMOLLM2_LICENCE}")
    student_layers: int = option(15, "Layers of the teacher that the student keeps")
    block_size: int = option(64, "Tokens of a row")
    num_test: int = option(32, "Test rows of each kind of text")


def main(argv: list[str] | None = None) -> None:
    script, args, console = parse(ExampleArguments, __doc__, argv, **DEFAULTS)
    console.print(f"[dim]{LICENCES['vader4']}\n{SMOLLM2_LICENCE}[/dim]")
    path = script.model_name_or_path or str(smollm2_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    train = rows_of(script.train, "train", tokenizer, script.block_size)
    tests = {
        name: rows_of(name, "test", tokenizer, script.block_size, script.num_test)
        for name in (script.train, script.other)
    }

    teacher = load_model(path)
    options = {
        "args": args,
        "train_dataset": train,
        "data_collator": default_data_collator,  # all rows are of one length
        "processing_class": tokenizer,
    }

    def show(name: str, trainer: Trainer) -> None:
        found = perplexities(trainer, tests)
        scores = ", ".join(f"{domain} {value:,.1f}" for domain, value in found.items())
        console.print(f"{name}: perplexity of {scores}", highlight=False)

    show("teacher", Trainer(teacher, **options))

    set_seed(args.seed)
    plain = Trainer(student_from_teacher(teacher, script.student_layers), **options)
    plain.train()
    show("student, cross-entropy alone", plain)

    set_seed(args.seed)  # the same rows in the same order
    student = student_from_teacher(teacher, script.student_layers)
    distilled = DistillationTrainer(student, teacher=teacher, temperature=1.0, **options)
    distilled.train()
    show("student, distilled", distilled)
    distilled.save_model()
    console.print(f"The distilled student is in {args.output_dir}.")


if __name__ == "__main__":
    run(main)
