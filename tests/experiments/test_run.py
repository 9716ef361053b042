"""`hf-adapt run`, as a person runs it: what it trains, keeps, prints and writes."""

import csv
import json
import logging
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, pipeline

from hf_adapt.alignment import MMD
from hf_adapt.cli.run_options import experiment
from hf_adapt.engine.callback import AdaptationCallback
from hf_adapt.engine.item_outputs import load_items
from hf_adapt.experiments import report
from hf_adapt.experiments.choice import candidates_of
from hf_adapt.experiments.config import Experiment
from hf_adapt.experiments.data import load_pair
from hf_adapt.experiments.label_file import LabelFile
from hf_adapt.experiments.outputs import RunOutputs
from hf_adapt.experiments.settings import Settings
from hf_adapt.report import write_report
from hf_adapt.unfreezing.prefix.cache import FrozenPrefix
from tests.experiments.conftest import results, rows, run, write_csv
from tests.helpers.finished_runs import page_of, without_oracle, words

Config = Callable[..., str]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every training run."""
    calls: list[int] = []
    train = Trainer.train

    def counted(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", counted)
    return calls


def test_groups_are_those_of_the_rows_that_are_tested(tmp_path: Path) -> None:
    """A training file without labels needs no groups; they are named as labels are."""
    texts = write_csv(tmp_path / "texts.csv", [(text,) for text, _ in rows("phone")], "text")
    lines = [
        (f"{t} again", label, ("1", "1.0", "nan")[i % 3])
        for i, (t, label) in enumerate(rows("film"))
    ]
    tested = write_csv(tmp_path / "tested.csv", lines, "text,label,place")
    films = write_csv(tmp_path / "films.csv", rows("film"))
    phones = {"train": str(texts), "test": str(tested), "group_column": "place"}
    settings = Settings(
        {
            "data": {"films": str(films), "phones": phones},
            "methods": {"a": []},
            "pairs": [["films", "phones"]],
        }
    )
    pair = load_pair(Experiment.read(settings), "films", "phones")
    assert Counter(pair.test_groups) == {"1": 32, None: 16}


def test_every_cell_is_a_line_and_a_table_is_written(write_config: Config, tmp_path: Path) -> None:
    printed = run(write_config(pairs="all"), "--seeds", "2")
    lines = results(tmp_path / "out")
    assert [(r["source"], r["target"], r["seed"], r["method"]) for r in lines] == [
        (*pair, seed, method)
        for pair in (("films", "phones"), ("phones", "films"))
        for seed in ("42", "43")
        for method in ("source only", "MMD", "bound")
    ]
    for line in lines:
        assert 0 <= float(line["target_accuracy"]) <= 1 and 0 <= float(line["source_f1"]) <= 1
        assert float(line["seconds"]) > 0 and float(line["peak_memory_mb"]) > 0
        assert sum(json.loads(line["target_predicted_shares"]).values()) == pytest.approx(1)
        assert line["error"] == ""
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| method | films → phones | phones → films |" in table
    assert table.count("| films → phones | ") == 5  # a column; true and three predicted shares
    assert "±" in table and "transformers" in table
    assert (tmp_path / "out" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert "below source only" in table
    assert f"wrote table.md, results.csv, accuracy.png to {tmp_path / 'out'}" in printed


def test_only_what_is_missing_is_run(
    write_config: Config, tmp_path: Path, trained: list[int]
) -> None:
    run(write_config(), "--method", "source only")
    assert len(trained) == 1
    run(write_config())
    assert len(trained) == 3
    (tmp_path / "out" / "results.csv").unlink()
    assert "3 of 3 runs are kept" in run(write_config())
    assert len(trained) == 3 and len(results(tmp_path / "out")) == 3
    run(write_config(), "--learning_rate", "0.01", "--method", "MMD")
    assert len(trained) == 4
    run(write_config())  # the first settings' results are still there
    assert len(trained) == 4
    run(write_config(), "--overwrite", "--method", "MMD")
    assert len(trained) == 5


@pytest.mark.parametrize("content", ["", '{"seconds": 3', "[1]", "{}", b"\xff\xfe"])
def test_a_result_that_is_cut_off_is_made_again(
    write_config: Config, tmp_path: Path, trained: list[int], content: str | bytes
) -> None:
    run(write_config(), "--method", "source only")
    (file,) = (tmp_path / "out").rglob("result.json")
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    run(write_config(), "--method", "source only")
    assert len(trained) == 2 and json.loads(file.read_text())["seed"] == 42


def test_failed_run_is_shown_and_tried_again_and_the_others_go_on(
    write_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, *args: Any) -> Any:
        raise ArithmeticError("no such kernel")

    with monkeypatch.context() as patch:
        patch.setattr(MMD, "loss", broken)
        printed = run(write_config(), fails=True)
    assert "failed films → phones, MMD, seed 42: ArithmeticError: no such kernel" in printed
    lines = results(tmp_path / "out")
    assert [bool(line["error"]) for line in lines] == [False, True, False]
    assert "MMD (1 failed)" in (tmp_path / "out" / "table.md").read_text()
    (error,) = (tmp_path / "out").rglob("error.txt")
    assert "in broken" in error.read_text()
    assert "2 of 3 runs are kept" in run(write_config())
    assert not error.exists()


def test_results_of_two_processes_are_those_of_one(write_config: Config, tmp_path: Path) -> None:
    both = ("--method", "source only", "--method", "MMD")
    kept = ("target_accuracy", "target_f1", "source_predicted_shares")
    run(write_config(), *both, "--jobs", "1", "--save-models")
    one = results(tmp_path / "out")
    run(write_config(), *both, "--jobs", "2", "--overwrite", "--output-dir", str(tmp_path / "two"))
    two = results(tmp_path / "two")
    assert [[line[key] for key in kept] for line in one] == [
        [line[key] for key in kept] for line in two
    ]


def test_labels_of_the_target_reach_the_bound_alone(
    write_config: Config, domains: dict[str, str], tmp_path: Path
) -> None:
    """With the target's labels flipped, all but the bound is the same to the last bit."""
    weights = {}
    for flip in (False, True):
        write_csv(Path(domains["phones"]), rows("phone", flip))
        out = tmp_path / f"out{flip}"
        run(write_config(output_dir=str(out)), "--save-models")
        for method in ("source_only", "mmd", "bound"):
            (path,) = out.rglob(f"{method}-seed42-*/model.safetensors")
            weights[method, flip] = load_file(path)
    for method in ("source_only", "mmd", "bound"):
        true, flipped = weights[method, False], weights[method, True]
        same = all(true[name].equal(flipped[name]) for name in true)
        assert same == (method != "bound"), method
    pages = [page_of(write_report([tmp_path / f"out{flip}"])) for flip in (False, True)]
    assert ET.tostring(pages[0]) != ET.tostring(pages[1])
    before, after = (ET.tostring(without_oracle(page)) for page in pages)
    assert before == after


@pytest.mark.parametrize("extra", [(), ("--cache-prefix",)])
def test_first_layers_are_frozen_and_the_rest_is_trained(
    write_config: Config, tmp_path: Path, model_dir: Path, extra: tuple[str, ...]
) -> None:
    run(
        write_config(methods={"MMD": {"adaptations": ["MMD"], "pretrain": {"max_steps": 2}}}),
        *("--freeze-layers", "1", "--save-models", "--max_steps", "24", *extra),
    )
    (path,) = (tmp_path / "out").rglob("model.safetensors")
    before, after = load_file(model_dir / "model.safetensors"), load_file(path)
    moved = {name for name in after if not before[name].equal(after[name])}
    assert any("layer.1." in name for name in moved)
    assert any("classifier" in name for name in moved)
    assert not any("embeddings" in name or "layer.0." in name for name in moved)


def test_frozen_layers_are_read_by_the_runs_that_follow(
    write_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of both domains, for all methods."""
    shares = []
    log = FrozenPrefix.log_values

    def noted(self: FrozenPrefix) -> dict[str, float]:
        shares.append(log(self))
        return shares[-1]

    monkeypatch.setattr(FrozenPrefix, "log_values", noted)
    methods = {"MMD": ["MMD"], "IM": ["InformationMaximization"]}
    config = write_config(methods=methods, training={"logging_steps": 1, "num_train_epochs": 2})
    printed = run(config, "--freeze-layers", "1", "--cache-prefix")
    read = [value for each in shares for value in each.values()]
    assert read == [0, 0, 1, 1, 0, 1, 1, 1]  # the first batch of a run opens the store
    assert "warned" not in printed.split("In %")[0]


def test_class_frequencies_reach_the_method(
    write_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    make = AdaptationCallback.__init__

    def noted(self: Any, *adaptations: Any, **options: Any) -> None:
        given.append(options.get("target_priors"))
        make(self, *adaptations, **options)

    monkeypatch.setattr(AdaptationCallback, "__init__", noted)
    methods = {
        "counted": {"adaptations": ["InformationMaximization"], "target_priors": "given"},
        "plain": {"adaptations": ["InformationMaximization"], "stream": {"ratio": 0.5}},
    }
    run(write_config(methods=methods))
    assert set(given[0]) == {"neg", "pos"} and given[1] is None
    assert (
        "counted: with the target's class frequencies, counted"
        in (tmp_path / "out" / "table.md").read_text()
    )
    run(write_config(methods=methods), "--target-priors", "{neg: 0.25, pos: 0.75}")
    assert given[2:] == [{"neg": 0.25, "pos": 0.75}] * 2


def test_methods_of_two_stages(write_config: Config, tmp_path: Path, trained: list[int]) -> None:
    priors = {"neg": 0.5, "pos": 0.5}
    shot = {"first": [], "adaptations": ["SHOT"], "train_on": "unlabelled"}
    methods = {
        "TAPT": {"pretrain": {"max_steps": 3}},
        "SHOT": {**shot, "target_priors": priors, "training": {"max_steps": 1}},
        "ADDA": {"first": [], "adaptations": ["ADDA"]},
    }
    evaluated = {"eval_strategy": "steps", "eval_steps": 1}  # where a stage has rows for it
    config = write_config(methods=methods, training={"max_steps": 4, **evaluated})
    run(config, "--save-models", "--learning_rate", "0.01")
    assert len(trained) == 6
    models = [load_file(p) for p in sorted((tmp_path / "out").rglob("model.safetensors"))]
    assert len(models) == 3  # and none of a first stage
    one, other, third = (model["classifier.weight"] for model in models)
    assert one.equal(other)  # ADDA and SHOT freeze the head of the same first stage
    assert not one.equal(third)


def test_methods_that_read_no_target_and_names_in_brackets(
    write_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    make = AdaptationCallback.__init__

    def noted(self: Any, *adaptations: Any, **options: Any) -> None:
        given.append("target_dataset" in options)
        make(self, *adaptations, **options)

    monkeypatch.setattr(AdaptationCallback, "__init__", noted)
    methods = {
        "[source] only": [],
        "unfreezing [/b]": ["GradualUnfreezing"],
        "SAM [a]": ["SAM"],
        "both": ["SAM", "MMD"],
    }
    out = tmp_path / "out[b]"
    config = write_config(methods=methods, output_dir=str(out))
    printed = run(config, "--save-models")
    assert given == [False, False, True]
    for name in (*methods, str(out)):
        assert name in printed
    assert len(results(out)) == 4


@pytest.mark.parametrize(
    ("priors", "message"),
    [
        ("{poss: 0.3, neg: 0.7}", "IM, films → phones: target_priors names the classes 'poss'"),
        ("{pos: 30, neg: 60}", "add up to 1; they add up to 90"),
        ("given", "target_priors: given counts the labels"),
    ],
)
def test_wrong_frequencies_are_told_before_anything_is_trained(
    write_config: Config, tmp_path: Path, trained: list[int], priors: str, message: str
) -> None:
    target = write_csv(tmp_path / "phones.csv", [(text,) for text, _ in rows("phone")], "text")
    data = {"films": str(tmp_path / "films.csv"), "phones": str(target)}
    methods = {
        "source only": [],
        "IM": ["InformationMaximization"],
        "TAPT": {"pretrain": {"max_steps": 1}},
    }
    config = write_config(methods=methods, data=data)
    printed = run(config, "--target-priors", priors, fails=True)
    assert message in printed and not trained


def test_classes_that_are_numbers(write_config: Config, tmp_path: Path) -> None:
    data = {}
    for name, thing in (("films", "film"), ("phones", "phone")):
        numbered = [(text, "1" if label == "pos" else "2") for text, label in rows(thing)]
        data[name] = str(write_csv(tmp_path / f"{name}.csv", numbered))
    methods = {"IM": ["InformationMaximization"]}
    run(write_config(methods=methods, data=data), "--target-priors", "{1: 0.9, 2: 0.1}")
    (line,) = results(tmp_path / "out")
    assert line["error"] == "" and list(json.loads(line["target_true_shares"])) == ["1", "2"]


def test_warnings_of_a_method_are_counted(
    write_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = logging.getLogger("hf_adapt.alignment.mmd")
    monkeypatch.setattr(MMD, "on_log", lambda self, logs, progress: log.warning("too [far]"))
    printed = run(write_config(training={"max_steps": 2, "logging_steps": 1}))
    assert "warned: too [far]" in printed
    assert [(r["warnings"], r["first_warning"]) for r in results(tmp_path / "out")] == [
        ("0", ""),
        ("2", "too [far]"),
        ("0", ""),
    ]
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| MMD (1 warned) |" in table.split("Predicted")[0]
    assert "| films → phones | MMD (1 warned) |" in table.split("Predicted")[1]


def test_a_warned_or_failed_run_is_marked_wherever_it_stands(
    write_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two pairs, by the seed that was warned of."""
    log, figures = logging.getLogger("hf_adapt.alignment.mmd"), []

    def noisy(self: MMD, trainer: Trainer) -> None:
        (log.warning if trainer.args.seed == 42 else log.info)("too far")
        if trainer.args.seed == 43 and "films-phones" in str(trainer.args.output_dir):
            raise ArithmeticError("no such kernel")

    monkeypatch.setattr(MMD, "begin", noisy)
    monkeypatch.setattr(report, "write_figure", lambda path, figure: figures.append(figure))
    run(write_config(pairs="all", seeds=2), fails=True)
    table = (tmp_path / "out" / "table.md").read_text()
    means, scores, shares = table.split("## ")[1:]
    assert means.count("| MMD (1 failed, 2 warned) |") == 1
    (line,) = (line for line in scores.splitlines() if line.startswith("| MMD"))
    marks = {"films → phones": "(1 failed, 1 warned)", "phones → films": "(1 warned)"}
    for (name, mark), cell in zip(marks.items(), line.split("|")[2:4], strict=True):
        assert cell.endswith(f" {mark} ") and scores.count(mark) == 1
        assert f"| {name} | MMD {mark} |" in shares
    names = [label.get_text() for label in figures[0].axes[0].get_yticklabels()]
    assert names == ["source only", "MMD (1 failed, 2 warned)", "bound"]


def test_renamed_classes_are_run_again(
    write_config: Config, tmp_path: Path, trained: list[int]
) -> None:
    for number, names in enumerate((("neg", "pos"), ("no", "yes")), start=1):
        data = {}
        for name, thing in (("films", "film"), ("phones", "phone")):
            renamed = [(text, names[label == "pos"]) for text, label in rows(thing)]
            data[name] = str(write_csv(tmp_path / f"{name}.csv", renamed))
        run(write_config(methods={"MMD": ["MMD"]}, data=data))
        assert len(trained) == number
        (line,) = results(tmp_path / "out")
        assert tuple(json.loads(line["target_true_shares"])) == names


def test_too_many_frozen_layers_end_it_at_once(write_config: Config, trained: list[int]) -> None:
    printed = run(write_config(freeze_layers=9), fails=True)
    assert "freeze_layers: 9, but the model has" in printed and not trained


def test_a_model_that_is_missing_ends_it_at_once(write_config: Config, trained: list[int]) -> None:
    printed = run(write_config(model="./no/model"), fails=True)
    assert "The model './no/model' cannot be loaded: There is no folder" in printed
    assert "with model: or --model" in printed and not trained


# ---------------------------------------------------------------- a person's own files
def own_files(tmp_path: Path, model_dir: Path, target: Path) -> list[str]:
    source = write_csv(tmp_path / "mine.csv", rows("film"), "text,label")
    options = {
        "--source": source,
        "--target": target,
        "--model": model_dir,
        "--output-dir": tmp_path / "out",
        "--max_steps": 2,
    }
    return [str(part) for option in options.items() for part in option]


def test_target_without_labels_gives_a_model_and_no_score(tmp_path: Path, model_dir: Path) -> None:
    texts = [(text,) for text, _ in rows("phone")]
    target = write_csv(tmp_path / "theirs.csv", texts, "text")
    printed = run(*own_files(tmp_path, model_dir, target))
    lines = results(tmp_path / "out")
    assert [line["method"] for line in lines] == ["source only", "recommended"]
    assert [line["target_accuracy"] for line in lines] == ["", ""]
    assert "48 of the target without; 12 and 0 to test on" in printed
    assert "theirs has no labels in a column 'label' (it has text), so there is no" in printed
    assert "Predicted shares" in printed and "target acc." not in printed
    folder = lines[1]["model"]
    assert f"'{folder}'" in printed
    (said,) = pipeline("text-classification", folder)("a good phone")
    assert said["label"] in ("pos", "neg")


def test_any_method_on_two_files_and_a_model_of_one_class_is_pointed_out(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = write_csv(tmp_path / "theirs.csv", rows("phone"))
    monkeypatch.setattr(report, "ONE_SIDED", 0.4)  # one of two classes always has more
    printed = run(*own_files(tmp_path, model_dir, target), "--method", "EntropyMinimization")
    (line,) = results(tmp_path / "out")
    assert line["method"] == "EntropyMinimization"
    shares = json.loads(line["target_predicted_shares"])
    name = max(shares, key=shares.__getitem__)
    assert f"{shares[name]:.1%} of the rows are given the class {name!r}." in printed
    assert "warned: runs with" not in printed
    printed = run(*own_files(tmp_path, model_dir, target), "--method", "DAN", fails=True)
    assert "Or the name of a class of hf_adapt.alignment, such as DANN" in printed


def test_target_with_labels_gives_a_score(tmp_path: Path, model_dir: Path) -> None:
    target = write_csv(tmp_path / "theirs.tsv", [("review\tstars",)], "text")
    lines = "\n".join(f"{text}\t{label}" for text, label in rows("phone"))
    target.write_text(f"review\tstars\n{lines}\n")
    source = tmp_path / "mine.jsonl"
    source.write_text(
        "\n".join(json.dumps({"review": text, "stars": label}) for text, label in rows("film"))
    )
    words = own_files(tmp_path, model_dir, target)
    words[1] = str(source)
    run(*words, "--text-column", "review", "--label-column", "stars")
    assert all(float(line["target_accuracy"]) >= 0 for line in results(tmp_path / "out"))


def test_a_mistyped_label_column_of_the_target(
    write_config: Config, domains: dict[str, str], tmp_path: Path, trained: list[int]
) -> None:
    """Named for the target alone it must be there; named for both it may be, and is asked for."""
    other = str(write_csv(tmp_path / "other.csv", rows("phone"), "text,labels"))
    data = {"films": domains["films"], "phones": {"train": other, "label_column": "lable"}}
    printed = run(write_config(data=data), fails=True)
    assert "and not 'lable'. Did you mean 'labels'? Name it with label_column" in printed
    assert not trained
    config = write_config(data={**data, "phones": other}, methods={"source only": []})
    for options in ((), ("--label-column", "label")):
        printed = run(config, *options)
        hint = "no labels in a column 'label' (it has text, labels; did you mean 'labels'?)"
        assert hint in " ".join(printed.split())
    data["phones"] = {"train": other, "label_column": "labels"}
    run(write_config(data=data, methods={"source only": []}))
    assert results(tmp_path / "out")[0]["target_accuracy"]


def test_rows_without_a_label_are_training_rows(tmp_path: Path, model_dir: Path) -> None:
    partly = [(text, label if i % 2 else "") for i, (text, label) in enumerate(rows("phone"))]
    printed = run(*own_files(tmp_path, model_dir, write_csv(tmp_path / "theirs.csv", partly)))
    assert "40 of the target without; 12 and 6 to test on" in printed


def test_its_runs_are_reported(write_config: Config, tmp_path: Path) -> None:
    methods = {"plain": [], "MMD": ["MMD"], "upper": "target"}
    run(write_config(methods=methods), "--logging_steps", "1")
    page = write_report([tmp_path / "out"])
    (pair,) = json.loads((page.parent / "report.json").read_text())["pairs"]
    roles = {each["method"]: each["role"] for each in pair["runs"]}
    assert roles == {"plain": "baseline", "MMD": "adapted", "upper": "bound"}
    curves = pair["runs"][1]["curves"]
    assert [step for step, _ in curves["loss/mmd"]] == [1, 2]
    assert "upper, trained on target labels" in page.read_text()


def test_one_of_the_methods_is_chosen_without_target_labels(
    write_config: Config, domains: dict[str, str], tmp_path: Path, trained: list[int]
) -> None:
    printed = run(write_config(), "--choose", "--seeds", "2")
    assert "films → phones, seed 43" in printed and "Chosen without target labels: " in printed
    (file,) = (tmp_path / "out").rglob("choice.json")
    found = json.loads(file.read_text())
    assert [each["seed"] for each in found] == [42, 43]
    assert [each["name"] for each in found[0]["candidates"]] == ["source only", "MMD"]  # no bound
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| chosen |" in table and "chosen: the run that was chosen" in table
    assert len(results(tmp_path / "out")) == 8
    count = len(trained)
    assert "6 of 6 runs are kept" in run(write_config(), "--choose", "--seeds", "2")
    assert len(trained) == count and json.loads(file.read_text()) == found

    # Other labels of the target, as many of each class: other scores, the same choice.
    other = [
        (text, label)
        for (text, _), (_, label) in zip(rows("phone"), rows("phone", flip=True), strict=True)
    ]
    write_csv(Path(domains["phones"]), other)
    run(write_config(), "--choose", "--seeds", "2", "--output-dir", str(tmp_path / "flipped"))
    (flipped,) = (tmp_path / "flipped").rglob("choice.json")
    others = json.loads(flipped.read_text())
    for each in (*others, *found):
        each.pop("run")  # its name is made of the data too
    assert others == found


def test_labels_that_a_person_fills_in_decide(
    write_config: Config, domains: dict[str, str], tmp_path: Path, trained: list[int]
) -> None:
    """Two methods that disagree on a third of the rows, on which one is said to be right."""
    config = write_config(methods={"source only": [], "MMD": ["MMD"]})
    run(config)
    folder = tmp_path / "out" / "films-phones"
    dev = None
    for each in folder.glob("*-seed42-*"):  # as if these models had not collapsed
        outputs = RunOutputs.load(each)
        assert outputs.target_unlabelled is not None and outputs.source_dev is not None
        keys = outputs.target_unlabelled.keys
        classes = torch.arange(len(keys)) % 2
        if each.name.startswith("mmd"):
            classes[::3] = 1 - classes[::3]
        logits = torch.nn.functional.one_hot(classes, 2).float()
        dev = dev or outputs.source_dev
        RunOutputs(
            source_dev=dev,
            target_unlabelled=replace(outputs.target_unlabelled, logits=logits),
        ).save(each)
    count = len(trained)
    printed = run(config, "--choose")
    file = folder / "to_label.csv"
    assert f"wrote {file}" in printed and "the same command chooses by them" in printed
    with file.open(newline="", encoding="utf-8-sig") as opened:
        asked = list(csv.DictReader(opened))
    assert len(asked) == len(classes[::3]) and all(row["label"] == "" for row in asked)
    assert {row["text"] for row in asked} <= set(dict(rows("phone")))
    numbers = {f"k{key % 2**64:016x}": n for n, key in enumerate(keys.tolist())}
    assert sorted(numbers[row["key"]] for row in asked) == list(range(len(keys)))[::3]

    right = [(row["key"], row["text"], ("pos", "neg")[numbers[row["key"]] % 2]) for row in asked]
    write_csv(file, right, "key,text,label")  # MMD is right on all of them
    printed = run(config, "--choose")
    assert f"Chosen by {len(asked)} labels of target items: MMD." in printed
    assert f"wrote {file}" not in printed
    (choice,) = json.loads((folder / "choice.json").read_text())
    assert choice["labels_used"] == len(asked)
    assert choice["candidates"][1]["scores"]["labelled_accuracy"] == 1

    # As a spreadsheet may have saved it: one row has lost its key, one is no row of the target, and
    # for one nobody could tell.
    odd = [("", right[0][1], right[0][2].upper()), ("k1", "=2", "pos"), (*right[1][:2], "")]
    lines = [("Key", "Text", "Label"), *odd, *right[2:]]
    text = "\r".join(["sep=;", *(";".join(line) for line in lines)])
    file.write_bytes(text.encode("utf-16"))
    printed = run(config, "--choose")
    assert f"Chosen by {len(asked) - 1} labels of target items: MMD." in printed
    assert (
        "1 of its texts are not among the target's and are left out, the first is '=2'" in printed
    )
    assert file.read_bytes() == text.encode("utf-16")

    # Labels that are none are to be mended before others are asked for, and so is a file.
    write_csv(file, [(*right[0][:2], "good"), *right[1:]], "key,text,label")
    printed = run(config, "--choose")
    assert "the labels 'good' are left out. Expected 'neg' or 'pos', or nothing." in printed
    assert "Chosen without target labels" in printed and "they leave out items" in printed
    assert "to_label_2.csv" not in printed

    # The rest of a file is to be filled in first.
    blank = [(*row[:2], "") for row in right]
    write_csv(file, [*right[:3], *blank[3:]], "key,text,label")
    printed = run(config, "--choose")
    assert "The 3 labels decide nothing: 3 of them are" in printed
    assert f"{len(asked) - 3} texts in {file} wait for a label" in printed

    # Where that is not possible they are asked for in a file of their own.
    write_csv(file, right[:3], "key,text,label")
    more = folder / "to_label_2.csv"
    printed = run(config, "--choose")
    assert f"wrote {more}" in printed and f"wrote {file}" not in printed
    with more.open(newline="", encoding="utf-8-sig") as opened:
        assert [row["key"] for row in csv.DictReader(opened)] == [row["key"] for row in asked[3:]]
    write_csv(more, right[3:], "key,text,label")
    other = {"pos": "neg", "neg": "pos"}[right[3][2]]
    write_csv(file, [*right[:3], (*right[3][:2], other)], "key,text,label")
    printed = run(config, "--choose")
    assert f"Chosen by {len(asked) - 1} labels" in printed
    assert "1 texts have two labels each" in printed

    # Nothing that a person has written is written over.
    more.unlink()
    for lines, header, said in (
        (
            [row[1:] for row in blank],
            "words,label",
            "expected the columns key, text and label, got",
        ),
        ([(*row, "mine") for row in blank], "key,text,label,note", "wrote"),
    ):
        write_csv(file, lines, header)
        before = file.read_text()
        printed = run(config, "--choose")
        assert said in printed and f"wrote {more}" in printed and file.read_text() == before
    assert len(trained) == count


def test_texts_to_label_are_asked_for_as_a_spreadsheet_reads_them(
    write_config: Config, tmp_path: Path
) -> None:
    texts = ["=1+1 good", "good &amp;lt;b plot", "long " * 9000, 'said "no", twice']
    theirs = write_csv(tmp_path / "theirs.csv", [(text, "pos") for text in texts])
    ours = write_csv(tmp_path / "ours.csv", rows("film"))
    tests = write_csv(tmp_path / "tests.csv", rows("phone"))
    data = {"films": str(ours), "phones": {"train": str(theirs), "test": str(tests)}}
    made = LabelFile(experiment(write_config(data=data), {}, {}), "films", "phones")
    rows_of = made.pair.target_unlabelled["text"]
    file = made.write(made.keys(rows_of))
    assert file is not None
    with file.open(newline="", encoding="utf-8-sig") as opened:
        asked = list(csv.DictReader(opened))
    shown = {row["text"] for row in asked}
    assert "'=1+1 good" in shown and 'said "no", twice' in shown
    assert max(map(len, shown)) == 30_000
    lines = [(row["key"], row["text"].upper(), "neg") for row in asked]
    write_csv(file, lines, "key,text,label")
    again = LabelFile(made.experiment, *made.domains)
    labels = again.labels(made.keys(rows_of))
    assert labels is not None and set(labels) == {0}


def test_the_domains_are_compared_in_every_layer(
    write_config: Config, tmp_path: Path, trained: list[int]
) -> None:
    run(write_config(), "--method", "source only")
    run(write_config(), "--method", "source only", "--diagnose")
    (file,) = (tmp_path / "out").rglob("diagnostics.json")
    layers = json.loads(file.read_text())["layers"]
    assert [each["name"] for each in layers][:2] == ["embeddings", "layer.0"]
    assert len(trained) == 2
    run(write_config(), "--method", "source only", "--diagnose")
    assert len(trained) == 2


def test_candidates_of_two_files_are_chosen_from(
    domains: dict[str, str], model_dir: Path, tmp_path: Path
) -> None:
    arguments = ("--source", domains["films"], "--target", domains["phones"], "--choose")
    small = ("--max_steps", "2", "--model", str(model_dir), "--output-dir", str(tmp_path / "out"))
    printed = run(*arguments, *small)
    methods = [line["method"] for line in results(tmp_path / "out")]
    assert methods == ["source only", "SelfTraining", "MCC", "chosen"]
    assert "Chosen without target labels" in printed


def test_no_candidate_has_seen_labels_or_trains_on_neighbours(write_config: Config) -> None:
    methods = {
        "source only": [],
        "told": {"adaptations": ["SelfTraining"], "target_priors": "given"},
        "told wrongly": {"adaptations": ["SelfTraining"], "target_priors": {"given": 0.1}},
        "assumed": {"adaptations": ["SelfTraining"], "target_priors": {"pos": 0.5, "neg": 0.5}},
        "ATDOC": ["ATDOC"],
        "AaD beside": ["MMD", "AaD"],
        "bound": "target",
    }
    made = experiment(write_config(methods=methods), {}, {})
    assert candidates_of(made) == ["source only", "assumed"]


def test_a_choice_needs_a_method_without_adaptation(write_config: Config) -> None:
    printed = run(write_config(methods={"MMD": ["MMD"]}), "--choose", fails=True)
    assert "needs a method without adaptation to compare with" in printed


def test_accuracy_by_group_of_target_rows(
    write_config: Config, domains: dict[str, str], tmp_path: Path
) -> None:
    """A column of the target says the groups; its test rows are counted, and no other."""
    lines = [
        (text, label, ("north", "south", "")[i % 3])
        for i, (text, label) in enumerate(rows("phone"))
    ]
    grouped = str(write_csv(tmp_path / "grouped.csv", lines, "text,label,place"))
    data = {"films": domains["films"], "phones": {"train": grouped, "group_column": "place"}}
    run(write_config(data=data), "--method", "source only")
    (folder,) = (tmp_path / "out" / "films-phones").iterdir()
    groups = json.loads((folder / "diagnostics.json").read_text())["groups"]
    assert set(groups) == {"north", "south"}  # an empty cell is no group
    items = load_items(folder / "outputs.npz")["target_test"]
    right = (items.logits.argmax(1) == items.labels).sum().item()
    counted = sum(group["count"] for group in groups.values())
    assert 0 < counted < len(items) == 12
    assert 0 <= sum(g["accuracy"] * g["count"] for g in groups.values()) <= right
    place = {text: group for text, _, group in lines}
    pair = load_pair(experiment(write_config(data=data), {}, {}), "films", "phones")
    tested = [place[text] for text in pair.target["test"]["text"]]
    assert {n: g["count"] for n, g in groups.items()} == Counter(filter(None, tested))
    assert "accuracy by group" in words(page_of(write_report([tmp_path / "out"])))

    run(write_config(data=data), "--method", "source only", "--group-column", "label")
    (folder,) = (tmp_path / "out" / "films-phones").iterdir()  # measured again, in its place
    assert set(json.loads((folder / "diagnostics.json").read_text())["groups"]) == {"pos", "neg"}

    printed = run(write_config(data=data), "--group-column", "plaec", fails=True)
    assert "and not 'plaec'. Did you mean 'place'? Name it with group_column" in printed
