"""Two tiny domains and a tiny model: every word of a text decides on its label."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from hf_adapt.cli import app
from tests.helpers.word_classifier import WORDS, save_tiny_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def quiet_and_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def rows(thing: str, flip: bool = False) -> list[tuple[str, str]]:
    return [
        (
            " ".join([WORDS[i % 4], thing, WORDS[8 + i // 4 % 6], WORDS[8 + i // 24]]),
            ("pos", "neg")[(i + flip) % 2],
        )
        for i in range(48)
    ]


def write_csv(path: Path, lines: list[tuple[str, ...]], header: str = "text,label") -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header.split(","), *lines])
    return path


@pytest.fixture
def domains(tmp_path: Path) -> dict[str, str]:
    return {
        "films": str(write_csv(tmp_path / "films.csv", rows("film"))),
        "phones": str(write_csv(tmp_path / "phones.csv", rows("phone"))),
    }


@pytest.fixture
def write_config(tmp_path: Path, domains: dict[str, str], model_dir: Path) -> Callable[..., str]:
    """Write a small configuration, with some keys changed; None takes one away."""

    def write(**changes: Any) -> str:
        values = {
            "model": str(model_dir),
            "data": domains,
            "pairs": [["films", "phones"]],
            "methods": {"source only": [], "MMD": ["MMD"], "bound": "target"},
            "seeds": 1,
            "training": {"max_steps": 2, "per_device_train_batch_size": 4},
            "output_dir": str(tmp_path / "out"),
            **changes,
        }
        file = tmp_path / "config.yaml"
        file.write_text(
            yaml.safe_dump({k: v for k, v in values.items() if v is not None}, sort_keys=False)
        )
        return str(file)

    return write


def run(*words: str, fails: bool = False) -> str:
    """What `hf-adapt run` prints, on lines of any length."""
    result: Result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["run", *words])
    if not fails and result.exit_code:
        raise AssertionError(result.output) from result.exception
    assert result.exit_code == int(fails), result.output
    return result.output


def results(folder: Path) -> list[dict[str, str]]:
    """The lines of results.csv."""
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))
