"""Three tasks in one training, run as a person runs it: a tiny model and data, no network."""

import json

import datasets
import multi_task
import pytest
import three_tasks

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
    options = {
        "--model_name_or_path": str(save_tiny_model(tmp_path / "model")),
        "--output_dir": str(tmp_path / "out"),
        "--max_steps": "4",
        "--per_device_train_batch_size": "4",
        "--freeze_layers": "1",
        "--few": "8",
        "--num_train": "16",
        "--seeds": "2",
        "--use_cpu": "true",
    }
    return [part for option in options.items() for part in option]


def test_every_method_beside_the_single_runs_and_finished_ones_are_kept(
    command, tmp_path, monkeypatch
):
    multi_task.main(command)
    folder = tmp_path / "out"
    table = (folder / "table.md").read_text()
    assert all(f"| {name} |" in table for name in (*multi_task.METHODS, multi_task.TUNED))
    assert "8 of sentiment, 16 of spam, 16 of tags" in table
    assert (folder / "affinity.png").stat().st_size > 10_000
    runs = json.loads((folder / "results.json").read_text())["runs"]
    assert {run["gain"] for run in runs if run["method"] == multi_task.ALONE} == {0}
    tuned = [run for run in runs if run["method"] == multi_task.TUNED]
    assert len(tuned) == 2 and all(run["chosen"] in multi_task.WEIGHTS for run in tuned)
    monkeypatch.setattr(multi_task, "cell", lambda *_: pytest.fail("a finished run runs again"))
    multi_task.main(command)
    assert (folder / "table.md").read_text() == table


def test_alone_and_together_see_as_many_rows_of_each_task(command, monkeypatch):
    seen = []

    class Seen(multi_task.Trainer):
        def train(self, *args, **kwargs):
            steps = self.args.num_train_epochs * len(self.train_dataset)
            steps /= self.args.per_device_train_batch_size
            quotas = dict(zip(self.train_dataset.names, self.train_dataset.quotas(0), strict=True))
            seen.append((steps, quotas))
            return super().train(*args, **kwargs)

    monkeypatch.setattr(multi_task, "Trainer", Seen)
    multi_task.main([*command, "--seeds", "1", "--methods", "mixture"])
    assert seen[:3] == [(12, {name: 16}) for name in three_tasks.NAMES]
    assert seen[3] == (12, dict.fromkeys(three_tasks.NAMES, 16))
