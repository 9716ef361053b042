"""Tokenizers of few words: word by word, and trained ones of the kinds that matter for offsets."""

import functools
import json
from collections.abc import Sequence
from typing import Any

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def word_tokenizer(
    words: Sequence[str],
    special: Sequence[str] = BERT_SPECIAL,
    single: str | None = "[CLS] $A [SEP]",
    pair: str | None = None,
    **settings: Any,
) -> PreTrainedTokenizerFast:
    """One number a word: the special tokens first, then the words in their order.

    Args:
        words: The vocabulary.
        special: Tokens before the words. The usual names become the tokenizer's own.
        single: What is put around a text; None for nothing.
        pair: What is put around two texts.
        settings: Further options of the tokenizer, such as `model_max_length`.
    """
    vocabulary = {word: number for number, word in enumerate([*special, *words])}
    unknown = "[UNK]" if "[UNK]" in special else special[0]
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if single is not None:
        inside = [token for token in special if token in f"{single} {pair}"]
        raw.post_processor = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=[(t, vocabulary[t]) for t in inside]
        )
    names = {f"{token[1:-1].lower()}_token": token for token in BERT_SPECIAL if token in special}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **{**names, **settings})


def chat_template(end: str) -> str:
    """A template that says which tokens are the assistant's; each answer ends with `end`."""
    return (
        "{% for m in messages %}{% if m['role'] == 'user' %}user: {{ m['content'] }} "
        "{% else %}assistant: {% generation %}{{ m['content'] }} " + end + " {% endgeneration %}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )


# ---- trained tokenizers ----

WORDS = (
    "aspirin thins the blood of people after a heart attack in new york and at the café on naïve "
    "days, diabetes mellitus! covid-19 (AT&T) isn't C++; 北京 大学 😀 👩🏽‍💻 Straße Ångström "
    "e.g. it answers every question briefly"
).split()
NAMES = [
    "aspirin", "blood", "heart attack", "heart", "new york", "café", "naïve", "diabetes mellitus",
    "covid-19", "covid", "AT&T", "C++", "北京", "大学", "😀", "straße", "Ångström", "isn't", "days",
    "the", "question", "👩🏽‍💻",
]  # fmt: skip
CORPUS = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))]
KINDS = ["wordpiece", "bytes", "prefixed bytes", "merging bytes", "unigram", "fallback"]
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<|user|>"]


@functools.cache
def tokenizer(kind: str) -> Any:
    """As BERT, GPT-2, RoBERTa, Qwen, T5 and Llama 2 have it, in this order."""
    raw, trainer = _raw(kind)
    raw.train_from_iterator(CORPUS, trainer)
    if kind == "fallback":
        raw = _with_bytes(raw)
    if kind in ("wordpiece", "prefixed bytes", "unigram"):
        ids = [(token, raw.token_to_id(token)) for token in ("<s>", "</s>")]
        pairs = {
            "wordpiece": "<s> $A </s> $B:1 </s>:1",
            "prefixed bytes": "<s> $A </s> </s> $B </s>",
        }
        raw.post_processor = processors.TemplateProcessing(
            single="$A </s>" if kind == "unigram" else "<s> $A </s>",
            pair=pairs.get(kind, "$A </s> $B </s>"),
            special_tokens=ids,
        )
    # transformers 4 takes the prefix away again unless it is told.
    prefix = {"add_prefix_space": True} if kind == "prefixed bytes" else {}
    return PreTrainedTokenizerFast(
        **prefix,
        tokenizer_object=raw,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|user|>"],
    )


def _with_bytes(raw: Tokenizer) -> Tokenizer:
    """A token for each byte, for characters that have none; the trainer only makes special ones."""
    state = json.loads(raw.to_str())
    vocabulary = state["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    return Tokenizer.from_str(json.dumps(state))


def _raw(kind: str) -> tuple[Tokenizer, Any]:
    special: dict[str, Any] = dict(special_tokens=SPECIAL, show_progress=False)
    if kind == "wordpiece":
        raw = Tokenizer(models.WordPiece(unk_token="<unk>"))
        raw.normalizer = normalizers.BertNormalizer(lowercase=True)
        raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        raw.decoder = decoders.WordPiece(prefix="##")
        return raw, trainers.WordPieceTrainer(vocab_size=170, **special)
    if kind == "unigram":
        raw = Tokenizer(models.Unigram())
        raw.normalizer = normalizers.Sequence(
            [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")]
        )
        raw.pre_tokenizer = pre_tokenizers.Metaspace()
        raw.decoder = decoders.Metaspace()
        return raw, trainers.UnigramTrainer(vocab_size=150, unk_token="<unk>", **special)
    if kind == "fallback":
        raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        raw.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        raw.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        letters = dict(initial_alphabet=list("▁abcdefghijklmnopqrstuvwxyz"), limit_alphabet=40)
        return raw, trainers.BpeTrainer(vocab_size=180, **letters, **special)
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefixed bytes")
    if kind == "merging bytes":  # a full stop and the newline after it are one token
        raw.normalizer = normalizers.NFC()
        pattern = Regex(r" ?[^\s\p{L}\p{N}]+[\r\n]*|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|\s*[\r\n]+|\s+")
        raw.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(pattern, "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return raw, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, **special)
