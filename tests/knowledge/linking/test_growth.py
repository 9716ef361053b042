"""A text of four times the length costs four times as much: nothing is quadratic."""

import gc
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adapt.knowledge.linking.entity_linker import EntityLinker
from hf_adapt.knowledge.linking.token_alignment import TokenAligner, longest_block
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


ROWS = ["whole", "offsets", "end", "inside", "decoded"]


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
            "inside": {"input_ids": [*ids[:7], *ids[size // 2 :], *ids[:2]], "text": text},
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


FEW = st.text("\0\1 a", min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(FEW, FEW)
def test_the_longest_block_is_that_of_every_part(row: str, text: str) -> None:
    parts = [row[i:j] for i in range(len(row)) for j in range(i + 1, len(row) + 1)]
    lengths = [len(part) for part in parts if part in text and len(part) >= min(8, len(row))]
    found = longest_block(row, text)
    assert (found.length if found else 0) == max(lengths, default=0)
    if found:
        at, of, length = found
        assert row[at : at + length] == text[of : of + length]
