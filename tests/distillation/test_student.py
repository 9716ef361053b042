"""Students made of a teacher's layers: they compute what the teacher does without the others."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedModel

from hf_adapt.distillation.student import student_from_teacher
from hf_adapt.models.layers import find_stacks
from tests.helpers.architectures import CASES, GROUPED, IMAGE, TEXT, Case
from tests.helpers.models import bert
from tests.helpers.trainers import same_bits, weights

MORE = [
    Case("Qwen3ForCausalLM", "Qwen3Config", dict(GROUPED, head_dim=8)),
    Case(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        dict(
            GROUPED,
            head_dim=8,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
    Case("Phi3ForCausalLM", "Phi3Config", dict(GROUPED, pad_token_id=0)),
    Case(
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        dict(
            vocab_size=64,
            hidden_size=16,
            num_layers=3,
            num_heads=2,
            window_size=4,
            attention_types=[[["global"], 1], [["local"], 1], [["global"], 1]],
        ),
    ),
    Case("DeiTModel", "DeiTConfig", IMAGE),
]
TEXTS = [
    "BertForSequenceClassification", "BertForMaskedLM", "RobertaForSequenceClassification",
    "XLMRobertaForMaskedLM", "DebertaV2ForSequenceClassification",
    "ElectraForSequenceClassification", "DistilBertForSequenceClassification",
    "MPNetForSequenceClassification", "XLNetForSequenceClassification",
    "ModernBertForSequenceClassification", "GPT2ForSequenceClassification",
    "LongformerForSequenceClassification",
]  # fmt: skip
DECODERS = [
    "GPT2LMHeadModel", "GPTNeoForCausalLM", "GPTNeoXForCausalLM", "LlamaForCausalLM",
    "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM",
    "Gemma3ForCausalLM", "Phi3ForCausalLM", "PhiForCausalLM", "OPTForCausalLM",
    "BloomForCausalLM", "FalconForCausalLM", "MixtralForCausalLM",
]  # fmt: skip
PAIRS = [
    "T5ForConditionalGeneration", "BartForConditionalGeneration", "MBartForConditionalGeneration",
    "PegasusForConditionalGeneration", "MarianMTModel",
]  # fmt: skip
OTHERS = [
    "ViTForImageClassification", "DeiTForImageClassification", "BeitForImageClassification",
    "Dinov2ForImageClassification", "ASTForAudioClassification", "Wav2Vec2ForCTC",
    "HubertForSequenceClassification", "WhisperForConditionalGeneration", "CLIPModel",
    "SiglipModel", "T5EncoderModel",
]  # fmt: skip
EVERY = [*TEXTS, *DECODERS, *PAIRS, *OTHERS]
SETTINGS: dict[str, dict[str, Any]] = {
    "WhisperForConditionalGeneration": dict(max_source_positions=10, num_mel_bins=8),
    "ModernBertForSequenceClassification": dict(local_attention=4),
    "GPT2ForSequenceClassification": dict(pad_token_id=0),
    "T5ForConditionalGeneration": dict(decoder_start_token_id=0),
    "DebertaV2ForSequenceClassification": dict(
        relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8
    ),
}


def make(name: str, seed: int = 0, **settings: Any) -> Any:
    """A tiny random model of a class, ready to evaluate, with biases and norms that matter."""
    case = next(c for c in [*CASES, *MORE] if c.model == name)
    chosen = {**case.settings, **SETTINGS.get(name, {}), **settings}
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of imports and tiny configs
        if not hasattr(transformers, name):
            pytest.skip(f"transformers {transformers.__version__} has no {name}")
        config = getattr(transformers, case.config)(**chosen)
        model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # else biases are 0, norms 1 and layers near no-ops
            if parameter.requires_grad:  # sinusoidal positions are built again by a load
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A small batch of what the model takes."""
    generator = torch.Generator().manual_seed(1)
    name, kind = type(model).__name__, model.config.model_type
    tokens = torch.randint(3, 60, (2, 8), generator=generator)
    tokens[:, -1] = 2
    picture = torch.randn(2, 3, 32, 32, generator=generator)
    if kind in ("vit", "deit", "beit", "dinov2"):
        return {"pixel_values": picture}
    if kind in ("clip", "siglip"):
        return {"input_ids": tokens, "pixel_values": picture}
    if kind in ("wav2vec2", "hubert"):
        return {"input_values": torch.randn(2, 200, generator=generator)}
    if kind == "audio-spectrogram-transformer":
        return {"input_values": torch.randn(2, 32, 16, generator=generator)}
    if kind == "whisper":
        sound = torch.randn(2, 8, 20, generator=generator)
        return {"input_features": sound, "decoder_input_ids": tokens}
    if name in PAIRS:
        return {"input_ids": tokens, "decoder_input_ids": tokens.flip(1)}
    return {"input_ids": tokens}


def output(model: PreTrainedModel) -> torch.Tensor:
    """What the model computes, with gradient."""
    out = model(**inputs(model))
    keys = ("logits", "logits_per_text", "last_hidden_state")
    return next(out[key] for key in keys if key in out)


def bypass(model: PreTrainedModel, kept: dict[str, list[int]]) -> None:
    """Let the layers that are not kept return their input."""

    def skip(_: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
        hidden = args[0] if args else next(iter(kwargs.values()))
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    for stack in find_stacks(model):
        for index, name in enumerate(stack.layers):
            if index not in kept[stack.tower]:
                model.get_submodule(name).register_forward_hook(skip, with_kwargs=True)


def depths(model: nn.Module) -> dict[str, int]:
    return {stack.tower: len(stack.layers) for stack in find_stacks(model)}


def ends(model: nn.Module) -> dict[str, list[int]]:
    """The last layer of each tower, with layer 0 where another one cannot be the first."""
    first = [0] if model.config.model_type == "modernbert" else []
    return {tower: [*first, number - 1] for tower, number in depths(model).items()}


@pytest.mark.parametrize("name", EVERY)
def test_all_layers_reproduce_the_teacher(name: str) -> None:
    teacher = make(name)
    student = student_from_teacher(teacher, depths(teacher))
    assert type(student) is type(teacher)
    assert same_bits(weights(student), weights(teacher))
    with torch.no_grad():
        assert torch.equal(output(student), output(teacher))


@pytest.mark.parametrize("name", EVERY)
def test_fewer_layers_are_the_teacher_with_the_others_bypassed(name: str) -> None:
    teacher = make(name)
    before, kept = weights(teacher), ends(teacher)
    state = torch.get_rng_state()
    student = student_from_teacher(teacher, kept)
    assert torch.equal(torch.get_rng_state(), state)
    assert depths(student) == {tower: len(indices) for tower, indices in kept.items()}
    assert same_bits(weights(teacher), before)
    assert depths(teacher) != depths(student)

    full = output(teacher)
    bypass(teacher, kept)
    with torch.no_grad():
        expected = output(teacher)
        torch.testing.assert_close(output(student), expected)
    assert not torch.allclose(full, expected)  # the layers left out mattered

    theirs = {t.data_ptr() for t in [*teacher.state_dict().values(), *teacher.buffers()]}
    assert not theirs & {t.data_ptr() for t in [*student.state_dict().values(), *student.buffers()]}


@pytest.mark.parametrize("name", EVERY)
def test_a_saved_student_loads_as_it_was_and_trains(name: str, tmp_path: Path) -> None:
    teacher = make(name)
    student = student_from_teacher(teacher, ends(teacher))
    student.save_pretrained(tmp_path)
    loaded, info = type(teacher).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert same_bits(weights(loaded), weights(student))
    with torch.no_grad():
        assert torch.equal(output(loaded), output(student))
    for _ in range(2):
        student.zero_grad()
        output(student).square().mean().backward()
        gradients = [p.grad for p in student.parameters() if p.grad is not None]
        assert all(bool(gradient.isfinite().all()) for gradient in gradients)
        for stack in find_stacks(student):
            for layer in stack.layers:
                own = [p.grad for p in student.get_submodule(layer).parameters()]
                assert any(g is not None and bool(g.any()) for g in own), layer


@pytest.mark.parametrize("name", [*DECODERS, *PAIRS])
def test_generation_with_a_cache_is_generation_without(name: str) -> None:
    teacher = make(name)
    student = student_from_teacher(teacher, ends(teacher))
    tokens = inputs(student)["input_ids"]
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    mask = torch.ones_like(tokens)
    with_cache, without = (
        student.generate(tokens, attention_mask=mask, use_cache=cache, **settings)
        for cache in (True, False)
    )
    assert torch.equal(with_cache, without)


# ---- which layers


@pytest.mark.parametrize(
    ("depth", "layers", "kept"),
    [
        (12, 6, [0, 2, 4, 7, 9, 11]),  # DistilBERT's and DistilBART's released code
        (12, 3, [0, 6, 11]),
        (12, 1, [0]),
        (12, 12, list(range(12))),
        (24, 2, [0, 23]),
        (5, [1, 3], [1, 3]),
    ],
)
def test_a_number_of_layers_is_spread_and_keeps_first_and_last(
    depth: int, layers: Any, kept: list[int]
) -> None:
    teacher = bert(num_hidden_layers=depth)
    student = student_from_teacher(teacher, layers)
    assert student.config.num_hidden_layers == len(student.bert.encoder.layer) == len(kept)
    for layer, index in zip(student.bert.encoder.layer, kept, strict=True):
        original = teacher.bert.encoder.layer[index]
        assert same_bits(dict(layer.state_dict()), dict(original.state_dict()))


def test_towers_by_name() -> None:
    teacher = make("BartForConditionalGeneration", encoder_layers=4, decoder_layers=4)
    student = student_from_teacher(teacher, {"encoder": 3, "decoder": [0, 2]})
    assert (student.config.encoder_layers, student.config.decoder_layers) == (3, 2)
    assert student.config.num_hidden_layers == 3
    assert depths(student_from_teacher(teacher, 2)) == {"encoder": 2, "decoder": 2}
    assert depths(student_from_teacher(teacher, {"decoder": 1})) == {"encoder": 4, "decoder": 1}
    alone = student_from_teacher(teacher, 1, tower="encoder")
    assert depths(alone) == {"encoder": 1, "decoder": 4}
    t5 = make("T5ForConditionalGeneration", num_decoder_layers=3)
    student = student_from_teacher(t5, {"decoder": [1]})
    assert (student.config.num_layers, student.config.num_decoder_layers) == (3, 1)


def test_t5_keeps_the_relative_positions_of_block_0() -> None:
    teacher = make("T5ForConditionalGeneration")
    student = student_from_teacher(teacher, {"encoder": [1, 2]})
    key = "layer.0.SelfAttention.relative_attention_bias.weight"
    first = student.encoder.block[0].get_parameter(key)
    assert torch.equal(first, teacher.encoder.block[0].get_parameter(key))
    query = "layer.0.SelfAttention.q.weight"
    first = student.encoder.block[0].get_parameter(query)
    assert torch.equal(first, teacher.encoder.block[1].get_parameter(query))


def test_albert_repeats_its_one_layer_fewer_times() -> None:
    teacher = make("AlbertForSequenceClassification", num_hidden_layers=4)
    student = student_from_teacher(teacher, 2)
    assert student.config.num_hidden_layers == 2
    assert same_bits(weights(student), weights(teacher))
    teacher.config.num_hidden_layers = 2
    teacher.albert.encoder.config.num_hidden_layers = 2
    with torch.no_grad():
        assert torch.equal(output(student), output(teacher))


def test_lists_of_one_entry_a_layer_follow() -> None:
    student = student_from_teacher(make("Gemma3ForCausalLM"), [1, 2])
    assert student.config.layer_types == ["full_attention", "sliding_attention"]
    student = student_from_teacher(make("GPTNeoForCausalLM"), [1])
    assert student.config.attention_layers == ["local"]
    longformer = make("LongformerForSequenceClassification", attention_window=[2, 4, 8])
    assert student_from_teacher(longformer, [0, 2]).config.attention_window == [2, 8]
    # As many convolutions as layers, but they are no layers.
    speech = student_from_teacher(make("Wav2Vec2ForCTC", num_hidden_layers=2), 1)
    assert len(speech.config.conv_dim) == speech.config.num_feat_extract_layers == 2


def test_lists_beside_the_layers_shrink_with_them() -> None:
    teacher = make("XLMForSequenceClassification")
    student = student_from_teacher(teacher, [0, 2])
    for name in ("attentions", "layer_norm1", "ffns", "layer_norm2"):
        ours, theirs = (getattr(m.transformer, name) for m in (student, teacher))
        assert len(ours) == 2
        assert torch.equal(next(ours[1].parameters()), next(theirs[2].parameters()))


def test_several_models_in_one() -> None:
    detr = make("DetrForObjectDetection")
    student = student_from_teacher(detr, {"encoder": 2, "decoder": 1})
    assert depths(student) == {"backbone": 4, "encoder": 2, "decoder": 1}
    llava = make("LlavaForConditionalGeneration")
    student = student_from_teacher(llava, 1, tower="language_model", hidden_size=8)
    assert depths(student) == {"vision_tower": 2, "language_model": 1}
    assert student.config.text_config.hidden_size == 8
    assert student.config.vision_config.hidden_size == 16


def test_the_student_is_as_the_teacher_in_all_else() -> None:
    teacher = make("LlamaForCausalLM", attn_implementation="eager").to(torch.bfloat16)
    teacher.model.norm.to(torch.float32)
    teacher.generation_config.top_k = 7
    teacher.requires_grad_(False)
    student = student_from_teacher(teacher, 2)
    assert student.config._attn_implementation == "eager"
    assert student.generation_config.top_k == 7
    assert student.generation_config is not teacher.generation_config
    assert student.dtype == torch.bfloat16
    assert student.model.norm.weight.dtype == torch.float32
    assert not student.training
    assert all(p.requires_grad for p in student.parameters())
    assert student_from_teacher(teacher.train(), 2).training
    assert torch.get_default_dtype() == torch.float32


def test_tied_weights_stay_tied_and_a_teacher_that_untied_them_is_refused() -> None:
    teacher = make("GPT2LMHeadModel")
    student = student_from_teacher(teacher, 2)
    assert student.lm_head.weight is student.transformer.wte.weight
    teacher.lm_head.weight = nn.Parameter(torch.randn(64, 16))
    with pytest.raises(ValueError, match=r"ties .*tie_word_embeddings = False"):
        student_from_teacher(teacher, 2)


def test_what_the_teacher_was_built_without_is_left_out() -> None:
    teacher = BertModel(BertConfig(**TEXT), add_pooling_layer=False)
    assert student_from_teacher(teacher, 2).pooler is None


# ---- narrower


@pytest.mark.parametrize(
    "name",
    sorted({*TEXTS, *DECODERS, *PAIRS, *OTHERS, "AlbertForSequenceClassification"}
           - {"FalconForCausalLM", "MixtralForCausalLM", "Wav2Vec2ForCTC", "CLIPModel",
              "HubertForSequenceClassification", "SiglipModel"}),
)  # fmt: skip
def test_a_narrower_student_runs_and_loads(name: str, tmp_path: Path) -> None:
    teacher = make(name)
    student = student_from_teacher(teacher, depths(teacher) if "Albert" not in name else 2, 8)
    with torch.no_grad():
        found = output(student)
        assert found.isfinite().all()
    student.save_pretrained(tmp_path)
    loaded, info = type(teacher).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        assert torch.equal(output(loaded), found)
    shapes = {n: p.shape for n, p in teacher.named_parameters()}
    assert any(p.shape != shapes[n] for n, p in student.named_parameters())
    for n, p in student.named_parameters():
        follows = not p.requires_grad  # sinusoidal positions of the new width
        if (
            not follows
            and "c_attn" not in n
            and "qkv" not in n
            and not re.search(r"gate_up|Wi\b", n)
        ):
            cut = teacher.get_parameter(n)[tuple(slice(size) for size in p.shape)]
            assert torch.equal(p, cut), n


def heads_of(layer: nn.Module, kind: str) -> torch.Tensor:
    """(query/key/value, head, head size, hidden) as the model's own forward divides them."""
    if kind == "gpt2":
        parts = layer.attn.c_attn.weight.split(layer.attn.embed_dim, dim=1)
        return torch.stack([p.T.unflatten(0, (-1, 8)) for p in parts])
    if kind == "modernbert":
        return layer.attn.Wqkv.weight.unflatten(0, (3, -1, 8))
    if kind == "gpt_neox":
        fused = layer.attention.query_key_value.weight.unflatten(0, (-1, 24))
        return torch.stack(fused.split(8, dim=1))
    fused = layer.self_attention.query_key_value.weight.unflatten(0, (-1, 3, 8))
    return fused.movedim(1, 0)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("GPT2LMHeadModel", "transformer.h.1"),
        ("ModernBertForSequenceClassification", "model.layers.1"),
        ("GPTNeoXForCausalLM", "gpt_neox.layers.1"),
        ("BloomForCausalLM", "transformer.h.1"),
    ],
)
def test_fused_projections_keep_the_leading_heads_of_query_key_and_value(
    name: str, layer: str
) -> None:
    # Three of six heads of 8: the hidden size is a multiple of 3, as in real models.
    six = {"n_embd": 48, "n_head": 6} if "GPT2" in name else {}
    if name == "BloomForCausalLM":
        six = {"hidden_size": 48, "n_head": 6}
    six = six or {"hidden_size": 48, "num_attention_heads": 6, "intermediate_size": 96}
    teacher = make(name, **six)
    kind = teacher.config.model_type
    student = student_from_teacher(teacher, 3, hidden_size=24)
    theirs, ours = (heads_of(m.get_submodule(layer), kind) for m in (teacher, student))
    assert ours.shape == (3, 3, 8, 24)
    assert torch.equal(ours, theirs[:, :3, :, :24])
    assert output(student).isfinite().all()


def test_phi3_and_modernbert_halves_are_cut_each() -> None:
    teacher = make("Phi3ForCausalLM", num_attention_heads=4, num_key_value_heads=2)
    student = student_from_teacher(teacher, 3, hidden_size=8)  # heads of 4: 2 and 1 are left
    big, small = (m.model.layers[2] for m in (teacher, student))
    rows = [0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 24, 25, 26, 27]
    assert torch.equal(small.self_attn.qkv_proj.weight, big.self_attn.qkv_proj.weight[rows, :8])
    rows = [*range(16), *range(32, 48)]
    assert torch.equal(small.mlp.gate_up_proj.weight, big.mlp.gate_up_proj.weight[rows, :8])
    modernbert = make("ModernBertForSequenceClassification")
    narrow = student_from_teacher(modernbert, 3, hidden_size=8)
    big, small = (m.model.layers[2].mlp.Wi.weight for m in (modernbert, narrow))
    assert torch.equal(small, big[rows, :8])


def test_one_key_value_head_stays_one() -> None:
    student = student_from_teacher(make("LlamaForCausalLM", num_attention_heads=4), 3, 8)
    assert (student.config.num_attention_heads, student.config.num_key_value_heads) == (2, 1)
    assert student.config.head_dim == 4
    assert student.config.intermediate_size == 16


# ---- refused


@pytest.mark.parametrize(
    ("layers", "kind", "message"),
    [
        (3, ValueError, r"Expected 1 to 2 layers .*got 3"),
        (0, ValueError, r"Expected 1 to 2 layers"),
        ([], ValueError, r"at least one, got \[\]"),
        ([0, 2], ValueError, r"from 0 to 1.*got \[0, 2\]"),
        ([-1], ValueError, r"from 0 to 1"),
        ([1, 0], ValueError, r"Expected increasing"),
        ([0, 0], ValueError, r"Expected increasing"),
        (True, TypeError, r"number of layers or a sequence"),
        ("01", TypeError, r"number of layers or a sequence"),
        (1.5, TypeError, r"got 1.5"),
        ({"decoder": 1}, ValueError, r"no tower 'decoder'. Its towers: '' \(2 layers\)"),
    ],
)
def test_layers_that_do_not_fit(layers: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        student_from_teacher(bert(), layers)


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (lambda: make("SwinForImageClassification"), dict(layers=1), r"SwinConfig .*stages"),
        (lambda: make("ConvNextForImageClassification"), dict(layers=2), r"stages"),
        (lambda: make("DetrForObjectDetection"), dict(layers=1), r"tower 'backbone'"),
        (
            lambda: make("ModernBertForSequenceClassification"),
            dict(layers=[1, 2]),
            r"Layer 1 of the teacher cannot be layer 0 .*Keep other layers",
        ),
        (
            lambda: make("Blip2ForConditionalGeneration"),
            dict(layers={"qformer": [0, 2]}),
            r"Layer 2 of the teacher cannot be layer 1 .*crossattention",
        ),
        (
            lambda: make("GPT2LMHeadModel", scale_attn_by_inverse_layer_idx=True),
            dict(layers=[0, 2]),
            r"Layer 2 of the teacher cannot be layer 1",
        ),
        (
            lambda: make("WhisperForAudioClassification", use_weighted_layer_sum=True),
            dict(layers=2),
            r"'layer_weights' of shape \(4,\) the student's \(3,\)",
        ),
        (lambda: bert(), dict(layers=2, hidden_size=12), r"multiple of 8 up to its own 16"),
        (lambda: bert(), dict(layers=2, hidden_size=24), r"multiple of 8 up to its own 16"),
        (lambda: make("FalconForCausalLM"), dict(layers=3, hidden_size=8), r"query_key_value"),
        (lambda: make("Wav2Vec2ForCTC"), dict(layers=3, hidden_size=8), r"pos_conv_embed"),
        (lambda: make("MambaForCausalLM"), dict(layers=3, hidden_size=8), r"no heads"),
        (lambda: make("CLIPModel"), dict(layers=2, hidden_size=8), r"Name the one .*`tower=`"),
        (
            lambda: make("BartForConditionalGeneration"),
            dict(layers=2, hidden_size=8, tower="encoder"),
            r"share one width",
        ),
        (
            lambda: make("BartForConditionalGeneration"),
            dict(layers={"encoder": 1}, tower="encoder"),
            r"not both",
        ),
    ],
)
def test_students_that_cannot_be_are_refused(
    build: Callable[[], Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        student_from_teacher(build(), **arguments)


def test_teachers_that_cannot_be_are_refused() -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(bert(), peft.LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(TypeError, match="merge_and_unload"):
        student_from_teacher(adapted, 1)
    assert depths(student_from_teacher(adapted.merge_and_unload(), 1)) == {"": 1}
    with pytest.raises(TypeError, match="PreTrainedModel, got Linear"):
        student_from_teacher(nn.Linear(2, 2), 1)  # type: ignore[type-var]
    quantised = bert()
    quantised.config.quantization_config = {"load_in_8bit": True}
    with pytest.raises(ValueError, match="quantised"):
        student_from_teacher(quantised, 1)
    with pytest.raises(ValueError, match="offloaded"):
        student_from_teacher(bert().to("meta"), 1)


def test_a_class_that_its_config_does_not_build_is_refused() -> None:
    class Own(transformers.BertPreTrainedModel):
        def __init__(self, config: BertConfig, head: nn.Module) -> None:
            super().__init__(config)
            self.bert, self.head = BertModel(config), head
            self.post_init()

    with pytest.raises(ValueError, match=r"Own cannot be built again .*'head'"):
        student_from_teacher(Own(BertConfig(**TEXT), nn.Linear(16, 2)), 1)


def test_a_model_without_layers_is_refused() -> None:
    class Flat(transformers.BertPreTrainedModel):
        def __init__(self, config: BertConfig) -> None:
            super().__init__(config)
            self.embeddings = nn.Embedding(8, 4)
            self.post_init()

    with pytest.raises(ValueError, match="no stack of layers"):
        student_from_teacher(Flat(BertConfig(**TEXT)), 1)
