"""The example of tags, run as a person runs it: a tiny model, a few sentences, no network."""

from pathlib import Path

import adapt_tags
import datasets
import pytest
from transformers import AutoModelForTokenClassification, AutoTokenizer, BertConfig, BertModel

from tests.helpers.word_classifier import WORDS, save_tiny_model


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two genres of 24 sentences, in which each word has a tag of its own."""

    def write_domain(name: str) -> Path:
        start = len(name)
        tokens = [[WORDS[(start + i * j) % 12] for j in range(1, 6)] for i in range(24)]
        tags = [[adapt_tags.TAGS[WORDS.index(word) % 11] for word in row] for row in tokens]
        path = tmp_path / f"{name}.parquet"
        datasets.Dataset.from_dict({"tokens": tokens, "tags": tags}).to_parquet(path)
        return path

    monkeypatch.setattr(adapt_tags, "write_domain", write_domain)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    (tmp_path / "model").mkdir()
    folder = save_tiny_model(tmp_path / "model")
    BertModel(BertConfig.from_pretrained(folder)).save_pretrained(folder)  # without a head
    given = {
        "--model_name_or_path": str(folder),
        "--output_dir": str(tmp_path / "out"),
        "--num_train": "16",
        "--num_test": "8",
        "--max_steps": "2",
        "--use_cpu": "true",
    }
    return [part for option in given.items() for part in option]


def test_both_models_are_tested_and_the_adapted_one_is_kept(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapt_tags.main(options)
    printed = capsys.readouterr().out
    assert "without:" in printed and f"with {adapt_tags.ExampleArguments.method}:" in printed
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label[6] == "NOUN"


def test_the_first_token_of_a_word_has_its_tag(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_model(tmp_path))
    tokenizer.add_tokens(["!"])
    rows = adapt_tags.tokenized({"tokens": [["good!", "film"]], "tags": [[3, 6]]}, tokenizer, 8)
    assert rows["labels"] == [[-100, 3, -100, 6, -100]]
