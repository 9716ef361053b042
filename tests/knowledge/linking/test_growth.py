"""A text of four times the length costs four times as much: nothing is quadratic."""

import gc
import time
import warnings
from array import array
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adapt.knowledge.linking.linker import EntityLinker
from hf_adapt.knowledge.linking.locating import Overlap, find_part, find_whole
from hf_adapt.knowledge.linking.tokens import TokenAligner
from tests.helpers.names import Names
from tests.helpers.tokenizers import tokenizer

NAMES = Names(["heart attack", "heart", "attack heart", "aspirin", "a a a", "北京", "北京大学"])
UNITS = {
    "words": "heart attack and aspirin ",
    "letters": "heartattack",
    "repeated": "a ",
    "spaces": "heart  attack \n and ",
    "decomposed": "cafe\u0301 heart attack ",
    "marks": "\u0301\u0327",
    "signs": "我在北京大学北京",
    "flags": "🇩🇪",
}


def growth(task: Callable[[Any], Any], make: Callable[[int], Any], units: int) -> float:
    """How much more CPU four times as many units take: 4 if linear, 16 if quadratic."""

    def seconds(number: int) -> float:
        given, taken = make(number), []
        task(given)
        for _ in range(3):
            gc.disable()
            started = time.process_time()
            task(given)
            taken.append(time.process_time() - started)
            gc.enable()
        return max(min(taken), 5e-4)  # below, the clock and constant costs are all there is

    return seconds(4 * units) / seconds(units)


@pytest.mark.parametrize(
    "options",
    [
        {"matcher": "words"},
        {"matcher": "words", "overlapping": True, "inflections": "english"},
        {"matcher": "words", "whole_words": False},
        {"matcher": "ahocorasick", "overlapping": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("unit", UNITS)
def test_linking(options: dict[str, Any], unit: str) -> None:
    linker = EntityLinker(NAMES, **options)
    # One character that folds to two: from then on offsets must be moved.
    assert growth(linker.link, lambda n: "ß " + UNITS[unit] * n, 6_000 // len(UNITS[unit])) < 9


ROWS = ["whole", "offsets", "end", "decoded"]


@pytest.mark.parametrize("kind", ["wordpiece", "merging bytes"])
@pytest.mark.parametrize("row", ROWS)
def test_mapping_to_tokens(kind: str, row: str) -> None:
    made = tokenizer(kind)
    linker = EntityLinker(NAMES, overlapping=True)

    def make(number: int) -> dict[str, Any]:
        text = "heart attack and cafe\u0301 " * number
        encoded = made(text, return_offsets_mapping=True)
        ids, size = encoded["input_ids"], len(encoded["input_ids"])
        return {
            "whole": {"input_ids": ids, "text": text},
            "offsets": {**encoded, "text": text},
            "end": {"input_ids": ids[size // 2 :], "text": text},
            "decoded": {"input_ids": ids},
        }[row]

    def align(given: dict[str, Any]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # linked in the decoding
            assert TokenAligner(linker, made)(given)

    assert growth(align, make, 300) < 9


def test_a_window_costs_what_it_holds() -> None:
    """Windows of a long text are as cheap as those of a short one, once the text is linked."""
    made, asked = tokenizer("wordpiece"), []

    class Counted(str):
        """A text that counts how much of it is copied."""

        def __getitem__(self, key: Any) -> str:
            part = super().__getitem__(key)
            asked.append(len(part))
            return part

    text = Counted("heart attack and aspirin " * 1_000)
    windows = made(
        str(text), truncation=True, max_length=64, stride=16, return_overflowing_tokens=True
    )["input_ids"]
    aligner = TokenAligner(EntityLinker(NAMES), made)
    aligner({"input_ids": windows[0], "text": text})
    asked.clear()
    found = aligner({"input_ids": windows[len(windows) // 2], "text": text})
    assert found and sum(asked) < 1_000


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("text", [b"-", b"- ", b"a", b"heart "])
def test_a_text_that_repeats_itself_is_located(text: bytes, size: int) -> None:
    def make(number: int) -> tuple[bytes, bytes]:
        many = text * size * number
        return many + b"x" * size + many[: len(many) // 2], many + b"y" * size

    def locate(given: tuple[bytes, bytes]) -> None:
        row, other = given
        half = row[: len(row) // 8 * 4]
        find_whole(half + b"z" * 4, half[: len(half) // 8 * 4], 1, size)
        assert find_part(row, [(0, len(row) // size)], other, 0, size) is not None

    assert growth(locate, make, 10_000 // len(text)) < 9


FEW = st.lists(st.sampled_from([0, 1, 32, 97]), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(FEW, FEW, st.integers(0, 3), st.sampled_from([1, 4]))
def test_locating_is_that_of_a_search_at_every_place(
    row: list[int], text: list[int], start: int, size: int
) -> None:
    one, other = (array("B" if size == 1 else "i", x).tobytes() for x in (row, text))

    def inside_word(place: int) -> bool:
        around = row[max(place - 1, 0) : place] + row[place + len(text) :][:1]
        return size == 1 and 97 in around

    places = [p for p in range(start, len(row)) if row[p : p + len(text)] == text]
    whole = next((p for p in places if not inside_word(p)), next(iter(places), None))
    expected = None if whole is None else Overlap(whole, 0, len(text))
    assert find_whole(one, other, start, size) == expected
    within = [p for p in range(len(text)) if text[p : p + len(row)] == row]
    lengths = [len(row)] * bool(within)
    lengths += [n for n in range(1, len(row) + 1) if row[-n:] == text[:n] or row[:n] == text[-n:]]
    found = find_part(one, [(0, len(row))], other, 0, size)
    assert (found.length if found else 0) == max(lengths, default=0)
