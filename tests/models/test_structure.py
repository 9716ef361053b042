"""The module whose output is a model's feature."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BartForSequenceClassification,
    BertForSequenceClassification,
    GPT2ForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    T5ForConditionalGeneration,
    ViTForImageClassification,
)

from hf_adapt.models.capture import OutputCapture
from hf_adapt.models.pooling import pool, token_mask
from hf_adapt.models.structure import find_feature_module, unwrapped_base
from tests.helpers.models import bart_config, bert, gpt2_config, t5_config, vit_config


def gpt2():
    return GPT2ForSequenceClassification(gpt2_config(n_layer=1))


def t5():
    return T5ForConditionalGeneration(t5_config(num_layers=1))


def bart():
    return BartForSequenceClassification(bart_config(encoder_layers=1, decoder_layers=1))


def vit():
    return ViTForImageClassification(vit_config(num_hidden_layers=1, num_channels=1))


def resnet():
    config = ResNetConfig(
        num_channels=1,
        embedding_size=4,
        hidden_sizes=[4, 8],
        depths=[1, 1],
        layer_type="basic",
    )
    return ResNetForImageClassification(config)


def lora_bert():
    return get_peft_model(bert(), LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2))


TEXT = {
    "input_ids": torch.tensor([[5, 6, 7, 2], [8, 9, 2, 1]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
}
IMAGES = {"pixel_values": torch.zeros(2, 1, 8, 8)}

# The model, the name of the module that is found, its inputs and the hidden state's shape.
MODELS = {
    "bert": (bert, "bert", TEXT, (2, 4, 16)),
    "gpt2": (gpt2, "transformer", TEXT, (2, 4, 16)),
    "t5": (t5, "encoder", {**TEXT, "labels": torch.ones(2, 3).long()}, (2, 4, 16)),
    "bart": (bart, "model.encoder", TEXT, (2, 4, 16)),
    "vit": (vit, "vit", IMAGES, (2, 5, 16)),
    "resnet": (resnet, "resnet", IMAGES, None),
    "lora bert": (lora_bert, "base_model.model.bert", TEXT, (2, 4, 16)),
}


@pytest.mark.parametrize("name", MODELS)
def test_default_feature_is_the_last_hidden_state(name):
    """Of the encoder where there is one; its gradient reaches the model."""
    make, expected, inputs, shape = MODELS[name]
    model = make()
    module = find_feature_module(model, None)
    assert module is model.get_submodule(expected)
    tap = OutputCapture(module)
    tap.record()
    model(**inputs)
    ((hidden, own_mask),) = tap.take()
    if "attention_mask" in inputs:  # its module was called with it
        assert torch.equal(own_mask, inputs["attention_mask"])
    else:
        assert own_mask is None
    if shape is None:
        assert hidden.ndim == 4 and hidden.shape[:2] == (2, 8)
    else:
        assert hidden.shape == shape
    assert hidden.requires_grad
    mask = token_mask(hidden, inputs.get("attention_mask"), model) if hidden.ndim == 3 else None
    assert pool(hidden, mask, "mean").shape == (2, hidden.shape[1 if shape is None else 2])


@pytest.mark.parametrize("make", [bert, lora_bert])
def test_a_layer_is_found_by_its_name(make):
    """A PEFT model is looked through: the name is the base model's."""
    model = make()
    layer = unwrapped_base(model).bert.encoder.layer[0]
    assert find_feature_module(model, "bert.encoder.layer.0") is layer
    if make is lora_bert:
        assert find_feature_module(model, "base_model.model.bert.encoder.layer.0") is layer
        assert isinstance(unwrapped_base(model), BertForSequenceClassification)


@pytest.mark.parametrize("make", [bert, lora_bert])
def test_an_unknown_name_lists_near_names(make):
    with pytest.raises(ValueError, match=r"'bert.encoder.layers.0' is not a module") as error:
        find_feature_module(make(), "bert.encoder.layers.0")
    assert "bert.encoder.layer.0" in str(error.value).split("Near names: ")[1].split(", ")
    assert "BertForSequenceClassification" in str(error.value)
    with pytest.raises(ValueError, match="Near names: none"):
        find_feature_module(make(), "###")


def test_first_module_of_a_sequential_is_the_feature():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert find_feature_module(model, None) is model[0]


def test_a_model_without_a_default_is_refused():
    class Custom(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.classifier = nn.Linear(2, 2), nn.Linear(2, 2)

    with pytest.raises(ValueError, match=r"Custom has no base model.*one of backbone, classifier"):
        find_feature_module(Custom(), None)
    assert isinstance(find_feature_module(Custom(), "backbone"), nn.Linear)
