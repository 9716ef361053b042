"""The distillation of language models, run as a person runs it: tiny models, no network."""

import json

import datasets
import distil_causal_lm
import pytest
import sequence_level_distillation

from tests.helpers.word_classifier import WORDS

TEXTS = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 15)) for i in range(1, 30)]


@pytest.fixture
def command(llama_dir, tmp_path, monkeypatch):
    """Options for a tiny Llama."""
    for module in (distil_causal_lm, sequence_level_distillation):
        monkeypatch.setattr(module, "texts_of", lambda domain, split: TEXTS)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    options = {
        "--model_name_or_path": str(llama_dir),
        "--student_layers": "2",
        "--output_dir": str(tmp_path / "out"),
        "--max_steps": "2",
        "--use_cpu": "true",
    }
    return [part for option in options.items() for part in option]


def test_half_the_layers_are_distilled_and_memory_is_measured(command, tmp_path):
    distil_causal_lm.main([*command, "--block_size", "8", "--memory_rows", "4"])
    out = tmp_path / "out"
    document = json.loads((out / "results.json").read_text())
    models = document["models"]
    assert list(models) == list(distil_causal_lm.MODELS)
    assert [found["layers"] for found in models.values()] == [4, 2, 2, 2]
    assert all(found["movies"] > 1 and found["nyt"] > 1 for found in models.values())
    # Both were trained, and not in the same way.
    assert len({models[name]["movies"] for name in ("before", "cross_entropy", "distilled")}) == 3
    assert list(document["memory"]) == ["whole logits", "chunked"]
    assert "| student, distilled | 2 |" in (out / "table.md").read_text()
    assert (out / "perplexity.png").stat().st_size > 10_000


def test_rows_hold_every_text_with_an_end_between(command):
    tokenizer = distil_causal_lm.AutoTokenizer.from_pretrained(command[1])
    rows = distil_causal_lm.blocks(["good film", "bad plot", "the end"], tokenizer, 4)
    assert tokenizer.decode(rows[0]["input_ids"]) == "good film <end> bad"
    assert len(rows) == 2 and rows[1]["labels"] == rows[1]["input_ids"]


def test_the_student_learns_what_the_teacher_wrote(command, tmp_path):
    small = ["--num_prompts", "12", "--num_test", "6", "--prompt_tokens", "3", "--new_tokens", "5"]
    sequence_level_distillation.main([*command, *small, "--per_device_train_batch_size", "4"])
    out = tmp_path / "out"
    models = json.loads((out / "results.json").read_text())["models"]
    assert list(models) == list(sequence_level_distillation.MODELS)
    assert all(found["teacher's text"] > 1 for found in models.values())
    assert len({found["teacher's text"] for found in models.values()}) == 4
    assert all(0 <= found["agreement"] <= 1 for found in models.values())
    assert (out / "perplexity.png").stat().st_size > 10_000


def test_only_continuations_are_learnt():
    rows = sequence_level_distillation.dataset_of([[5, 6, 7, 8]], prompt_tokens=2)
    assert rows[0] == {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}
