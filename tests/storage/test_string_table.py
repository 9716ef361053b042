"""Strings in one Arrow array: read, found and taken like those of a list."""

import pickle

import numpy as np
import pytest

from hf_adapt.storage import string_table
from hf_adapt.storage.string_table import StringTable


def test_strings() -> None:
    strings = ["b", "", "a", "b", "🙂é", "zz"]
    table = StringTable.of(strings)
    assert list(table) == table[:] == strings and table[1:3] == ["", "a"]
    assert [table.find(text) for text in ["b", "", "🙂é", "c", "zzz"]] == [0, 1, 4, -1, -1]
    assert table.find("\ud800") == -1
    assert table.find_all(["zz", "nothing", "b"]).tolist() == [5, -1, 0]
    assert list(table.take(np.array([4, 1]))) == ["🙂é", ""]
    empty = StringTable.of([])
    assert (len(empty), list(empty), empty.find("a")) == (0, [], -1)


def test_the_order_of_utf8_is_that_of_code_points() -> None:
    strings = ["\uffff", "🙂", "a", "é", "ﬀ", "𐀀"]
    table = StringTable.of(strings)
    assert [table.find(text) for text in strings] == list(range(6))


def test_many_strings_are_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(string_table, "CHUNK", 2)
    table = StringTable.of(str(i) for i in range(5))
    assert list(table) == [str(i) for i in range(5)]


def test_a_pickle_does_not_depend_on_what_was_searched() -> None:
    table = StringTable.of(["b", "a"])
    before = pickle.dumps(table)
    assert table.find("a") == 1
    assert pickle.dumps(table) == before
    assert list(pickle.loads(before)) == ["b", "a"]
