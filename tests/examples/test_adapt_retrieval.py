"""The example of retrieval, run as a person runs it: a tiny model and graphs, no network."""

import runpy
import sys
from pathlib import Path

import adapt_retrieval
import datasets
import pytest
from sentence_transformers import SentenceTransformer
from transformers import BertConfig, BertModel

from hf_adapt.knowledge import KnowledgeGraph
from tests.helpers.word_classifier import WORDS, save_tiny_model


def test_three_models_are_tested_and_the_adapted_one_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terms = [
        f'[Term]\nid: X:{i}\nname: {a} {b}\ndef: "the {b} is {a}" []\nis_a: X:99\n'
        for i, (a, b) in enumerate((a, b) for a in WORDS[:6] for b in WORDS[6:12])
    ]
    ontology = tmp_path / "graph.obo"
    ontology.write_text(
        "format-version: 1.2\n\n" + "\n".join([*terms, "[Term]\nid: X:99\nname: no"])
    )
    graph = KnowledgeGraph.from_obo(ontology)
    monkeypatch.setattr(adapt_retrieval, "hpo_path", lambda: ontology)
    monkeypatch.setattr(adapt_retrieval, "wordnet_path", lambda: tmp_path)
    monkeypatch.setattr(KnowledgeGraph, "from_wordnet", lambda folder: graph)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    (tmp_path / "model").mkdir()
    folder = save_tiny_model(tmp_path / "model")
    BertModel(BertConfig.from_pretrained(folder)).save_pretrained(folder)
    options = {
        "--model_name_or_path": str(folder),
        "--output_dir": str(tmp_path / "out"),
        "--num_train": "16",
        "--num_test": "8",
        "--max_steps": "2",
        "--per_device_train_batch_size": "4",
        "--use_cpu": "true",
    }
    adapt_retrieval.main([part for option in options.items() for part in option])
    printed = capsys.readouterr().out
    names = ("before", "without", f"with {adapt_retrieval.ExampleArguments.method}")
    assert all(f"{name}: " in printed for name in names)
    assert SentenceTransformer(str(tmp_path / "out"), device="cpu").encode("film").shape == (16,)
    assert len(adapt_retrieval.definitions(graph)) == 36  # and not the term without a definition


def test_what_is_not_installed_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(SystemExit, match='pip install "sentence-transformers>='):
        runpy.run_path(adapt_retrieval.__file__)
