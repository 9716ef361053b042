"""Features of any model: pooling that never sees padding, and the layer that is tapped."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from hf_adapt.models.capture import OutputCapture, hidden_state
from hf_adapt.models.pooling import pool, token_mask
from hf_adapt.models.structure import find_feature_module, unwrapped_base
from tests.helpers.models import VOCABULARY, bert

# ---- pool ----

ROWS = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [6.0, 60.0]], [[5.0, 50.0], [7.0, 70.0], [0, 0]]])
LENGTHS = (3, 2)
POOLED = {
    "mean": [[3.0, 30.0], [6.0, 60.0]],
    "cls": [[1.0, 10.0], [5.0, 50.0]],
    "last": [[6.0, 60.0], [7.0, 70.0]],
    "tokens": [[1.0, 10.0], [2.0, 20.0], [6.0, 60.0], [5.0, 50.0], [7.0, 70.0]],
}


def padded(side, content, width=5):
    """The rows, padded on one side to `width` with `content`, and their mask."""
    hidden = torch.full((2, width, 2), content)
    mask = torch.zeros(2, width, dtype=torch.bool)
    for row, length in enumerate(LENGTHS):
        place = slice(0, length) if side == "right" else slice(width - length, width)
        hidden[row, place] = ROWS[row, :length]
        mask[row, place] = True
    return hidden, mask


@pytest.mark.parametrize("content", [0.0, 1e6, float("inf"), float("nan")])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", POOLED)
def test_padding_does_not_matter(pooling, side, content):
    """Neither where it is nor what is in it: a masked position may hold anything, also NaN."""
    hidden, mask = padded(side, content)
    hidden.requires_grad_()
    pooled = pool(hidden, mask, pooling)
    assert pooled.tolist() == POOLED[pooling]
    pooled.sum().backward()
    assert torch.isfinite(hidden.grad).all() and (hidden.grad[~mask] == 0).all()


@pytest.mark.parametrize("pooling", POOLED)
def test_a_mask_with_holes_counts_real_positions_only(pooling):
    hidden = torch.arange(5.0).view(1, 5, 1)
    mask = torch.tensor([[False, True, False, True, False]])
    expected = {"mean": [[2.0]], "cls": [[1.0]], "last": [[3.0]], "tokens": [[1.0], [3.0]]}
    assert pool(hidden, mask, pooling).tolist() == expected[pooling]


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_a_row_without_real_positions_stays_finite(pooling):
    assert torch.isfinite(pool(torch.ones(1, 3, 2), torch.zeros(1, 3).bool(), pooling)).all()


def test_pooled_features_pass_through_and_feature_maps_are_averaged():
    mask = torch.ones(2, 1).bool()
    vectors = torch.randn(2, 4)
    maps = torch.arange(2 * 3 * 2 * 2.0).view(2, 3, 2, 2)
    for pooling in POOLED:
        assert torch.equal(pool(vectors, mask, pooling), vectors)
        assert pool(maps, mask, pooling).tolist() == [[1.5, 5.5, 9.5], [13.5, 17.5, 21.5]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pooling_is_in_float32(dtype):
    """The sum of 300 values of 300 has no float16, and too few digits in bfloat16."""
    pooled = pool(torch.full((1, 300, 1), 300.0, dtype=dtype), torch.ones(1, 300).bool(), "mean")
    assert pooled.dtype == torch.float32 and pooled.item() == 300


def test_a_callable_pools_as_it_likes():
    hidden, mask = padded("right", 0.0)
    assert torch.equal(pool(hidden, mask, lambda h, m: h[:, 1] * m[:, 1:2]), ROWS[:, 1])
    five = torch.zeros(2, 1, 1, 1, 3)
    assert pool(five, mask, lambda h, m: h[:, 0, 0, 0]).shape == (2, 3)


@pytest.mark.parametrize("shape", [(2, 4, 3), (2, 3), (2, 3, 2, 2)])
def test_unknown_pooling_is_refused(shape):
    with pytest.raises(ValueError, match="pooling='max' is unknown"):
        pool(torch.zeros(shape), torch.ones(shape[:2]).bool(), "max")


@pytest.mark.parametrize("shape", [(2,), (2, 1, 1, 1, 3)])
def test_other_numbers_of_dimensions_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(B, D\), \(B, T, D\) or \(B, C, H, W\)"):
        pool(torch.zeros(shape), torch.ones(2, 1).bool(), "mean")


# ---- token_mask ----


def test_token_mask_is_the_attention_mask():
    hidden, mask = torch.zeros(2, 3, 4), torch.tensor([[1, 1, 0], [0, 1, 1]])
    result = token_mask(hidden, mask, nn.Identity())
    assert result.dtype == torch.bool and result.tolist() == mask.bool().tolist()
    assert token_mask(hidden, None, nn.Identity()).tolist() == [[True] * 3] * 2


def test_token_mask_of_audio_is_reduced_by_the_models_rule():
    model = nn.Identity()
    model._get_feature_vector_attention_mask = lambda frames, mask: mask[:, ::2][:, :frames]
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    assert token_mask(torch.zeros(1, 3, 4), mask, model).tolist() == [[True, True, False]]


@pytest.mark.parametrize("shape", [(2, 4), (1, 3)])
def test_token_mask_that_does_not_fit_is_refused(shape):
    with pytest.raises(ValueError, match=r"mask has shape .* output is \(2, 3, 4\): expected"):
        token_mask(torch.zeros(2, 3, 4), torch.ones(shape), nn.Identity())


# ---- find_feature_module ----

SMALL = dict(num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)


def gpt2():
    return GPT2ForSequenceClassification(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=8,
            n_layer=1,
            n_head=2,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=2,
        )
    )


def t5():
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=8,
            d_kv=4,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
        )
    )


def bart():
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=16,
    )
    return BartForSequenceClassification(config)


def vit():
    return ViTForImageClassification(
        ViTConfig(hidden_size=8, image_size=8, patch_size=4, num_channels=1, **SMALL)
    )


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
    "gpt2": (gpt2, "transformer", TEXT, (2, 4, 8)),
    "t5": (t5, "encoder", {**TEXT, "labels": torch.ones(2, 3).long()}, (2, 4, 8)),
    "bart": (bart, "model.encoder", TEXT, (2, 4, 8)),
    "vit": (vit, "vit", IMAGES, (2, 5, 8)),
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


# ---- hidden_state ----


def test_hidden_state_of_every_form_of_output():
    hidden, ids = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long)
    pooler = torch.zeros(2, 4)
    for output in (
        hidden,
        (hidden, pooler),
        [ids, hidden],
        {"pooler_output": pooler, "last_hidden_state": hidden},
        {"sentence_embedding": pooler, "token_embeddings": hidden},
        {"ids": ids, "anything": hidden},
    ):
        assert hidden_state(output) is hidden
    for output in (None, "text", (), {"ids": ids}, SimpleNamespace(last_hidden_state=hidden)):
        assert hidden_state(output) is None


# ---- OutputCapture ----


def test_tap_records_only_while_told_to():
    module = nn.Linear(2, 3)
    tap = OutputCapture(module)
    module(torch.zeros(1, 2))
    assert tap.take() == []
    tap.record()
    first, second = module(torch.zeros(1, 2)), module(torch.ones(1, 2))
    tap.stop()
    module(torch.zeros(1, 2))
    captured = tap.take()
    assert [mask for _, mask in captured] == [None, None]
    assert captured[0][0] is first and captured[1][0] is second
    assert tap.take() == []


def test_tap_starts_anew():
    module = nn.Linear(2, 3)
    tap = OutputCapture(module)
    tap.record()
    module(torch.zeros(1, 2))
    tap.record()
    last = module(torch.ones(1, 2))
    ((hidden, _),) = tap.take()
    assert hidden is last


@pytest.mark.parametrize("trained", [True, False])
def test_tap_keeps_to_forwards_with_the_gradient_mode_it_began_in(trained):
    """A teacher's forward inside a trained loss is not the features; in evaluation all are."""
    module = nn.Linear(2, 3)
    tap = OutputCapture(module)
    with torch.set_grad_enabled(trained):
        tap.record()
        with torch.set_grad_enabled(not trained):
            module(torch.zeros(1, 2))
        own = module(torch.ones(1, 2))
    ((hidden, _),) = tap.take()
    assert hidden is own


def test_tap_takes_the_mask_that_the_output_holds():
    """A sentence-transformer has a mask per text column, and its modules hand it on."""

    class Column(nn.Module):
        def forward(self, mask):
            return {"token_embeddings": torch.zeros(2, 3, 4), "attention_mask": mask}

    module, mask = Column(), torch.tensor([[1, 1, 0], [1, 1, 1]])
    tap = OutputCapture(module)
    tap.record()
    module(mask)
    module(mask[:, None, None])  # a mask for the attention, not for the tokens
    (_, first), (_, second) = tap.take()
    assert first is mask and second is None


def test_tap_leaves_no_trace():
    module = nn.Linear(2, 3)
    tap = OutputCapture(module, extract=lambda output: "seen")
    tap.record()
    module(torch.zeros(1, 2))
    assert tap.take() == ["seen"]
    tap.remove()
    module(torch.zeros(1, 2))
    assert tap.take() == [] and not module._forward_hooks
