"""What the tokens of a vocabulary spell: the characters, or bytes, that each stands for."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

Span = tuple[int, int]
SPACE = "▁"  # of sentencepiece
GLUED = frozenset("-'’/&")
COMPOSING = ('"NF', "Precompiled", "StripAccents")  # what normalizers are called
UNKNOWN = "\ufffd".encode()
"""What special and unknown tokens spell."""
_is_byte = re.compile(r"<0x[0-9A-F]{2}>").fullmatch


class TokenPieces:
    """The bytes that tokens spell, and the text of a run of tokens.

    Args:
        tokenizer: A fast tokenizer.

    Attributes:
        is_exact: Whether tokens spell the text's own characters, spaces included (byte-level BPE,
            sentencepiece), up to the tokenizer's normalisation.
        loses_marks: Whether offsets may leave out accents, which the tokenizer drops or composes.
        special: Tokens that stand for no text, unknown ones not among them.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        unknown: int | None = tokenizer.unk_token_id
        marked = {i for i, token in added.items() if token.special}
        self.special = frozenset({*tokenizer.all_special_ids, *marked} - {unknown})
        backend = tokenizer.backend_tokenizer
        self._kind, self._prefix = _kind(backend), _prefix(backend)
        self.is_exact = self._kind in ("bytes", "spaces")
        normalizer = _state(backend.normalizer)
        self.loses_marks = not self.is_exact or any(name in normalizer for name in COMPOSING)
        self._known = {i: token.content.encode() for i, token in added.items()}
        self._known.update(dict.fromkeys({*self.special, unknown}, UNKNOWN))

    def __getitem__(self, token: int) -> bytes:
        """The bytes of a token."""
        piece = self._known.get(token)
        if piece is None:
            piece = self._known[token] = self._spelt(token)
        return piece

    def _spelt(self, token: int) -> bytes:
        found = self._tokenizer.convert_ids_to_tokens(token)
        if found is None:
            return UNKNOWN
        piece = str(found)
        if self._kind == "bytes":
            return b"".join(_BYTES.get(c) or c.encode() for c in piece.removesuffix("</w>"))
        if self._kind == "spaces":
            if _is_byte(piece):
                return bytes([int(piece[3:5], 16)])
            return piece.replace(SPACE, " ").encode()
        return piece.encode()

    def text(self, tokens: Sequence[int]) -> tuple[str, list[Span]]:
        """A text that a run of tokens may stand for, and the characters of each.

        Tokens that spell spaces give the text itself. Others are put together as most text is
        written: hyphens, apostrophes, slashes and ampersands without spaces around them.

        Args:
            tokens: Without special ones.
        """
        if self.is_exact:
            return self._exact_text(tokens)
        parts: list[str] = []
        spans: list[Span] = []
        size, glue = 0, True
        for token in tokens:
            piece = self[token].decode()
            if self._kind == "suffix":
                word, ends_word = piece.removesuffix("</w>"), piece.endswith("</w>")
            else:
                word, ends_word = piece.removeprefix(self._prefix), True
                glue = glue or len(word) < len(piece) or word in GLUED
            if not glue:
                parts.append(" ")
                size += 1
            parts.append(word)
            spans.append((size, size + len(word)))
            size += len(word)
            glue = not ends_word or word in GLUED
        return "".join(parts), spans

    def _exact_text(self, tokens: Sequence[int]) -> tuple[str, list[Span]]:
        pieces = [self[token] for token in tokens]
        spelt = b"".join(pieces)
        # The bytes of a character that was cut become lone surrogates, which no name has.
        text = spelt.decode("utf-8", "surrogateescape")
        bounds = [0, *accumulate(map(len, pieces))]
        if len(text) < len(spelt):
            codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
            sizes = 1 + (codes > 0x7F) + (codes > 0x7FF).astype(np.int64) + (codes > 0xFFFF)
            sizes[(codes >= 0xDC80) & (codes <= 0xDCFF)] = 1
            owners = np.repeat(np.arange(len(text)), sizes)
            starts = np.append(owners, len(text))[bounds].tolist()
            ends = (owners[np.array(bounds[1:]) - 1] + 1).tolist()
        else:
            starts, ends = bounds, bounds[1:]
        spans = [
            (start, end) if piece else (0, 0)
            for piece, start, end in zip(pieces, starts, ends, strict=False)
        ]
        return text, spans


def _state(part: Any) -> str:
    return "" if part is None else bytes(part.__getstate__()).decode()


def _kind(backend: Any) -> str:
    """How tokens spell text: by what undoes the tokenisation, else by what did it."""
    for state in (_state(backend.decoder), _state(backend.pre_tokenizer)):
        if '"ByteLevel"' in state:
            return "bytes"
        if '"Metaspace"' in state or SPACE in state or r"\u2581" in state:
            return "spaces"
        if '"BPEDecoder"' in state:
            return "suffix"
        if '"WordPiece"' in state:
            return "prefix"
    return "words"


def _prefix(backend: Any) -> str:
    state = _state(backend.decoder)
    found = json.loads(state).get("prefix") if '"WordPiece"' in state else None
    return found if isinstance(found, str) else "##"


def _byte_characters() -> dict[str, bytes]:
    """The printable characters by which byte-level vocabularies write bytes."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    written = {chr(byte): byte for byte in plain}
    written.update({chr(0x100 + place): byte for place, byte in enumerate(others)})
    return {character: bytes([byte]) for character, byte in written.items()}


_BYTES = _byte_characters()
