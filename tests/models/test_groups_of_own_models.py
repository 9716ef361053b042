"""Layer groups of models that no library wrote: towers, stacks and what lies around them."""

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    BertPreTrainedModel,
    GPT2Config,
    GPT2Model,
    MPNetConfig,
    MPNetModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_adapt.models.groups import layer_groups
from hf_adapt.models.layers import find_stacks
from tests.helpers.architectures import (
    AUDIO,
    GPT,
    GROUPED,
    TEXT,
    assert_groups,
    by_name,
    case,
    layers,
)


class Own(nn.Module):
    """A user's own module: BERT under the given name, and a head."""

    def __init__(self, name: str, head_first: bool) -> None:
        super().__init__()
        if head_first:
            self.head = nn.Linear(16, 2)
        setattr(self, name, BertModel(BertConfig(**TEXT)))
        if not head_first:
            self.head = nn.Linear(16, 2)


@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.parametrize("name", ["encoder", "embedder"])
def test_a_users_own_module_around_a_base_model(name: str, head_first: bool) -> None:
    assert_groups(
        Own(name, head_first),
        {
            "embeddings": f"{name}.embeddings",
            **layers(f"{name}.encoder.layer", top=f"{name}.pooler"),
            "head": "head",
        },
    )


class Dual(nn.Module):
    """Two base models of one class, with a module between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(16, 16)
        self.query = GPT2Model(GPT2Config(**GPT))
        self.bridge = nn.Linear(16, 16)
        self.passage = GPT2Model(GPT2Config(**GPT))
        self.out = nn.Linear(16, 1)


def test_two_towers_of_ones_own() -> None:
    expected = {"embeddings": "stem"}
    for tower in ("query", "passage"):
        expected[f"{tower}.embeddings"] = f"{tower}.wte {tower}.wpe"
        expected |= layers(f"{tower}.h", f"{tower}.")
        expected[f"{tower}.norm"] = f"{tower}.ln_f"
        expected |= {"bridge": "bridge"} if tower == "query" else {"head": "out"}
    assert_groups(Dual(), expected)


class Plain(nn.Module):
    """Nothing of transformers: layers of one class in a list."""

    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.classifier = nn.Linear(4, 2)
        self.embed = nn.Embedding(8, 4)
        self.blocks = nn.ModuleList([layer() for _ in range(3)])
        self.norm = nn.LayerNorm(4)
        self.projection = nn.Linear(4, 4)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Linear(4, 4),
        lambda: nn.TransformerEncoderLayer(4, 1),
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
    ],
    ids=["leaf", "module", "stage"],
)
def test_a_plain_module(layer: Callable[[], nn.Module]) -> None:
    assert_groups(
        Plain(layer),
        {
            "embeddings": "embed",
            **layers("blocks"),
            "norm": "norm",
            "head": "classifier projection",
        },
    )


class Checkpointed(GradientCheckpointingLayer):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)


def test_a_list_as_long_as_a_stack_of_checkpointing_layers_is_no_part_of_them() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([Checkpointed(), Checkpointed()])
    model.adapters = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    assert_groups(model, {"layer.0": "layers.0", "layer.1": "layers.1", "head": "adapters"})


def test_an_encoder_and_a_decoder_side_by_side_are_two_towers() -> None:
    model = nn.Module()
    model.encoder_layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    model.decoder_layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    assert [stack.tower for stack in find_stacks(model)] == ["encoder_layers", "decoder_layers"]


def test_a_projection_above_the_lower_tower_goes_with_its_top_layer() -> None:
    model = nn.Module()
    for tower in ("low", "high"):
        setattr(model, tower, part := nn.Module())
        part.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        part.projection = nn.Linear(4, 4)
        if tower == "low":
            model.head = nn.Linear(4, 4)  # by name, although between the towers
    assert_groups(
        model,
        {
            **layers("low.layers", "low.", 2, top="low.projection"),
            **layers("high.layers", "high.", 2),
            "head": "head high.projection",
        },
    )


def test_the_projections_of_a_dual_encoder_are_its_head_wherever_registered() -> None:
    with torch.device("meta"):
        model = transformers.ClapModel(
            transformers.ClapConfig(
                text_config=TEXT,
                audio_config=dict(
                    patch_embeds_hidden_size=8,
                    hidden_size=16,
                    depths=[1, 1],
                    num_attention_heads=[2, 2],
                    spec_size=32,
                    num_mel_bins=8,
                ),
                projection_dim=8,
            )
        )
    groups = by_name(layer_groups(model))
    assert {name.split(".")[0] for name in groups["head"].parameters} == {
        "logit_scale_a",
        "logit_scale_t",
        "text_projection",
        "audio_projection",
    }


def test_relative_positions_registered_after_the_layers_are_embeddings() -> None:
    encoder = "mpnet.encoder"
    assert_groups(
        case("MPNetForSequenceClassification"),
        {
            "embeddings": f"mpnet.embeddings {encoder}.relative_attention_bias",
            **layers(f"{encoder}.layer"),
            "head": "classifier",
        },
    )


def test_named_and_shared_layers() -> None:
    named = nn.Sequential()
    for name in ("low", "high"):
        named.add_module(name, nn.Linear(4, 4))
    assert_groups(named, {"layer.0": "low", "layer.1": "high"})
    shared = nn.Linear(4, 4)
    model = nn.ModuleList([shared, shared, nn.Linear(4, 4)])
    groups = layer_groups(model)
    assert [(group.name, group.level) for group in groups] == [("layer.0", 0), ("layer.2", 1)]
    assert groups[0].parameters == ("0.weight", "0.bias")


@pytest.mark.parametrize(
    "name",
    ["multi_modal_projector", "connector", "aligner", "projector", "mm_projector", "resampler"],
)
def test_what_joins_two_towers_is_between_them_although_registered_last(name: str) -> None:
    model = nn.Module()
    for tower in ("low", "high"):
        setattr(model, tower, nn.ModuleList([nn.Linear(4, 4) for _ in range(2 + len(tower))]))
    setattr(model, name, nn.Linear(4, 4))
    model.adapter = nn.Linear(4, 4)
    groups = layer_groups(model)
    assert [g.name for g in groups][4:7] == ["low.layer.4", name, "high.layer.0"]
    assert by_name(groups)["head"].parameters == ("adapter.weight", "adapter.bias")


class Flat(BertPreTrainedModel):
    """A model of one piece, whose modules are registered in no order."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(8, 4)
        self.pooler = nn.Linear(4, 4)
        self.final_norm = nn.LayerNorm(4)
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.per_layer_projection = nn.Linear(4, 4)
        self.pos_emb = nn.Linear(4, 4)
        self.position_bias = nn.Linear(4, 4)
        self.fc = nn.Linear(4, 2)
        self.post_init()


def test_names_tell_where_registration_does_not() -> None:
    assert_groups(
        Flat(BertConfig(**TEXT)),
        {
            "embeddings": "embeddings per_layer_projection pos_emb position_bias",
            **layers("layers", top="pooler"),
            "norm": "final_norm",
            "head": "fc",
        },
    )


def test_norms_registered_before_the_layers_and_applied_after_them() -> None:
    text = dict(GROUPED, head_dim=8)
    with torch.device("meta"):
        t5gemma = transformers.T5GemmaForConditionalGeneration(
            transformers.T5GemmaConfig(encoder=text, decoder=dict(text))
        )
        conformer = transformers.Wav2Vec2ConformerForCTC(
            transformers.Wav2Vec2ConformerConfig(**AUDIO)
        )
    groups = by_name(layer_groups(t5gemma))
    for tower in ("encoder", "decoder"):
        assert groups[f"{tower}.norm"].parameters == (f"model.{tower}.norm.weight",)
    assert by_name(layer_groups(conformer))["norm"].parameters == (
        "wav2vec2_conformer.encoder.layer_norm.weight",
        "wav2vec2_conformer.encoder.layer_norm.bias",
    )


def test_convolutions_registered_after_the_layers_and_applied_before_them() -> None:
    from transformers.models.qwen3_omni_moe import (
        configuration_qwen3_omni_moe,
        modeling_qwen3_omni_moe,
    )

    config = configuration_qwen3_omni_moe.Qwen3OmniMoeAudioEncoderConfig(
        d_model=16,
        encoder_layers=3,
        encoder_attention_heads=2,
        encoder_ffn_dim=32,
        num_mel_bins=16,
        downsample_hidden_size=8,
        output_dim=16,
    )
    with torch.device("meta"):
        model = modeling_qwen3_omni_moe.Qwen3OmniMoeAudioEncoder(config)
    assert_groups(
        model,
        {
            "embeddings": "conv2d1 conv2d2 conv2d3 conv_out",
            **layers("layers", top="proj1 proj2"),
            "norm": "ln_post",
        },
    )


class ModelAsHead(BertPreTrainedModel):
    """A head that is itself a model of transformers, without checkpointing layers."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.reader = MPNetModel(MPNetConfig(**TEXT))
        self.post_init()


def test_a_model_in_the_head_is_no_tower() -> None:
    assert_groups(
        ModelAsHead(BertConfig(**TEXT)),
        {"embeddings": "bert.embeddings", **layers("bert.encoder.layer"), "head": "reader"},
    )


def test_models_in_a_list_are_towers_and_a_list_of_one_is_no_layer() -> None:
    config = BertConfig(**TEXT)
    two = nn.ModuleList([BertModel(config), BertModel(config)])
    assert [(stack.tower, len(stack.layers)) for stack in find_stacks(two)] == [("0", 3), ("1", 3)]
    one = nn.Sequential(nn.ModuleDict({"auto_model": BertModel(config)}))
    assert [stack.path for stack in find_stacks(one)] == ["0.auto_model.encoder.layer"]


def test_towers_that_share_the_first_part_of_their_name() -> None:
    model = nn.ModuleDict(
        {
            "image": nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)] * 1)}),
            "text": nn.Transformer(4, 2, 2, 3, 4, batch_first=True),
        }
    )
    assert [(stack.tower, len(stack.layers)) for stack in find_stacks(model)] == [
        ("encoder", 2),
        ("decoder", 3),
    ]
    model["image"]["layers"].append(nn.Linear(2, 2))
    assert [(stack.path, stack.tower) for stack in find_stacks(model)] == [
        ("image.layers", "image"),
        ("text.encoder.layers", "text.encoder"),
        ("text.decoder.layers", "text.decoder"),
    ]
