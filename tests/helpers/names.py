"""A graph of names alone, and a search that is slow and plainly right."""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence

from hf_adapt.knowledge.linking.normalization import UNSPACED

RANGES = []
letters = iter(UNSPACED)
for first in letters:
    dash = next(letters)
    assert dash == "-"
    RANGES.append((first, next(letters)))


class Names:
    """What a linker asks of a graph."""

    def __init__(self, names: Sequence[str | tuple[str, int] | tuple[str, int, float]]) -> None:
        self.rows: list[tuple[str, int, float]] = []
        for place, name in enumerate(names):
            given = (name, place) if isinstance(name, str) else name
            self.rows.append((*given, 1.0)[:3])  # type: ignore[arg-type]
        self.num_entities = 1 + max((row[1] for row in self.rows), default=-1)
        self.fingerprint = str(sorted(self.rows))

    def surfaces(self) -> Iterator[tuple[str, int, float]]:
        return iter(self.rows)

    def key(self, entity: int) -> str:
        return f"Q{entity}"

    def label(self, entity: int) -> str:
        return next(name for name, number, _ in self.rows if number == entity)

    def entities(self, keys: Sequence[str]) -> list[int]:
        known = {self.key(entity): entity for entity in range(self.num_entities)}
        return [known.get(key, -1) for key in keys]


def canonical(text: str, ignore_case: bool) -> str:
    text = text.casefold() if ignore_case else text
    text = text.replace("’", "'").replace("\u2011", "-")
    return unicodedata.normalize("NFC", " ".join(text.split()))


def unspaced(character: str) -> bool:
    return any(low <= character <= high for low, high in RANGES)


def is_mark(character: str) -> bool:
    return unicodedata.category(character)[0] == "M" or character in "\u200c\u200d"


def is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def is_regional(character: str) -> bool:
    return 0x1F1E6 <= ord(character) <= 0x1F1FF


def is_boundary(text: str, place: int, whole_words: bool) -> bool:
    """Whether a mention may begin or end here."""
    if place in (0, len(text)):
        return True
    base = place - 1
    while base > 0 and is_mark(text[base]):
        base -= 1
    after, before = text[place], text[base]
    if is_regional(after):
        start = place
        while start > 0 and is_regional(text[start - 1]):
            start -= 1
        return (place - start) % 2 == 0
    if is_mark(after):
        return not is_word(before)
    if not whole_words or not is_word(after) or not is_word(before):
        return True
    return unspaced(after) or unspaced(before)


def naive(
    names: Iterable[str],
    text: str,
    ignore_case: bool = True,
    whole_words: bool = True,
    overlapping: bool = False,
) -> list[tuple[int, int, str]]:
    """Every span of the text against every name."""
    wanted = {canonical(name, ignore_case) for name in names} - {""}
    places = [p for p in range(len(text) + 1) if is_boundary(text, p, whole_words)]
    found = [
        (start, end, canonical(text[start:end], ignore_case))
        for start in places
        for end in places
        if start < end
        and not text[start].isspace()
        and not text[end - 1].isspace()
        and canonical(text[start:end], ignore_case) in wanted
    ]
    if overlapping:
        return sorted(found)
    kept, free = [], 0
    for match in sorted(found, key=lambda match: (match[0], -match[1])):
        if match[0] >= free:
            kept.append(match)
            free = match[1]
    return kept
