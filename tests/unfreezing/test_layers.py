"""Layer groups over architectures: nothing is lost, counted twice, or in the wrong order."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    BertPreTrainedModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    MPNetConfig,
    MPNetModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_adapt.models.groups import LayerGroup, layer_groups, matches
from hf_adapt.models.layers import find_stacks
from tests.helpers.architectures import (
    AUDIO,
    BOTH,
    CASES,
    GPT,
    GROUPED,
    IMAGE,
    SEGFORMER,
    TEXT,
    Case,
    case,
)
from tests.helpers.models import bert, llama


def in_registration_order(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def held(groups: Sequence[LayerGroup]) -> list[str]:
    return [name for group in groups for name in group.parameters]


def by_name(groups: Sequence[LayerGroup]) -> dict[str, LayerGroup]:
    found = {group.name: group for group in groups}
    assert len(found) == len(groups)
    return found


def assert_groups(model: nn.Module, expected: dict[str, str]) -> None:
    """The groups, in order, are those expected: name → modules or parameters, space-separated."""
    groups = layer_groups(model)
    assert [group.name for group in groups] == list(expected)
    for group in groups:
        modules = expected[group.name].split()
        wanted = {
            name
            for name in in_registration_order(model)
            if any(name == module or name.startswith(f"{module}.") for module in modules)
        }
        assert set(group.parameters) == wanted, group.name


@pytest.mark.parametrize("case", [*CASES, SEGFORMER], ids=lambda case: case.model)
def test_every_architecture_is_divided_from_bottom_to_top(case: Case) -> None:
    model = case.build()
    groups = layer_groups(model)
    named = by_name(groups)

    assert sorted(held(groups)) == sorted(in_registration_order(model))
    assert all(group.parameters for group in groups)
    levels = [group.level for group in groups]
    assert levels == sorted(levels)
    assert set(levels) == set(range(max(levels) + 1))

    assert ("head" in named) == case.head
    if case.head:
        assert groups[-1].kind == "head"
        assert [group.name for group in groups if group.level == groups[-1].level] == ["head"]

    found = {stack.tower: stack for stack in find_stacks(model)}
    trained = {tower: stack for tower, stack in found.items() if tower != "backbone"}
    assert {tower: len(stack.layers) for tower, stack in trained.items()} == case.layers
    for tower, number in case.layers.items():
        layers = [group for group in groups if group.kind == "layer" and group.tower == tower]
        prefix = f"{tower}." if tower else ""
        assert [group.name for group in layers] == [f"{prefix}layer.{i}" for i in range(number)]
        assert len({group.level for group in layers}) == number
        for group, module in zip(layers, found[tower].layers, strict=True):
            inside = [n for n in in_registration_order(model) if n.startswith(f"{module}.")]
            assert inside
            assert set(inside) <= set(group.parameters)
        for group in groups:
            if group.tower == tower and group.kind == "norm":
                assert group.level == layers[-1].level
            if group.tower == tower and group.kind == "embeddings":
                assert group.level < layers[0].level


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.model)
def test_the_input_embeddings_are_embeddings(case: Case) -> None:
    model = case.build()
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    for name, p in model.named_parameters():
        names[id(p)] = name
    if case.embedding is None:
        module = model.get_input_embeddings()
        inputs = [names[id(p)] for p in module.parameters() if p.requires_grad]
    else:
        inputs = [case.embedding]
    assert inputs
    of = {name: group for group in layer_groups(model) for name in group.parameters}
    assert {of[name].kind for name in inputs} == {"embeddings"}


def layers(path: str, tower: str = "", number: int = 3, **top: str) -> dict[str, str]:
    """Expected layer groups; `top` is what else the top layer holds."""
    found = {f"{tower}layer.{i}": f"{path}.{i}" for i in range(number)}
    found[f"{tower}layer.{number - 1}"] += " " + top.get("top", "")
    return found


def test_deberta_relative_embeddings_are_embeddings_and_its_convolution_is_the_first_layers() -> (
    None
):
    model = case(
        "DebertaV2ForSequenceClassification",
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        norm_rel_ebd="layer_norm",
        position_buckets=8,
        conv_kernel_size=3,
    )
    encoder = "deberta.encoder"
    assert_groups(
        model,
        {
            "embeddings": f"deberta.embeddings {encoder}.rel_embeddings {encoder}.LayerNorm",
            "layer.0": f"{encoder}.layer.0 {encoder}.conv",
            "layer.1": f"{encoder}.layer.1",
            "layer.2": f"{encoder}.layer.2",
            "head": "pooler classifier",
        },
    )


def test_the_final_norm_and_projection_of_opt_are_above_its_layers() -> None:
    decoder = "model.decoder"
    assert_groups(
        case("OPTForCausalLM", word_embed_proj_dim=8),
        {
            "embeddings": (
                f"{decoder}.embed_tokens {decoder}.embed_positions {decoder}.project_in"
            ),
            **layers(f"{decoder}.layers", top=f"{decoder}.project_out"),
            "norm": f"{decoder}.final_layer_norm",
        },
    )


def test_the_embedding_norm_of_bart_is_below_its_layers() -> None:
    encoder, decoder = "model.encoder", "model.decoder"
    model = case("BartForSequenceClassification")
    assert_groups(
        model,
        {
            "embeddings": "model.shared",
            "encoder.embeddings": f"{encoder}.embed_positions {encoder}.layernorm_embedding",
            **layers(f"{encoder}.layers", "encoder."),
            "decoder.embeddings": f"{decoder}.embed_positions {decoder}.layernorm_embedding",
            **layers(f"{decoder}.layers", "decoder.", 2),
            "head": "classification_head",
        },
    )
    named = by_name(layer_groups(model))
    assert named["embeddings"].level == named["encoder.embeddings"].level == 0
    assert named["decoder.embeddings"].level == named["encoder.layer.2"].level + 1


def test_the_weight_t5_ties_in_three_places_counts_once() -> None:
    model = case("T5ForConditionalGeneration")
    assert_groups(
        model,
        {
            "embeddings": "shared",
            **layers("encoder.block", "encoder."),
            "encoder.norm": "encoder.final_layer_norm",
            **layers("decoder.block", "decoder.", 2),
            "decoder.norm": "decoder.final_layer_norm",
        },
    )
    assert by_name(layer_groups(model))["embeddings"].parameters == ("shared.weight",)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_tied_to_the_embeddings_is_no_group(tied: bool) -> None:
    head = {} if tied else {"head": "lm_head"}
    assert_groups(
        case("LlamaForCausalLM", tie_word_embeddings=tied),
        {
            "embeddings": "model.embed_tokens",
            **layers("model.layers"),
            "norm": "model.norm",
            **head,
        },
    )


def test_a_tied_weight_registered_first_in_the_head_is_embeddings() -> None:
    class HeadFirst(GPT2LMHeadModel):
        def __init__(self, config: GPT2Config) -> None:
            super().__init__(config)
            self.add_module("transformer", self._modules.pop("transformer"))

    model = HeadFirst(GPT2Config(**GPT))
    assert next(iter(model.named_parameters()))[0] == "lm_head.weight"  # the trap is set
    named = by_name(layer_groups(model))
    assert named["embeddings"].parameters == ("lm_head.weight", "transformer.wpe.weight")
    assert "head" not in named


def test_albert_has_one_layer_that_its_whole_depth_shares() -> None:
    albert = "albert.encoder"
    assert_groups(
        case("AlbertForSequenceClassification"),
        {
            "embeddings": f"albert.embeddings {albert}.embedding_hidden_mapping_in",
            "layer.0": f"{albert}.albert_layer_groups.0 albert.pooler",
            "head": "classifier",
        },
    )


@pytest.mark.parametrize("stable", [False, True])
def test_the_norm_of_a_speech_encoder_is_where_it_is_applied(stable: bool) -> None:
    norm = "wav2vec2.encoder.layer_norm"
    model = case(
        "Wav2Vec2ForCTC",
        do_stable_layer_norm=stable,
        feat_extract_norm="layer" if stable else "group",
    )
    assert_groups(
        model,
        {
            "embeddings": "wav2vec2.masked_spec_embed wav2vec2.feature_extractor "
            f"wav2vec2.feature_projection wav2vec2.encoder.pos_conv_embed {'' if stable else norm}",
            **layers("wav2vec2.encoder.layers"),
            **({"norm": norm} if stable else {}),
            "head": "lm_head",
        },
    )


def test_weights_over_layers_are_the_head_although_registered_first() -> None:
    with torch.device("meta"):
        model = transformers.WhisperForAudioClassification(
            transformers.WhisperConfig(**BOTH, use_weighted_layer_sum=True)
        )
    assert_groups(
        model,
        {
            "embeddings": "encoder.conv1 encoder.conv2",
            **layers("encoder.layers"),
            "norm": "encoder.layer_norm",
            "head": "layer_weights projector classifier",
        },
    )


def test_parameters_that_are_no_modules() -> None:
    vit = by_name(layer_groups(case("ViTForImageClassification")))
    assert {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"} <= set(
        vit["embeddings"].parameters
    )
    clip = by_name(layer_groups(case("CLIPModel")))
    assert set(clip["head"].parameters) == {
        "logit_scale",
        "visual_projection.weight",
        "text_projection.weight",
    }
    blip = by_name(layer_groups(case("Blip2ForConditionalGeneration")))
    assert blip["embeddings"].parameters == ("query_tokens",)


def test_a_projector_between_towers_has_a_level_of_its_own() -> None:
    groups = layer_groups(case("LlavaForConditionalGeneration"))
    assert [(group.name, group.level) for group in groups] == [
        ("vision_tower.embeddings", 0),
        ("vision_tower.layer.0", 1),
        ("vision_tower.layer.1", 2),
        ("vision_tower.norm", 2),
        ("multi_modal_projector", 3),
        ("language_model.embeddings", 4),
        ("language_model.layer.0", 5),
        ("language_model.layer.1", 6),
        ("language_model.layer.2", 7),
        ("language_model.norm", 7),
        ("head", 8),
    ]
    assert by_name(groups)["multi_modal_projector"].kind == "other"


def test_a_projector_registered_after_the_towers_is_still_between_them() -> None:
    with torch.device("meta"):
        model = transformers.VisionEncoderDecoderModel(
            encoder=transformers.ViTModel(transformers.ViTConfig(**dict(IMAGE, hidden_size=32))),
            decoder=GPT2LMHeadModel(GPT2Config(**GPT, add_cross_attention=True)),
        )
    order = [group.name for group in layer_groups(model)]
    assert order.index("enc_to_dec_proj") == order.index("decoder.embeddings") - 1
    assert order[-1] == "decoder.norm"


def test_a_pooler_goes_with_the_top_layer_and_its_norm_is_the_final_norm() -> None:
    bert = by_name(layer_groups(case("BertModel")))
    assert "pooler.dense.weight" in bert["layer.2"].parameters
    beit = by_name(layer_groups(case("BeitForImageClassification")))
    assert set(beit["norm"].parameters) == {
        "beit.pooler.layernorm.weight",
        "beit.pooler.layernorm.bias",
    }


def test_lists_side_by_side_that_make_one_layer() -> None:
    names = ("attentions", "layer_norm1", "ffns", "layer_norm2")
    top = {f"layer.{i}": " ".join(f"transformer.{name}.{i}" for name in names) for i in range(3)}
    assert_groups(
        case("XLMForSequenceClassification"),
        {
            "embeddings": "transformer.position_embeddings transformer.embeddings "
            "transformer.layer_norm_emb",
            **top,
            "head": "sequence_summary",
        },
    )


def test_a_tower_without_checkpointing_layers_beside_those_with_them() -> None:
    stacks = find_stacks(case("DetrForObjectDetection"))
    assert [(stack.tower, len(stack.layers)) for stack in stacks] == [
        ("backbone", 4),
        ("encoder", 3),
        ("decoder", 2),
    ]


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


def test_frozen_parameters_are_in_no_group_and_levels_stay_contiguous() -> None:
    model = bert()
    names = [group.name for group in layer_groups(model)]
    assert names == ["embeddings", "layer.0", "layer.1", "head"]
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[1].requires_grad_(False)
    groups = layer_groups(model)
    assert [(group.name, group.level) for group in groups] == [
        ("layer.0", 0),
        ("layer.1", 1),
        ("head", 2),
    ]
    # The pooler still trains, and goes with the top layer.
    assert groups[1].parameters == ("bert.pooler.dense.weight", "bert.pooler.dense.bias")
    model.bert.requires_grad_(False)
    assert [(group.name, group.level) for group in layer_groups(model)] == [("head", 0)]


def test_names_do_not_depend_on_what_is_frozen() -> None:
    model = case("LlavaForConditionalGeneration")
    before = by_name(layer_groups(model))
    model.model.vision_tower.requires_grad_(False)
    after = by_name(layer_groups(model))
    kept = [name for name in before if not name.startswith("vision_tower")]
    assert list(after) == kept
    assert all(after[name].parameters == before[name].parameters for name in kept)
    assert [group.level for group in after.values()][:2] == [0, 1]


def test_nothing_trainable_is_refused() -> None:
    model = bert()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="BertForSequenceClassification has no trainable"):
        layer_groups(model)


def test_a_model_without_layers_is_refused_with_what_was_looked_for() -> None:
    model = nn.ModuleDict({"one": nn.Linear(2, 2), "two": nn.Linear(2, 2)})
    assert find_stacks(model) == []
    normed = nn.ModuleDict({"one": nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))})
    assert find_stacks(normed) == []  # its ParametrizationList is no layer
    dropouts = nn.Sequential(nn.Sequential(nn.Dropout(), nn.Dropout()), nn.Linear(2, 2))
    assert find_stacks(dropouts) == []
    with pytest.raises(ValueError, match=r"No stack of layers in ModuleDict: looked for .*groups="):
        layer_groups(model)
    groups = layer_groups(model, {"low": "one", "high": "two"})
    assert [group.level for group in groups] == [0, 1]


# ---- PEFT


def lora(modules_to_save: list[str] | None = None, **settings: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["query"], modules_to_save=modules_to_save, **settings
    )
    return peft.get_peft_model(bert(), config)


def test_adapters_are_in_the_group_of_their_layer_and_the_saved_head_is_the_head() -> None:
    model = lora(["classifier"])
    base = "base_model.model"
    assert_groups(
        model,
        {
            **layers(f"{base}.bert.encoder.layer", number=2),
            "head": f"{base}.classifier",
        },
    )
    named = by_name(layer_groups(model))
    assert set(named["head"].parameters) == {
        f"{base}.classifier.modules_to_save.default.weight",
        f"{base}.classifier.modules_to_save.default.bias",
    }
    assert all("lora_" in name for name in named["layer.0"].parameters)


def test_a_saved_layer_leaves_the_stack_a_stack() -> None:
    model = lora(["layer.1"])
    assert [len(stack.layers) for stack in find_stacks(model)] == [2]
    named = by_name(layer_groups(model))
    assert any("layer.1.modules_to_save" in name for name in named["layer.1"].parameters)


def test_a_prompt_is_an_embedding() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    named = by_name(layer_groups(peft.get_peft_model(bert(), config)))
    assert named["embeddings"].parameters == ("prompt_encoder.default.embedding.weight",)
    assert list(named) == ["embeddings", "head"]


# ---- groups given by the user

WHOLE = {
    "bottom": ["bert.embeddings", "bert.encoder.layer.0"],
    "top": r"bert\.(encoder\.layer\.1|pooler)\..*",
    "head": "classifier",
}


def test_given_groups_keep_their_order_names_and_patterns() -> None:
    model = bert()
    groups = layer_groups(model, WHOLE)
    assert [(g.name, g.kind, g.tower, g.level) for g in groups] == [
        ("bottom", "other", "", 0),
        ("top", "other", "", 1),
        ("head", "head", "", 2),
    ]
    assert sorted(held(groups)) == sorted(in_registration_order(model))
    assert groups[2].parameters == ("classifier.weight", "classifier.bias")


def test_given_groups_may_be_a_sequence() -> None:
    model = bert()
    groups = layer_groups(model, ["bert.embeddings", ["bert.encoder", "bert.pooler"], "classifier"])
    assert [group.name for group in groups] == ["bert.embeddings", "group.1", "classifier"]


def test_found_groups_may_be_given_back() -> None:
    model = llama()
    found = layer_groups(model)
    again = layer_groups(model, found)
    assert [(g.name, g.kind, g.parameters) for g in again] == [
        (g.name, g.kind, g.parameters) for g in found
    ]
    kinds = layer_groups(model, {group.name: group.parameters for group in found})
    assert [group.kind for group in kinds] == [group.kind for group in found]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({**WHOLE, "top": "bert.pooler"}, r"16 of 41 .* in no group: .* and 11 more"),
        (
            {**WHOLE, "again": "bert.pooler"},
            r"'top' and 'again' both hold 'bert.pooler.dense.weight' and 1 more",
        ),
        (
            {**WHOLE, "bottom": "bert.embedings"},
            r"group 'bottom', the pattern 'bert.embedings' .*Near names: bert.embeddings",
        ),
        (
            {**WHOLE, "head": ["classifier", "pooler"]},
            r"group 'head', the pattern 'pooler' matches no trainable.*Near names: bert.pooler",
        ),
        ({**WHOLE, "head": "classifier.["}, r"'classifier.\[' is neither .* regular expression"),
        ({}, r"expected a mapping .* with at least one group"),
        ("bert", r"expected a mapping"),
        (["classifier", "classifier"], r"Two groups have one name"),
    ],
    ids=["strays", "overlap", "typo", "one of two", "regex", "empty", "string", "same name"],
)
def test_groups_that_do_not_divide_the_parameters_are_refused(groups: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        layer_groups(bert(), groups)


def test_a_group_of_frozen_parameters_is_refused() -> None:
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    groups = {"embeddings": "bert.embeddings", "rest": r"bert\.(encoder|pooler).*|classifier.*"}
    with pytest.raises(ValueError, match=r"'embeddings'.* are frozen \(requires_grad=False\)\. U"):
        layer_groups(model, groups)


def test_base_weights_of_a_peft_model_are_refused_with_modules_to_save() -> None:
    groups = {"pooler": "base_model.model.bert.pooler", "rest": ".*lora.*|.*classifier.*"}
    with pytest.raises(ValueError, match=r"frozen \(requires_grad=False\)\. .*modules_to_save"):
        layer_groups(lora(["classifier"]), groups)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("h.1", "h.1", True),
        ("h.1", "h.1.weight", True),
        ("h.1", "h.10.weight", False),
        ("weight", "h.1.weight", False),
        (r"h\.\d+\..*", "h.10.weight", True),
        (r"h\.\d", "h.1.weight", False),
        (".*bias", "h.1.weight", False),
    ],
)
def test_matches(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


def test_an_invalid_expression_is_named() -> None:
    with pytest.raises(ValueError, match=r"'h\.\(' is neither"):
        matches("h.(", "h.1")
