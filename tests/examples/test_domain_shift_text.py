"""The demo, run as a person runs it, on tiny data and a tiny model, without a network."""

import json

import datasets
import domain_shift_text as demo
import pytest
from safetensors.torch import load_file
from transformers import Trainer

from tests.helpers.word_classifier import WORDS, save_tiny_model

RESULTS = ("results.json", "table.md", "target_accuracy.png")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def command(model_dir, tmp_path, monkeypatch):
    """The demo's command line for two tiny files; every word of a text decides on its label."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")

    def write(name, thing, flip=False):
        lines = ["text,label"]
        for i in range(48):
            words = [WORDS[i % 4], thing, WORDS[8 + i // 4 % 6], WORDS[8 + i // 24]]
            lines.append(f"{' '.join(words)},{('pos', 'neg')[(i + flip) % 2]}")
        path = tmp_path / name
        path.write_text("\n".join(lines))
        return str(path)

    def make(output_dir, *extra, flip=False):
        options = {
            "--source": write("films.csv", "film"),
            "--target": write("phones.csv", "phone", flip),
            "--model_name_or_path": str(model_dir),
            "--output_dir": str(tmp_path / output_dir),
            "--freeze_layers": "1",
            "--max_steps": "2",
            "--seeds": "1",
            "--per_device_train_batch_size": "4",
        }
        return [part for option in options.items() for part in option] + list(extra)

    return make


def test_all_methods_run_and_everything_is_written(command, tmp_path, capsys):
    demo.main(command("out", "--seeds", "2"))
    printed = capsys.readouterr().out
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(document["summary"]) == ["source", "dann", "mmd+im", "oracle"]
    assert [(run["method"], run["seed"]) for run in document["runs"]] == [
        (method, seed) for seed in (42, 43) for method in demo.METHODS
    ]
    for method, label in demo.METHODS.items():
        assert label in printed
        for score in demo.SCORES:
            assert 0 <= document["summary"][method][score]["mean"] <= 1
            assert document["summary"][method][score]["sd"] is not None
    assert document["majority_share_of_target"] == pytest.approx(0.5, abs=0.2)
    assert document["versions"]["transformers"]
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.count("\n| ") == 6 and "± " in table
    assert (tmp_path / "out" / "target_accuracy.png").read_bytes().startswith(b"\x89PNG")
    for name in RESULTS:
        assert str(tmp_path / "out" / name) in printed.replace("\n", "")


def test_finished_runs_are_kept_until_a_setting_changes(command, tmp_path, monkeypatch):
    trained = []
    train = Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self, *a: trained.append(1) or train(self, *a))
    both = ("--methods", "source", "oracle")
    demo.main(command("out", "--methods", "source"))
    assert len(trained) == 1
    demo.main(command("out", *both))
    assert len(trained) == 2
    (tmp_path / "out" / "results.json").unlink()
    demo.main(command("out", *both))
    assert len(trained) == 2 and (tmp_path / "out" / "results.json").exists()
    demo.main(command("out", *both, "--learning_rate", "0.01"))
    assert len(trained) == 4
    demo.main(command("out", *both))  # the first settings' results are still there
    assert len(trained) == 4
    demo.main(command("out", *both, "--overwrite"))
    assert len(trained) == 6


def test_target_labels_reach_the_oracle_alone(command, tmp_path):
    """With the target's labels flipped, every other model is the same to the last bit."""
    weights = {}
    for flip in (False, True):
        folder = f"out{flip}"
        demo.main(command(folder, "--save_models", flip=flip))
        for method in demo.METHODS:
            (path,) = (tmp_path / folder).glob(f"{method}-seed42-*/model.safetensors")
            weights[method, flip] = load_file(path)
    for method in demo.METHODS:
        before, after = weights[method, False], weights[method, True]
        same = all(before[name].equal(after[name]) for name in before)
        assert same == (method != "oracle"), method


def test_first_layers_are_frozen_and_the_rest_is_trained(command, tmp_path, model_dir):
    demo.main(command("out", "--methods", "source", "--save_models"))
    (path,) = (tmp_path / "out").glob("source-*/model.safetensors")
    before, after = load_file(model_dir / "model.safetensors"), load_file(path)
    moved = {name for name in after if not before[name].equal(after[name])}
    assert any("layer.1." in name for name in moved)
    assert any("classifier" in name for name in moved)
    assert not any("embeddings" in name or "layer.0." in name for name in moved)


def test_too_many_frozen_layers_are_refused(command):
    with pytest.raises(ValueError, match="--freeze_layers 2, but the model has 2 layers"):
        demo.main(command("out", "--freeze_layers", "2"))


def test_unknown_method_is_refused(command):
    with pytest.raises(ValueError, match=r"\['cyclegan'\].*'mmd\+im'"):
        demo.main(command("out", "--methods", "cyclegan"))


def run_of(method, target_accuracy, seed=0):
    scores = dict.fromkeys(demo.SCORES, 0.9) | {"target_accuracy": target_accuracy}
    return {"method": method, "seed": seed, "seconds": 12.0, **scores}


def test_share_of_the_gap():
    runs = [
        run_of("source", 0.6),
        run_of("oracle", 0.8),
        run_of("dann", 0.6),
        run_of("dann", 0.7, 1),
    ]
    summary = demo.summarize(runs)
    assert summary["dann"]["gap_closed"] == pytest.approx(0.25)
    assert summary["dann"]["target_accuracy"]["sd"] == pytest.approx(0.0707107)
    rows = demo.table_rows(summary)
    assert [row[0] for row in rows] == ["method", "source only", "DANN", "oracle"]
    assert rows[2][3] == "65.0 ± 7.1" and rows[2][5] == "25%"
    assert rows[1][3] == "60.0" and rows[1][5] == "–"


def test_no_gap_and_a_negative_share():
    assert (
        demo.summarize([run_of("source", 0.8), run_of("oracle", 0.7), run_of("dann", 0.9)])["dann"][
            "gap_closed"
        ]
        is None
    )
    worse = [run_of("source", 0.6), run_of("oracle", 0.8), run_of("dann", 0.5)]
    assert demo.table_rows(demo.summarize(worse))[2][5] == "-50%"
