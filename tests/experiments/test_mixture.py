"""Several tasks in one file: what is trained together and alone, what is kept, and the table."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification, BertForTokenClassification, Trainer

from hf_adapt.cli.run_options import experiment
from hf_adapt.experiments.cell import Cell, cell_folder
from hf_adapt.experiments.data import cached_pair
from hf_adapt.experiments.joint_training import mixtures_of
from hf_adapt.experiments.outputs import RunOutputs
from hf_adapt.experiments.settings import ConfigError
from hf_adapt.multitask import MultiTask, Uncertainty, relative_gain
from hf_adapt.report import write_report
from tests.experiments.conftest import results, rows, run, write_csv
from tests.helpers.word_classifier import WORDS

Config = Callable[..., str]
METHODS: dict[str, Any] = {
    "alone": [],
    "mixture": ["MultiTask"],
    "weighted": [{"MultiTask": {"weighting": "Uncertainty"}}],
    "surgery": ["SAM", {"MultiTask": {"surgery": {"cagrad": {"c": 0.4}}}}],
}


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, Any]:
    """Tags of words, whether a text is good, and what it is about, with few labels."""
    lines = []
    for i in range(40):
        words = [WORDS[i % 4], "film", WORDS[8 + i // 4 % 5], WORDS[8 + i // 20]]
        lines.append(json.dumps({"words": words, "tags": ["ADJ", "NOUN", "X", "X"]}))
    (tmp_path / "words.jsonl").write_text("\n".join(lines))
    about = [(t, n) for n in ("film", "phone", "plot") for t, _ in rows(n)]
    return {
        "tags": {"train": "words.jsonl", "task": "token-classification", "text_column": "words"},
        "mood": str(write_csv(tmp_path / "mood.csv", rows("film"))),
        "topic": {"train": str(write_csv(tmp_path / "topic.csv", about)), "num_train": 9},
    }


@pytest.fixture
def write(write_config: Config, tasks: dict[str, Any]) -> Config:
    """A configuration of these tasks, with some keys changed."""

    def written(**changes: Any) -> str:
        given = {"data": tasks, "mixture": {"sampling": "equal"}, "methods": METHODS}
        return write_config(**{**given, "pairs": None, **changes})

    return written


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Trainer]:
    """The Trainers that have trained."""
    found: list[Trainer] = []
    train = Trainer.train

    def noted(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        found.append(self)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", noted)
    return found


def test_tasks_are_trained_alone_and_together(
    write: Config, tmp_path: Path, trained: list[Trainer]
) -> None:
    out, tasks = tmp_path / "out", ("tags", "mood", "topic")
    config = write(training={"max_steps": 8, "learning_rate": 0.003, "eval_strategy": "epoch"})
    options = ("--seeds", "2", "--save-models")
    printed = run(config, *options)
    assert len(trained) == 2 * (3 + 3)  # of a mixture one training for all tasks
    assert "Mixture of 3 tasks, 66 rows in an epoch" in printed and "topic  22 rows" in printed
    assert "topic: sequence-classification, 3 classes; 9 training rows, 36 to test on" in printed
    lines = results(out)
    assert [(r["source"], r["seed"], r["method"]) for r in lines] == [
        (task, seed, method) for task in tasks for seed in ("42", "43") for method in METHODS
    ]
    accuracy = {(r["method"], r["seed"], r["source"]): float(r["target_accuracy"]) for r in lines}
    head, _, *body = (out / "table.md").read_text().splitlines()[2:8]
    assert head == "| method | tags | mood | topic | Δm | seconds |"
    assert [line.split(" | ")[0] for line in body] == [f"| {name}" for name in METHODS]
    alone, mixture = (
        [{task: accuracy[method, seed, task] for task in tasks} for seed in ("42", "43")]
        for method in ("alone", "mixture")
    )
    gains = [relative_gain(own, other) for own, other in zip(mixture, alone, strict=True)]
    assert f" | {50 * sum(gains):+.1f} ± " in body[1] and body[0].split(" | ")[-2] == "–"
    page = write_report([out]).read_text()
    assert "on 3 tasks (mood, tags and topic), with seeds 42 and 43: 24 runs" in page
    assert "No choice is recorded" not in page

    assert "24 of 24 runs are kept" in run(config, *options)
    (one,) = (out / "mood").glob("mixture-seed42-*/result.json")
    one.unlink()
    assert "21 of 24 runs are kept" in run(config, *options)  # a training fills three
    assert len(trained) == 13
    kept = ("source_accuracy", "target_accuracy", "target_predicted_shares")
    assert [[r[key] for key in kept] for r in results(out)] == [[r[k] for k in kept] for r in lines]


def test_the_saved_model_of_a_task_is_the_one_that_was_scored(
    write: Config, tmp_path: Path
) -> None:
    config = write(methods={"mixture": ["MultiTask"]})
    run(config, "--save-models", "--max_steps", "4", "--learning_rate", "0.01")
    made = experiment(config, {}, {})
    for line in results(tmp_path / "out"):
        name, folder = line["source"], Path(line["model"])
        kind = BertForTokenClassification if name == "tags" else BertForSequenceClassification
        task, pair = made.task_of(name), cached_pair(made, name, name)
        model, tokenizer = kind.from_pretrained(folder).eval(), task.processor(str(folder))
        assert list(model.config.label2id) == pair.labels
        prepared = task.prepared(pair.source["test"], tokenizer, 16)
        batch = task.collator(tokenizer)(list(prepared))
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = model(**batch).logits[labels != -100].sort(0).values
        scored = RunOutputs.load(folder).target_test.logits.sort(0).values
        torch.testing.assert_close(logits, scored)


def test_frozen_layers_the_diagnosis_and_steps_of_its_own(write: Config, tmp_path: Path) -> None:
    methods = {
        "alone": {"training": {"max_steps": 3}},
        "seen": [{"MultiTask": {"diagnose_every": 1}}],
    }
    printed = run(write(methods=methods, training={"max_steps": 4}), "--freeze-layers", "1")
    assert "Δm" in printed and "more accurate than alone" in " ".join(printed.split())
    assert printed.count("Negative transfer") <= 1
    (file,) = (tmp_path / "out").rglob("task_affinity.json")
    assert json.loads(file.read_text())["tasks"] == ["mood", "tags", "topic"]
    (logs,) = (tmp_path / "out" / "topic").glob("alone-*/logs.json")
    assert json.loads(logs.read_text())[-1]["step"] == 3
    roles = {json.loads(f.read_text())["role"] for f in (tmp_path / "out").rglob("alone-*/r*.json")}
    assert roles == {"baseline"}


@pytest.mark.parametrize("changes_rows", [False, True])
def test_what_changes_a_mixture_makes_new_runs_of_all_its_tasks(
    write: Config, tasks: dict[str, Any], changes_rows: bool
) -> None:
    topic = {**tasks["topic"], "num_train": 8}
    change = {"data": {**tasks, "topic": topic}} if changes_rows else {"mixture": {"size": 30}}
    before, after = (experiment(write(**each), {}, {}) for each in ({}, change))
    for task in tasks:
        for method in ("alone", "mixture"):
            cell = Cell(task, task, method, 42)
            same = cell_folder(before, cell) == cell_folder(after, cell)
            assert same == (method == "alone" and not (changes_rows and task == "topic")), cell


def test_a_mixture_of_two_processes_is_that_of_one(write: Config, tmp_path: Path) -> None:
    lines = []
    for jobs in ("1", "2"):
        folder = tmp_path / jobs
        methods = {name: METHODS[name] for name in ("mixture", "weighted")}
        run(write(methods=methods), "--jobs", jobs, "--output-dir", str(folder))
        lines.append([(r["target_accuracy"], r["target_f1"]) for r in results(folder)])
    assert lines[0] == lines[1] and len(lines[0]) == 6


def test_what_a_method_names_is_built(write: Config) -> None:
    own = {"adaptations": ["MultiTask"], "mixture": {"sampling": {"temperature": 2}, "size": 99}}
    fixed = [{"MultiTask": {"weighting": {"mood": 2, "tags": {"linear_ramp": {}}}}}]
    made = experiment(write(methods={**METHODS, "other": own, "fixed": fixed}), {}, {})
    built: dict[str, Any] = {name: m.build(list)[-1] for name, m in made.methods.items() if m.mixes}
    assert all(isinstance(each, MultiTask) for each in built.values())
    assert isinstance(built["weighted"].weighting, Uncertainty)
    assert built["surgery"].surgery.keywords == {"c": 0.4}
    assert built["fixed"].weighting.given["tags"](1.0) == 1.0
    mixtures = mixtures_of(made)
    assert mixtures["mixture"].quotas(0) == [22, 22, 22]
    assert mixtures["other"].quotas(0) == [37, 40, 22]  # as the roots of 26, 31 and 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"mixture": {"sampling": {"mood": 0.5, "spam": 0.5}}},
            "sampling names spam, and the data",
        ),
        ({"mixture": {"sampling": {"mood": 0.5, "tags": 0.6}}}, "they add up to 1.1"),
        ({"mixture": {"sampling": "equl"}}, "sampling='equl' is unknown: use 'proportional'"),
        ({"mixture": {"sampling": {"temperature": -1}}}, "temperature=-1 must be positive"),
        ({"mixture": {"sampling": {"annealed": {"epoch": 1}}}}, "unexpected keyword argument"),
        ({"mixture": {"size": 0}}, "size=0 must be at least 1"),
        ({"mixture": {"size": "all"}}, "size: expected a whole number"),
        ({"mixture": {"sampels": 1}}, "'sampels' is unknown. Did you mean sampling?"),
        ({"mixture": "equal"}, "expected {sampling: …, size: …}"),
        ({"mixture": None}, "'mixture' trains several tasks together: the file needs mixture:"),
        ({"mixture": None, "methods": {"a": []}}, "have one task, sequence-classification"),
        ({"pairs": "all"}, "mixture: or pairs:, and not both"),
        ({"cache_prefix": True}, "cache_prefix: the layers below several heads"),
        ({"choose": True}, "choose: a choice is made among adaptations to a target"),
        ({"diagnose": True}, "use {MultiTask: {diagnose_every: 10}}"),
        ({"methods": {"a": "target"}}, "'a' needs a target, and the tasks of a mixture have none"),
        ({"methods": {"a": ["MultiTask", "MMD"]}}, "'a' needs a target"),
        ({"methods": {"a": "recommended"}}, "'a' needs a target"),
        ({"methods": {"a": {"mixture": {"size": 9}}}}, "trains each task alone: add MultiTask"),
        ({"methods": {"a": [{"MultiTask": {"tasks": {}}}]}}, "the argument 'tasks' is unknown"),
        ({"methods": {"a": [{"MultiTask": {"weighting": "FAMOUS"}}]}}, "Did you mean FAMO?"),
        ({"methods": {"a": [{"MultiTask": {"weighting": {"spam": 2}}}]}}, "names 'spam', and the"),
        ({"methods": {"a": [{"MultiTask": {"surgery": "pcgard"}}]}}, "Did you mean pcgrad?"),
        ({"methods": {"a": [{"MultiTask": {"surgery": {"mgda": {"c": 1}}}}]}}, "argument 'c'"),
    ],
)
def test_a_mixture_that_cannot_be_is_named_with_its_line(
    write: Config, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        experiment(write(**change), {}, {})
    assert message in str(caught.value) and "config.yaml:" in str(caught.value)


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("tags", {"text_column": "wrods"}, "and not 'wrods'. Did you mean 'words'? Name it with"),
        ("mood", {"label_column": "lable"}, "and not 'lable'. Did you mean 'label'?"),
        ("tags", {"task": "sequence-classification", "label_column": "tags"}, "expected one class"),
        (
            "mood",
            {"task": "token-classification", "text_column": "text", "label_column": "label"},
            "expected a list of words, got",
        ),
        ("mood", {"dev": "few.csv", "test": "few.csv"}, "no row with a label in 'label'"),
    ],
)
def test_rows_that_do_not_fit_their_task_end_it_before_training(
    write: Config,
    tasks: dict[str, Any],
    trained: list[Trainer],
    tmp_path: Path,
    task: str,
    change: dict[str, Any],
    message: str,
) -> None:
    write_csv(tmp_path / "few.csv", [("good film", "")])
    given = tasks[task] if isinstance(tasks[task], dict) else {"train": tasks[task]}
    printed = run(write(data={**tasks, task: {**given, **change}}), fails=True)
    assert message in printed and not trained


def test_a_task_without_rows_in_an_epoch(write: Config, trained: list[Trainer]) -> None:
    printed = run(write(mixture={"size": 2, "sampling": "equal"}), fails=True)
    assert "the task 'topic' has no row among the 2 of an epoch" in printed and not trained
