"""The distillation of classifiers, run as a person runs it: tiny data, tiny models, no network."""

import json

import datasets
import distil_classifier as example
import domain_data
import pytest
import teacher_assistant
import torch

from tests.helpers.word_classifier import WORDS, save_tiny_model


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Options for a tiny teacher and a tiny student, on sentences of two words."""

    def load_domain(domain):
        rows = [
            (f"{WORDS[i % 4]} {WORDS[4 + i % 5]} {WORDS[8 + i % 6]}", ("pos", "neg")[i % 2])
            for i in range(40)
        ]
        return {"train": rows, "dev": rows[:8], "test": rows[:8]}

    monkeypatch.setattr(domain_data, "load_domain", load_domain)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    folders = {}
    for name in ("teacher", "student"):
        (tmp_path / name).mkdir()
        folders[name] = str(save_tiny_model(tmp_path / name))
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


def test_all_methods_run_and_everything_is_written(command, tmp_path):
    example.main([*command, "--seeds", "2"])
    out = tmp_path / "out"
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert {(run["method"], run["seed"]) for run in runs} == {
        (method, seed) for seed in (42, 43) for method in example.METHODS
    }
    assert all(0 <= run[name] <= 1 for run in runs for name in example.TESTS)
    sizes = {run["method"]: run["parameters"] for run in runs}
    assert sizes["alone"] == sizes["distilled"] == sizes["unlabelled"] < sizes["teacher"]
    table = (out / "table.md").read_text()
    assert all(f"| {name} |" in table for name in example.METHODS.values())
    assert (out / "distillation.png").stat().st_size > 10_000
    assert any((out / "seed42" / "teacher").iterdir())  # what the teacher said was kept


def test_the_teacher_is_asked_once_for_each_row(command, monkeypatch):
    teachers = []
    made = example.CachedTeacher.__init__

    def remembered(self, *args, **kwargs):
        teachers.append(self)
        made(self, *args, **kwargs)

    monkeypatch.setattr(example.CachedTeacher, "__init__", remembered)
    few = ["--seeds", "1", "--max_steps", "9", "--num_unlabelled", "12"]  # three epochs of 10 rows
    example.main([*command, *few, "--methods", "distilled", "unlabelled"])
    of_labelled, of_texts = (teacher.computed for teacher in teachers)
    assert of_labelled == 10
    assert 0 < of_texts <= 24  # the labelled rows are there already


def test_the_teacher_of_the_example_is_a_logistic_regression_on_its_sentences(command, monkeypatch):
    searches = []

    class RememberedSearch(example.GridSearchCV):
        def fit(self, sentences, labels):
            searches.append((self, sentences))
            return super().fit(sentences, labels)

    monkeypatch.setattr(example, "GridSearchCV", RememberedSearch)
    script, *_ = example.parse(example.ExampleArguments, None, command)
    data = example.load(script, 0)
    model, tokenizer, found = example.make_teacher(script, data)
    ((search, sentences),) = searches
    (batch,) = example.batches(data.train, tokenizer, script.teacher_prefix)
    logits = model(**batch).logits
    assert logits.shape == (10, 2)
    margin = torch.from_numpy(search.decision_function(sentences)).float()
    assert margin.std() > 0
    torch.testing.assert_close(logits[:, 1] - logits[:, 0], margin, rtol=1e-3, atol=1e-3)
    assert not model.training and 0 <= found["in domain"] <= 1


def test_an_assistant_stands_between_teacher_and_student(command, tmp_path):
    teacher_assistant.main([*command, "--seeds", "1", "--assistant_layers", "2"])
    out = tmp_path / "out"
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert [run["method"] for run in runs] == list(teacher_assistant.METHODS)
    sizes = {run["method"]: run["parameters"] for run in runs}
    assert sizes["alone"] == sizes["direct"] == sizes["assisted"] < sizes["assistant"]
    assert "student of assistant" in (out / "table.md").read_text()
    assert (out / "assistant.png").stat().st_size > 10_000


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="unknown --methods"):
        example.ExampleArguments(methods=["half"])
