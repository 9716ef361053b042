"""Linking: candidates, options, settings, linkers of the user's own."""

import json
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adapt.knowledge.linking.callable_linker import CallableLinker
from hf_adapt.knowledge.linking.entity_linker import EntityLinker
from hf_adapt.knowledge.linking.inflection import ENGLISH_FUNCTION_WORDS, english_forms
from hf_adapt.knowledge.linking.linker import Linker
from hf_adapt.knowledge.linking.matcher import AhoCorasickMatcher, WordMatcher
from hf_adapt.knowledge.linking.mentions import Candidate, Mention
from tests.helpers.names import Names

MEDICAL = Names(["aspirin", "heart attack", "attack", "heart", "blood", "AT&T", "C++"])


def spans(linker: Linker, text: str) -> list[tuple[int, int, str, int]]:
    return [(m.start, m.end, m.surface, m.candidates[0].entity) for m in linker.link(text)]


def surfaces(linker: Linker, text: str) -> list[str]:
    return [mention.surface for mention in linker.link(text)]


def test_the_leftmost_longest_is_linked() -> None:
    linker = EntityLinker(MEDICAL)
    text = "Aspirin after a heart\n attack, or AT&T in C++."
    assert spans(linker, text) == [
        (0, 7, "Aspirin", 0),
        (16, 29, "heart\n attack", 1),
        (34, 38, "AT&T", 5),
        (42, 45, "C++", 6),
    ]
    assert linker.link_batch(["aspirins", "", "blood"]) == [[], [], linker.link("blood")]
    both = EntityLinker(MEDICAL, overlapping=True)
    assert surfaces(both, "heart attack") == ["heart", "heart attack", "attack"]
    assert surfaces(EntityLinker(MEDICAL, ignore_case=False), "Aspirin aspirin") == ["aspirin"]
    assert surfaces(EntityLinker(MEDICAL), "AT & T") == []  # whitespace only where a name has it


@pytest.mark.parametrize("matcher", ["words", "ahocorasick"])
@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=5), st.text(), st.data())
def test_every_span_has_the_characters_of_its_surface(
    matcher: str, names: list[str], around: str, data: Any
) -> None:
    names = [name for name in names if len(name.strip()) > 1]
    if not names:
        return
    name = data.draw(st.sampled_from(names))
    text = f"{around} {name} {around[::-1]}"
    for overlapping in (False, True):
        linker = EntityLinker(Names(names), matcher=matcher, overlapping=overlapping)
        mentions = linker.link(text)
        assert all(text[m.start : m.end] == m.surface for m in mentions)
        starts = [mention.start for mention in mentions]
        assert starts == sorted(starts)
        if overlapping and not around:
            assert any(m.surface.strip() == name.strip() for m in mentions)


def test_candidates_are_by_prior_then_by_number() -> None:
    graph = Names([("Paris", 4, 1.0), ("paris", 2, 6.0), ("PARIS", 3, 1.0), ("Paris", 2, 2.0)])
    (mention,) = EntityLinker(graph).link("in Paris")
    assert mention.candidates == (
        Candidate(2, 6 / 8),  # an entity's two names are one meaning
        Candidate(3, 1 / 8),
        Candidate(4, 1 / 8),
    )
    (mention,) = EntityLinker(graph, max_candidates=2).link("in Paris")
    assert mention.candidates == (Candidate(2, 6 / 7), Candidate(3, 1 / 7))
    (mention,) = EntityLinker(graph, ignore_case=False).link("in Paris")
    assert [candidate.entity for candidate in mention.candidates] == [2, 4]
    (mention,) = EntityLinker(Names([("a b", 1, 0.0), ("a b", 0, 0.0)])).link("a b")
    assert mention.candidates == (Candidate(0, 0.5), Candidate(1, 0.5))


def test_names_that_are_left_out() -> None:
    graph = Names(["the", "x", "  ", "", "who", "World Health Organization"])
    text = "The x who: World Health Organization"
    assert surfaces(EntityLinker(graph), text) == ["The", "who", "World Health Organization"]
    assert surfaces(EntityLinker(graph, min_length=1), text)[:2] == ["The", "x"]
    linker = EntityLinker(graph, stop_surfaces=[*ENGLISH_FUNCTION_WORDS, "Who"])
    assert surfaces(linker, text) == ["World Health Organization"]


def test_inflections() -> None:
    graph = Names([("therapy", 0), ("heart attack", 1), ("glass", 2), ("glasses", 3), ("stop", 4)])
    linker = EntityLinker(graph, inflections="english")
    assert spans(linker, "Therapies for heart attacks") == [
        (0, 9, "Therapies", 0),
        (14, 27, "heart attacks", 1),
    ]
    assert spans(linker, "glasses stopped")[0][3] == 3  # a name stays what it is
    assert surfaces(linker, "glasses stopped") == ["glasses", "stopped"]
    assert surfaces(EntityLinker(graph), "Therapies") == []
    german = EntityLinker(Names(["Haus"]), inflections=lambda word: {"haus": ["Häuser"]}[word])
    assert surfaces(german, "die HÄUSER") == ["HÄUSER"]


@pytest.mark.parametrize("matcher", ["words", "ahocorasick"])
def test_korean_particles(matcher: str) -> None:
    """As docs/knowledge.md says: by parts of words, or by the particles as inflections."""
    graph, text = Names(["서울", "한국"]), "서울은 한국의 수도이다"
    assert surfaces(EntityLinker(graph, matcher=matcher), text) == []
    parts = EntityLinker(graph, matcher=matcher, whole_words=False)
    assert surfaces(parts, text) == ["서울", "한국"]
    particles = EntityLinker(
        graph, matcher=matcher, inflections=lambda word: [word + p for p in ("은", "는", "의")]
    )
    assert surfaces(particles, text) == ["서울은", "한국의"]


def test_inflected_forms_of_several_names_are_ambiguous() -> None:
    def forms(word: str) -> list[str]:
        return [word + "s", word] if word != "axi" else ["axes"]

    graph = Names([("axe", 0, 1.0), ("axe", 5, 3.0), ("axi", 1, 1.0)])
    (mention,) = EntityLinker(graph, inflections=forms).link("axes")
    assert {c.entity: c.prior for c in mention.candidates} == {5: 0.6, 0: 0.2, 1: 0.2}


@pytest.mark.parametrize(
    ("word", "form"),
    [
        ("child", "children"),
        ("policeman", "policemen"),
        ("thesis", "theses"),
        ("knife", "knives"),
        ("box", "boxes"),
        ("bake", "baking"),
        ("plan", "planned"),
        ("visit", "visited"),
        ("day", "days"),
        ("half", "halves"),
        ("criterion", "criteria"),
        ("roof", "roofs"),
    ],
)
def test_english_forms(word: str, form: str) -> None:
    assert form in english_forms(word)
    assert word not in english_forms(word)
    assert english_forms("Ärger") == english_forms("x2") == []


def test_scripts_without_spaces_need_no_extra() -> None:
    graph = Names(["北京", "北京大学", "โรงพยาบาล", "ラーメン", "COVID"])
    text = "我在北京大学,北京。COVID病 ไปโรงพยาบาล とんこつラーメン屋"
    expected = ["北京大学", "北京", "COVID", "โรงพยาบาล", "ラーメン"]
    words, extra = EntityLinker(graph, matcher="words"), EntityLinker(graph)
    assert surfaces(words, text) == surfaces(extra, text) == expected
    assert isinstance(extra._matcher, AhoCorasickMatcher)
    assert isinstance(words._matcher, WordMatcher)


def test_the_choice_of_a_matcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(EntityLinker(MEDICAL)._matcher, WordMatcher)
    parts = EntityLinker(MEDICAL, whole_words=False)
    assert isinstance(parts._matcher, AhoCorasickMatcher)
    monkeypatch.setattr("hf_adapt.knowledge.linking.entity_linker.find_spec", lambda name: None)
    slow = EntityLinker(MEDICAL, whole_words=False)
    assert isinstance(slow._matcher, WordMatcher)
    text = "lifeblood, aspirins"
    assert surfaces(slow, text) == surfaces(parts, text) == ["blood", "aspirin"]


def test_settings_make_the_same_linker() -> None:
    made = EntityLinker(
        MEDICAL,
        ignore_case=False,
        inflections="english",
        overlapping=True,
        max_candidates=1,
        min_length=3,
        stop_surfaces={"blood", "attack"},
        matcher="words",
    )
    told = json.loads(json.dumps(made.settings))
    again = EntityLinker.from_settings(MEDICAL, told)
    assert again.settings == made.settings
    assert again.fingerprint == made.fingerprint
    text = "heart attacks, blood, C++"
    assert again.link(text) == made.link(text) == pickle.loads(pickle.dumps(made)).link(text)
    assert EntityLinker.from_settings(MEDICAL, told, min_length=1).settings["min_length"] == 1
    with pytest.raises(ValueError, match=r"Unknown linker settings colour; known are ignore_case"):
        EntityLinker.from_settings(MEDICAL, {**told, "colour": 1})


def test_fingerprints() -> None:
    def forms(word: str) -> list[str]:
        return [word + "en"]

    linkers = [
        EntityLinker(MEDICAL),
        EntityLinker(Names(["aspirin"])),
        EntityLinker(MEDICAL, ignore_case=False),
        EntityLinker(MEDICAL, stop_surfaces=["blood"]),
        EntityLinker(MEDICAL, inflections=forms),
        CallableLinker(MEDICAL, lambda text: []),
        CallableLinker(MEDICAL, lambda text: [(0, 1, 0)]),
    ]
    assert len({linker.fingerprint for linker in linkers}) == len(linkers)
    same = [EntityLinker(MEDICAL, matcher=matcher) for matcher in ("auto", "words", "ahocorasick")]
    assert {linker.fingerprint for linker in same} == {linkers[0].fingerprint}


def test_other_rules_of_folding_are_another_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataset that was linked by older rules is not read from the cache."""
    for make in (EntityLinker, lambda graph: CallableLinker(graph, lambda text: [])):
        with monkeypatch.context() as patch:
            now = make(MEDICAL).fingerprint
            patch.setattr("hf_adapt.knowledge.linking.linker.RULES", 1)
            assert make(MEDICAL).fingerprint != now


def test_settings_only_name_functions() -> None:
    made = EntityLinker(MEDICAL, inflections=lambda word: [word + "n"])
    assert made.settings["inflections"].startswith("function:tests.knowledge.linking.test_linker.")
    with pytest.raises(
        ValueError, match=r"a function that is not saved with it. Pass it: from_set"
    ):
        EntityLinker.from_settings(MEDICAL, made.settings)
    again = EntityLinker.from_settings(MEDICAL, made.settings, inflections=None)
    assert again.settings["inflections"] is None


def test_a_linker_of_your_own() -> None:
    results: list[Any] = [
        (9, 13, ["Q1", 3], [1.0, 3.0]),
        (0, 3, np.int64(2)),
        (2, 5, "Q1"),  # overlaps
        (5, 6, "Q77"),  # not in the graph
    ]
    linker = CallableLinker(MEDICAL, lambda text: results)
    with pytest.warns(UserWarning, match=r"found 'Q77', which is no key of the graph.*like 'Q0'"):
        mentions = linker.link("abc ef   hi j")
    assert mentions == [
        Mention(0, 3, "abc", (Candidate(2, 1.0),)),
        Mention(9, 13, "hi j", (Candidate(3, 0.75), Candidate(1, 0.25))),
    ]
    every = CallableLinker(MEDICAL, lambda text: results[:3], overlapping=True, max_candidates=1)
    assert [m.surface for m in every.link("abc ef   hi j")] == ["abc", "c e", "hi j"]
    assert [len(m.candidates) for m in every.link("abc ef   hi j")] == [1, 1, 1]


def test_a_pipeline_like_spacys() -> None:
    def pipeline(text: str) -> Any:
        ends = [(0, 7, ""), (8, 13, "Q4"), (14, 17, "")]
        return SimpleNamespace(
            ents=[SimpleNamespace(start_char=s, end_char=e, kb_id_=k) for s, e, k in ends]
        )

    expected = [(0, 7, "ASPIRIN", 0), (8, 13, "heart", 4)]
    assert spans(CallableLinker(MEDICAL, pipeline), "ASPIRIN heart xyz") == expected
    strict = CallableLinker(MEDICAL, pipeline, ignore_case=False)
    assert spans(strict, "ASPIRIN heart xyz") == expected[1:]


class Unpicklable:
    """A linker that holds what cannot be pickled, as spaCy's pipelines do."""

    def __call__(self, text: str) -> list[tuple[int, int, int]]:
        return [(0, len(text), 1)]

    def __reduce__(self) -> Any:
        raise TypeError("cannot pickle this")


class Pipeline(Unpicklable):
    def __init__(self, content: bytes) -> None:
        self.content = content

    def to_bytes(self) -> bytes:
        return self.content


def test_a_pipeline_is_told_by_its_bytes() -> None:
    one, same, other = (
        CallableLinker(MEDICAL, Pipeline(text)).fingerprint for text in (b"a", b"a", b"b")
    )
    assert one == same != other


def test_a_function_that_cannot_be_hashed_is_never_taken_for_another() -> None:
    with pytest.warns(UserWarning, match="cannot be hashed.*not cached"):
        one, other = (CallableLinker(MEDICAL, Unpicklable()).fingerprint for _ in range(2))
    assert one != other


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([(0, 99, 1)], r"the span \(0, 99\) for a text of 4 characters; expected 0 <= start"),
        ([(2, 2, 1)], r"the span \(2, 2\)"),
        ([(0, 2)], r"must return \(start, end, entities\).*got \(0, 2\)"),
        ([("0", 2, 1)], r"must return \(start, end, entities\)"),
        ([(0, 2, 99)], r"the entity 99; the graph has entities 0 to 6"),
        ([(0, 2, [1, 2], [0.5])], r"2 entities and 1 priors for 'te'"),
    ],
)
def test_what_your_linker_must_return(result: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CallableLinker(MEDICAL, lambda text: result).link("text")


def test_bad_options() -> None:
    with pytest.raises(ValueError, match=r"matcher='flash' is not one of 'auto', 'words', 'aho"):
        EntityLinker(MEDICAL, matcher="flash")
    with pytest.raises(ValueError, match=r"is not one of .*CallableLinker\(graph, function\)"):
        EntityLinker(MEDICAL, matcher=lambda text: [])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="inflections='german' is not None, 'english' or a func"):
        EntityLinker(MEDICAL, inflections="german")
    with pytest.raises(ValueError, match="max_candidates=0 must be at least 1"):
        EntityLinker(MEDICAL, max_candidates=0)
    with pytest.raises(ValueError, match="stop_surfaces must be several names, got the one 'the'"):
        EntityLinker(MEDICAL, stop_surfaces="the")
    for graph in (Names([]), Names(["a", " b "])):
        with pytest.raises(ValueError, match=r"has no name to link: none has min_length=2"):
            EntityLinker(graph)
    with pytest.raises(TypeError, match="expects a text, got list; for several texts use link_b"):
        EntityLinker(MEDICAL).link(["a"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expects a function text -> spans, got str"):
        CallableLinker(MEDICAL, "spacy")  # type: ignore[arg-type]
