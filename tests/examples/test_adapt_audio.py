"""The example of sound, run as a person runs it, and its notebook: a few recordings, no network."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapt_audio
import datasets
import numpy as np
import pytest
from transformers import AutoModelForAudioClassification

from tests.examples.conftest import ROOT


@pytest.fixture
def write_domain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Recordings of 6 to 52 frames."""

    def write(name: str) -> Path:
        random = np.random.default_rng(len(name))
        frames = [random.normal(size=(6 + 2 * i, 13)).tolist() for i in range(24)]
        rows = {"frames": frames, "label": [str(i % 10) for i in range(24)]}
        path = tmp_path / f"{name}.parquet"
        datasets.Dataset.from_dict(rows).to_parquet(path)
        return path

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return write


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    found = {"--max_steps": "2", "--num_test": "8", "--use_cpu": "true"}
    found["--output_dir"] = str(tmp_path / "out")
    return [part for option in found.items() for part in option]


def test_both_models_are_tested_and_the_adapted_one_is_kept(
    write_domain: Callable[[str], Path],
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(adapt_audio, "write_domain", write_domain)
    adapt_audio.main(options)
    printed = capsys.readouterr().out
    assert "without:" in printed and f"with {adapt_audio.ExampleArguments.method}:" in printed
    assert AutoModelForAudioClassification.from_pretrained(tmp_path / "out").config.num_labels == 10


def test_the_cells_of_its_notebook_run(
    write_domain: Callable[[str], Path],
    options: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the notebook's folder, without the cell that installs."""
    notebook = ROOT / "examples" / "notebooks" / "adapt_audio.ipynb"
    monkeypatch.chdir(notebook.parent)
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    _, install, *code, call = ["".join(cell["source"]) for cell in cells]
    assert "git clone" in install and call.endswith("main([])")
    space: dict[str, Any] = {"__name__": "__main__"}
    for cell in code:
        exec(cell, space)
    space["write_domain"] = write_domain
    exec(call.replace("main([])", f"main({options})"), space)
    assert "without:" in capsys.readouterr().out
