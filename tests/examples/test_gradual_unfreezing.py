"""The example and the benchmark of unfreezing on tiny data and a tiny model, without a network."""

import json
from pathlib import Path

import datasets
import domain_data
import gradual_unfreezing as example
import pytest
import unfreezing_schedules
from transformers import AutoModelForSequenceClassification

from tests.helpers.word_classifier import WORDS, save_tiny_model


@pytest.fixture
def model_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tiny model; every domain has 24 rows."""

    def load_domain(domain: str) -> dict[str, list[tuple[str, str]]]:
        texts = [(f"{WORDS[i % 4]} {domain} {i}", ("pos", "neg")[i % 2]) for i in range(24)]
        return {"train": texts, "dev": texts[:8], "test": texts[:8]}

    monkeypatch.setattr(domain_data, "load_domain", load_domain)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    (tmp_path / "model").mkdir()
    return str(save_tiny_model(tmp_path / "model"))


def options(tmp_path: Path, **more: str) -> list[str]:
    given = {"output_dir": str(tmp_path / "out"), "max_steps": "4", "use_cpu": "true", **more}
    given["per_device_train_batch_size"] = "4"
    return [part for name, value in given.items() for part in (f"--{name}", value)]


def test_both_models_are_tested_and_the_one_that_unfreezes_gradually_is_saved(
    model_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example.main(options(tmp_path, model_name_or_path=model_path, num_train="8"))
    printed = capsys.readouterr().out
    assert "all at once: movies" in printed and "gradually: movies" in printed
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").bert
    before = AutoModelForSequenceClassification.from_pretrained(model_path).bert
    layers = [[layer.output.dense.weight for layer in m.encoder.layer] for m in (saved, before)]
    moved = [float((a - b).detach().norm()) for a, b in zip(*layers, strict=True)]
    assert 0 < moved[0] < moved[1]  # the upper layer trains longer, and at a larger rate


def test_every_method_has_its_row_and_finished_runs_are_kept(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {"e5": (lambda: model_path, "", "")}
    monkeypatch.setattr(unfreezing_schedules, "MODELS", models)
    command = [*options(tmp_path, num_train="12", seeds="2"), "--tests", "movies", "nyt"]
    unfreezing_schedules.main(command)
    folder = tmp_path / "out" / "e5-movies"
    runs = json.loads((folder / "results.json").read_text())["runs"]
    methods = list(unfreezing_schedules.METHODS)
    assert [(r["method"], r["seed"]) for r in runs] == [(m, s) for s in (42, 43) for m in methods]
    table = (folder / "table.md").read_text()
    assert all(f"| {method} |" in table for method in methods)
    assert (folder / "unfreezing.png").stat().st_size > 10_000
    monkeypatch.setattr(unfreezing_schedules, "cell", lambda *_: pytest.fail("runs again"))
    unfreezing_schedules.main(command)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown --methods"):
        unfreezing_schedules.BenchmarkArguments(methods=["half"])
