"""Three tasks in one training, run as a person runs it: a tiny model and data, no network."""

import json

import datasets
import multi_task
import pytest
import task_mixtures
import three_tasks
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from tests.helpers.word_classifier import WORDS, save_tiny_model

CLASSES = {"movies": ("bad", "good"), "sms": ("ham", "spam")}


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Options for a tiny model."""

    def texts(domain):
        rows = [(f"{WORDS[i % 4]} film {i}", CLASSES[domain][i % 2]) for i in range(24)]
        return {"train": rows, "dev": rows[8:16], "test": rows[:8]}

    def words(*_):
        rows = [([WORDS[i % 4], "film"], ["ADJ", "NOUN"]) for i in range(24)]
        return {"train": rows, "dev": rows[8:16], "test": rows[:8]}

    monkeypatch.setattr(three_tasks, "load_domain", texts)
    monkeypatch.setattr(three_tasks, "domain_rows", words)
    monkeypatch.setattr(three_tasks, "write_domain", lambda name: name)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    (tmp_path / "model").mkdir()
    torch.manual_seed(0)
    options = {
        "--model_name_or_path": str(save_tiny_model(tmp_path / "model")),
        "--output_dir": str(tmp_path / "out"),
        "--max_steps": "4",
        "--per_device_train_batch_size": "4",
        "--freeze_layers": "1",
        "--learning_rate": "0.01",
        "--num_train": "16",
        "--use_cpu": "true",
    }
    return [part for option in options.items() for part in option]


def test_three_models_and_one_for_all_three(command, tmp_path, capsys):
    multi_task.main(command)
    printed = capsys.readouterr().out
    assert all(f"{name}: " in printed for name in three_tasks.NAMES)
    spam = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "spam")
    assert list(spam.config.id2label.values()) == ["ham", "spam"]
    tags = AutoModelForTokenClassification.from_pretrained(tmp_path / "out" / "tags")
    assert list(tags.config.id2label.values()) == ["ADJ", "NOUN"]
    assert tags.bert.embeddings.word_embeddings.weight.equal(
        spam.bert.embeddings.word_embeddings.weight
    )


def test_every_method_beside_the_single_runs_and_finished_ones_are_kept(
    command, tmp_path, monkeypatch
):
    command += ["--few", "8", "--seeds", "2"]
    task_mixtures.main(command)
    folder = tmp_path / "out"
    table = (folder / "table.md").read_text()
    assert all(f"| {name} |" in table for name in (*task_mixtures.METHODS, task_mixtures.TUNED))
    assert "8 of sentiment, 16 of spam, 16 of tags" in table
    assert (folder / "affinity.png").stat().st_size > 10_000
    runs = json.loads((folder / "results.json").read_text())["runs"]
    assert {run["gain"] for run in runs if run["method"] == task_mixtures.ALONE} == {0}
    tuned = [run for run in runs if run["method"] == task_mixtures.TUNED]
    assert len(tuned) == 2 and all(run["chosen"] in task_mixtures.WEIGHTS for run in tuned)
    monkeypatch.setattr(task_mixtures, "cell", lambda *_: pytest.fail("a finished run runs again"))
    task_mixtures.main(command)
    assert (folder / "table.md").read_text() == table


def test_alone_and_together_see_as_many_rows_of_each_task(command, monkeypatch):
    seen = []

    class Seen(task_mixtures.Trainer):
        def train(self, *args, **kwargs):
            steps = self.args.num_train_epochs * len(self.train_dataset)
            steps /= self.args.per_device_train_batch_size
            quotas = dict(zip(self.train_dataset.names, self.train_dataset.quotas(0), strict=True))
            seen.append((steps, quotas))
            return super().train(*args, **kwargs)

    monkeypatch.setattr(task_mixtures, "Trainer", Seen)
    task_mixtures.main([*command, "--few", "8", "--methods", "mixture"])
    assert seen[:3] == [(12, {name: 16}) for name in three_tasks.NAMES]
    assert seen[3] == (12, dict.fromkeys(three_tasks.NAMES, 16))
