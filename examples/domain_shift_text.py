"""Does a text classifier work in another domain, and how much do unlabelled texts from there help?

Fine-tunes one model several times, tests it in the domain it was trained on (source) and in another
one (target), and prints a table of the methods:

    source only                      fine-tuned on the source's labels alone, as anyone would
    recommended                      the same, and one line that adds unlabelled target texts
    recommended, frequencies given   that line also says how frequent each class is in the target
    bound                            fine-tuned on the target's labels

Labels of the target are used by the bound, for its class frequencies where they are given, and for
testing; never for training or choosing any other model. Every model is the last of its run.
docs/plain_vs_adapted.md shows such a script; here `hf-adapt run` runs domain_shift_text.yaml, after
the texts and the model have been fetched.

    python examples/domain_shift_text.py
    python examples/domain_shift_text.py --source sms --target email --seeds 5
    python examples/domain_shift_text.py --source mine.csv --target theirs.csv --num-train 5000

Takes about seven minutes on two CPU cores with --jobs 2. What is finished is kept in --output-dir:
the same command again goes on where it stopped. Every option of TrainingArguments can be given as
well; `hf-adapt run --help` has the others.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # what the examples share
from domain_data import DataError, run


def main(arguments: list[str]) -> None:
    run(Path(__file__).with_suffix(".yaml"), arguments)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DataError as error:
        sys.exit(f"error: {error}")
