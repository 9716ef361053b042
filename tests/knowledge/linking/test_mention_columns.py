"""Mentions as a column: cached, in several processes, for streams; the printed coverage."""

import re
from pathlib import Path
from typing import Any

import datasets
import pytest

from hf_adapt.knowledge.linking.callable_linker import CallableLinker
from hf_adapt.knowledge.linking.entity_linker import EntityLinker
from hf_adapt.knowledge.linking.mention_columns import AddMentions, coverage
from hf_adapt.knowledge.linking.token_alignment import TokenAligner
from tests.helpers.names import Names
from tests.helpers.tokenizers import tokenizer

GRAPH = Names([("aspirin", 0), ("new york", 1), ("new york", 2), ("blood", 3)])
TEXTS = ["nothing here", "Aspirin in New York", None, "blood and aspirin"] * 6


@pytest.fixture
def linker() -> EntityLinker:
    return EntityLinker(GRAPH)


@pytest.fixture
def on_disk(tmp_path: Path) -> Any:
    """A dataset with a cache folder: one in memory is not cached."""
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "data")
    return datasets.load_from_disk(tmp_path / "data")


def test_the_column(linker: EntityLinker, on_disk: Any, capsys: pytest.CaptureFixture[str]) -> None:
    linked = linker.map(on_disk)
    assert linked["mentions"][:3] == [
        [],
        [
            {"start": 0, "end": 7, "entities": [0], "priors": [1.0]},
            {"start": 11, "end": 19, "entities": [1, 2], "priors": [0.5, 0.5]},
        ],
        [],
    ]
    assert linked.column_names == ["text", "mentions"]
    assert capsys.readouterr().out == (
        "12 of 24 rows (50.0%) have a mention; 1.00 mentions a row; 4 of 4 entities (100.0%) are "
        "mentioned\n"
    )
    few = linked.select([0, 3])
    assert coverage(few, 8).endswith("2 of 8 entities (25.0%) are mentioned")


def test_a_second_call_reads_the_cache(
    linker: EntityLinker, on_disk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    real = AddMentions.__call__

    def counted(self: AddMentions, batch: Any) -> Any:
        calls.append(1)
        return real(self, batch)

    monkeypatch.setattr(AddMentions, "__call__", counted)
    first = linker.map(on_disk)
    assert calls
    calls.clear()
    again = EntityLinker(Names(list(GRAPH.rows)), matcher="ahocorasick").map(on_disk)
    assert not calls
    assert again.to_list() == first.to_list()
    assert again._fingerprint == first._fingerprint
    for other in (EntityLinker(GRAPH, overlapping=True), EntityLinker(Names(["blood"]))):
        calls.clear()
        assert other.map(on_disk)._fingerprint != first._fingerprint
        assert calls
    calls.clear()
    linker.map(on_disk, load_from_cache_file=False)
    assert calls


def test_the_user_may_map_link_and_is_cached_too(linker: EntityLinker) -> None:
    from datasets.fingerprint import Hasher

    def add(row: Any) -> Any:
        return {"found": len(linker.link(row["text"] or ""))}

    before = Hasher.hash(add)
    linker.link("aspirin in new york")  # what the linker remembers is no part of what it is
    assert Hasher.hash(add) == before


def test_several_processes_and_streams_give_the_same(linker: EntityLinker, on_disk: Any) -> None:
    one = linker.map(on_disk, load_from_cache_file=False).to_list()
    two = linker.map(on_disk, num_proc=2, batch_size=5, load_from_cache_file=False)
    assert two.to_list() == one
    stream = linker.map(on_disk.to_iterable_dataset())
    assert list(stream) == one
    assert "mentions" in stream.features

    def rows() -> Any:
        yield from on_disk

    unknown = datasets.IterableDataset.from_generator(rows)
    assert list(linker.map(unknown)) == one


def test_splits(linker: EntityLinker, on_disk: Any, capsys: pytest.CaptureFixture[str]) -> None:
    both = datasets.DatasetDict(train=on_disk, test=on_disk.select([0]))
    linked = linker.map(both)
    assert isinstance(linked, datasets.DatasetDict)
    assert linked["train"].features == linked["test"].features  # also where nothing was found
    assert re.fullmatch(r"train: 12 of 24 .*\ntest: 0 of 1 rows .*\n", capsys.readouterr().out)
    streams = datasets.IterableDatasetDict(train=on_disk.to_iterable_dataset())
    assert list(linker.map(streams)["train"]) == linked["train"].to_list()


def test_several_columns_words_and_tokens(linker: EntityLinker) -> None:
    made = tokenizer("bytes")
    first, second = ["in", "new", "york"], "the blood"
    ids = made(" ".join(first) + " " + second)["input_ids"]
    data = datasets.Dataset.from_dict({"a": [first], "b": [second], "input_ids": [ids]})
    (row,) = linker.map(data, ("a", "b"), tokenizer=made)
    assert [(m["start"], m["end"], m["column"]) for m in row["mentions"]] == [(3, 11, 0), (4, 9, 1)]
    spelt = [made.decode(ids[m["start"] : m["end"]]).strip() for m in row["token_mentions"]]
    assert spelt == ["new york", "blood"]
    aligner = TokenAligner(linker, made, ("a", "b"))
    aligned = aligner({key: row[key] for key in ("a", "b", "input_ids", "mentions")})
    assert [(m.start, m.end, m.column) for m in aligned] == [
        (m["start"], m["end"], column) for column, m in enumerate(row["token_mentions"])
    ]
    assert [(m.start, m.end) for m in aligner(row)] == [(m.start, m.end) for m in aligned]


def test_a_linker_of_your_own_in_two_processes(on_disk: Any) -> None:
    own = CallableLinker(GRAPH, lambda text: [(0, 1, "Q3")] if text else [])
    linked = own.map(on_disk, num_proc=2)
    assert linked[1]["mentions"] == [{"start": 0, "end": 1, "entities": [3], "priors": [1.0]}]


def test_bad_datasets(linker: EntityLinker, on_disk: Any) -> None:
    with pytest.raises(TypeError, match=r"expects a datasets.Dataset.*got list.*linker.link_batch"):
        linker.map(["aspirin"])
    with pytest.raises(ValueError, match=r"The dataset has no column 'sentence'; it has text. Set"):
        linker.map(on_disk, "sentence")
    with pytest.raises(ValueError, match=r"\(train\) has no column 'input_ids'.*Tokenise it first"):
        linker.map(datasets.DatasetDict(train=on_disk), tokenizer=tokenizer("bytes"))
    numbers = datasets.Dataset.from_dict({"text": [1, 2]})
    with pytest.raises(ValueError, match=r"'text' must have texts or lists of words, got int: 1"):
        linker.map(numbers)
