"""Tiny models of many families, and random mentions for them."""

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_adapt.knowledge.injection.injector import KnowledgeInjector
from hf_adapt.knowledge.injection.inputs import Knowledge

VOCABULARY = 64
SIZE = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
TOKENS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
DIMENSION, RELATIONS = 6, 3


def _bert() -> Any:
    return BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, **SIZE, **NO_DROPOUT))


def _bert_tokens() -> Any:
    return BertForTokenClassification(BertConfig(vocab_size=VOCABULARY, **SIZE, **NO_DROPOUT))


def _bert_masked() -> Any:
    return BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **SIZE, **NO_DROPOUT))


def _bert_answers() -> Any:
    return BertForQuestionAnswering(BertConfig(vocab_size=VOCABULARY, **SIZE, **NO_DROPOUT))


def _modernbert() -> Any:
    config = ModernBertConfig(
        vocab_size=VOCABULARY, **SIZE, **TOKENS, cls_token_id=2, sep_token_id=3
    )
    return ModernBertForSequenceClassification(config)


def _roberta() -> Any:
    config = RobertaConfig(vocab_size=VOCABULARY, **SIZE, **NO_DROPOUT, **TOKENS)
    return RobertaForSequenceClassification(config)


def _deberta() -> Any:
    config = DebertaV2Config(
        vocab_size=VOCABULARY,
        **SIZE,
        **NO_DROPOUT,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
    )
    return DebertaV2ForSequenceClassification(config)


def _gpt2() -> Any:
    dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    size = dict(vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=2, n_head=2)
    return GPT2LMHeadModel(GPT2Config(**size, **dropout, **TOKENS))


def _llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **SIZE, **TOKENS))


def _llama_rows() -> Any:
    return LlamaForSequenceClassification(LlamaConfig(vocab_size=VOCABULARY, **SIZE, **TOKENS))


def _t5() -> Any:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    )
    return T5ForConditionalGeneration(config)


def _bart() -> Any:
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
        dropout=0.0,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        **TOKENS,
    )
    return BartForConditionalGeneration(config)


def _lora() -> Any:
    return get_peft_model(_bert(), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))


def _lora_llama() -> Any:
    return get_peft_model(_llama(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))


MODELS: dict[str, Callable[[], Any]] = {
    "bert": _bert,
    "bert_tokens": _bert_tokens,
    "bert_masked": _bert_masked,
    "bert_answers": _bert_answers,
    "modernbert": _modernbert,
    "roberta": _roberta,
    "deberta": _deberta,
    "gpt2": _gpt2,
    "llama": _llama,
    "llama_rows": _llama_rows,
    "t5": _t5,
    "bart": _bart,
    "lora": _lora,
    "lora_llama": _lora_llama,
}
CAUSAL = ("gpt2", "llama", "lora_llama")
GENERATING = (*CAUSAL, "t5", "bart")
ROWS = ("bert", "modernbert", "roberta", "deberta", "llama_rows", "lora")
"""Models with a label for each row."""


def made(name: str, seed: int = 0) -> Any:
    """A model with reproducible weights, in evaluation mode."""
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    with torch.no_grad():  # the usual 0.02 would hide what a few layers do
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model


def inputs(name: str, rows: int = 3, length: int = 10, seed: int = 1) -> dict[str, torch.Tensor]:
    """Rows of tokens with labels; the last row is shorter."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    ids[-1, length - 2 :], mask[-1, length - 2 :] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    if name in ROWS:
        labels = torch.arange(rows) % 2
    if name == "bert_tokens":
        labels = (ids % 2).masked_fill(mask == 0, -100)
    batch = {"input_ids": ids, "attention_mask": mask}
    if name == "bert_answers":
        first = torch.arange(rows) + 1
        return {**batch, "start_positions": first, "end_positions": first + 1}
    return {**batch, "labels": labels}


def knowledge(
    rows: int = 3, seed: int = 2, neighbours: int = 2, mentions: bool = True
) -> dict[str, torch.Tensor]:
    """Mentions in every row but the second: tokens 1 to 3, and 5."""
    generator = torch.Generator().manual_seed(seed)
    spans = torch.tensor([[1, 3], [5, 6]]).repeat(rows, 1, 1)
    entities = torch.randint(0, 9, (rows, 2, 3), generator=generator)
    entities[:, 1, 2] = -1
    priors = torch.rand(rows, 2, 3, generator=generator)
    vectors = torch.randn(rows, 2, 3, DIMENSION, generator=generator)
    near = torch.randn(rows, 2, 3, neighbours, DIMENSION, generator=generator)
    relations = torch.randint(0, 2 * RELATIONS, (rows, 2, 3, neighbours), generator=generator)
    relations[..., -1] = -1
    absent = torch.zeros(rows, dtype=torch.bool)
    absent[1] = True
    if not mentions:
        absent[:] = True
    spans[absent], entities[absent] = 0, -1
    there = entities >= 0
    priors = priors * there
    priors = priors / priors.sum(-1, keepdim=True).clamp(min=1e-9)
    return Knowledge(
        spans,
        entities,
        priors,
        vectors * there.unsqueeze(-1),
        near * there[..., None, None],
        relations.masked_fill(~there.unsqueeze(-1), -1),
    ).inputs()


def built(
    name: str, layers: Any = ("embeddings", 0), form: str = "gated", seed: int = 3, **options: Any
) -> KnowledgeInjector:
    """An injector for a tiny model, with its weights made."""
    torch.manual_seed(seed)
    injector = KnowledgeInjector(list(layers), form, inner_size=8, **options)
    injector.build([16] * len(layers), DIMENSION, RELATIONS, name in CAUSAL)
    return injector


def disturb(injector: KnowledgeInjector, seed: int = 4, scale: float = 0.5) -> None:
    """Make the output projections do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for form in injector.forms:
            form.output.weight.copy_(
                scale * torch.randn(form.output.weight.shape, generator=generator)
            )
