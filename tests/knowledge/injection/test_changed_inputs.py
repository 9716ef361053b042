"""Soft prompts and facts as text: they change the input, and nothing else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BartForSequenceClassification,
)

from hf_adapt import DANN, Adaptation, AdaptationCallback, adapt
from hf_adapt.knowledge import (
    EntityLinker,
    KnowledgeInjection,
    KnowledgeInjector,
    TextTriples,
    TokenAligner,
    knowledge_inputs,
    load_knowledge_model,
)
from hf_adapt.knowledge.injection.injector_attachment import InjectorAttachment
from hf_adapt.knowledge.injection.soft_prompt import add_prompt_tokens
from hf_adapt.knowledge.injection.text_triples import (
    VISIBILITY,
    TripleBatcher,
    VisibilityAttachment,
    additive_mask,
    check_visibility,
    first_position,
)
from tests.helpers import toy
from tests.helpers.injectors import trainer
from tests.helpers.models import FIVE, NO_DROPOUT, SIZE, bart_config, family
from tests.helpers.trainers import GradientRecorder, StopAt, cosine_and_ratio, same_bits, weights

needs_masks = pytest.mark.skipif(not FIVE, reason="BERT of transformers 4 takes no 4-D mask")


def prompting(**options: Any) -> KnowledgeInjection:
    injector = KnowledgeInjector(injection_layer="soft_prompt", num_tokens=3, **options)
    return KnowledgeInjection(toy.graph(), toy.vectors(), injector=injector, learning_rate=1e-2)


def batcher(model: Any = None, **options: Any) -> TripleBatcher:
    aligner = TokenAligner(EntityLinker(toy.graph()), toy.tokenizer())
    first = 0 if model is None else first_position(model)
    return TripleBatcher(toy.graph(), aligner, first_position=first, **options)


# ---- soft prompts ----


@pytest.mark.parametrize("left", [False, True])
def test_prompt_tokens_stand_before_the_text(left: bool) -> None:
    ids = torch.tensor([[0, 0, 7, 8], [5, 6, 7, 8]] if left else [[7, 8, 0, 0], [5, 6, 7, 8]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.clone()}
    spans = torch.tensor([[[2, 3], [3, 4]], [[0, 1], [0, 0]]])
    places = add_prompt_tokens(batch, spans, 3, token=9)
    first = [0, 0, 9, 9, 9, 7, 8] if left else [9, 9, 9, 7, 8, 0, 0]
    assert batch["input_ids"].tolist() == [first, [9, 9, 9, 5, 6, 7, 8]]
    mask = [0, 0, 0, 1, 1, 1, 1] if left else [0, 1, 1, 1, 1, 0, 0]
    assert batch["attention_mask"].tolist() == [mask, [0, 0, 1, 1, 1, 1, 1]]
    assert batch["labels"][1].tolist() == [-100] * 3 + [5, 6, 7, 8]
    begin = 3 if left else 1
    assert places[0].tolist() == [[begin, begin + 1], [begin + 1, begin + 2]]
    assert places[1].tolist() == [[2, 3], [0, 0]]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_soft_prompt_trains_and_generates(name: str, tmp_path: Path) -> None:
    one = trainer(tmp_path, name, max_steps=4)
    own = prompting()
    adapt(one, own).train()
    one.save_model(str(tmp_path / "final"))
    model = load_knowledge_model(tmp_path / "final")
    inputs = knowledge_inputs(model, ["w0 w20 w1 w2"])
    assert inputs["input_ids"].shape[1] == len(toy.tokenizer()("w0 w20 w1 w2")["input_ids"]) + 3
    settings: dict[str, Any] = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    cached = model.generate(**inputs, **settings)
    assert torch.equal(cached, model.generate(**inputs, **settings, use_cache=False))
    # What the prompt's tokens are called does not matter: their embeddings are the entities'.
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][:, 1:3] = 40
    torch.testing.assert_close(model(**other).logits, model(**inputs).logits)
    changed = {**inputs, "knowledge_vectors": -inputs["knowledge_vectors"]}
    assert not torch.allclose(model(**changed).logits, model(**inputs).logits, atol=1e-5)


def gradients_of_batches(
    folder: Path, model: str, made: Callable[[], Adaptation]
) -> list[torch.Tensor]:
    """The first gradient of one micro-batch of eight rows, and of eight of one."""
    found = []
    for rows, steps in ((8, 1), (1, 8)):
        one = trainer(
            folder,
            model,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=steps,
            max_grad_norm=0.0,
        )
        recorder = GradientRecorder()
        one.add_callback(recorder)
        adapt(one, made()).train()
        found.append(recorder.gradients[0])
    return found


def test_soft_prompts_of_any_batch_are_the_same(tmp_path: Path) -> None:
    found = gradients_of_batches(tmp_path, "llama", prompting)
    cosine, ratio = cosine_and_ratio(*found)
    assert cosine == pytest.approx(1, abs=1e-4) and ratio == pytest.approx(1, abs=1e-3)


def test_soft_prompts_resume(tmp_path: Path) -> None:
    def run(folder: Path, stop: bool = False, **more: Any) -> Any:
        one = trainer(folder, "llama", save_strategy="steps", save_steps=2, max_steps=4)
        own = prompting()
        if stop:
            one.add_callback(StopAt(3))
        adapt(one, own).train(**more)
        return weights(one.model), weights(own.module)

    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", stop=True)
    resumed = run(
        tmp_path / "parts", resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2")
    )
    assert all(same_bits(a, b) for a, b in zip(whole, resumed, strict=True))


# ---- facts as text ----


def test_facts_are_seen_by_their_mention_alone() -> None:
    batch = batcher(num_triples=1).encode(["w20 w0 w21"])
    # [CLS] w20 w0 w21 [SEP] + "part of w1 w2", of which "part" and "of" are no words here
    assert batch["input_ids"].tolist()[0][:5] == [2, 25, 5, 26, 3]
    assert batch["input_ids"].tolist()[0][5:] == [1, 1, 6, 7]
    assert batch["position_ids"].tolist()[0] == [0, 1, 2, 3, 4, 3, 4, 5, 6]
    visible = batch[VISIBILITY][0]
    assert visible[:5, :5].all() and visible[5:, 5:].all()
    assert visible[2, 5:].all() and visible[5:, 2].all()
    others = [0, 1, 3, 4]
    assert not visible[others][:, 5:].any() and not visible[5:][:, others].any()


@needs_masks
@pytest.mark.parametrize("name", ["bert", "roberta", "bert_tokens"])
def test_facts_reach_their_mention_alone(name: str) -> None:
    model = family(name)
    check_visibility(model)
    own_batcher = batcher(model)
    VisibilityAttachment(model, own_batcher)
    text = "w20 w0 w21"
    batch: dict[str, Any] = dict(toy.tokenizer()([text], return_tensors="pt"))
    batch.pop("token_type_ids", None)
    plain = model.base_model(**batch).last_hidden_state[0]
    own: dict[str, Any] = own_batcher.encode([text])
    own.pop("token_type_ids", None)
    own["output_hidden_states"] = True
    first = model(**own).hidden_states[1][0, :5]
    before = model(**batch, output_hidden_states=True).hidden_states[1][0]
    others = [0, 1, 3, 4]
    torch.testing.assert_close(first[others], before[others])
    assert not torch.allclose(first[2], before[2], atol=1e-4)
    assert plain.shape == (5, 16)


@needs_masks
def test_facts_train_and_are_loaded(tmp_path: Path) -> None:
    one = trainer(tmp_path, "bert_tokens", max_steps=3, save_strategy="steps", save_steps=3)
    adapt(one, TextTriples(toy.graph(), num_triples=2)).train()
    assert np_finite(one.evaluate()["eval_loss"])
    one.save_model(str(tmp_path / "final"))
    model = load_knowledge_model(tmp_path / "final")
    one.model.eval()
    inputs = knowledge_inputs(model, ["w0 w20", "w30"])
    torch.testing.assert_close(model(**inputs).logits, one.model(**inputs).logits)


@needs_masks
def test_facts_as_any_adaptation(tmp_path: Path) -> None:
    """By a callback, and beside another adaptation with rows of its own."""
    one = trainer(tmp_path, "bert", max_steps=3)
    own = TextTriples(toy.graph())
    target = toy.rows(12, 7).remove_columns("labels")
    one.add_callback(AdaptationCallback(own, DANN(hidden_sizes=(8,)), target_dataset=target))
    one.train()
    assert np_finite(one.state.log_history[0]["loss/dann"])
    assert VISIBILITY in next(iter(one.get_eval_dataloader()))
    assert [m.surface for m in own.explain("w0 w4").mentions] == ["w0", "w4"]
    with pytest.raises(ValueError, match="has an injector already"):
        InjectorAttachment(one.model, KnowledgeInjector())
    own.detach()
    assert "forward" not in vars(one.model)


def np_finite(value: float) -> bool:
    return value == value and abs(value) < 1e9


@needs_masks
def test_facts_of_any_batch_are_the_same(tmp_path: Path) -> None:
    found = gradients_of_batches(tmp_path, "bert", lambda: TextTriples(toy.graph()))
    cosine, ratio = cosine_and_ratio(*found)
    assert cosine == pytest.approx(1, abs=1e-4) and ratio == pytest.approx(1, abs=1e-3)


def bart() -> Any:
    return BartForSequenceClassification(bart_config(encoder_layers=1, decoder_layers=1))


@pytest.mark.parametrize("name", ["deberta", "t5", "llama", "bart"])
def test_models_that_cannot_are_told(name: str, tmp_path: Path) -> None:
    model = bart() if name == "bart" else family(name)
    with pytest.raises(ValueError, match="TextTriples"):
        check_visibility(model)


@needs_masks
def test_albert_can() -> None:
    size = {**SIZE, "embedding_size": 8}
    check_visibility(AlbertForSequenceClassification(AlbertConfig(vocab_size=64, **size,
                                                                  **NO_DROPOUT)))  # fmt: skip


def test_masks_are_of_numbers() -> None:
    mask = additive_mask(torch.tensor([[[True, False]]]), torch.float16)
    assert mask.dtype == torch.float16 and mask.shape == (1, 1, 1, 2)
    assert mask[0, 0, 0, 0] == 0 and torch.isfinite(mask).all() and mask[0, 0, 0, 1] < -6e4


def test_options_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="changes the input: layers must be 'embeddings'"):
        KnowledgeInjector(2, "soft_prompt")
    with pytest.raises(ValueError, match="num_triples=0"):
        TextTriples(toy.graph(), num_triples=0)
