"""The tokens of a row: its runs of text, and what they spell."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cached_property

from hf_adapt.knowledge.linking.token_pieces import Span, TokenPieces

CUT = "\udc80\udcff"
"""The first and the last of the lone surrogates that bytes of a cut character become."""


class TokenRow:
    """The tokens of a row.

    Args:
        tokens: Their ids.
        mask: 0 for padding; None if there is none.
        pieces: What tokens spell.
    """

    def __init__(self, tokens: list[int], mask: list[int] | None, pieces: TokenPieces) -> None:
        self.tokens, self.pieces = tokens, pieces
        masked = mask or itertools.repeat(1, len(tokens))
        is_text = [t not in pieces.special and m != 0 for t, m in zip(tokens, masked, strict=True)]
        # First position and end of each run of tokens that are not special.
        self.runs: list[Span] = []
        end = 0
        for in_run, group in itertools.groupby(is_text):
            start, end = end, end + sum(1 for _ in group)
            if in_run:
                self.runs.append((start, end))

    @cached_property
    def ids(self) -> str:
        """A character for each token, so that tokens are searched as strings are."""
        return as_characters(self.tokens)

    @cached_property
    def spelled_runs(self) -> list[tuple[str, list[Span]]]:
        """What the tokens of each run spell, and the characters of each."""
        return [self.pieces.text(self.tokens[first:end]) for first, end in self.runs]

    def cuts(self, first: int, end: int) -> tuple[bool, bool]:
        """Whether the first and the last character of a run lack some of their bytes."""
        if not self.pieces.is_exact:
            return False, False
        last, _ = self.pieces.text(self.tokens[max(first, end - 4) : end])
        head = self.pieces[self.tokens[first]][:1]
        return b"\x80" <= head < b"\xc0", is_cut(last[-1:])


def is_cut(character: str) -> bool:
    """Whether this is what is left of the bytes of a character that was cut."""
    return CUT[0] <= character <= CUT[1]


def as_characters(ids: Sequence[int]) -> str:
    """A character for each id, so that tokens are searched as strings are."""
    return "".join(map(chr, ids))
