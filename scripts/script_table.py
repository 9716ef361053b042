"""Run every official script with every capability, and write docs/scripts.md.

`make script-table`; `make script-table ARGS="run_glue dpo"` runs these again and keeps the others.
Takes about two minutes on two CPU cores.
"""

import argparse
import logging
import sys
import tempfile
import warnings
from pathlib import Path

import datasets
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.scripts.table import PAGE, read, render
from tests.scripts.yardstick import CAPABILITIES, SCRIPTS, outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scripts", nargs="*", help="names of scripts; all by default")
    chosen = parser.parse_args().scripts or list(SCRIPTS)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    before = read(PAGE.read_text(encoding="utf-8")) if PAGE.exists() else {}
    outcomes: dict[tuple[str, str], str] = {}
    failed = False
    for script in SCRIPTS:
        for capability in CAPABILITIES:
            if script not in chosen and (script, capability) in before:
                outcomes[script, capability] = before[script, capability]
                continue
            with tempfile.TemporaryDirectory() as folder:
                try:
                    found = outcome(script, capability, Path(folder))
                except Exception as error:
                    failed = True
                    found = f"fails: {type(error).__name__}: {error}"
            print(f"{script}, {capability}: {found}", flush=True)
            outcomes[script, capability] = found
    if failed:
        sys.exit("Something fails, so the page was left as it is.")
    PAGE.write_text(render(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main()
