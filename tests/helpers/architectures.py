"""Classes of transformers of every architecture, and what their layer groups must be."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from hf_adapt.models.groups import LayerGroup, layer_groups

TEXT = dict(
    vocab_size=64, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
)
GROUPED = dict(TEXT, num_key_value_heads=1)
GPT = dict(vocab_size=64, n_embd=16, n_layer=3, n_head=2)
T5 = dict(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2)
BOTH = dict(
    vocab_size=64,
    d_model=16,
    encoder_layers=3,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=2,
)
IMAGE = dict(
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=32,
    image_size=32,
    patch_size=8,
)
SWIN = dict(
    image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4
)
STAGES = dict(hidden_sizes=[8, 8, 16, 16], depths=[1, 2, 1, 1])
AUDIO = dict(
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=32,
    conv_dim=(16, 16),
    conv_stride=(2, 2),
    conv_kernel=(3, 3),
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
    vocab_size=32,
)
CAPTION = dict(TEXT, projection_dim=8, max_position_embeddings=16, bos_token_id=1)
PICTURE = dict(IMAGE, projection_dim=8, num_hidden_layers=2)
PAIR = dict(text_config=CAPTION, vision_config=PICTURE)
OPT = dict(vocab_size=64, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, ffn_dim=32)
ONE = {"": 3}
ENCODER_DECODER = {"encoder": 3, "decoder": 2}


@dataclass
class Case:
    """A class of transformers, its config, and what its groups must be."""

    model: str
    config: str
    settings: dict[str, Any]
    layers: dict[str, int] = field(default_factory=lambda: ONE)
    head: bool = True
    embedding: str | None = None
    """A parameter of the embeddings where the class does not name its input embeddings."""

    def build(self) -> Any:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of imports and tiny configs, not of the groups
            if not hasattr(transformers, self.model):
                pytest.skip(f"transformers {transformers.__version__} has no {self.model}")
            config = getattr(transformers, self.config)(**self.settings)
            return getattr(transformers, self.model)(config)


CASES = [
    # encoders
    Case("BertModel", "BertConfig", TEXT, head=False),
    Case("BertForSequenceClassification", "BertConfig", TEXT),
    Case("BertForMaskedLM", "BertConfig", TEXT),
    Case("RobertaForSequenceClassification", "RobertaConfig", TEXT),
    Case("XLMRobertaForTokenClassification", "XLMRobertaConfig", TEXT),
    Case("XLMRobertaForMaskedLM", "XLMRobertaConfig", TEXT),
    Case("DebertaV2ForSequenceClassification", "DebertaV2Config", TEXT),
    Case("ElectraForSequenceClassification", "ElectraConfig", dict(TEXT, embedding_size=8)),
    Case("AlbertForSequenceClassification", "AlbertConfig", dict(TEXT, embedding_size=8), {"": 1}),
    Case(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        dict(vocab_size=64, dim=16, n_layers=3, n_heads=2, hidden_dim=32),
    ),
    Case("MPNetForSequenceClassification", "MPNetConfig", TEXT),
    Case(
        "XLNetForSequenceClassification",
        "XLNetConfig",
        dict(vocab_size=64, d_model=16, n_layer=3, n_head=2, d_inner=32),
    ),
    Case(
        "XLMForSequenceClassification",
        "XLMConfig",
        dict(vocab_size=64, emb_dim=16, n_layers=3, n_heads=2),
    ),
    Case("LongformerForSequenceClassification", "LongformerConfig", dict(TEXT, attention_window=4)),
    Case(
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        dict(
            TEXT, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
        ),
    ),
    # decoders
    Case("GPT2Model", "GPT2Config", GPT, head=False),
    Case("GPT2LMHeadModel", "GPT2Config", GPT, head=False),
    Case("GPT2ForSequenceClassification", "GPT2Config", GPT),
    Case("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT),
    Case("LlamaForCausalLM", "LlamaConfig", GROUPED),
    Case("MistralForCausalLM", "MistralConfig", GROUPED),
    Case("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    Case("Gemma2ForCausalLM", "Gemma2Config", dict(GROUPED, head_dim=8), head=False),
    Case("OPTForCausalLM", "OPTConfig", dict(OPT, word_embed_proj_dim=16), head=False),
    Case("BloomForCausalLM", "BloomConfig",
         dict(vocab_size=64, hidden_size=16, n_layer=3, n_head=2), head=False),
    Case("FalconForCausalLM", "FalconConfig",
         {k: v for k, v in TEXT.items() if k != "intermediate_size"}, head=False),
    Case("PhiForCausalLM", "PhiConfig", TEXT),
    Case("MixtralForCausalLM", "MixtralConfig", dict(GROUPED, num_local_experts=2)),
    Case("MambaForCausalLM", "MambaConfig",
         dict(vocab_size=64, hidden_size=16, num_hidden_layers=3, state_size=4), head=False),
    Case("CpmAntModel", "CpmAntConfig",
         dict(vocab_size=64, hidden_size=16, num_attention_heads=2, dim_head=8, dim_ff=32,
              num_hidden_layers=3), head=False),
    # encoder-decoders
    Case("T5ForConditionalGeneration", "T5Config", dict(T5, num_decoder_layers=2),
         ENCODER_DECODER, head=False),
    Case("T5ForSequenceClassification", "T5Config", dict(T5, num_decoder_layers=2),
         ENCODER_DECODER),
    Case("T5EncoderModel", "T5Config", T5, head=False),
    Case("BartForConditionalGeneration", "BartConfig", BOTH, ENCODER_DECODER, head=False),
    Case("BartForSequenceClassification", "BartConfig", BOTH, ENCODER_DECODER),
    Case("MBartForConditionalGeneration", "MBartConfig", BOTH, ENCODER_DECODER, head=False),
    Case("PegasusForConditionalGeneration", "PegasusConfig", BOTH, ENCODER_DECODER, head=False),
    Case("MarianMTModel", "MarianConfig", BOTH, ENCODER_DECODER, head=False),
    Case("WhisperForConditionalGeneration", "WhisperConfig", BOTH, ENCODER_DECODER, head=False),
    Case("WhisperForAudioClassification", "WhisperConfig", BOTH),
    # images
    Case("ViTForImageClassification", "ViTConfig", IMAGE),
    Case("DeiTForImageClassification", "DeiTConfig", IMAGE),
    Case("BeitForImageClassification", "BeitConfig", IMAGE),
    Case("Dinov2ForImageClassification", "Dinov2Config", dict(IMAGE, mlp_ratio=2)),
    Case("SwinForImageClassification", "SwinConfig", SWIN, {"": 2}),
    Case("ConvNextForImageClassification", "ConvNextConfig", dict(STAGES, num_stages=4), {"": 4},
         embedding="convnext.embeddings.patch_embeddings.weight"),
    Case("ResNetForImageClassification", "ResNetConfig", dict(STAGES, embedding_size=8), {"": 4},
         embedding="resnet.embedder.embedder.convolution.weight"),
    Case("DetrForObjectDetection", "DetrConfig",
         dict(
             BOTH,
             num_queries=3,
             use_timm_backbone=False,
             use_pretrained_backbone=False,
             backbone=None,
             backbone_config=transformers.ResNetConfig(
                 **STAGES, embedding_size=8, out_features=["stage4"]
             ),
         ),
         ENCODER_DECODER, embedding="model.query_position_embeddings.weight"),
    # audio
    Case("Wav2Vec2ForCTC", "Wav2Vec2Config", AUDIO,
         embedding="wav2vec2.feature_extractor.conv_layers.0.conv.weight"),
    Case("HubertForSequenceClassification", "HubertConfig", AUDIO,
         embedding="hubert.feature_extractor.conv_layers.0.conv.weight"),
    Case("ASTForAudioClassification", "ASTConfig",
         dict(
             {k: v for k, v in IMAGE.items() if k != "image_size"},
             patch_size=4, max_length=32, num_mel_bins=16,
         )),
    # several modalities
    Case("CLIPModel", "CLIPConfig", dict(PAIR, projection_dim=8),
         {"text_model": 3, "vision_model": 2},
         embedding="text_model.embeddings.token_embedding.weight"),
    Case("CLIPForImageClassification", "CLIPConfig", dict(PAIR, projection_dim=8), {"": 2},
         embedding="vision_model.embeddings.patch_embedding.weight"),
    Case("SiglipModel", "SiglipConfig", PAIR, {"text_model": 3, "vision_model": 2},
         embedding="text_model.embeddings.token_embedding.weight"),
    Case("BlipForConditionalGeneration", "BlipConfig", PAIR, {"vision_model": 2, "text_decoder": 3},
         embedding="vision_model.embeddings.patch_embedding.weight"),
    Case("Blip2ForConditionalGeneration", "Blip2Config",
         dict(
             vision_config=PICTURE,
             qformer_config=dict(TEXT, encoder_hidden_size=16),
             text_config=dict(OPT, model_type="opt", word_embed_proj_dim=16),
             num_query_tokens=2,
         ),
         {"vision_model": 2, "qformer": 3, "language_model": 3}, head=False),
    Case("LlavaForConditionalGeneration", "LlavaConfig",
         dict(
             vision_config=dict(PICTURE, model_type="clip_vision_model"),
             text_config=dict(GROUPED, model_type="llama"),
             image_token_index=5,
         ),
         {"vision_tower": 2, "language_model": 3}),
    Case("ViltForQuestionAnswering", "ViltConfig", dict(TEXT, image_size=32, patch_size=8)),
]  # fmt: skip
SEGFORMER = Case(
    "SegformerForSemanticSegmentation",
    "SegformerConfig",
    dict(STAGES, num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=8),
    {"": 4},
)


def case(model: str, **settings: Any) -> Any:
    """The model of a class above, with other settings."""
    found = next(c for c in CASES if c.model == model)
    return Case(model, found.config, {**found.settings, **settings}).build()


def in_registration_order(model: nn.Module) -> list[str]:
    """The parameters that train."""
    return [name for name, p in model.named_parameters() if p.requires_grad]


def held(groups: Sequence[LayerGroup]) -> list[str]:
    """The parameters of all groups."""
    return [name for group in groups for name in group.parameters]


def by_name(groups: Sequence[LayerGroup]) -> dict[str, LayerGroup]:
    """The groups by their names, of which each is there once."""
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


def layers(path: str, tower: str = "", number: int = 3, **top: str) -> dict[str, str]:
    """Expected layer groups; `top` is what else the top layer holds."""
    found = {f"{tower}layer.{i}": f"{path}.{i}" for i in range(number)}
    found[f"{tower}layer.{number - 1}"] += " " + top.get("top", "")
    return found
