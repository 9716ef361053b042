"""Tiny random models made from configs: no network, no files, milliseconds a step."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
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
    ViTConfig,
)

FIVE = int(transformers.__version__.split(".")[0]) >= 5
"""Some of what the plain Trainer gets wrong in 4.57 (resume, counting) is right from 5.0 on."""
VOCABULARY = 64
SIZE = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
TOKENS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)


def bert(head: str = "sequence", dropout: bool = False, seed: int = 0, **config: Any) -> Any:
    """A two-layer BERT with a classification head over rows or tokens."""
    torch.manual_seed(seed)
    chosen = {**SIZE, **({} if dropout else NO_DROPOUT), "num_labels": 3, **config}
    settings = BertConfig(vocab_size=VOCABULARY, **chosen)
    classes = {"sequence": BertForSequenceClassification, "token": BertForTokenClassification}
    return classes[head](settings)


def bert_config(**settings: Any) -> BertConfig:
    """Two layers without dropout."""
    return BertConfig(vocab_size=VOCABULARY, **{**SIZE, **NO_DROPOUT, **settings})


def llama(seed: int = 0) -> LlamaForCausalLM:
    """A two-layer LLaMA, which has no dropout."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config())


def llama_config(**settings: Any) -> LlamaConfig:
    """Two layers."""
    return LlamaConfig(**{"vocab_size": VOCABULARY, **SIZE, **TOKENS, **settings})


def gpt2_config(**settings: Any) -> GPT2Config:
    """Two layers without dropout."""
    size = dict(vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=2, n_head=2)
    dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return GPT2Config(**{**size, **dropout, **TOKENS, **settings})


def t5_config(**settings: Any) -> T5Config:
    """Two layers in the encoder and in the decoder, without dropout."""
    size = dict(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    tokens = dict(decoder_start_token_id=0, pad_token_id=0, eos_token_id=2)
    return T5Config(**{**size, **tokens, "dropout_rate": 0.0, **settings})


def bart_config(**settings: Any) -> BartConfig:
    """Two layers in the encoder and in the decoder, without dropout."""
    defaults = dict(
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
    return BartConfig(**{**defaults, **settings})


def vit_config(**settings: Any) -> ViTConfig:
    """Two layers over four patches, without dropout."""
    size = dict(image_size=8, patch_size=4, num_labels=3)
    return ViTConfig(**{**size, **SIZE, **NO_DROPOUT, **settings})


# ---- families of models, to be asked for by name ----


def _bert() -> Any:
    return BertForSequenceClassification(bert_config())


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


def _llama() -> Any:
    return LlamaForCausalLM(llama_config())


def _lora() -> Any:
    return get_peft_model(_bert(), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))


def _lora_llama() -> Any:
    return get_peft_model(_llama(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))


MODELS: dict[str, Callable[[], Any]] = {
    "bert": _bert,
    "bert_tokens": lambda: BertForTokenClassification(bert_config()),
    "bert_masked": lambda: BertForMaskedLM(bert_config()),
    "bert_answers": lambda: BertForQuestionAnswering(bert_config()),
    "modernbert": _modernbert,
    "roberta": _roberta,
    "deberta": _deberta,
    "gpt2": lambda: GPT2LMHeadModel(gpt2_config()),
    "llama": _llama,
    "llama_rows": lambda: LlamaForSequenceClassification(llama_config()),
    "t5": lambda: T5ForConditionalGeneration(t5_config()),
    "bart": lambda: BartForConditionalGeneration(bart_config()),
    "lora": _lora,
    "lora_llama": _lora_llama,
}
CAUSAL = ("gpt2", "llama", "lora_llama")
GENERATING = (*CAUSAL, "t5", "bart")
ROWS = ("bert", "modernbert", "roberta", "deberta", "llama_rows", "lora")
"""Models with a label for each row."""


def family(name: str, seed: int = 0) -> Any:
    """A model with reproducible weights, in evaluation mode."""
    torch.manual_seed(seed)
    return enlarged(MODELS[name]().eval(), 5)


def enlarged(model: Any, factor: float) -> Any:
    """The model with larger weights: the usual 0.02 would hide what a few layers do."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(factor)
    return model
