"""The tables of domain shift: methods × pairs of domains × seeds, by `hf-adapt run`.

    python benchmarks/domain_shift.py                                   # the 12 pairs of vader4
    python benchmarks/domain_shift.py benchmarks/configs/spam2.yaml --seeds 5
    python benchmarks/domain_shift.py --pair movies:tweets --method DANN --jobs 2

Fetches what a configuration reads first. What is finished is kept in its output folder.
"""

import sys
from pathlib import Path

from domain_data import DataError, run

DEFAULT = Path(__file__).parent / "configs" / "vader4.yaml"


def main(arguments: list[str]) -> None:
    given = bool(arguments) and arguments[0].endswith((".yaml", ".yml"))
    run(Path(arguments[0]) if given else DEFAULT, arguments[given:])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DataError as error:
        sys.exit(f"error: {error}")
