"""The example of knowledge injection, run as a person runs it: tiny data, a tiny WordNet."""

import json
from pathlib import Path

import datasets
import domain_data
import knowledge_injection as example
import pytest
import torch

from tests.helpers.word_classifier import WORDS, save_tiny_model

ADJECTIVES = {"good": 100, "bad": 200, "fine": 300, "poor": 400}
NOUNS = {"film": 100, "phone": 200, "battery": 300, "plot": 400}


def tiny_wordnet(folder: Path) -> str:
    """The words of the tiny texts, in the files' own format."""
    folder.mkdir()
    for file, kind, words in (("adj", "a", ADJECTIVES), ("noun", "n", NOUNS)):
        pointer = "! 00000200 a 0101" if kind == "a" else "@ 00000100 n 0000"
        lines = [
            f"{number:08} 00 {kind} 01 {word} 0 001 {pointer} | what {word} is  "
            for word, number in words.items()
        ]
        (folder / f"data.{file}").write_text("\n".join(lines) + "\n")
    for file in ("verb", "adv"):
        (folder / f"data.{file}").write_text("  1 nothing here\n")
    return str(folder)


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Options for a tiny model, on sentences of three words and the domain's name."""

    def load_domain(domain):
        rows = [
            (
                f"{WORDS[i % 4]} {WORDS[4 + i % 4]} {WORDS[8 + i % 6]} {domain}",
                ("pos", "neg")[i % 2],
            )
            for i in range(40)
        ]
        return {"train": rows, "dev": rows[:8], "test": rows[:8]}

    monkeypatch.setattr(domain_data, "load_domain", load_domain)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("HF_ADAPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    options = {
        "--model_name_or_path": str(save_tiny_model(tmp_path / "model")),
        "--wordnet": tiny_wordnet(tmp_path / "wordnet"),
        "--output_dir": str(tmp_path / "out"),
        "--max_steps": "2",
        "--per_device_train_batch_size": "4",
        "--use_cpu": "true",
    }
    return [part for option in options.items() for part in option]


def test_all_methods_run_and_everything_is_written(command, tmp_path, capsys):
    example.main([*command, "--seeds", "2", "--num_labels", "8", "16"])
    out = tmp_path / "out"
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert {(run["method"], run["labels"], run["seed"]) for run in runs} == {
        (method, labels, seed)
        for method in example.METHODS
        for labels in (8, 16)
        for seed in (42, 43)
    }
    assert all(0 <= run[name] <= 1 for run in runs for name in example.TESTS)
    table = (out / "table.md").read_text()
    assert all(f"| {name} |" in table for name in example.METHODS.values())
    assert (out / "knowledge.png").stat().st_size > 10_000
    linked = "'plot' [4:8]"  # of "The plot is a bank ..."
    assert linked in (out / "explanations.txt").read_text() and linked in capsys.readouterr().out


def test_glosses_are_encoded_once(command, monkeypatch):
    made = []
    encode = example.EntityVectors.from_descriptions

    def counted(*args, **kwargs):
        made.append(args)
        return encode(*args, **kwargs)

    monkeypatch.setattr(example.EntityVectors, "from_descriptions", counted)
    few = ["--seeds", "1", "--num_labels", "8", "--methods", "wordnet"]
    example.main([*command, *few])
    example.main([*command, *few])
    assert len(made) == 1


def test_the_controls_are_controls():
    vectors = example.EntityVectors.from_array(torch.arange(12.0).view(6, 2).numpy())
    rows = vectors.gather(range(6))
    assert (example.control("wordnet", vectors).gather(range(6)) == rows).all()
    assert (example.control("boundaries", vectors).gather(range(6)) == 1).all()
    shuffled = example.control("shuffled", vectors).gather(range(6))
    assert sorted(map(tuple, shuffled)) == sorted(map(tuple, rows))
    assert not (shuffled == rows).all()


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="unknown --methods"):
        example.ExampleArguments(methods=["half"])
