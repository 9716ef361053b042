"""What the tokens of a vocabulary spell, by the tokenizer's own decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Span = tuple[int, int]
BROKEN = "\ufffd"
"""What decoders make of bytes that are no whole character."""
UNKNOWN = "\ufffc"
"""What unknown tokens spell: no name has it."""
GLUED = frozenset("-'’/&")
MANY_TOKENS = 16
"""Tokens in a row that may share their characters."""


class TokenPieces:
    """The text of a run of tokens, and which of its characters each token stands for."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._backend = tokenizer, tokenizer.backend_tokenizer
        unknown: int | None = tokenizer.unk_token_id
        marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special = frozenset({*tokenizer.all_special_ids, *marked} - {unknown})
        """Tokens that stand for no text, unknown ones not among them."""
        # Decoders drop a space at the beginning: a piece is what its tokens add to a word.
        self._before = self._ids("a")
        self._size = len(self._backend.decode(self._before, skip_special_tokens=False))
        self._loses_spaces = self._ids("a-a") == self._ids("a - a")  # as WordPiece does
        self._known: dict[int, str] = {}
        if unknown is not None:
            self._known[unknown] = " " * self[unknown].startswith(" ") + UNKNOWN

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _spelt(self, tokens: list[int]) -> str:
        text: str = self._backend.decode([*self._before, *tokens], skip_special_tokens=False)
        return text[self._size :]

    def __getitem__(self, token: int) -> str:
        """What a token spells, with the space before it."""
        piece = self._known.get(token)
        if piece is None:
            piece = self._known[token] = self._spelt([token])
        return piece

    def text(self, tokens: Sequence[int]) -> tuple[str, list[Span]]:
        """A text that tokens may stand for, and the characters of each token.

        Where the tokenizer loses spaces, it is put together as most text is written: hyphens,
        apostrophes, slashes and ampersands without spaces around them.
        """
        parts: list[str] = []
        spans: list[Span] = []
        size, glue, shared = 0, True, list[int]()

        def add(piece: str, number: int) -> None:
            nonlocal size, glue
            if self._loses_spaces:
                is_glued = piece.strip() in GLUED
                piece, glue = piece.lstrip() if glue or is_glued else piece, is_glued
            parts.append(piece)
            spans.extend([(size, size + len(piece))] * number)
            size += len(piece)

        for token in tokens:
            piece = self[token]
            if BROKEN not in piece:
                if shared:
                    add(self._spelt(shared), len(shared))
                    shared = []
                add(piece, 1)
                continue
            shared.append(token)
            piece = self._spelt(shared)
            if BROKEN not in piece or len(shared) == MANY_TOKENS:
                add(piece, len(shared))
                shared = []
        if shared:
            add(self._spelt(shared), len(shared))
        return "".join(parts), spans
