"""The notebooks are made from the examples; test_adapt_audio.py runs one of them."""

import sys
from pathlib import Path

import pytest

from tests.examples.conftest import ROOT

sys.path.append(str(ROOT / "scripts"))
import notebooks

SCRIPTS = sorted(notebooks.EXAMPLES.glob("*.py"))


def test_every_example_has_its_notebook_and_no_other_is_there() -> None:
    assert {path.stem for path in notebooks.FOLDER.glob("*.ipynb")} == {
        path.stem for path in SCRIPTS
    }


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_notebook_is_that_of_its_script(script: Path) -> None:
    """Else run `make notebooks`."""
    stored = (notebooks.FOLDER / f"{script.stem}.ipynb").read_text(encoding="utf-8")
    assert stored == notebooks.notebook(script)
