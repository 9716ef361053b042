"""The one-line callback on every kind of model: it trains, logs, evaluates and saves as it should.

Each model is trained for three steps with DANN, MMD and, where it predicts, information
maximisation. What a silent failure would break is compared with the plain model: the task loss is
that of the source rows alone, the saved folder is the plain Trainer's.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartConfig,
    BertConfig,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    DebertaV2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    ResNetConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    Trainer,
    TrainingArguments,
    ViTConfig,
    Wav2Vec2Config,
    default_data_collator,
)

from hf_adapt import DANN, MMD, AdaptationCallback, InformationMaximization
from hf_adapt.engine.streams import Stream
from tests.helpers.models import (
    NO_DROPOUT,
    VOCABULARY,
    bart_config,
    bert_config,
    gpt2_config,
    llama_config,
    t5_config,
    vit_config,
)
from tests.helpers.sounds import wav2vec2_config
from tests.helpers.tokenizers import BERT_SPECIAL, word_tokenizer

STEPS = 3
BATCH = 4


def tokenizer() -> PreTrainedTokenizerFast:
    words = [f"word{i}" for i in range(VOCABULARY - len(BERT_SPECIAL))]
    names = ["input_ids", "attention_mask"]
    return word_tokenizer(words, single=None, eos_token="[SEP]", model_input_names=names)


# ---- rows: the target's words differ from the source's, so a discriminator has what to learn ----


def _ids(i: int, low: int) -> list[int]:
    return [low + (7 * i + 3 * j) % 28 for j in range(4 + i % 5)]


def text_rows(target: bool, label: Callable[[int, list[int]], Any] | None) -> list[dict[str, Any]]:
    rows = []
    for i in range(12):
        ids = _ids(i, 34 if target else 5)
        row: dict[str, Any] = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        if label is not None and not target:
            row["labels"] = label(i, ids)
        rows.append(row)
    return rows


def class_rows(target: bool) -> list[dict[str, Any]]:
    return text_rows(target, lambda i, ids: i % 3)


def token_rows(target: bool) -> list[dict[str, Any]]:
    return text_rows(target, lambda i, ids: [-100] + [t % 3 for t in ids[1:]])


def plain_rows(target: bool) -> list[dict[str, Any]]:
    return text_rows(target, None)


def pair_rows(target: bool) -> list[dict[str, Any]]:
    return text_rows(target, lambda i, ids: ids[:3][::-1])


def image_rows(target: bool) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(int(target))
    pixels = torch.randn(12, 3, 16, 16, generator=generator) + 2 * target
    rows = [{"pixel_values": p.tolist(), "labels": i % 3} for i, p in enumerate(pixels)]
    return [{"pixel_values": r["pixel_values"]} for r in rows] if target else rows


def audio_rows(target: bool) -> list[dict[str, Any]]:
    rows = []
    for i in range(12):
        time = torch.arange(400) / 400
        wave = torch.sin(6.28 * (3 + i) * time) * (2 if target else 1)
        mask = [1] * (400 - 40 * (i % 3)) + [0] * (40 * (i % 3))
        row = {"input_values": wave.tolist(), "attention_mask": mask}
        rows.append(row if target else {**row, "labels": i % 3})
    return rows


# ---- models ----


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TOKENS = {"bos_token_id": 2, "eos_token_id": 3}


def bert() -> BertConfig:
    return bert_config(num_labels=3, **SMALL)


def deberta() -> DebertaV2Config:
    return DebertaV2Config(
        vocab_size=VOCABULARY,
        intermediate_size=16,
        num_labels=3,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        **SMALL,
        **NO_DROPOUT,
    )


def gpt2() -> GPT2Config:
    return gpt2_config(n_layer=1, **TOKENS)


def llama() -> LlamaConfig:
    return llama_config(num_key_value_heads=1, **{**SMALL, **TOKENS})


def t5() -> T5Config:
    return t5_config(d_ff=16, num_layers=1, eos_token_id=3)


def bart() -> BartConfig:
    return bart_config(encoder_layers=1, decoder_layers=1, decoder_start_token_id=3, **TOKENS)


def vit() -> ViTConfig:
    return vit_config(image_size=16, patch_size=8, **SMALL)


def resnet() -> ResNetConfig:
    return ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )


def wav2vec2() -> Wav2Vec2Config:
    return wav2vec2_config(
        intermediate_size=16,
        classifier_proj_size=8,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        feat_proj_dropout=0.0,
        activation_dropout=0.0,
        final_dropout=0.0,
        num_labels=3,
        **SMALL,
    )


@dataclass
class Case:
    """A model with what a script for it would hold."""

    auto: Any
    config: Callable[[], Any]
    rows: Callable[[bool], list[dict[str, Any]]]
    collator: Callable[[], Any] = lambda: DataCollatorWithPadding(tokenizer())
    predicts: bool = True
    trainer: type[Trainer] = Trainer
    arguments: type[TrainingArguments] = TrainingArguments
    options: dict[str, Any] = field(default_factory=dict)
    forward: Any = "joint"
    lora: dict[str, Any] | None = None

    def model(self) -> Any:
        torch.manual_seed(0)
        model = self.auto.from_config(self.config())
        if self.lora is not None:
            model = peft.get_peft_model(
                model, peft.LoraConfig(r=2, lora_alpha=4, lora_dropout=0.0, **self.lora)
            )
        return model

    def make(self, folder: str, model: Any, callbacks: list[Any]) -> Trainer:
        args = self.arguments(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            max_steps=STEPS,
            logging_steps=1,
            learning_rate=1e-2,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **self.options,
        )
        source = Dataset.from_list(self.rows(False))
        return self.trainer(
            model=model,
            args=args,
            train_dataset=source,
            eval_dataset=source.select(range(5)),
            data_collator=self.collator(),
            callbacks=callbacks,
        )


def language_model(mlm: bool) -> Callable[[], Any]:
    return lambda: DataCollatorForLanguageModeling(tokenizer(), mlm=mlm, mlm_probability=0.5)


SEQ2SEQ: dict[str, Any] = {
    "rows": pair_rows,
    "collator": lambda: DataCollatorForSeq2Seq(tokenizer()),
    "predicts": False,  # a decoder has nothing to predict on unlabelled rows
    "trainer": Seq2SeqTrainer,
    "arguments": Seq2SeqTrainingArguments,
    "options": {"predict_with_generate": True, "generation_max_length": 5},
}
IMAGE: dict[str, Any] = {"rows": image_rows, "collator": lambda: default_data_collator}
AUTO_IMAGE = AutoModelForImageClassification
CAUSAL: dict[str, Any] = {"rows": plain_rows, "collator": language_model(mlm=False)}

CASES = {
    "bert-classification": Case(AutoModelForSequenceClassification, bert, class_rows),
    "bert-tokens": Case(
        AutoModelForTokenClassification,
        bert,
        token_rows,
        lambda: DataCollatorForTokenClassification(tokenizer()),
    ),
    "deberta-tokens": Case(
        AutoModelForTokenClassification,
        deberta,
        token_rows,
        lambda: DataCollatorForTokenClassification(tokenizer()),
    ),
    "gpt2-lm": Case(AutoModelForCausalLM, gpt2, **CAUSAL),
    "llama-lm": Case(AutoModelForCausalLM, llama, **CAUSAL),
    "bert-mlm": Case(AutoModelForMaskedLM, bert, plain_rows, language_model(mlm=True)),
    "t5": Case(AutoModelForSeq2SeqLM, t5, **SEQ2SEQ),
    "bart": Case(AutoModelForSeq2SeqLM, bart, **SEQ2SEQ),
    "vit": Case(AUTO_IMAGE, vit, **IMAGE),
    # Batch normalisation couples the rows of a forward: apart, the source's loss is the plain one.
    "resnet": Case(AUTO_IMAGE, resnet, **IMAGE, forward="separate"),
    "wav2vec2": Case(
        AutoModelForAudioClassification, wav2vec2, audio_rows, lambda: default_data_collator
    ),
    "lora-bert": Case(
        AutoModelForSequenceClassification,
        bert,
        class_rows,
        lora={"task_type": "SEQ_CLS", "target_modules": ["query", "value"]},
    ),
    "lora-gpt2": Case(
        AutoModelForCausalLM,
        gpt2,
        **CAUSAL,
        lora={"task_type": "CAUSAL_LM", "target_modules": ["c_attn"], "fan_in_fan_out": True},
    ),
}


class Recorder:
    """Keeps what the model was given in its training forwards, and its features' gradients."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.inputs: list[dict[str, Any]] = []
        model.register_forward_pre_hook(self._hook, with_kwargs=True)

    def _hook(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and module.training:
            self.inputs.append(
                {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
            )


def objectives(case: Case, weight: float = 1.0) -> list[Any]:
    terms: list[Any] = [DANN(ramp=None, hidden_sizes=(8,), weight=weight), MMD(weight=weight)]
    if case.predicts:
        terms.append(InformationMaximization(weight=weight))
    return terms


def callback(case: Case, terms: list[Any]) -> AdaptationCallback:
    target = Dataset.from_list(case.rows(True))
    return AdaptationCallback(*terms, target_dataset=Stream(target, forward=case.forward))


def source_loss(model: torch.nn.Module, inputs: dict[str, Any]) -> float:
    """What the plain model makes of the source rows of a recorded batch."""
    source = {
        key: value[:BATCH] if isinstance(value, torch.Tensor) and value.ndim > 0 else value
        for key, value in inputs.items()
    }
    with torch.no_grad():
        return float(model(**source).loss)


# DeBERTa of transformers 4.57 compiles two functions by torch.jit when it is imported.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", CASES)
def test_trains_logs_evaluates_and_saves(name: str, tmp_path: Any) -> None:
    case = CASES[name]
    model = case.model()
    initial = copy.deepcopy(model)
    recorder = Recorder(model)
    terms = objectives(case)
    trainer = case.make(str(tmp_path / "adapted"), model, [callback(case, terms)])
    discriminator: dict[str, torch.Tensor] = {}
    built = terms[0].build_modules

    def build_and_copy(batch: Any) -> Any:
        module = built(batch)
        discriminator.update(copy.deepcopy(module.state_dict()))
        return module

    terms[0].build_modules = build_and_copy
    trainer.train()

    # Logged, each step.
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == STEPS == trainer.state.global_step
    keys = {"loss/task", "loss/dann", "loss/mmd", "dann/lambda", "dann/domain_accuracy"}
    keys |= {"dann/gradient_ratio", "mmd/gradient_ratio", "dann/module_gradient_norm"}
    if case.predicts:
        keys |= {"loss/information_maximization", "information_maximization/entropy"}
    for entry in logged:
        assert keys <= set(entry)
        assert all(math.isfinite(v) for v in entry.values() if isinstance(v, float))
        assert 0 < entry["dann/gradient_ratio"] < 1
        assert 0 < entry["mmd/gradient_ratio"] < 1

    # The task loss is that of the source rows alone, although the target rows went along.
    joint = case.forward == "joint"
    sizes = [next(v for v in r.values() if isinstance(v, torch.Tensor)) for r in recorder.inputs]
    assert [len(v) for v in sizes] == [2 * BATCH if joint else BATCH] * (
        STEPS if joint else 2 * STEPS
    )
    initial.train()  # batch normalisation uses the batch; there is no dropout
    assert logged[0]["loss/task"] == pytest.approx(
        source_loss(initial, recorder.inputs[0]), rel=2e-5
    )
    if joint and "labels" in recorder.inputs[0]:
        assert bool((recorder.inputs[0]["labels"][BATCH:] == -100).all())
        assert bool((recorder.inputs[0]["labels"][:BATCH] != -100).any())

    # Trained: the discriminator, and of the model what is trainable and nothing else.
    assert discriminator
    for key, value in terms[0].module.state_dict().items():
        assert not torch.equal(value, discriminator[key]), key
    before, after = initial.state_dict(), model.state_dict()
    for key, parameter in model.named_parameters():
        assert torch.equal(before[key], after[key]) or parameter.requires_grad, key
    changed = {k for k, p in model.named_parameters() if not torch.equal(before[k], after[k])}
    assert changed
    if case.lora is not None:
        assert {k for k in changed if "lora_" not in k and "modules_to_save" not in k} == set()
        assert any("lora_" in k for k in changed)
        assert name == "lora-gpt2" or any("modules_to_save" in k for k in changed)

    # Evaluation and prediction see the author's rows, and no term.
    metrics = trainer.evaluate()
    assert math.isfinite(metrics["eval_loss"])
    assert not any("/" in key for key in metrics)
    prediction = trainer.predict(trainer.eval_dataset)
    first = prediction.predictions
    first = first[0] if isinstance(first, tuple) else first
    assert len(first) == 5
    assert not model._forward_hooks, "a feature tap was left on the model"

    # Saved: a plain Hugging Face folder and one file more.
    trainer.save_model()
    plain = case.make(str(tmp_path / "plain"), case.model(), [])
    plain.train()
    if name != "bert-mlm":  # whose random masks depend on the number of rows
        expected = plain.state.log_history[0]["loss"]
        assert logged[0]["loss/task"] == pytest.approx(expected, rel=2e-4)
    plain.save_model()
    files = set(os.listdir(tmp_path / "adapted"))
    assert files == set(os.listdir(tmp_path / "plain")) | {"adaptation.safetensors"}
    loads_plainly(case, str(tmp_path / "adapted"), after)


def loads_plainly(case: Case, folder: str, state: dict[str, torch.Tensor]) -> None:
    """`from_pretrained` gives the trained weights back; pytest makes any warning an error."""
    if case.lora is not None:
        torch.manual_seed(0)
        loaded = peft.PeftModel.from_pretrained(case.auto.from_config(case.config()), folder)
    else:
        loaded, info = case.auto.from_pretrained(folder, output_loading_info=True)
        problems = {k: v for k, v in info.items() if v}
        assert not problems
    for key, value in loaded.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)


@pytest.mark.parametrize(
    "name", ["bert-classification", "bert-tokens", "t5", "resnet", "lora-bert"]
)
def test_the_terms_reach_the_backbone(name: str, tmp_path: Any) -> None:
    """With a task loss of no gradient, the backbone's gradient is the terms' own."""
    case = CASES[name]
    model = case.model()
    terms = objectives(case)
    seen: dict[str, float] = {}

    class OnlyTerms(case.trainer):  # type: ignore[name-defined, misc]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            return (loss[0] * 0.0, *loss[1:]) if isinstance(loss, tuple) else loss * 0.0

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            result = super().training_step(*args, **kwargs)
            for key, parameter in model.named_parameters():
                if parameter.grad is not None:
                    seen[key] = seen.get(key, 0.0) + float(parameter.grad.abs().sum())
            return result

    trainer = copy_case(case, OnlyTerms).make(str(tmp_path), model, [callback(case, terms)])
    trainer.train()
    tap = "classifier" if name != "t5" else "decoder"
    inside = {k: v for k, v in seen.items() if tap not in k and model_trains(model, k)}
    assert sum(v > 0 for v in inside.values()) > len(inside) / 2


def copy_case(case: Case, trainer: type[Trainer]) -> Case:
    case = copy.copy(case)
    case.trainer = trainer
    return case


def model_trains(model: torch.nn.Module, name: str) -> bool:
    return dict(model.named_parameters())[name].requires_grad


def test_token_classification_aligns_tokens(tmp_path: Any) -> None:
    """Pooling `auto` takes each real token as an item for a tagger, each row elsewhere."""
    counts = {}
    for name in ("bert-tokens", "bert-classification"):
        case = CASES[name]
        terms = objectives(case)
        model = case.model()
        recorder = Recorder(model)
        items: list[int] = []
        original = terms[0].loss

        def loss(
            batch: Any, original: Any = original, items: list[int] = items
        ) -> tuple[torch.Tensor, torch.Tensor]:
            total, count = original(batch)
            items.append(int(count))
            return total, count

        terms[0].loss = loss
        case.make(str(tmp_path / name), model, [callback(case, terms)]).train()
        counts[name] = (items[1:], [int(r["attention_mask"].sum()) for r in recorder.inputs])
    tagger, tokens = counts["bert-tokens"]
    assert tagger == tokens
    assert counts["bert-classification"][0] == [2 * BATCH] * STEPS


def test_batch_normalisation_trains_jointly_too(tmp_path: Any) -> None:
    case = copy.copy(CASES["resnet"])
    case.forward = "joint"
    trainer = case.make(str(tmp_path), case.model(), [callback(case, objectives(case))])
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss/task"])


def test_an_encoder_decoder_refuses_predictions_on_unlabelled_rows(tmp_path: Any) -> None:
    case = CASES["t5"]
    terms = [InformationMaximization()]
    trainer = case.make(str(tmp_path), case.model(), [callback(case, terms)])
    with pytest.raises(ValueError, match="decoder of an encoder-decoder"):
        trainer.train()
    assert trainer.state.global_step == 0
