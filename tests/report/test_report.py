"""The page about finished runs: right numbers, nothing from target labels but what says so."""

import dataclasses
import itertools
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hf_adapt.cli import app
from hf_adapt.evaluation import calibration_error
from hf_adapt.experiments.outputs import RunOutputs
from hf_adapt.report import ReportError, write_report
from hf_adapt.report.drawing import MOST_CONFUSIONS, MOST_GROUPS, style, svg
from hf_adapt.report.embedding import projected
from hf_adapt.report.plots.predictions import confusion_plot, groups_plot
from hf_adapt.report.runs import find_pairs
from tests.helpers.finished_runs import (
    page_of,
    replaced,
    save_extras,
    save_run,
    without_oracle,
    words,
)

EVIL = "<script>alert('x')</script>\"&lt; $\\frac$ {{7*7}} _早\x1b\ud800"
SEEN = "<script>alert('x')</script>\"&lt; $\\frac$ {{7*7}} _早\ufffd\ufffd"


def save_three(root: Path, **options: Any) -> None:
    """Source only with two seeds, an adapted run and the bound."""
    save_run(root, seed=42, skill=1.0, **options)
    save_run(root, seed=43, skill=1.0, **options)
    save_extras(save_run(root, "DANN", **options))
    save_run(root, "bound", skill=3.0, **options)


def numbers_of(page: Path) -> Any:
    return json.loads((page.parent / "report.json").read_text())


def test_says_what_was_compared_what_came_out_and_what_was_chosen(tmp_path: Path) -> None:
    save_three(tmp_path)
    page = write_report([tmp_path])
    assert page == tmp_path / "report" / "report.html"
    runs = numbers_of(page)["pairs"][0]["runs"]
    accuracy = {(run["method"], run["seed"]): run["oracle"]["accuracy"] for run in runs}
    low = [100 * accuracy["source only", seed] for seed in (42, 43)]
    high = 100 * accuracy["DANN", 42]
    shown = words(page_of(page))
    assert "3 methods (source only, DANN and bound) on 1 pair of domains" in shown
    assert "Chosen without target labels: DANN. It has the best mean rank." in shown
    assert (
        f"source only has {np.mean(low):.1f} ± {np.std(low, ddof=1):.1f} %; best: DANN, which was "
        f"chosen, with {high:.1f} % ({high - np.mean(low):+.1f} points); bound, trained on"
    ) in shown
    assert "MCC 42 dropped it has collapsed" in shown
    assert "long (worst)" in shown


def test_the_numbers_are_those_of_the_outputs(tmp_path: Path) -> None:
    folder = save_run(tmp_path, classes=("a", "b", "c"))
    (run,) = numbers_of(write_report([folder]))["pairs"][0]["runs"]
    outputs = RunOutputs.load(folder)
    test, dev = outputs.target_test, outputs.source_dev
    assert test is not None and dev is not None
    counts = np.zeros((3, 3), dtype=int)
    np.add.at(counts, (test.labels.numpy(), test.logits.argmax(1).numpy()), 1)
    assert run["oracle"]["confusion"] == counts.tolist()
    for side, found in ((dev, run["source_calibration"]), (test, run["oracle"]["calibration"])):
        p = side.logits.double().softmax(1).numpy()
        truth = np.eye(3)[side.labels.numpy()]
        assert found["brier"] == pytest.approx(((p - truth) ** 2).sum(1).mean())
        assert found["ece"] == pytest.approx(calibration_error(side.logits, side.labels, 10))
        assert sum(each["count"] for each in found["bins"]) == len(side)
    assert run["curves"]["loss"] == [[1, 1.0], [2, 0.5], [3, pytest.approx(1 / 3)]]
    assert list(run["curves"]) == ["loss", "loss/task", "eval_target_iwv", "learning_rate"]
    assert run["curves"]["eval_target_iwv"] == [[3, None]]  # JSON has no infinity


def test_poisoned_target_labels_change_only_what_is_the_oracles(tmp_path: Path) -> None:
    pages = []
    for name in ("true", "poisoned"):
        save_three(tmp_path / name, poisoned=name == "poisoned")
        pages.append(write_report([tmp_path / name]))
    whole = [page_of(page) for page in pages]
    assert ET.tostring(whole[0]) != ET.tostring(whole[1])
    rest = [ET.tostring(without_oracle(page)) for page in whole]
    assert rest[0] == rest[1]
    assert b"Estimated accuracy" in rest[0] and b"Features by domain" in rest[0]
    numbers = [numbers_of(page) for page in pages]
    oracles = [[run.pop("oracle") for run in each["pairs"][0]["runs"]] for each in numbers]
    assert oracles[0] != oracles[1]
    assert numbers[0] == numbers[1]


def test_texts_of_the_data_stay_texts(tmp_path: Path) -> None:
    options: dict[str, Any] = {"pair": (f"s{EVIL}", f"t{EVIL}"), "classes": (f"a{EVIL}", "_b")}
    folders = [
        save_run(tmp_path, f"{name}{EVIL}", folders=("pair", name), **options, **more)
        for name, more in (
            ("base", {"role": "baseline"}),
            ("other", {"warnings": 2, "first_warning": f"warning{EVIL}", "collapsed": True}),
            ("broken", {"error": f"error{EVIL}"}),
        )
    ]
    save_extras(folders[1], EVIL, chosen=f"other{EVIL}")
    logs = [{f"loss/{EVIL}": 1.0, "step": 1}, {f"loss/{EVIL}": 0.5, "step": 2}]
    (folders[1] / "logs.json").write_text(json.dumps(logs))
    page = page_of(write_report([tmp_path]))
    assert not [e for e in page.iter() if e.tag.rpartition("}")[2] in ("script", "img")]
    shown = words(page)
    for text in ("s", "t", "a", "base", "other", "warning", "error", "loss/", "short", "layer 0"):
        assert text + SEEN in shown, text
    assert f"collapsed every target item is given class a{SEEN}" in shown


def no_outputs(folder: Path) -> None:
    (folder / "outputs.npz").unlink()


def cut_outputs(folder: Path) -> None:
    file = folder / "outputs.npz"
    file.write_bytes(file.read_bytes()[:999])


def not_finite(folder: Path) -> None:
    outputs = RunOutputs.load(folder)
    bad = replaced(outputs.target_unlabelled, logits=torch.full((60, 2), torch.nan))
    RunOutputs(outputs.source_dev, outputs.source_test, bad, None).save(folder)


def only_target(folder: Path) -> None:
    RunOutputs(None, None, RunOutputs.load(folder).target_unlabelled, None).save(folder)


def other_lengths(folder: Path) -> None:
    found = RunOutputs.load(folder)
    test = replaced(found.target_test, labels=found.target_test.labels[:-1])
    dataclasses.replace(found, target_test=test).save(folder)


def other_classes(folder: Path) -> None:
    found = RunOutputs.load(folder)
    test = replaced(found.target_test, logits=torch.zeros(60, 7))
    dataclasses.replace(found, target_test=test).save(folder)


def no_target(folder: Path) -> None:
    RunOutputs(RunOutputs.load(folder).source_dev, None, None, None).save(folder)


def no_logs(folder: Path) -> None:
    (folder / "logs.json").unlink()


def cut_choice(folder: Path) -> None:
    (folder.parent / "choice.json").write_text('{"chosen": ')


def old_choice(folder: Path) -> None:
    file = folder.parent / "choice.json"
    made = [{**each, "run": "DANN-of-other-settings"} for each in json.loads(file.read_text())]
    file.write_text(json.dumps(made))


def odd_diagnostics(folder: Path) -> None:
    (folder / "diagnostics.json").write_text('{"layers": ["a layer"]}')


def odd_groups(folder: Path) -> None:
    (folder / "diagnostics.json").write_text('{"groups": {"north": {"accuracy": 0.5}}}')


def odd_choice(folder: Path) -> None:
    (folder.parent / "choice.json").write_text('[{"chosen": "DANN", "candidates": ["DANN"]}]')


def odd_logs(folder: Path) -> None:
    (folder / "logs.json").write_text('[{"loss": 1.0, "step": "one"}]')


def odd_result(folder: Path) -> None:
    file = folder / "result.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_f1": "high"}))


@pytest.mark.parametrize(
    ("damage", "note"),
    [
        (no_outputs, "outputs.npz is missing, so only the scores are shown."),
        (cut_outputs, "outputs.npz cannot be read"),
        (not_finite, "The predictions are not finite: the model has diverged."),
        (not_finite, "1 run collapsed"),
        (other_lengths, "outputs.npz cannot be read (the arrays of target_test do not belong"),
        (other_classes, "outputs.npz cannot be read (its parts have different numbers of classes"),
        (only_target, "DANN"),
        (no_target, "There are no outputs for unlabelled target rows, so nothing is estimated."),
        (no_logs, "logs.json is missing, so there are no curves of this run."),
        (cut_choice, "choice.json cannot be read"),
        (old_choice, "1 of 1 choices in choice.json are left out: they were made among other runs"),
        (odd_diagnostics, "diagnostics.json is left out: layers[0]: expected an object, got 'a"),
        (odd_groups, "diagnostics.json is left out: groups.north: low is missing."),
        (odd_choice, "choice.json is left out: [0].candidates[0]: expected an object, got 'DANN'."),
        (odd_logs, "logs.json is left out: [0].step: expected a number, got 'one'."),
        (odd_result, "is no result of a run and is left out: target_f1: expected a number, got"),
    ],
)
def test_copes_with_what_is_missing(
    tmp_path: Path, damage: Callable[[Path], None], note: str
) -> None:
    save_run(tmp_path)
    save_extras(folder := save_run(tmp_path, "DANN"))
    damage(folder)
    shown = words(page_of(write_report([tmp_path])))
    assert note in shown
    assert "source only" in shown


def test_the_worst_of_many_groups_is_that_of_all() -> None:
    count = MOST_GROUPS + 9
    groups = {
        f"g{i}": {"accuracy": 0.9 - 0.2 * (i == count - 1), "low": 0.1, "high": 1, "count": 99 - i}
        for i in range(count)
    }
    plot = groups_plot("a", {"method": "DANN", "oracle": {"groups": groups}})
    assert plot is not None and plot.table is not None
    assert len(plot.table.rows) == MOST_GROUPS + 1
    assert plot.table.rows[-1][:2] == [f"g{count - 1} (worst)", "70.0"]


def test_many_classes_make_a_small_page() -> None:
    count = 200
    confusion = np.ones((count, count), int)
    confusion[3, 7] = 9
    names = [f"c{i}" for i in range(count)]
    run = {"method": "DANN", "classes": names, "oracle": {"confusion": confusion.tolist()}}
    plot = confusion_plot("a", run)
    assert plot is not None and plot.table is not None
    assert plot.table.rows[0] == ["c3", "c7", "9"] and len(plot.table.rows) == MOST_CONFUSIONS
    with style():
        assert len(svg(plot.figure(), "a", "b", "c")) < 200_000


def test_without_target_labels_nothing_is_the_oracles(tmp_path: Path) -> None:
    for method in ("source only", "DANN"):
        save_run(tmp_path, method, labelled=False)
    page = page_of(write_report([tmp_path]))
    assert "Estimated accuracy on the target: source only" in words(page)
    assert not [e for e in page.iter() if "data-oracle" in e.attrib]


def test_takes_output_folders_pairs_and_runs(tmp_path: Path) -> None:
    save_three(tmp_path)
    run = tmp_path / "films-phones" / "DANN-seed42-0123456789"
    for given, count in ((tmp_path, 4), (run.parent, 4), (run, 1)):
        ((pair,), notes) = find_pairs([given, given])
        assert (len(pair.runs), notes) == (count, [])
        assert len(pair.choices) == 1
    page = write_report([run], tmp_path / "out")
    assert (page.parent / "1-films_phones-all-accuracy.png").read_bytes()[:4] == b"\x89PNG"


def test_the_newest_of_several_runs_of_a_seed_counts(tmp_path: Path) -> None:
    for digest in ("old", "new"):
        save_run(tmp_path, digest=digest)
    page = write_report([tmp_path])
    assert [run["folder"] for run in numbers_of(page)["pairs"][0]["runs"]] == [
        "source_only-seed42-new"
    ]
    assert "source_only-seed42-old is left out: source_only-seed42-new is a newer run" in words(
        page_of(page)
    )


def test_is_the_same_for_the_same_runs(tmp_path: Path) -> None:
    save_three(tmp_path)
    first, second = (write_report([tmp_path], tmp_path / f"out{n}").parent for n in range(2))
    names = sorted(file.name for file in first.iterdir())
    assert "report.html" in names and len(names) > 6
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_ids_are_unique_links_lead_somewhere_and_headings_are_in_order(tmp_path: Path) -> None:
    save_three(tmp_path)
    save_run(tmp_path, pair=("films", "books"))
    page = page_of(write_report([tmp_path]))
    ids = [e.attrib["id"] for e in page.iter() if "id" in e.attrib]
    assert len(ids) == len(set(ids))
    text = ET.tostring(page, encoding="unicode")
    assert {*re.findall(r'href="#([^"]+)"', text), *re.findall(r"url\(#([^)]+)\)", text)} <= {*ids}
    named = [e.attrib["aria-labelledby"].split() for e in page.iter() if e.tag.endswith("}svg")]
    assert len(named) > 20 and {name for names in named for name in names} <= {*ids}
    levels = [int(e.tag[1]) for e in page.iter() if re.fullmatch(r"h\d", e.tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_embedding_is_that_of_both_runs_together(tmp_path: Path) -> None:
    before, after = (
        RunOutputs.load(save_run(tmp_path, method)) for method in ("source only", "DANN")
    )
    found = projected(before, after)
    assert found is not None
    features = [
        torch.cat([each.source_dev.features, each.target_unlabelled.features]).double().numpy()  # type: ignore[union-attr]
        for each in (before, after)
    ]
    both = np.concatenate(features)
    directions = np.linalg.svd(both - both.mean(0), full_matrices=False)[2][:2]
    expected = (both - both.mean(0)) @ directions.T
    points = np.concatenate([view["points"] for view in found])
    np.testing.assert_allclose(abs(points), abs(expected), atol=1e-6)


def test_the_command_says_where_the_page_is(tmp_path: Path) -> None:
    save_run(tmp_path)
    done = CliRunner().invoke(app, ["report", str(tmp_path), "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "".join(done.output.split()).endswith("out/report.html")


def empty(path: Path) -> None:
    path.mkdir()


def file(path: Path) -> None:
    path.write_text("")


def damaged(path: Path) -> None:
    path.mkdir()
    (path / "result.json").write_text("{")


@pytest.mark.parametrize(
    ("make", "came"),
    [
        (lambda path: None, "there is no such folder. Expected result.json in it, or in PAIR/"),
        (empty, "it is empty"),
        (file, "a file lies there"),
        (damaged, "is no result of a run"),
    ],
)
def test_a_folder_without_runs_is_an_error(
    tmp_path: Path, make: Callable[[Path], None], came: str
) -> None:
    make(tmp_path / "runs")
    with pytest.raises(ReportError, match=re.escape(came)):
        write_report([tmp_path / "runs"])
    done = CliRunner().invoke(app, ["report", str(tmp_path / "runs")])
    assert done.exit_code == 1
