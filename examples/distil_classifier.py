"""A small model learns from a large one, also on texts without labels. How much of it is kept?

Fine-tunes MiniLM-L6 on 500 movie reviews: that is the teacher. Two of its six layers are then
fine-tuned on the same reviews, once as any script would, and once from the teacher's predictions
beside, on these reviews and on movie reviews and tweets without labels. All are tested on movie
reviews and on tweets.

    python examples/distil_classifier.py
    python examples/distil_classifier.py --target nyt --student_layers 3

Measured with the first command (seed 42; accuracy on movie reviews / tweets, in %): teacher 80.4 /
77.2, student alone 72.8 / 51.2, distilled 76.8 / 78.8; with --seed 43 --bf16 true --use_cpu true
78.8 / 81.2, 72.2 / 51.4 and 75.0 / 82.2. Four minutes of CPU time. The distilled student is saved
in --output_dir. Every option of TrainingArguments can be given as well;
benchmarks/distilled_classifier.py measures another teacher over seeds.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from datasets import concatenate_datasets
from transformers import AutoTokenizer, Trainer, set_seed

from hf_adapt import DistillationTrainer, Stream
from hf_adapt.distillation import student_from_teacher

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # what the examples share
from domain_data import LICENCES, MINILM_LICENCE, load_pair, minilm_path
from experiment import DOMAINS, new_classifier, option, parse, predict, run, tokenized

DEFAULTS = {"output_dir": "runs/distil_classifier", "learning_rate": 1e-4, "num_train_epochs": 4}


@dataclass
class ExampleArguments:
    source: str = option("movies", f"Domain with labels. {LICENCES['vader4']}", choices=DOMAINS)
    target: str = option("tweets", "Domain of which only texts are known", choices=DOMAINS)
    model_name_or_path: str | None = option(None, f"Folder or hub id. Default: {MINILM_LICENCE}")
    student_layers: int = option(2, "Layers that the students keep")
    num_labels: int = option(500, "Rows with labels")
    num_test: int = option(500, "Test rows of each domain, at most")
    max_length: int = option(32, "Tokens of a text that are read")


def main(argv: list[str] | None = None) -> None:
    script, args, console = parse(ExampleArguments, __doc__, argv, **DEFAULTS)
    console.print(f"[dim]{LICENCES['vader4']}\n{MINILM_LICENCE}[/dim]")
    path = script.model_name_or_path or str(minilm_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    pair = load_pair(script.source, script.target, num_test=script.num_test)
    source, target = (
        tokenized(dataset, tokenizer, script.max_length).shuffle(seed=0)
        for dataset in (pair.source["train"], pair.target_unlabelled)
    )
    rows = source.select(range(len(source))[: script.num_labels])
    rest = source.select(range(len(source))[script.num_labels :]).remove_columns("label")
    texts = concatenate_datasets([rest, target])
    tests = {script.source: pair.source["test"], script.target: pair.target["test"]}

    def show(name: str, trainer: Trainer) -> None:
        scores = []
        for domain, test in tests.items():
            truth, guesses = predict(trainer, tokenized(test, tokenizer, script.max_length))
            scores.append(f"{domain} {100 * (truth == guesses).mean():.1f}")
        console.print(f"{name}: accuracy {', '.join(scores)} %", highlight=False)

    options = {"args": args, "train_dataset": rows, "processing_class": tokenizer}
    set_seed(args.seed)
    teacher = Trainer(new_classifier(path, pair.labels), **options)
    teacher.train()
    show("teacher", teacher)

    set_seed(args.seed)
    pretrained = new_classifier(path, pair.labels)
    alone = Trainer(student_from_teacher(pretrained, script.student_layers), **options)
    alone.train()
    show("student alone", alone)

    distilled = DistillationTrainer(
        student_from_teacher(pretrained, script.student_layers),
        teacher=teacher.model,
        kd_weight=0.8,
        ce_weight=0.2,
        target_dataset=Stream(texts, ratio=2),  # two texts without labels beside each with one
        **options,
    )
    distilled.train()
    show("student, distilled", distilled)
    distilled.save_model()
    console.print(f"The distilled student is in {args.output_dir}.")


if __name__ == "__main__":
    run(main)
