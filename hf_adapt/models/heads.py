"""The heads of Hugging Face models, in one table by the endings of class names."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from torch import nn

from hf_adapt.models.structure import is_a, is_encoder_decoder, unwrapped_base

HeadName = Literal[
    "sequence_classification",
    "multiple_choice",
    "next_sentence",
    "token_classification",
    "question_answering",
    "masked_lm",
    "causal_lm",
    "conditional_generation",
    "image_classification",
    "audio_classification",
]


class HeadClasses(NamedTuple):
    """The classes of models with a head.

    Attributes:
        endings: Endings of the names of these classes.
        auto_class: The Auto class of transformers that loads these models.
    """

    endings: tuple[str, ...]
    auto_class: str


HEADS: dict[HeadName, HeadClasses] = {
    "sequence_classification": HeadClasses(
        ("ForSequenceClassification",), "AutoModelForSequenceClassification"
    ),
    "multiple_choice": HeadClasses(("ForMultipleChoice",), "AutoModelForMultipleChoice"),
    "next_sentence": HeadClasses(
        ("ForNextSentencePrediction",), "AutoModelForNextSentencePrediction"
    ),
    "token_classification": HeadClasses(
        ("ForTokenClassification",), "AutoModelForTokenClassification"
    ),
    "question_answering": HeadClasses(
        ("ForQuestionAnswering", "ForQuestionAnsweringSimple"), "AutoModelForQuestionAnswering"
    ),
    "masked_lm": HeadClasses(("ForMaskedLM", "ForPreTraining"), "AutoModelForMaskedLM"),
    "causal_lm": HeadClasses(("ForCausalLM", "LMHeadModel"), "AutoModelForCausalLM"),
    "conditional_generation": HeadClasses(("ForConditionalGeneration",), "AutoModelForSeq2SeqLM"),
    "image_classification": HeadClasses(
        ("ForImageClassification",), "AutoModelForImageClassification"
    ),
    "audio_classification": HeadClasses(
        ("ForAudioClassification",), "AutoModelForAudioClassification"
    ),
}


def has_head(model: nn.Module, *heads: HeadName) -> bool:
    """Whether a model, or the class that it is derived from, has one of these heads.

    Example:
        >>> from transformers import BertConfig, BertForMaskedLM
        >>> config = BertConfig(hidden_size=4, num_attention_heads=1, num_hidden_layers=1)
        >>> has_head(BertForMaskedLM(config), "masked_lm"), has_head(nn.Linear(2, 2), "masked_lm")
        (True, False)
    """
    return is_a(model, tuple(ending for head in heads for ending in HEADS[head].endings))


def weights_of_the_head(model: nn.Module) -> list[str]:
    """The parameters of a classification head, which belong to its labels; none of other models.

    The head of a language model is none of them: its labels are the vocabulary.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=4, num_attention_heads=1, num_hidden_layers=1)
        >>> weights_of_the_head(BertForSequenceClassification(config))
        ['classifier.weight', 'classifier.bias']
    """
    base: Any = unwrapped_base(model)
    body = getattr(base, getattr(base, "base_model_prefix", ""), None)
    generates = has_head(model, "masked_lm", "causal_lm", "conditional_generation")
    if generates or not isinstance(body, nn.Module) or body is base:
        return []
    inner = {id(p) for p in body.parameters()}
    return [name for name, p in model.named_parameters() if id(p) not in inner]


def is_causal_lm(model: nn.Module) -> bool:
    """Whether a model predicts each token from those before it."""
    return has_head(model, "causal_lm") and not is_encoder_decoder(model)
