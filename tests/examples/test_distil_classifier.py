"""The distillation of classifiers, run as a person runs it: tiny data, tiny models, no network."""

import json

import datasets
import distil_classifier
import distilled_classifier as benchmark
import domain_data
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.helpers.word_classifier import WORDS, save_tiny_model


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Folders of a tiny teacher and a tiny student; sentences of three words."""

    def load_domain(domain):
        rows = [
            (f"{WORDS[i % 4]} {WORDS[4 + i % 5]} {WORDS[8 + i % 6]}", ("pos", "neg")[i % 2])
            for i in range(40)
        ]
        return {"train": rows, "dev": rows[:8], "test": rows[:8]}

    monkeypatch.setattr(domain_data, "load_domain", load_domain)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    found = {}
    torch.manual_seed(0)
    for name in ("teacher", "student"):
        (tmp_path / name).mkdir()
        found[name] = str(save_tiny_model(tmp_path / name))
    return found


@pytest.fixture
def command(folders, tmp_path):
    """Options of the benchmark."""
    options = {
        "--model_name_or_path": folders["student"],
        "--teacher_name_or_path": folders["teacher"],
        "--student_layers": "1",
        "--num_labels": "10",
        "--num_unlabelled": "16",
        "--output_dir": str(tmp_path / "out"),
        "--max_steps": "2",
        "--per_device_train_batch_size": "4",
        "--use_cpu": "true",
    }
    return [part for option in options.items() for part in option]


def test_a_student_alone_and_distilled(folders, tmp_path, capsys):
    options = {
        "--model_name_or_path": folders["student"],
        "--student_layers": "1",
        "--num_labels": "10",
        "--output_dir": str(tmp_path / "out"),
        "--max_steps": "2",
        "--per_device_train_batch_size": "4",
        "--use_cpu": "true",
    }
    distil_classifier.main([part for option in options.items() for part in option])
    printed, bars = capsys.readouterr()
    assert "train_runtime" not in printed + bars  # one bar in place of the Trainer's logs
    models = ("teacher", "student alone", "student, distilled")
    assert all(f"{name}: accuracy movies " in printed for name in models)
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert student.config.num_hidden_layers == 1


def test_every_method_is_compared_over_draws(command, tmp_path):
    own = [name for name in benchmark.METHODS if name != "teacher"]
    benchmark.main([*command, "--seeds", "2", "--assistant_layers", "2", "--methods", *own])
    out = tmp_path / "out"
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert {(run["method"], run["seed"]) for run in runs} == {
        (method, seed) for seed in (42, 43) for method in benchmark.METHODS
    }
    assert all(0 <= run[name] <= 1 for run in runs for name in benchmark.TESTS)
    sizes = {run["method"]: run["parameters"] for run in runs}
    assert len({sizes[name] for name in ("alone", "distilled", "unlabelled", "assisted")}) == 1
    assert sizes["alone"] < sizes["assistant"]
    table = (out / "table.md").read_text()
    assert all(f"| {name} |" in table for name in benchmark.METHODS.values())
    assert (out / "distillation.png").stat().st_size > 10_000
    assert any((out / "seed42" / "teacher").iterdir())  # what the teacher said was kept
    assert any((out / "seed42" / "assistant").iterdir())


def test_the_teacher_is_asked_once_for_each_row(command, monkeypatch):
    teachers = []
    made = benchmark.CachedTeacher.__init__

    def remembered(self, *args, **kwargs):
        teachers.append(self)
        made(self, *args, **kwargs)

    monkeypatch.setattr(benchmark.CachedTeacher, "__init__", remembered)
    few = ["--seeds", "1", "--max_steps", "9", "--num_unlabelled", "12"]  # three epochs of 10 rows
    benchmark.main([*command, *few, "--methods", "distilled", "unlabelled"])
    of_labelled, of_texts = (teacher.computed for teacher in teachers)
    assert of_labelled == 10
    assert 0 < of_texts <= 24  # the labelled rows are there already


def test_the_teacher_of_the_example_is_a_logistic_regression_on_its_sentences(command, monkeypatch):
    searches = []

    class RememberedSearch(benchmark.GridSearchCV):
        def fit(self, sentences, labels):
            searches.append((self, sentences))
            return super().fit(sentences, labels)

    monkeypatch.setattr(benchmark, "GridSearchCV", RememberedSearch)
    script, *_ = benchmark.parse(benchmark.ExampleArguments, None, command)
    data = benchmark.load(script, 0)
    model, tokenizer, found = benchmark.make_teacher(script, data)
    ((search, sentences),) = searches
    (batch,) = benchmark.batches(data.train, tokenizer, script.teacher_prefix)
    logits = model(**batch).logits
    assert logits.shape == (10, 2)
    margin = torch.from_numpy(search.decision_function(sentences)).float()
    assert margin.std() > 0
    torch.testing.assert_close(logits[:, 1] - logits[:, 0], margin, rtol=1e-3, atol=1e-3)
    assert not model.training and 0 <= found["in domain"] <= 1


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="unknown --methods"):
        benchmark.ExampleArguments(methods=["half"])
