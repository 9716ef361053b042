"""Names in texts: the same as a search that tries every span."""

import builtins
import hashlib
import itertools
import pickle
import re
import unicodedata
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_adapt.knowledge.linking.matcher import AhoCorasickMatcher, WordMatcher
from hf_adapt.knowledge.linking.normalization import (
    RULES,
    Folded,
    find_unspaced,
    fold,
    fold_names,
    fold_punctuation,
    inner_offsets,
    token_splitter,
)
from tests.helpers.names import is_boundary, is_mark, naive, unspaced

MATCHERS = [WordMatcher, AhoCorasickMatcher]
# Few letters, so that names are found, overlap and nearly match; each with a trap of its own.
LETTERS = st.sampled_from(
    [
        *("aab  bcC1_+.&-'" + "\t\n\u00a0éßİﬁΣςǰK🇩🇩🇪’\u2011" + "中文かがก한"),
        *("e\u0301", "\u0301", "ss", "fi", "❤\ufe0f", "👩\u200d💻", "か\u3099", "กี"),
        *("\u1112\u1161", "\u11ab", "\u212b", "\U00020000", "हि", "\u200c", "ΐ"),
    ]
)
TEXTS = st.lists(LETTERS, max_size=30).map("".join)
NAMES = st.lists(st.lists(LETTERS, min_size=1, max_size=4).map("".join), min_size=1, max_size=8)


def found(
    matcher: Any, names: list[str], text: str, case: bool, words: bool, overlapping: bool
) -> list[tuple[int, int, str]]:
    numbers: dict[str, int] = {}
    for name in names:
        if folded := fold_names([name], case)[0]:
            numbers.setdefault(folded, 1 + len(numbers))
    texts = list(numbers)
    folded = fold(fold_punctuation(text), case)
    return [
        (folded.origin(start), folded.origin(end), texts[number - 1])
        for start, end, number in matcher(numbers, words).find(folded, overlapping)
    ]


@pytest.mark.parametrize("matcher", MATCHERS)
@settings(deadline=None, max_examples=200)
@given(NAMES, TEXTS, st.booleans(), st.booleans(), st.booleans())
@example(["caf"], "café cafe\u0301 caf", True, True, False)
@example(["izmir", "bay"], "İzmir izmir bay", True, True, False)
@example(["new york", "york city", "new york city hall"], "new york city", True, True, False)
@example(["s", "ss"], "ß", True, False, False)
@example(["s"], "ß s", True, False, False)
@example(["s"], "ß s", True, False, True)
@example(["🇩🇪", "🇪🇸", "🇩"], "🇩🇪🇸🇪 🇪🇸 🇩", True, True, True)
@example(["o'neil-x"], "O’Neil‑X o'neil-x", True, True, False)
@example(["C++", "C", "+"], "C++ C+ c", False, True, True)
def test_matches_are_those_of_every_span(
    matcher: Any, names: list[str], text: str, case: bool, words: bool, overlapping: bool
) -> None:
    expected = naive(names, text, case, words, overlapping)
    assert found(matcher, names, text, case, words, overlapping) == expected


@pytest.mark.parametrize("matcher", MATCHERS)
@settings(deadline=None, max_examples=25)
@given(NAMES, TEXTS)
def test_in_a_very_long_text(matcher: Any, names: list[str], text: str) -> None:
    unit = " x " + text + " x \u0301 "
    once = found(matcher, names, unit, True, True, False)
    repeated = found(matcher, names, unit * 100, True, True, False)
    assert len(once) * 100 == len(repeated)
    moved = [(s + 99 * len(unit), e + 99 * len(unit), name) for s, e, name in once]
    assert repeated[len(repeated) - len(once) :] == moved


@given(st.text(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_folding_is_canonical_and_keeps_offsets(text: str, case: bool) -> None:
    folded = fold(text, case)
    offsets = [
        folded.origin(place) for place in range(len(folded.text) + 1) if place not in folded.inside
    ]
    assert offsets == sorted(offsets)
    assert offsets[0] == 0 and offsets[-1] == len(text)
    again = fold(unicodedata.normalize("NFD", text), case)
    assert unicodedata.normalize("NFC", again.text) == unicodedata.normalize("NFC", folded.text)


def test_every_character_keeps_its_kind() -> None:
    """Otherwise a text would have other word boundaries when it is folded."""
    marked = set()
    blocks = [(0, 0x3000), (0xA640, 0xAC00), (0xF900, 0x10000), (0x1D000, 0x1F000)]
    for code in itertools.chain.from_iterable(range(*block) for block in blocks):
        character = chr(code)
        kinds = [(x.isspace(), x.isalnum(), is_mark(x)) for x in fold(character, True).text]
        first = (character.isspace(), character.isalnum(), is_mark(character))
        if kinds[0] != first and not (is_mark(character) and kinds[0][1]):
            marked.add(character)
    assert not marked


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.booleans())
def test_tokens_and_boundaries_agree(text: str, words: bool) -> None:
    inner = inner_offsets(Folded(text := fold(text, True).text), words)
    pieces = token_splitter(False, words)(text)
    assert "".join(pieces) == text
    place, edges = 0, {0}
    for piece in pieces:
        place += len(piece)
        edges.add(place)
    for place in range(len(text) + 1):
        assert bool(inner[place]) != (place in edges)
        assert is_boundary(text, place, words) == (place in edges)


@pytest.mark.parametrize("matcher", MATCHERS)
@pytest.mark.parametrize("words", [False, True])
def test_punctuation_of_all_sorts_keeps_offsets(matcher: Any, words: bool) -> None:
    names = ["alzheimer’s disease", "x-ray", "co\u2010factor", "hy\u00adphen", "комп'ютер"]
    text = (
        "Straße: Alzheimer's disease, ALZHEIMER\u02bcS\tDISEASE; X\u2013Ray x\u2212ray x\u00ad-ray "
        "co-factor hyphen Hy\u00adphen\u00ad, комп\u2019ютер x—ray"
    )
    pieces = [
        *("Alzheimer's disease", "ALZHEIMER\u02bcS\tDISEASE", "X\u2013Ray", "x\u2212ray"),
        *("x\u00ad-ray", "co-factor", "hyphen", "Hy\u00adphen\u00ad", "комп\u2019ютер"),
    ]
    got = [text[start:end] for start, end, _ in found(matcher, names, text, True, words, False)]
    assert got == pieces


@pytest.mark.parametrize("matcher", MATCHERS)
@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("a ß\u00ad b", None),
        ("a \ufb01\u00adne", None),
        ("\u00adNew York", "New York"),
        ("in New \u00adYork", "New \u00adYork"),
        ("in New\u00a0\u00ad\u00adYork", "New\u00a0\u00ad\u00adYork"),
        ("in \u00adNew \u00ad York\u00ad, too", "New \u00ad York\u00ad"),
    ],
)
def test_soft_hyphens(matcher: Any, words: bool, text: str, piece: str | None) -> None:
    got = found(matcher, ["s", "f", "new york"], text, True, words, False)
    assert [text[start:end] for start, end, _ in got] == ([] if piece is None else [piece])


@pytest.mark.parametrize("matcher", MATCHERS)
@pytest.mark.parametrize("words", [False, True])
def test_a_flag_is_not_found_inside_of_others(matcher: Any, words: bool) -> None:
    england = "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"
    text = f"🇩🇪🇸🇪 中🇪🇸中 {england}🏴"
    got = found(matcher, ["🇪🇸", "🏴", "🇸🇪"], text, True, words, True)
    assert got == [(2, 4, "🇸🇪"), (6, 8, "🇪🇸"), (17, 18, "🏴")]


def test_other_rules_of_folding_need_another_number() -> None:
    """Caches of linked datasets are found by it: raise RULES, then change the hash here."""
    texts = [
        "İzmir  Bay\t",
        "Straße ﬁne ΐ",
        "cafe\u0301",
        "O’Neil‑X",
        "hy\u00adphen",
        "ß\u00ad \u00ade",
        "🇩🇪🇸",
        "中文か\u3099",
    ]
    made = [
        (*fold(fold_punctuation(text), True), token_splitter(False, True)(text)) for text in texts
    ]
    told = hashlib.sha256(repr([(*row[:3], sorted(row[3]), row[4]) for row in made]).encode())
    assert (RULES, told.hexdigest()[:12]) == (3, "43709248ddfe")


def test_unspaced_scripts() -> None:
    for character in "中ไกか龥𠀀ខမ":
        assert find_unspaced(character) and unspaced(character)
    for character in "aй한हא":
        assert not find_unspaced(character)


@pytest.mark.parametrize("matcher", MATCHERS)
def test_a_matcher_is_the_same_after_pickling(matcher: Any) -> None:
    made = matcher({"new york": 1, "york": 2, "c++": 3})
    again = pickle.loads(pickle.dumps(made))
    text = fold("York, New  York and C++", True)
    assert again.find(text, False) == made.find(text, False) != []


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "ahocorasick_rs":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=re.escape('pip install "hf-adapt[knowledge]"')):
        AhoCorasickMatcher({"a": 0})
