"""Layer groups over architectures: nothing is lost, counted twice, or in the wrong order."""

import pytest
import torch
import transformers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
)

from hf_adapt.models.groups import layer_groups
from hf_adapt.models.layers import find_stacks
from tests.helpers.architectures import (
    BOTH,
    CASES,
    GPT,
    IMAGE,
    SEGFORMER,
    Case,
    assert_groups,
    by_name,
    case,
    held,
    in_registration_order,
    layers,
)


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
