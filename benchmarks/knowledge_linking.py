"""How fast entity linking is: the default against flashtext, the extra against pyahocorasick.

Names of one to three words over a synthetic vocabulary of Zipf's law, ASCII and Chinese; texts of
1,000 characters, with few names or half of them names. All find the same places (checked; where
flashtext does not, the table says how many texts). "default" is `EntityLinker.link` whole, with its
mentions and candidates, against the bare matches of flashtext. "extra" is the matcher with
ahocorasick_rs, from text to bare matches, as "pyahocorasick" is, with the same folding, boundaries
and choice; "extra, link" is `EntityLinker.link` with it. Methods take turns in one process, by
the CPU time of one thread; the number is the median of the rounds. Building is in a fresh process
each: seconds of CPU, and by how much it raised the peak of memory above that with the names alone.

    pip install ahocorasick_rs pyahocorasick flashtext
    python benchmarks/knowledge_linking.py [--rounds 7] [--characters 1000000]

Ten minutes on two cores. Results: benchmarks/README.md.
"""

import argparse
import gc
import itertools
import json
import os
import random
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from measure import in_fresh_process, print_machine, print_table, progress

from hf_adapt.knowledge.linking.folding import ascii_letters, fold, fold_names
from hf_adapt.knowledge.linking.linker import EntityLinker
from hf_adapt.knowledge.linking.matching import AhoCorasickMatcher, leftmost_longest

SETTINGS = [
    ("words", 100_000, "sparse"),
    ("words", 100_000, "dense"),
    ("words", 1_000_000, "sparse"),
    ("words", 1_000_000, "dense"),
    ("chinese", 100_000, "sparse"),
    ("chinese", 100_000, "dense"),
]
METHODS = {
    "words": ["default", "flashtext", "extra", "extra, link", "pyahocorasick", "tokenizer"],
    "chinese": ["default", "extra", "extra, link", "pyahocorasick", "tokenizer"],
}
ROW = 1000


class Names:
    """The part of a graph that a linker asks for."""

    fingerprint = "benchmark"

    def __init__(self, names: list[str]) -> None:
        self.names, self.num_entities = names, len(names)

    def surfaces(self) -> Iterator[tuple[str, int, float]]:
        return zip(self.names, itertools.count(), itertools.repeat(1.0))


# ---------------------------------------------------------------- data
def vocabulary(number: int, seed: int) -> list[str]:
    """Different pronounceable words."""
    random.seed(seed)
    consonants, vowels = "bcdfghjklmnprstvwz", "aeiou"
    words: dict[str, None] = {}
    while len(words) < number:
        syllables = random.choices((2, 3, 4), (4, 3, 1))[0]
        word = "".join(random.choice(consonants) + random.choice(vowels) for _ in range(syllables))
        words[word + random.choice(("", "", "n", "s", "r"))] = None
    return list(words)


def zipf(words: list[str]) -> list[float]:
    """Cumulative weights of words by their rank."""
    return list(itertools.accumulate(1 / (rank + 10) for rank in range(len(words))))


def data(script: str, number: int, kind: str, characters: int) -> tuple[list[str], list[str]]:
    """Names, and texts of 1,000 characters."""
    if script == "chinese":
        random.seed(1)
        signs = [chr(code) for code in range(0x4E00, 0x4E00 + 3500)]
        weights = zipf(signs)
        made: dict[str, None] = {}
        while len(made) < number:
            made["".join(random.choices(signs, cum_weights=weights, k=random.randint(2, 6)))] = None
        names = list(made)
        others = [chr(code) for code in range(0x5C00, 0x5C00 + 3500)]
        # Sparse: one character in five is of those that the names are made of.
        pieces = random.choices((*signs, *others), k=characters)
        pieces = [
            random.choices(signs, cum_weights=weights)[0] if random.random() < 0.2 else piece
            for piece in pieces
        ]
        if kind == "dense":
            pieces = [x for _ in range(characters // 6) for x in (random.choice(names), pieces[_])]
        text = "".join(pieces)
        return names, [text[at : at + ROW] for at in range(0, characters, ROW)]
    words = vocabulary(130_000, 0)
    named, others = words[:100_000], words[100_000:]
    weights = zipf(named)
    made = {}
    while len(made) < number:
        count = random.choice((1, 2, 2, 3))
        made[" ".join(random.choices(named, cum_weights=weights, k=count))] = None
    names = list(made)
    pieces = random.choices(others, cum_weights=zipf(others), k=characters // 4)
    if kind == "dense":
        pieces = [x for piece in pieces for x in (random.choice(names), piece)]
    else:  # a hit in about every fifty words
        pieces = [random.choice(names) if random.random() < 0.02 else piece for piece in pieces]
    for at in range(0, len(pieces), 12):
        pieces[at] = pieces[at].capitalize()
        pieces[at - 1] += random.choice((".", ",", "!", "\n"))
    text = " ".join(pieces).replace("\n ", "\n")[:characters]
    return names, [text[at : at + ROW] for at in range(0, len(text), ROW)]


# ---------------------------------------------------------------- methods
Find = Callable[[str], list[tuple[int, int]]]


def build(method: str, names: list[str], script: str) -> tuple[Callable[[list[str]], Any], Any]:
    """A function that links texts, and one that makes (start, end) of what it found."""
    if method == "extra":
        extra = AhoCorasickMatcher({name: n for n, name in enumerate(fold_names(names, True), 1)})
        return (
            lambda texts: [extra.find(fold(text, True), False) for text in texts],
            lambda found: [match[:2] for match in found],
        )
    if method in ("default", "extra, link"):
        matcher = "words" if method == "default" else "ahocorasick"
        linker = EntityLinker(Names(names), matcher=matcher, min_length=1)
        return linker.link_batch, lambda mentions: [(m.start, m.end) for m in mentions]
    if method == "flashtext":
        from flashtext import KeywordProcessor

        processor = KeywordProcessor()
        for name in names:
            processor.add_keyword(name)
        return (
            lambda texts: [processor.extract_keywords(text, span_info=True) for text in texts],
            lambda found: [(start, end) for _, start, end in found],
        )
    if method == "pyahocorasick":
        find = _pyahocorasick(names, script)
        return (
            lambda texts: [find(text) for text in texts],
            lambda found: [match[:2] for match in found],
        )
    return _tokenizer(names, script), None


def _pyahocorasick(names: list[str], script: str) -> Callable[[str], Any]:
    """With case folding, word boundaries and leftmost-longest, as the extra does them."""
    import ahocorasick

    automaton = ahocorasick.Automaton()
    for number, name in enumerate(names):
        automaton.add_word(name.casefold(), (number, len(name)))
    automaton.make_automaton()
    letters = ascii_letters()

    def words(text: str) -> list[tuple[int, int, int]]:
        folded = text.casefold()
        flags = b"\0" + folded.encode().translate(letters) + b"\0"
        return leftmost_longest(
            [
                (last + 1 - length, -last - 1, number)
                for last, (number, length) in automaton.iter(folded)
                if not (flags[last + 1] and flags[last + 2])
                and not (flags[last + 1 - length] and flags[last + 2 - length])
            ]
        )

    def signs(text: str) -> list[tuple[int, int, int]]:
        return leftmost_longest(
            [
                (last + 1 - length, -last - 1, number)
                for last, (number, length) in automaton.iter(text)
            ]
        )

    return words if script == "words" else signs


def _tokenizer(names: list[str], script: str) -> Callable[[list[str]], Any]:
    """A WordPiece tokenizer as BERT's, which knows 30,000 of the words whole."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if script == "words":
        words = vocabulary(130_000, 0)
        known = [*words[:15_000], *words[100_000:115_000]]
        letters = "abcdefghijklmnopqrstuvwxyz.,!;"
        pieces = ["[UNK]", *letters, *("##" + letter for letter in letters), *known]
    else:
        pieces = ["[UNK]", *(chr(code) for code in range(0x4E00, 0x9FA5))]
    ids = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    raw = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]")
    return lambda texts: [tokenizer(text, verbose=False) for text in texts]


# ---------------------------------------------------------------- measurements
def measure(script: str, number: int, kind: str, rounds: int, characters: int) -> None:
    """Print a JSON line: million characters a second of each method."""
    names, texts = data(script, number, kind, characters)
    size = sum(map(len, texts)) / 1e6
    made = {method: build(method, names, script) for method in METHODS[script]}
    spans = {
        method: [places(found) for found in link(texts)]
        for method, (link, places) in made.items()
        if places is not None
    }
    for method in ("extra", "extra, link", "pyahocorasick"):
        assert spans["default"] == spans[method], method
    pairs = zip(spans["default"], spans.get("flashtext", spans["default"]), strict=True)
    line: dict[str, Any] = {
        "script": script,
        "names": number,
        "text": kind,
        "mentions per 1,000 characters": round(sum(map(len, spans["default"])) / size / 1000, 1),
        "texts where flashtext differs": sum(one != other for one, other in pairs),
    }
    seconds: dict[str, list[float]] = {method: [] for method in made}
    # Otherwise each method would pay for the collector's walks through the others' dictionaries.
    gc.collect()
    gc.freeze()
    for turn in range(rounds):
        for method in list(made)[:: 1 if turn % 2 else -1]:
            start = time.process_time()
            made[method][0](texts)
            seconds[method].append(time.process_time() - start)
    for method, values in seconds.items():
        line[method] = round(size / statistics.median(values), 2)
    for one, other in (("default", "flashtext"), ("extra", "pyahocorasick")):
        if other in seconds:
            ratios = [b / a for a, b in zip(seconds[one], seconds[other], strict=True)]
            line[f"{one} / {other}"] = round(statistics.median(ratios), 2)
    print(json.dumps(line), flush=True)


def measure_building(script: str, number: int, method: str) -> None:
    """Print a JSON line: seconds and megabytes of building."""
    names, _ = data(script, number, "sparse", 10_000)
    if method == "extra, link":
        import ahocorasick_rs  # noqa: F401 - its import is no part of building
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    kept = build(method, names, script)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert kept
    line = {"script": script, "names": number, "method": method}
    print(json.dumps({**line, "seconds": round(seconds, 2), "MB": round(peak / 1024)}), flush=True)


def _fresh(*arguments: object) -> dict[str, Any]:
    line: dict[str, Any] = in_fresh_process(__file__, *arguments)
    progress(line)
    return line


def main() -> None:
    """Run all of it, each setting in a fresh process, and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--characters", type=int, default=1_000_000)
    parser.add_argument("--only", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        script, number, *what = options.only
        if what[0] == "build":
            measure_building(script, int(number), what[1])
        else:
            measure(script, int(number), what[0], options.rounds, options.characters)
        return
    print_machine("cpu", "ahocorasick_rs", "pyahocorasick", "flashtext", "tokenizers")
    given = ["--rounds", options.rounds, "--characters", options.characters]
    linked = [_fresh(*given, "--only", s, n, kind) for s, n, kind in SETTINGS]
    built = [
        _fresh("--only", script, number, "build", method)
        for script, number in (("words", 100_000), ("words", 1_000_000), ("chinese", 100_000))
        for method in METHODS[script]
        if method not in ("extra", "tokenizer")
    ]
    print("\nMillion characters a second:")
    print_table(linked)
    print("\nBuilding:")
    print_table(built)


if __name__ == "__main__":
    main()
