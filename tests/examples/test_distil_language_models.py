"""The distillation of language models, run as a person runs it: tiny models, no network."""

import json

import datasets
import distil_causal_lm
import language_models
import pytest
import sequence_level_distillation
from transformers import AutoModelForCausalLM

from tests.helpers.word_classifier import WORDS

TEXTS = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 15)) for i in range(1, 30)]


@pytest.fixture
def command(llama_dir, tmp_path, monkeypatch):
    """Options for a tiny Llama."""
    for module in (language_models, sequence_level_distillation):
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


def test_half_the_layers_learn_with_the_teacher_and_without(command, tmp_path, capsys):
    distil_causal_lm.main(
        [*command, "--block_size", "8", "--warmup_steps", "0", "--learning_rate", "0.05"]
    )
    printed = capsys.readouterr().out
    models = ("teacher", "student, cross-entropy alone", "student, distilled")
    scores = [printed.split(f"{name}: perplexity of ")[1].splitlines()[0] for name in models]
    assert len(set(scores)) == 3  # both were trained, and not in the same way
    assert all(score.startswith("movies ") and ", nyt " in score for score in scores)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert student.config.num_hidden_layers == 2


def test_the_student_learns_what_the_teacher_wrote(command, tmp_path):
    small = ["--num_prompts", "12", "--num_test", "6", "--prompt_tokens", "3", "--new_tokens", "5"]
    sequence_level_distillation.main([*command, *small, "--per_device_train_batch_size", "4"])
    out = tmp_path / "out"
    models = json.loads((out / "results.json").read_text())["models"]
    assert list(models) == list(sequence_level_distillation.MODELS)
    assert all(found["teacher's text"] > 1 for found in models.values())
    assert len({found["teacher's text"] for found in models.values()}) == 4
    assert all(0 <= found["agreement"] <= 1 for found in models.values())


def test_only_continuations_are_learnt():
    rows = sequence_level_distillation.dataset_of([[5, 6, 7, 8]], prompt_tokens=2)
    assert rows[0] == {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}
