"""What is fine-tuned on movie reviews reads tweets as well. Better, if it unfreezes gradually?

Fine-tunes multilingual-e5-small, of twelve layers, on 640 movie reviews: all layers from the start,
and then with one line that trains the head first and one layer more per phase, from the top, each
at a lower rate than the one above it (ULMFiT). Tests both on movie reviews and on tweets.

    python examples/gradual_unfreezing.py --bf16 true --use_cpu true
    python examples/gradual_unfreezing.py --target products --layer_decay 0.6

About two minutes on two CPU cores with --bf16. With seed 42 movie reviews and tweets are 79.7 and
76.0 % right if all trains at once, and 77.0 and 85.3 % gradually, in half the time (three seeds and
other domains: docs/results.md). The second model is saved in --output_dir. Every option of
TrainingArguments can be given as well.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, EvalPrediction, Trainer, set_seed

from hf_adapt import GradualUnfreezingCallback
from hf_adapt.engine.progress import slanted_triangular

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # what the examples share
from domain_data import LICENCES, load_pair
from experiment import DOMAINS, new_classifier, option, parse, run, tokenized
from model_weights import E5_LICENCE, E5_PREFIX, e5_small_path

DEFAULTS = {
    "output_dir": "runs/gradual_unfreezing",
    "num_train_epochs": 2,
    "learning_rate": 1e-4,
}


@dataclass
class ExampleArguments:
    source: str = option("movies", f"Domain with labels. {LICENCES['vader4']}", choices=DOMAINS)
    target: str = option("tweets", "Domain that is only tested", choices=DOMAINS)
    model_name_or_path: str | None = option(None, f"Folder or hub id. Default: {E5_LICENCE}")
    layer_decay: float = option(0.8, "Learning rate of a layer relative to the one above it")
    head_rate: float = option(10.0, "Learning rate of the new head relative to the top layer")
    num_train: int = option(640, "Labelled training rows")
    num_test: int = option(300, "Test rows of each domain, at most")
    max_length: int = option(32, "Tokens of a text that are read")


def accuracy(given: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((given.predictions.argmax(-1) == given.label_ids).mean())}


def main(argv: list[str] | None = None) -> None:
    script, args, console = parse(ExampleArguments, __doc__, argv, **DEFAULTS)
    console.print(f"[dim]{LICENCES['vader4']}\n{E5_LICENCE}[/dim]")
    path = script.model_name_or_path or str(e5_small_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    pair = load_pair(script.source, script.target, None, script.num_test)
    rows = pair.source["train"].shuffle(seed=args.seed)
    few = rows.select(range(len(rows))[: script.num_train])
    train, test, other = (
        tokenized(
            rows.map(lambda row: {"text": E5_PREFIX + row["text"]}), tokenizer, script.max_length
        )
        for rows in (few, pair.source["test"], pair.target["test"])
    )
    for gradually in (False, True):
        set_seed(args.seed)
        trainer = Trainer(
            new_classifier(path, pair.labels),
            args,
            train_dataset=train,
            processing_class=tokenizer,
            compute_metrics=accuracy,
        )
        if gradually:
            unfreezing = GradualUnfreezingCallback(
                layer_decay=script.layer_decay,
                lr_multipliers={"head": script.head_rate},
                rewarm_steps=5,
                lr_schedule=slanted_triangular(),
            )
            trainer.add_callback(unfreezing)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        right = [trainer.evaluate(rows)["eval_accuracy"] for rows in (test, other)]
        console.print(
            f"{'gradually' if gradually else 'all at once'}: {script.source} {right[0]:.1%}, "
            f"{script.target} {right[1]:.1%} right, {seconds:.0f} seconds"
        )
    trainer.save_model()
    console.print(f"The model that was unfrozen gradually is in {args.output_dir}.")


if __name__ == "__main__":
    run(main)
