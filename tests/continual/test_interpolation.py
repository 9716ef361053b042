"""Models between two, in memory and on disk."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertModel,
    GPT2LMHeadModel,
    Trainer,
)
from typer.testing import CliRunner

from hf_adapt.cli import app
from hf_adapt.continual import interpolate, interpolation_sweep, plot_sweep
from hf_adapt.continual.matching import shared_weights
from hf_adapt.continual.merging import Merge, mean
from hf_adapt.models.averages import blend
from tests.helpers.data import collate, rows
from tests.helpers.distillation import tokenizer
from tests.helpers.models import bert, bert_config, gpt2_config
from tests.helpers.trainers import arguments, same_bits, weights

RUNNER = CliRunner()
LABELS = {"num_labels": 2, "id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
SPAM = {"num_labels": 2, "id2label": {0: "ham", 1: "spam"}, "label2id": {"ham": 0, "spam": 1}}


def between(
    start: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor], alpha: float
) -> dict[str, torch.Tensor]:
    return {n: ((1 - alpha) * start[n].double() + alpha * tuned[n].double()) for n in tuned}


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.allclose(one[name].double(), other[name].double(), atol=1e-7), name


# ---- in memory ----


def test_at_both_ends_bit_for_bit_and_between() -> None:
    start, tuned = bert(seed=1), bert(seed=2)
    before = weights(start), weights(tuned)
    first, middle, last = interpolate(start, tuned, np.array([0, 0.3, 1]))
    assert same_bits(weights(first), before[0]) and same_bits(weights(last), before[1])
    assert_close(weights(middle), between(*before, 0.3))
    assert same_bits(weights(start), before[0]) and same_bits(weights(tuned), before[1])
    assert_close(weights(interpolate(start, tuned, 0.3)), weights(middle))


def test_what_is_equal_stays_equal() -> None:
    """A frozen layer must not move by a rounding error."""
    same = torch.randn(999)
    for alpha in (0.1, 0.3, 0.7):
        assert torch.equal(blend(same, same, alpha), same)
    assert torch.equal(mean([same] * 7), same)


@pytest.mark.parametrize("kind", ["body", "other head", "more labels", "other labels", "old names"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_head_that_the_start_lacks_is_kept(kind: str, on_disk: bool, tmp_path: Path) -> None:
    tuned: Any = bert(seed=2, **LABELS)
    heads: dict[str, Any] = {
        "body": lambda: BertModel(bert_config(), add_pooling_layer=False),
        "other head": lambda: BertForMaskedLM(bert_config()),
        "more labels": lambda: bert(seed=1),
        "other labels": lambda: bert(seed=1, **SPAM),
        "old names": lambda: BertModel(bert_config()),
    }
    start = heads[kind]()
    for name, each in (("start", start), ("tuned", tuned)):
        if on_disk:
            each.save_pretrained(tmp_path / name)
    if kind == "old names" and on_disk:
        file = tmp_path / "start" / "model.safetensors"
        old = load_file(file)
        for new, name in (("weight", "gamma"), ("bias", "beta")):
            old = {n.replace(f"LayerNorm.{new}", f"LayerNorm.{name}"): v for n, v in old.items()}
        save_file(old, file)
    if on_disk:
        for _ in Merge([tmp_path / "start", tmp_path / "tuned"], 0.0).write(tmp_path / "merged"):
            pass
        merged: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    else:
        merged = interpolate(start, tuned, 0.0)
    base = getattr(start, "bert", start)
    assert same_bits(weights(merged.classifier), weights(tuned.classifier))
    assert same_bits(weights(merged.bert.encoder), weights(base.encoder))
    assert same_bits(weights(merged.bert.embeddings), weights(base.embeddings))
    kept = tuned.bert if getattr(base, "pooler", None) is None else base
    assert same_bits(weights(merged.bert.pooler), weights(kept.pooler))
    assert merged.config.id2label == tuned.config.id2label


def test_tied_weights_buffers_and_low_precision() -> None:
    class Net(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2).bfloat16()
            self.one = self.two = nn.Parameter(torch.full((2,), value, dtype=torch.bfloat16))
            self.norm.running_mean.fill_(value)
            self.norm.num_batches_tracked.fill_(int(value))

    made: Any = interpolate(Net(1.0), Net(2.0), 0.25)
    assert made.one is made.two and made.one.tolist() == [1.25] * 2
    assert made.one.dtype == torch.bfloat16
    assert made.norm.running_mean.tolist() == [1.25] * 2
    assert int(made.norm.num_batches_tracked) == 2, "counters are the tuned model's"

    torch.manual_seed(0)
    start, tuned = (GPT2LMHeadModel(gpt2_config()) for _ in range(2))
    merged = interpolate(start, tuned, 0.5)
    assert merged.lm_head.weight is merged.transformer.wte.weight
    assert_close(weights(merged), between(weights(start), weights(tuned), 0.5))


def test_folders(tmp_path: Path) -> None:
    start, tuned = bert(seed=1).to(torch.bfloat16), bert(seed=2).to(torch.bfloat16)
    start.save_pretrained(tmp_path / "start")
    tuned.save_pretrained(tmp_path / "tuned")
    made = interpolate(str(tmp_path / "start"), tmp_path / "tuned", 0.5)
    assert same_bits(weights(made), weights(interpolate(start, tuned, 0.5)))


def peft_model() -> Any:
    return get_peft_model(bert(), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))


def quantised() -> Any:
    model = bert()
    model.classifier.weight = nn.Parameter(torch.zeros(3, 16, dtype=torch.uint8), False)
    return model


@pytest.mark.parametrize(
    ("start", "alpha", "expected"),
    [
        (lambda: bert(num_hidden_layers=1), 0.5, r"different architectures: bert.encoder.layer.1"),
        (lambda: bert(num_hidden_layers=3), 0.5, r"encoder.layer.2\S+ \(\(16, 16\), none\)"),
        (lambda: bert(hidden_size=32), 0.5, r"word_embeddings.weight \(\(64, 32\), \(64, 16\)\)"),
        (lambda: GPT2LMHeadModel(gpt2_config()), 0.5, "no module of the base model"),
        (peft_model, 0.5, "has adapters.*merge_and_unload"),
        (quantised, 0.5, "classifier.weight is torch.uint8: quantised"),
        (bert, 1.5, "alpha=1.5 must lie from 0"),
        (bert, [0.5, -1], "alpha=-1.0 must lie from 0"),
        (lambda: "no such folder", 0.5, "There is no folder no such folder"),
    ],
)
def test_what_cannot_be_blended(start: Any, alpha: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        interpolate(start(), bert(), alpha)


def test_merged_adapters_are_weights() -> None:
    """Some releases of PEFT leave `peft_config` on the model."""
    tuned = peft_model()
    for name, factor in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.ones_(factor)
    merged = tuned.merge_and_unload()
    merged.peft_config = {"default": LoraConfig()}
    half = interpolate(bert(), merged, 0.5)
    query = [m.bert.encoder.layer[0].attention.self.query.weight for m in (bert(), half, merged)]
    torch.testing.assert_close(query[1], (query[0] + query[2]) / 2)
    assert not torch.equal(query[0], query[2])


def test_no_names_in_common() -> None:
    with pytest.raises(ValueError, match="no module of the base model has the same name"):
        shared_weights({"a.weight": (1,)}, {"b.weight": (1,)})


# ---- a sweep ----


def test_a_sweep_with_a_trainer(tmp_path: Path) -> None:
    start, tuned = bert(seed=1), bert(seed=2, dropout=True)
    tasks = {"movies": rows(6, 1), "tweets": rows(7, 2)}
    trainer = Trainer(tuned, arguments(tmp_path), eval_dataset=tasks, data_collator=collate)
    before = weights(tuned)
    tuned.train()
    seen: list[Any] = []

    def evaluate(model: Any) -> dict[str, float]:
        assert not model.training
        seen.append(model)
        found: dict[str, float] = trainer.evaluate()
        return {name: value for name, value in found.items() if name.endswith("loss")}

    sweep = interpolation_sweep(start, tuned, [0.0, 0.5, 1.0], evaluate)
    assert [row["alpha"] for row in sweep] == [0.0, 0.5, 1.0]
    assert set(map(id, seen)) == {id(tuned)} and tuned.training
    assert same_bits(weights(tuned), before)
    for row in sweep:
        trainer.model.load_state_dict(interpolate(start, bert(seed=2), row["alpha"]).state_dict())
        assert trainer.evaluate()["eval_movies_loss"] == row["eval_movies_loss"]

    axes = plot_sweep(sweep, "eval_movies_loss", "eval_tweets_loss").axes[0]
    assert [text.get_text() for text in axes.texts] == ["0", "0.5", "1"]
    assert axes.lines[0].get_xdata().tolist() == [row["eval_movies_loss"] for row in sweep]
    with pytest.raises(ValueError, match="has no accuracy; it has alpha, eval_movies_loss"):
        plot_sweep(sweep, "accuracy", "eval_movies_loss")


def test_an_evaluation_that_fails_leaves_the_model_as_it_was() -> None:
    tuned = bert(seed=2)
    before = weights(tuned)
    with pytest.raises(ZeroDivisionError):
        interpolation_sweep(bert(seed=1), tuned, [0.5], lambda model: {"x": 1 / 0})
    assert same_bits(weights(tuned), before)


# ---- the command ----


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Two models, one of them sharded, with what a run leaves beside them."""
    bert(seed=1).save_pretrained(tmp_path / "start")
    bert(seed=2).save_pretrained(tmp_path / "tuned", max_shard_size="10KB")
    tokenizer().save_pretrained(tmp_path / "tuned")
    for name in ("optimizer.pt", "trainer_state.json", "README.md", "adaptation.safetensors"):
        (tmp_path / "tuned" / name).write_text("{}")
    (tmp_path / "tuned" / "checkpoint-1").mkdir()
    return tmp_path


def run(*command: str) -> str:
    done = RUNNER.invoke(app, ["merge", *command])
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def test_the_command_blends_sharded_and_single_files(saved: Path) -> None:
    names = str(saved / "start"), str(saved / "tuned")
    output = run(*names, "--alpha", "0.3", "-o", str(saved / "merged"))
    assert "weights merged" in output and "Kept" not in output
    merged = AutoModelForSequenceClassification.from_pretrained(saved / "merged")
    assert same_bits(weights(merged), weights(interpolate(bert(seed=1), bert(seed=2), 0.3)))
    found = {file.name for file in (saved / "merged").iterdir()}
    beside = {f.name for f in (saved / "tuned").iterdir() if f.is_file()}
    assert beside - found == {
        "optimizer.pt",
        "trainer_state.json",
        "README.md",
        "adaptation.safetensors",
    }
    assert len([name for name in found if name.startswith("model-")]) > 1
    assert {file.name for file in saved.iterdir()} == {"start", "tuned", "merged"}


@pytest.mark.parametrize(("alpha", "same"), [("0", "start"), ("1", "tuned")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_command_bit_for_bit(alpha: str, same: str, dtype: Any, tmp_path: Path) -> None:
    models = {"start": bert(seed=1).to(dtype), "tuned": bert(seed=2).to(dtype)}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    names = [str(tmp_path / name) for name in models]
    (tmp_path / "merged").mkdir()
    run(*names, "--alpha", alpha, "-o", str(tmp_path / "merged"))
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=dtype)
    assert same_bits(weights(merged), weights(models[same]))


def test_the_command_takes_the_mean_of_several(tmp_path: Path) -> None:
    models = [bert(seed=seed) for seed in range(3)]
    for seed, model in enumerate(models):
        model.save_pretrained(tmp_path / str(seed))
    run(
        *(str(tmp_path / str(s)) for s in range(3)),
        "--average",
        "-o",
        str(tmp_path / "m"),
    )
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    states = [weights(model) for model in models]
    assert_close(weights(merged), {n: sum(s[n].double() for s in states) / 3 for n in states[0]})
    bert(num_labels=2).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"do not share classifier.bias, classifier.weight"):
        Merge([tmp_path / "other", tmp_path / "0"])


def test_the_command_says_what_it_kept(tmp_path: Path) -> None:
    BertModel(bert_config()).save_pretrained(tmp_path / "start")
    bert().save_pretrained(tmp_path / "tuned")
    names = str(tmp_path / "start"), str(tmp_path / "tuned")
    output = run(*names, "--alpha", "0.5", "-o", str(tmp_path / "merged"))
    assert "tuned: classifier.bias, classifier.weight." in output


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["{start}", "{tuned}"], "Pass --alpha"),
        (["{start}", "{tuned}", "--alpha", "0.5", "--average"], "Pass --alpha"),
        (["{start}", "--alpha", "0.5"], "blends two models, START and TUNED; got 1"),
        (["{start}", "--average"], "two models or more, got 1"),
        (["{start}", "{tuned}", "--alpha", "2"], "alpha=2.0 must lie from 0"),
        (["{start}", "no such folder", "--alpha", "0.5"], "There is no folder no such folder"),
        (["{start}", "{adapter}", "--alpha", "0.5"], "has adapters (PEFT)"),
        (["{start}", "{empty}", "--alpha", "0.5"], "has no model.safetensors"),
        (["{start}", "{tuned}", "--alpha", "0.5", "-o", "{start}"], "exists and is not empty"),
    ],
)
def test_the_command_refuses(command: list[str], expected: str, saved: Path) -> None:
    peft_model().save_pretrained(saved / "adapter")
    (saved / "empty").mkdir()
    names = {name: str(saved / name) for name in ("start", "tuned", "adapter", "empty")}
    words = [word.format(**names) for word in command]
    if "-o" not in words:
        words += ["-o", str(saved / "merged")]
    done = RUNNER.invoke(app, ["merge", *words])
    assert done.exit_code == 1
    assert expected in " ".join(done.output.split())
    assert not (saved / "merged").exists() and not list(saved.glob("*.part"))


def test_an_interrupted_merge_leaves_nothing(saved: Path) -> None:
    writing = Merge([saved / "start", saved / "tuned"], 0.5).write(saved / "merged")
    next(writing)
    writing.close()
    assert {file.name for file in saved.iterdir()} == {"start", "tuned"}
