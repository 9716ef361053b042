"""The demo, run as a person runs it, on tiny data and a tiny model, without a network."""

import csv

import datasets
import domain_data
import domain_shift_text as demo
import pytest

from tests.helpers.word_classifier import WORDS, save_tiny_model


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Domains of 48 rows in the cache, and the options for a tiny model."""
    monkeypatch.setenv("HF_ADAPT_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    fetched = []

    def write_domain(name):
        fetched.append(name)
        file = tmp_path / "domains" / f"{name}.csv"
        file.parent.mkdir(exist_ok=True)
        texts = [
            f"{WORDS[i % 4]} {name} {WORDS[8 + i // 4 % 6]} {WORDS[8 + i // 24]}" for i in range(48)
        ]
        with file.open("w", newline="") as stream:
            csv.writer(stream).writerow(("text", "label"))
            csv.writer(stream).writerows((t, ("pos", "neg")[i % 2]) for i, t in enumerate(texts))
        return file

    monkeypatch.setattr(domain_data, "write_domain", write_domain)
    (tmp_path / "model").mkdir()
    options = ["--model", str(save_tiny_model(tmp_path / "model")), "--max_steps", "2"]
    options += ["--freeze-layers", "1", "--seeds", "1", "--output-dir", str(tmp_path / "out")]
    return fetched, options


def test_demo_compares_its_methods_on_its_pairs(tiny, tmp_path, capsys):
    fetched, options = tiny
    with pytest.raises(SystemExit) as ended:
        demo.main(options)
    assert ended.value.code == 0, capsys.readouterr().err
    assert fetched == ["movies", "products", "tweets"]
    table = (tmp_path / "out" / "table.md").read_text()
    for method in ("source only", "recommended", "recommended, frequencies given", "bound"):
        assert f"\n| {method} | " in table
    assert "vader" in capsys.readouterr().out.lower()  # whom to cite


def test_other_domains_are_fetched_when_they_are_named(tiny, tmp_path):
    fetched, options = tiny
    with pytest.raises(SystemExit) as ended:
        demo.main(["--source", "sms", "--target=email", "--method", "source only", *options])
    assert ended.value.code == 0
    assert fetched == ["email", "sms"]
    assert "## sms → email" in (tmp_path / "out" / "table.md").read_text()


PAIRS = {"vader4": 12, "spam2": 2, "digits": 2, "brown": 2, "multilingual": 2}


@pytest.mark.parametrize("name", PAIRS)
def test_configurations_of_the_benchmarks_are_right(name, tmp_path, monkeypatch):
    from hf_adapt.experiments.config import Experiment
    from hf_adapt.experiments.settings import Settings

    file = demo.Path(demo.__file__).parents[1] / "benchmarks" / "configs" / f"{name}.yaml"
    experiment = Experiment.read(Settings.read(file))
    assert len(experiment.pairs) == PAIRS[name]
