"""The example and the benchmark of knowledge injection: tiny graphs, a tiny model, no network."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import datasets
import domain_data
import knowledge_controls
import knowledge_injection as example
import pytest
import rare_terms
import torch

from hf_adapt.knowledge import KnowledgeInjector, load_knowledge_model
from tests.helpers.word_classifier import WORDS, save_tiny_model

SYSTEMS = {"HP:1": "the eye", "HP:2": "the skin"}


def ontology(folder: Path) -> Path:
    """Two organ systems with twelve terms each, half of them below another; one term in both."""
    stanzas = ["id: HP:0000118\nname: Phenotypic abnormality"]
    for system, name in SYSTEMS.items():
        stanzas.append(f"id: {system}\nname: Abnormality of {name}\nis_a: HP:0000118")
        for i in range(12):
            above = system if i % 2 == 0 else f"{system}{i - 1:02}"
            stanzas.append(
                f'id: {system}{i:02}\nname: A long name {system}{i}\ndef: "What {name} has" []\n'
                f'synonym: "Rare{system[3:]}{i}osis" EXACT []\nis_a: {above}'
            )
    stanzas.append('id: HP:3\nname: Both\ndef: "Either" []\nis_a: HP:1\nis_a: HP:2')
    (folder / "hp.obo").write_text("".join(f"[Term]\n{stanza}\n\n" for stanza in stanzas))
    return folder


@pytest.fixture(autouse=True)
def terms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny ontology in place of the real one; the words of a tiny model have one piece."""
    monkeypatch.setattr(rare_terms, "hpo_path", lambda: ontology(tmp_path) / "hp.obo")
    monkeypatch.setattr(rare_terms, "is_rare", lambda name, tokenizer: " " not in name)
    monkeypatch.setattr(rare_terms, "NUM_TEST", 6)
    monkeypatch.setattr(rare_terms, "NUM_DEV", 6)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("HF_ADAPT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model_path(tmp_path: Path) -> str:
    (tmp_path / "model").mkdir()
    return str(save_tiny_model(tmp_path / "model"))


def options(tmp_path: Path, **more: str) -> list[str]:
    given = {"output_dir": str(tmp_path / "out"), "max_steps": "2", "use_cpu": "true", **more}
    return [part for name, value in given.items() for part in (f"--{name}", value)]


def words(rows: datasets.Dataset) -> set[str]:
    return {word.strip(".,;") for text in rows["text"] for word in text.lower().split()}


def test_the_graph_does_not_have_the_label_and_no_term_is_in_two_splits() -> None:
    found = rare_terms.load_terms(None)
    assert sorted(found.labels) == sorted(SYSTEMS.values())
    keys = {found.graph.key(entity) for entity in range(len(found.graph))}
    assert len(keys) == 24 and not keys & {"HP:0000118", *SYSTEMS, "HP:3"}
    split = [
        {w for w in words(r) if w.startswith("rare")} for r in (found.train, found.dev, found.test)
    ]
    assert [len(each) for each in split] == [12, 6, 6]
    assert len(set.union(*split)) == 24


def test_a_sentence_of_two_findings_has_the_label_of_the_one_that_the_patient_has() -> None:
    terms = [rare_terms.Term(0, "xosis", 7), rare_terms.Term(1, "yosis", 8)]
    patterns = rare_terms.PATTERNS_OF_TWO
    rows = rare_terms.sentences(terms, [7, 8], ["the eye", "the skin"], patterns, copies=20)
    for row in rows:
        own, other = ("xosis", "yosis") if row["label"] == 0 else ("yosis", "xosis")
        assert row["text"].lower() in {p.lower().format(a=own, b=other) for p in patterns}
    assert len(set(rows["text"])) > 8


def test_both_models_are_tested_and_the_informed_one_is_saved(
    model_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {
        "model_name_or_path": model_path,
        "num_labels": "8",
        "layer": "0",
        "freeze_layers": "1",
    }
    example.main(options(tmp_path, **given))
    printed = capsys.readouterr().out
    assert "without the ontology:" in printed and "with the ontology:" in printed
    assert "osis'" in printed  # what the injector makes of a sentence
    model = load_knowledge_model(tmp_path / "out")
    assert sorted(model.config.label2id) == sorted(SYSTEMS.values())


@pytest.fixture
def tiny_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark's tasks on few rows; the tiny model has two layers."""

    def terms(path: str, tokenizer: object) -> knowledge_controls.Task:
        task = knowledge_controls.rare_terms(path, tokenizer)
        return replace(task, make_injector=lambda: KnowledgeInjector(0), freeze_layers=1)

    def load_domain(domain: str) -> dict[str, list[tuple[str, str]]]:
        rows = [(f"{WORDS[i % 8]} {domain} {i}", ("bad", "good")[i % 2]) for i in range(24)]
        return {"train": rows, "dev": rows[:8], "test": rows[:8]}

    monkeypatch.setitem(knowledge_controls.TASKS, "terms", terms)
    monkeypatch.setattr(domain_data, "load_domain", load_domain)
    monkeypatch.setattr(knowledge_controls, "wordnet_path", lambda: tiny_wordnet(tmp_path / "dict"))


def tiny_wordnet(folder: Path) -> Path:
    """The words of the tiny texts, in the files' own format."""
    folder.mkdir(exist_ok=True)
    for file, kind, words in (("adj", "a", WORDS[:4]), ("noun", "n", WORDS[4:8])):
        pointer = "! 00000200 a 0101" if kind == "a" else "@ 00000100 n 0000"
        lines = [
            f"{100 * number:08} 00 {kind} 01 {word} 0 001 {pointer} | what {word} is  "
            for number, word in enumerate(words, start=1)
        ]
        (folder / f"data.{file}").write_text("\n".join(lines) + "\n")
    for file in ("verb", "adv"):
        (folder / f"data.{file}").write_text("  1 nothing here\n")
    return folder


@pytest.mark.usefixtures("tiny_tasks")
@pytest.mark.parametrize("task", ["terms", "sentiment"])
def test_every_method_has_its_row_and_finished_runs_are_kept(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    monkeypatch.setattr(knowledge_controls, "minilm_path", lambda: model_path)
    command = [*options(tmp_path, task=task), "--seeds", "2", "--num_labels", "6"]
    knowledge_controls.main(command)
    folder = tmp_path / "out" / task
    runs = json.loads((folder / "results.json").read_text())["runs"]
    methods = set(knowledge_controls.METHODS)
    if task == "sentiment":
        methods.remove("definitions read")
    assert {(run["method"], run["seed"]) for run in runs} == {*product(methods, (42, 43))}
    table = (folder / "table.md").read_text()
    assert all(f"| {method} |" in table for method in methods)
    assert (folder / "knowledge.png").stat().st_size > 10_000
    monkeypatch.setattr(knowledge_controls, "cell", lambda *_: pytest.fail("runs again"))
    knowledge_controls.main(command)


def test_definitions_stand_behind_the_text() -> None:
    found = rare_terms.load_terms(None)
    linker = knowledge_controls.EntityLinker(found.graph)
    text = "Rare10osis was confirmed and rare21osis ruled out."
    rows = knowledge_controls.with_definitions(datasets.Dataset.from_dict({"text": [text]}), linker)
    definitions = "Rare10osis: What the eye has rare21osis: What the skin has"
    assert rows["text"][:] == [f"{text} {definitions}"]


def test_the_controls_are_controls() -> None:
    vectors = knowledge_controls.EntityVectors.from_array(torch.arange(12.0).view(6, 2).numpy())
    rows = vectors.gather(range(6))
    control = knowledge_controls.control
    assert (control("knowledge", vectors).gather(range(6)) == rows).all()
    assert (control("boundaries alone", vectors).gather(range(6)) == 1).all()
    shuffled = control("shuffled", vectors).gather(range(6))
    assert sorted(map(tuple, shuffled)) == sorted(map(tuple, rows))
    assert not (shuffled == rows).all()


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown --methods"):
        knowledge_controls.BenchmarkArguments(methods=["half"])
