"""The example, run as a person runs it, on tiny data and a tiny model, without a network."""

import json

import datasets
import domain_data
import gradual_unfreezing as example
import pytest

from tests.helpers.word_classifier import WORDS, save_tiny_model


@pytest.fixture
def model_dir(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    return save_tiny_model(folder)


def test_all_methods_run_and_everything_is_written(model_dir, tmp_path, monkeypatch, capsys):
    def load_domain(domain):
        texts = [(f"{WORDS[i % 4]} {domain} {i}", ("pos", "neg")[i % 2]) for i in range(24)]
        return {"train": texts, "dev": texts[:8], "test": texts[:8]}

    monkeypatch.setattr(domain_data, "load_domain", load_domain)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    out = tmp_path / "out"
    options = {
        "--model_name_or_path": str(model_dir),
        "--output_dir": str(out),
        "--max_steps": "4",
        "--seeds": "2",
        "--per_device_train_batch_size": "4",
        "--use_cpu": "true",
    }
    example.main([part for option in options.items() for part in option])
    printed = capsys.readouterr().out
    assert "starts at" in printed and "out of" in printed
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert [(run["method"], run["seed"]) for run in runs] == [
        (method, seed) for seed in (42, 43) for method in example.METHODS
    ]
    rates = {run["method"]: run["rates"] for run in runs}
    assert rates["full"] == [{}] * 4
    head = {group for step in rates["head"] for group, rate in step.items() if rate > 0}
    assert head == {"head"}
    lp_ft = [sorted(g for g, rate in step.items() if rate > 0) for step in rates["lp-ft"]]
    assert lp_ft == [["head"]] * 2 + [["embeddings", "head", "layer.0", "layer.1"]] * 2
    assert [sum(r > 0 for r in step.values()) for step in rates["gradual"]] == [1, 2, 3, 4]
    table = (out / "table.md").read_text()
    assert all(f"| {method} |" in table for method in example.METHODS)
    assert (out / "unfreezing.png").stat().st_size > 10_000


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="unknown --methods"):
        example.ExampleArguments(methods=["half"])
