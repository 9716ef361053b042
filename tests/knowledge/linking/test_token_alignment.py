"""Mentions by token, against the tokenizer's own offsets."""

import pickle
import unicodedata
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adapt.knowledge.linking.entity_linker import EntityLinker
from hf_adapt.knowledge.linking.mentions import TokenMention
from hf_adapt.knowledge.linking.token_alignment import TokenAligner
from hf_adapt.knowledge.linking.token_pieces import TokenPieces
from tests.helpers.names import Names
from tests.helpers.tokenizers import KINDS, NAMES, WORDS, tokenizer

LINKER = EntityLinker(Names(NAMES), min_length=1)
SEPARATORS = st.sampled_from([" ", " ", " ", "  ", ", ", "\n", ". ", "\t"])
PAIRS = st.lists(st.tuples(st.sampled_from(WORDS), SEPARATORS), min_size=1, max_size=25)
FORMS = st.sampled_from(["NFC", "NFC", "NFD"])


def joined(parts: list[tuple[str, str]], form: str) -> str:
    return unicodedata.normalize(form, "".join(word + gap for word, gap in parts)).strip()


TEXTS = st.builds(joined, PAIRS, FORMS)
Found = list[tuple[int, int, str, int]]


def found(aligner: TokenAligner, row: Any) -> Found:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no text may be looked for in the decoding
        mentions = aligner(row)
    return sorted((m.start, m.end, m.mention.surface, m.column) for m in mentions)


def real(kind: str, encoded: Any, place: int | None = None) -> list[tuple[int, int]]:
    """Offsets; none for a token that is only the space before a word."""
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    if place is not None:
        ids, offsets = ids[place], offsets[place]
    tokens = tokenizer(kind).convert_ids_to_tokens(ids)
    return [
        (0, 0) if token in ("Ġ", "▁") else tuple(span)
        for token, span in zip(tokens, offsets, strict=True)
    ]


def expected(
    texts: Sequence[str],
    offsets: Sequence[Sequence[int]],
    columns: Sequence[int | None],
    whole: Sequence[Sequence[Sequence[int]]],
    moved: int = 0,
) -> Found:
    """By a loop over all tokens: those of a mention, if the row has as many as the whole text."""
    made: Found = []
    for column, text in enumerate(texts):
        for mention in LINKER.link(text):
            start, end = mention.start, mention.end

            def inside(span: Sequence[int], start: int = start, end: int = end) -> bool:
                return span[1] > span[0] and span[1] > start and span[0] < end

            places = [
                place
                for place, span in enumerate(offsets)
                if columns[place] == column and inside((span[0] - moved, span[1] - moved))
            ]
            needed = sum(inside(span) for span in whole[column])
            if places and len(places) >= needed:
                made.append((places[0], places[-1] + 1, mention.surface, column))
    return sorted(made)


def alone(kind: str, text: str) -> Any:
    made = tokenizer(kind)
    return real(kind, made(text, add_special_tokens=False, return_offsets_mapping=True))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(TEXTS, st.sampled_from(["left", "right"]), st.booleans(), st.integers(0, 9))
def test_whole_and_truncated_rows(
    kind: str, text: str, padding_side: str, pad: bool, cut: int
) -> None:
    made = tokenizer(kind)
    made.padding_side = padding_side
    length = len(made(text)["input_ids"])
    limit = dict(padding="max_length", max_length=length + 5) if pad else {}
    if cut:
        limit = dict(truncation=True, max_length=max(4, length - cut * 4))
    encoded = made(text, return_offsets_mapping=True, **limit)
    offsets = real(kind, encoded)
    wanted = expected([text], offsets, encoded.sequence_ids(), [alone(kind, text)])
    aligner = TokenAligner(LINKER, made)
    row = {"input_ids": encoded["input_ids"], "text": text}
    assert found(aligner, row) == wanted
    assert found(aligner, {**row, "offset_mapping": encoded["offset_mapping"]}) == wanted
    for convert in (np.array, torch.tensor):
        assert found(aligner, {**row, "input_ids": convert(row["input_ids"])}) == wanted


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None)
@given(st.lists(st.sampled_from(WORDS), min_size=12, max_size=30, unique=True))
def test_windows_with_a_stride(kind: str, words: list[str]) -> None:
    text, made = " ".join(words), tokenizer(kind)
    made.padding_side = "right"
    encoded = made(
        text,
        truncation=True,
        max_length=16,
        stride=4,
        padding="max_length",
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    whole, aligner = [alone(kind, text)], TokenAligner(LINKER, made)
    for place, ids in enumerate(encoded["input_ids"]):
        offsets = encoded["offset_mapping"][place]
        wanted = expected([text], real(kind, encoded, place), encoded.sequence_ids(place), whole)
        row = {"input_ids": ids, "text": text}
        assert found(aligner, {**row, "offset_mapping": offsets}) == wanted
        got = found(aligner, row)
        # A window of few tokens may occur twice in the text; then another mention may be there.
        if sum(span[1] > span[0] for span in offsets) > 8:
            assert got == wanted


@pytest.mark.parametrize("kind", ["wordpiece", "prefixed bytes", "unigram"])
@settings(max_examples=25, deadline=None)
@given(TEXTS, TEXTS, st.sampled_from([None, "only_second", "only_first"]))
def test_pairs(kind: str, first: str, second: str, truncation: str | None) -> None:
    made = tokenizer(kind)
    lengths = [len(alone(kind, text)) for text in (first, second)]
    limit: dict[str, Any] = {}
    if truncation is not None:
        cut = lengths[truncation == "only_second"] // 3
        limit = dict(truncation=truncation, max_length=len(made(first, second)["input_ids"]) - cut)
    encoded = made(first, second, return_offsets_mapping=True, **limit)
    wanted = expected(
        [first, second],
        real(kind, encoded),
        encoded.sequence_ids(),
        [alone(kind, first), alone(kind, second)],
    )
    aligner = TokenAligner(LINKER, made, ("question", "context"))
    row = {"input_ids": encoded["input_ids"], "question": first, "context": second}
    assert found(aligner, {**row, "offset_mapping": encoded["offset_mapping"]}) == wanted
    got = found(aligner, row)
    kept = len(wanted)
    if truncation is None or len(encoded["input_ids"]) > 25:
        assert got == wanted
    else:
        assert len(got) <= kept + 2


TEMPLATES = [
    "<|user|>\n{}</s>",
    "<s><|user|> {} </s>",
    "Question: {}\nAnswer: briefly",
    "the question:\n\n{}\n\nit answers",
    '("{}")',
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(TEXTS, st.sampled_from(["", "."]))
def test_a_template_around_the_text(kind: str, template: str, text: str, stop: str) -> None:
    made, text = tokenizer(kind), text + stop
    prompt = template.format(text)
    encoded = made(prompt, add_special_tokens=False, return_offsets_mapping=True)
    moved = template.index("{}")
    offsets = real(kind, encoded)
    columns = [0 if end > moved and start < moved + len(text) else None for start, end in offsets]
    # The text may be tokenised otherwise than alone, so every token that is there is needed.
    shifted = [(start - moved, end - moved) for start, end in offsets]
    wanted = expected([text], offsets, columns, [shifted], moved)
    aligner = TokenAligner(LINKER, made)
    row = {"input_ids": encoded["input_ids"], "text": text}
    if len(alone(kind, text)) <= 12:
        return
    got = found(aligner, row)
    assert set(got) <= set(wanted)
    inner = wanted if kind in ("bytes", "merging bytes") else _not_outermost(wanted, text)
    assert set(inner) <= set(got)
    # Offsets of the prompt are not those of the text: they must not be taken for them.
    assert found(aligner, {**row, "offset_mapping": offsets}) == got


def _not_outermost(wanted: Found, text: str) -> Found:
    """Without mentions in the first and the last word, which may be tokenised with the template."""
    outer = text.split()[:: max(1, len(text.split()) - 1)]
    return [m for m in wanted if not any(m[2] in word or word in m[2] for word in outer)]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_spell_the_surface(kind: str) -> None:
    made = tokenizer(kind)
    text = "The Café of NEW YORK: heart attack, 北京 😀 and diabetes mellitus in C++"
    row = {"input_ids": made(text)["input_ids"], "text": text}
    mentions = TokenAligner(LINKER, made)(row)
    assert len(mentions) == 8
    for mention in mentions:
        spelt = made.decode(row["input_ids"][mention.start : mention.end])
        if made.unk_token_id in row["input_ids"][mention.start : mention.end]:
            continue
        surface = mention.mention.surface
        if kind == "wordpiece":
            surface = unicodedata.normalize("NFD", surface.lower()).replace("\u0301", "")
        assert surface.replace(" ", "") in spelt.replace(" ", "")


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_alone(kind: str) -> None:
    made = tokenizer(kind)
    text = "aspirin after a heart attack, at covid-19 the question isn't the blood"
    ids = made(text)["input_ids"]
    aligner = TokenAligner(LINKER, made)
    with pytest.warns(UserWarning, match=r"own decoding, because rows have no text \(columns text"):
        mentions = aligner({"input_ids": ids})
    with_text = aligner({"input_ids": ids, "text": text})
    places = [(m.start, m.end, m.mention.surface) for m in mentions]
    assert places == [(m.start, m.end, m.mention.surface) for m in with_text]
    assert len(places) == 8
    aligner({"input_ids": ids})  # the warning comes once, and warnings are errors here


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.endswith("bytes")])
@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])), cut=st.integers(0, 5))
def test_byte_level_text_is_exact(kind: str, text: str, cut: int) -> None:
    made = tokenizer(kind)
    text = unicodedata.normalize("NFC", text)
    for token in ("<pad>", "<unk>", "<s>", "</s>", "<|user|>"):
        text = text.replace(token, "")
    ids = made(text, add_special_tokens=False)["input_ids"]
    spelt, spans = TokenPieces(made).text(ids)
    assert spelt in (text, " " + text)
    assert [start for start, _ in spans] == sorted(start for start, _ in spans)
    shorter, _ = TokenPieces(made).text(ids[: max(0, len(ids) - cut)])
    assert spelt.startswith(shorter.rstrip("\ufffd"))


def test_text_that_is_not_that_of_the_tokens() -> None:
    made = tokenizer("wordpiece")
    aligner = TokenAligner(LINKER, made)
    row = {"input_ids": made("new york after a heart attack")["input_ids"], "text": "quite other"}
    with pytest.warns(UserWarning, match="the text of a row is not what its tokens say"):
        assert [m.mention.surface for m in aligner(row)] == ["new york", "heart attack"]
    assert found(aligner, {"input_ids": row["input_ids"], "text": "  "}) == []


def test_mentions_found_beforehand() -> None:
    made, text = tokenizer("bytes"), "aspirin in new york"
    aligner = TokenAligner(LINKER, made, ("title", "text"))
    ids = made(text)["input_ids"]
    record = {"start": 11, "end": 14, "entities": [3, 1], "priors": [0.75, 0.25], "column": 1}
    row = {"input_ids": ids, "title": "", "text": text, "mentions": [record]}
    (mention,) = aligner(row)
    assert mention.mention.surface == "new" and mention.column == 1
    assert [c.entity for c in mention.mention.candidates] == [3, 1]
    as_lists = {key: [value] for key, value in record.items()}
    assert aligner({**row, "mentions": as_lists}) == [mention]
    assert aligner({**row, "mentions": []}) == []
    with pytest.raises(ValueError, match=r"the span \(11, 99\) in text column 1, which has a text"):
        aligner({**row, "mentions": [{**record, "end": 99}]})


def test_token_mentions_are_taken_as_they_are() -> None:
    aligner = TokenAligner(LINKER, SimpleNamespace(is_fast=False))
    record = {"start": 1, "end": 3, "entities": [4], "priors": None}
    (mention,) = aligner({"input_ids": [5, 6, 7], "token_mentions": [record]})
    assert isinstance(mention, TokenMention)
    assert (mention.start, mention.end, mention.mention.candidates[0].prior) == (1, 3, 1.0)
    with pytest.raises(ValueError, match=r"the span \(1, 4\) in a row of 3 tokens; expected 0 <="):
        aligner({"input_ids": [5, 6, 7], "token_mentions": [{**record, "end": 4}]})


def test_a_slow_tokenizer_is_refused() -> None:
    aligner = TokenAligner(LINKER, SimpleNamespace(is_fast=False))
    with pytest.raises(
        ValueError, match=r"needs a fast tokenizer.*got SimpleNamespace.*token_ment"
    ):
        aligner({"input_ids": [1], "text": "a"})
    with pytest.raises(ValueError, match="text_columns must be several names, got the one 'text'"):
        TokenAligner(LINKER, None, "text")


def test_words_and_processors_and_pickling() -> None:
    made = tokenizer("prefixed bytes")
    words = ["aspirin", "in", "new", "york"]
    encoded = made(words, is_split_into_words=True, return_offsets_mapping=True)
    aligner = TokenAligner(LINKER, SimpleNamespace(tokenizer=made), ("tokens",))
    row = {"input_ids": encoded["input_ids"], "tokens": words}
    places = found(aligner, {**row, "offset_mapping": encoded["offset_mapping"]})
    assert [place[2] for place in places] == ["aspirin", "new york"]
    again = pickle.loads(pickle.dumps(TokenAligner(LINKER, made, ("tokens",))))
    assert found(again, row) == places


@pytest.mark.parametrize("kind", ["wordpiece", "prefixed bytes", "unigram"])
def test_a_cut_text_of_a_pair_is_not_looked_for_in_the_other(kind: str) -> None:
    made, first, second = tokenizer(kind), "heart of new york", "new york and the heart of new york"
    aligner = TokenAligner(LINKER, made, ("a", "b"))
    cut = len(alone(kind, first)) // 2
    whole = made(first, second)["input_ids"]
    encoded = made(first, second, truncation="only_first", max_length=len(whole) - cut)
    places = found(aligner, {"input_ids": encoded["input_ids"], "a": first, "b": second})
    spelt = [(surface, column) for _, _, surface, column in places]
    expected = ["new york", "the", "heart", "new york"]
    assert spelt == [("heart", 0), *((surface, 1) for surface in expected)]


@pytest.mark.parametrize("kind", KINDS)
def test_offsets_of_a_prompt_are_not_taken_for_those_of_the_text(kind: str) -> None:
    made = tokenizer(kind)
    text = "aspirin thins the blood of people after a heart attack in new york " * 4
    encoded = made("every question: " + text, add_special_tokens=False, return_offsets_mapping=True)
    cut = {name: encoded[name][:30] for name in ("input_ids", "offset_mapping")}
    assert cut["offset_mapping"][-1][1] < len(text)  # they could be
    aligner = TokenAligner(LINKER, made)
    places = found(aligner, {**cut, "text": text})
    assert places == found(aligner, {"input_ids": cut["input_ids"], "text": text})
    for start, end, surface, _ in places:
        assert surface in made.decode(cut["input_ids"][start:end])
    # One token may hold several words, whose mentions then come in either order.
    assert {"aspirin", "the"} <= {place[2] for place in places}


def test_padding_with_a_token_that_is_no_special_one() -> None:
    made = tokenizer("bytes")
    ids = made("new york")["input_ids"]
    pad = made("the")["input_ids"]
    row = {"input_ids": pad * 3 + ids, "attention_mask": [0] * 3 * len(pad) + [1] * len(ids)}
    with pytest.warns(UserWarning, match="own decoding"):
        mentions = TokenAligner(LINKER, made)(row)
    assert [m.mention.surface for m in mentions] == ["new york"]


def test_a_text_of_which_only_a_space_is_left() -> None:
    made = tokenizer("bytes")
    row = {"input_ids": made(" ")["input_ids"], "text": "ASPIRIN  "}
    with pytest.warns(UserWarning, match="own decoding"):
        assert TokenAligner(LINKER, made)(row) == []


@pytest.mark.parametrize("matcher", ["words", "ahocorasick"])
def test_half_of_a_character_in_the_decoding(matcher: str) -> None:
    made = tokenizer("bytes")
    ids = made("aspirin 👩🏽‍💻", add_special_tokens=False)["input_ids"][:-1]
    linker = EntityLinker(Names(NAMES), matcher=matcher)
    with pytest.warns(UserWarning, match="own decoding"):
        found = TokenAligner(linker, made)({"input_ids": ids})
    assert [m.mention.surface for m in found] == ["aspirin"]
