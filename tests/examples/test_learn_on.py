"""Learning on without forgetting, run as a person runs it: tiny models and data, no network."""

import json
import math
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import datasets
import forgetting
import forgetting_language_model
import language_models
import learn_on
import learn_on_lm
import pytest
import torch
import two_tasks
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from tests.helpers.word_classifier import WORDS, save_tiny_model

CLASSES = {"movies": ("bad", "good"), "sms": ("ham", "spam")}


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Options for a tiny classifier."""

    def load_domain(domain):
        texts = [(f"{WORDS[i % 4]} film {i}", CLASSES[domain][i % 2]) for i in range(24)]
        return {"train": texts, "test": texts[:8]}

    monkeypatch.setattr(two_tasks, "load_domain", load_domain)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    (tmp_path / "model").mkdir()
    torch.manual_seed(0)
    options = {
        "--model_name_or_path": str(save_tiny_model(tmp_path / "model")),
        "--output_dir": str(tmp_path / "out"),
        "--max_steps": "2",
        "--freeze_layers": "1",
        "--learning_rate": "0.05",
        "--use_cpu": "true",
    }
    return [part for option in options.items() for part in option]


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_the_old_task_is_tested_before_and_after(command, tmp_path):
    learn_on.main([*command, "--memory_size", "12", "--ratio", "1", "--max_steps", "12"])
    found = results(tmp_path / "out")["accuracy"]
    assert list(found) == ["before sms", "plain", "with replay"]
    assert found["plain"][0] == 0 < found["with replay"][0]


def test_a_head_that_has_grown_predicts_the_old_classes_as_before(command, tmp_path):
    start = command[1]
    old = AutoModelForSequenceClassification.from_pretrained(start)
    model = two_tasks.grown(start, ["bad", "good", "ham", "spam"])
    assert model.config.id2label == {0: "bad", 1: "good", 2: "ham", 3: "spam"}
    assert model.classifier.weight[:2].equal(old.classifier.weight)
    assert model.bert.pooler.dense.weight.equal(old.bert.pooler.dense.weight)


def test_every_method_has_its_row_and_finished_runs_are_kept(command, tmp_path, monkeypatch):
    options = [*command, "--seeds", "1", "--tasks", "movies", "sms"]
    forgetting.main(options)
    folder = tmp_path / "out" / "movies-sms"
    table = (folder / "table.md").read_text()
    assert all(f"| {method} |" in table for method in forgetting.METHODS)
    assert (folder / "forgetting.png").stat().st_size > 10_000
    monkeypatch.setattr(forgetting, "cell", lambda *_: pytest.fail("a finished run runs again"))
    forgetting.main(options)
    assert (folder / "table.md").read_text() == table


@pytest.fixture
def language_command(llama_dir, tmp_path, monkeypatch):
    """Options for a tiny language model."""
    texts = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 15)) for i in range(1, 30)]

    def texts_of(domain, split):
        start = ["sms", "nyt", "movies"].index(domain)
        return texts[start:]

    monkeypatch.setattr(language_models, "texts_of", texts_of)
    options = {
        "--model_name_or_path": str(llama_dir),
        "--output_dir": str(tmp_path / "out"),
        "--max_steps": "2",
        "--block_size": "8",
        "--memory_size": "4",
        "--learning_rate": "0.1",
        "--warmup_steps": "0",
        "--use_cpu": "true",
    }
    return [part for option in options.items() for part in option]


def test_perplexity_of_what_is_learnt_of_the_memory_and_of_other_texts(
    language_command, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(learn_on_lm, "texts_of", language_models.texts_of)
    at = language_command.index("--block_size")
    learn_on_lm.main([*language_command[:at], *language_command[at + 2 :], "--max_length", "8"])
    printed = capsys.readouterr().out
    rows = re.findall(r"(.+): perplexity of sms (.+), nyt (.+), movies (.+)", printed)
    assert [row[0] for row in rows] == ["at the start", "plain", "with replay"]
    assert len({row[1:] for row in rows}) == 3
    PeftModel.from_pretrained(language_models.load_model(language_command[1]), tmp_path / "out")


def test_what_is_not_installed_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SystemExit, match='pip install "trl>='):
        runpy.run_path(learn_on_lm.__file__)


def test_a_language_model_is_compared_over_seeds(language_command, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    forgetting_language_model.main([*language_command, "--seeds", "2", "--num_test", "8"])
    folder = tmp_path / "out" / "sms-nyt-movies"
    document = results(folder)
    runs = {(run["method"], run["seed"]): run for run in document["runs"]}
    assert len(runs) == 2 * len(forgetting_language_model.METHODS)
    start, plain = document["start"], runs["plain", 42]
    assert plain["forgotten"] == pytest.approx(math.log(plain["nyt"] / start["nyt"]))
    assert plain["learnt"] == pytest.approx(math.log(start["sms"] / plain["sms"]))
    half = runs["interpolation", 42]["sms"]
    assert half not in (start["sms"], plain["sms"])
    assert plain["sms"] != runs["plain", 43]["sms"]
    table = (folder / "table.md").read_text()
    assert all(f"| {method} |" in table for method in forgetting_language_model.METHODS)
    assert (folder / "forgetting.png").stat().st_size > 10_000
    monkeypatch.setattr(
        forgetting_language_model, "cell", lambda *_: pytest.fail("a finished run runs again")
    )
    forgetting_language_model.main([*language_command, "--seeds", "2", "--num_test", "8"])
    assert (folder / "table.md").read_text() == table
