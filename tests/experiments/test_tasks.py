"""The tasks: tokens with labels of words, and images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    BertForTokenClassification,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_adapt.experiments.config import DomainFiles
from hf_adapt.experiments.data import DataError, load_domain
from hf_adapt.experiments.tasks import ImageClassification, SequenceClassification, Task
from hf_adapt.experiments.tasks.token_classification import TokenClassification, _labels
from tests.experiments.conftest import results, run
from tests.helpers.models import vit_config
from tests.helpers.word_classifier import WORDS


def test_first_token_of_a_word_has_its_label(model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    task = TokenClassification()
    rows = Dataset.from_dict(
        {"tokens": [["good", "film"], ["bad"]], "tags": [["A", "B"], ["A"]]},
        features=task.features(["A", "B"]),
    )
    found = task.prepared(rows, tokenizer, 16)
    assert found["labels"][:] == [[-100, 0, 1, -100], [-100, 0, -100]]
    assert set(found.column_names) >= {"input_ids", "attention_mask", "labels"}
    assert "labels" not in task.prepared(rows.remove_columns("tags"), tokenizer, 16).column_names
    assert _labels([None, 0, 0, 1, None], [5, 6]) == [-100, 5, -100, 6, -100]


@pytest.mark.parametrize(
    ("task", "cell", "label", "message"),
    [
        (TokenClassification(), ["a", "b"], ["X"], "2 words and 1 tags"),
        (TokenClassification(), "a b", ["X", "X"], "expected a list of words, got 'a b'"),
        (TokenClassification(), ["a", None], ["X", "X"], "expected a list of words"),
        (TokenClassification(), ["a"], "X", "expected a list of tags, got 'X'"),
        (SequenceClassification(), "a", ["X"], "expected one class"),
        (ImageClassification(), "a.png", "X", "expected an image, got 'a.png'"),
    ],
)
def test_a_row_of_another_kind_is_named(
    task: Task, cell: object, label: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        task.checked(cell, label)


@pytest.mark.parametrize("tags", [None, [], ["X", None]])
def test_words_without_a_tag_for_each_have_no_label(tags: object) -> None:
    assert TokenClassification().checked(["a", "b"], tags) is None
    assert TokenClassification().checked(["a", "b"], ["X", "Y"]) == ["X", "Y"]


def test_the_file_and_the_row_are_named(tmp_path: Path) -> None:
    lines = [{"tokens": ["a", "b"], "tags": tags} for tags in (["X", "Y"], ["X"])]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError, match=r"a.jsonl', row 2: it has 2 words and 1 tags"):
        load_domain(DomainFiles(str(tmp_path / "a.jsonl")), TokenClassification())


@pytest.mark.parametrize("has_labels", [True, False])
def test_words_of_another_domain(tmp_path: Path, model_dir: Path, has_labels: bool) -> None:
    files = {}
    for domain in ("film", "phone"):
        lines = []
        for i in range(40):
            words = [WORDS[i % 4], domain, WORDS[8 + i % 6], WORDS[8 + i // 20]]
            row = {"tokens": words, "tags": ["ADJ", "NOUN", "X", "X"]}
            if domain == "phone" and not has_labels:
                del row["tags"]
            lines.append(json.dumps(row))
        files[domain] = tmp_path / f"{domain}.jsonl"
        files[domain].write_text("\n".join(lines))
    config = tmp_path / "config.yaml"
    config.write_text(
        f"data: {{film: {files['film']}, phone: {files['phone']}}}\npairs: [[film, phone]]\n"
        f"model: {model_dir}\ntask: token-classification\nseeds: 1\nsave_models: true\n"
        "methods: {source only: [], MMD: [MMD]}\ntraining: {max_steps: 2}\n"
    )
    run(str(config), "--output-dir", str(tmp_path / "out"))
    for line in results(tmp_path / "out"):
        assert line["error"] == "" and (line["target_accuracy"] != "") == has_labels
        assert set(json.loads(line["target_predicted_shares"])) == {"ADJ", "NOUN", "X"}
        BertForTokenClassification.from_pretrained(line["model"])
        if has_labels:
            true = json.loads(line["target_true_shares"])
            assert true == pytest.approx({"ADJ": 0.25, "NOUN": 0.25, "X": 0.5})


def test_images_of_another_domain(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ViTForImageClassification(vit_config(image_size=8, patch_size=4, num_channels=3))
    model.save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    generator = np.random.default_rng(0)
    names = ["dark", "light"]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    for domain, shift in (("a", 0), ("b", 40)):
        images, labels = [], []
        for i in range(24):
            low = 10 + shift + 120 * (i % 2)
            images.append(generator.integers(low, low + 60, (8, 8, 3), dtype=np.uint8))
            labels.append(i % 2)
        columns = {"image": images, "label": labels}
        Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"{domain}.parquet")
    config = tmp_path / "config.yaml"
    config.write_text(
        "data: {a: a.parquet, b: b.parquet}\npairs: [[a, b]]\nmodel: vit\nseeds: 1\n"
        "task: image-classification\nsave_models: true\nmethods: {source only: [], MMD: [MMD]}\n"
        "training: {num_train_epochs: 20, learning_rate: 3.0e-3}\n"
    )
    out = str(tmp_path / "out")
    run(str(config), "--output-dir", out)
    lines = results(tmp_path / "out")
    assert [line["error"] for line in lines] == ["", ""]
    assert float(lines[0]["source_accuracy"]) == 1.0
    assert "2 of 2 runs are kept" in run(str(config), "--output-dir", out)
    one, other = (load_file(Path(line["model"], "model.safetensors")) for line in lines)
    assert any(not one[name].equal(other[name]) for name in one)
