"""What the tokens of a vocabulary spell: the characters, or bytes, that each stands for."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

Span = tuple[int, int]
ITEM = array("i").itemsize
SPACE = "▁"  # of sentencepiece
GLUED = frozenset("-'’/&")
COMPOSING = ('"NF', "Precompiled", "StripAccents")  # what normalizers are called
NOTHING = b"\xff"
"""For special tokens: a byte that no UTF-8 text has, so that no search runs across them."""


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
        self._added: dict[int, str] = {
            i: token.content for i, token in tokenizer.added_tokens_decoder.items()
        }
        marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.unknown: int | None = tokenizer.unk_token_id
        self.special = frozenset({*tokenizer.all_special_ids, *marked} - {self.unknown})
        self._kind = _kind(tokenizer.backend_tokenizer)
        self.is_exact = self._kind in ("bytes", "spaces")
        normalizer = _state(tokenizer.backend_tokenizer.normalizer)
        self.loses_marks = not self.is_exact or any(name in normalizer for name in COMPOSING)
        self._prefix = _prefix(tokenizer.backend_tokenizer)
        self._known: dict[int, bytes] = {}

    def __getitem__(self, token: int) -> bytes:
        """The bytes of a token; `NOTHING` for special and unknown ones."""
        piece = self._known.get(token)
        if piece is None:
            piece = self._known[token] = self._spelt(token)
        return piece

    def _spelt(self, token: int) -> bytes:
        if token in self.special or token == self.unknown:
            return NOTHING
        if token in self._added:
            return self._added[token].encode()
        found = self._tokenizer.convert_ids_to_tokens(token)
        if found is None:
            return NOTHING
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
            piece = self[token].decode() if self[token] != NOTHING else "\ufffd"
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
        pieces = [self[token] if self[token] != NOTHING else b"\xef\xbf\xbd" for token in tokens]
        # A character cut off by truncation becomes lone surrogates, which no name has.
        text = b"".join(pieces).decode("utf-8", "surrogateescape")
        ends = list(accumulate(map(len, pieces)))
        owners: list[int] = []
        for place, character in enumerate(text):
            owners += [place] * len(character.encode("utf-8", "surrogateescape"))
        spans, start = [], 0
        for end in ends:
            spans.append((owners[start], owners[end - 1] + 1) if end > start else (0, 0))
            start = end
        return text, spans


class Row:
    """The tokens of a row.

    Args:
        tokens: Their ids.
        mask: 0 for padding; None if there is none.
        pieces: What tokens spell.
    """

    def __init__(self, tokens: list[int], mask: list[int] | None, pieces: TokenPieces) -> None:
        self.tokens, self._pieces, self.loses_marks = tokens, pieces, pieces.loses_marks
        special = pieces.special
        if mask is None:
            self._is_text = [token not in special for token in tokens]
        else:
            self._is_text = [t not in special and m != 0 for t, m in zip(tokens, mask, strict=True)]

    def part(self, first: int, end: int) -> Row:
        """The tokens of a run, as a row."""
        return Row(self.tokens[first:end], None, self._pieces)

    @cached_property
    def runs(self) -> list[Span]:
        """First position and end of each run of tokens that are not special."""
        before = [False, *self._is_text][: len(self._is_text)]
        pairs = zip(before, self._is_text, strict=True)
        edges = [place for place, (was, now) in enumerate(pairs) if was != now]
        if self._is_text and self._is_text[-1]:
            edges.append(len(self._is_text))
        return list(zip(edges[::2], edges[1::2], strict=True))

    @cached_property
    def ids(self) -> bytes:
        """The ids, `ITEM` bytes each."""
        return array("i", self.tokens).tobytes()

    @cached_property
    def _spelt(self) -> list[bytes]:
        pieces = self._pieces
        return [
            pieces[token] if is_text else NOTHING
            for token, is_text in zip(self.tokens, self._is_text, strict=True)
        ]

    @cached_property
    def spelling(self) -> bytes:
        """What the tokens spell."""
        return b"".join(self._spelt)

    @cached_property
    def bounds(self) -> list[int]:
        """Where each token begins in `spelling`, and its length."""
        return [0, *accumulate(map(len, self._spelt))]

    def is_blank(self, place: int) -> bool:
        """Whether a token is whitespace alone; offsets count it to the word that follows."""
        return self._pieces[self.tokens[place]].isspace()

    def cuts(self, first: int, end: int) -> tuple[bool, bool]:
        """Whether the first and the last character of a run of tokens lack some of their bytes."""
        if not self._pieces.is_exact:
            return False, False
        start, stop = self.bounds[first], self.bounds[end]
        head = self.spelling[start:stop][:1]
        return b"\x80" <= head < b"\xc0", _lacks_end(self.spelling[max(start, stop - 4) : stop])

    @cached_property
    def spelt_runs(self) -> list[Span]:
        """The runs in `spelling`, without the whitespace around them."""
        made = []
        for first, end in self.runs:
            start, stop = self.bounds[first], self.bounds[end]
            run = self.spelling[start:stop]
            start += len(run) - len(run.lstrip())
            made.append((start, max(start, stop - (len(run) - len(run.rstrip())))))
        return made


def _lacks_end(tail: bytes) -> bool:
    """Whether the last character of UTF-8 is cut."""
    for back, byte in enumerate(reversed(tail), 1):
        if byte & 0xC0 != 0x80:
            return back < 1 + (byte >= 0xC0) + (byte >= 0xE0) + (byte >= 0xF0) and byte != 0xFF
    return False


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
    if '"WordPiece"' in state:
        found = json.loads(state).get("prefix")
        if isinstance(found, str):
            return found
    return "##"


_is_byte = re.compile(r"<0x[0-9A-F]{2}>").fullmatch


def _byte_characters() -> dict[str, bytes]:
    """The printable characters by which byte-level vocabularies write bytes."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    written = {chr(byte): byte for byte in plain}
    written.update({chr(0x100 + place): byte for place, byte in enumerate(others)})
    return {character: bytes([byte]) for character, byte in written.items()}


_BYTES = _byte_characters()
