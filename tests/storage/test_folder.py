"""Arrow arrays in a folder: written as a whole or not at all, mapped when read."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from hf_adapt.storage import folder as folders
from hf_adapt.storage.fingerprint import fingerprint
from hf_adapt.storage.folder import read_folder, write_folder
from hf_adapt.storage.string_table import StringTable

NUMBERS = np.arange(12, dtype=np.float16)


def arrays() -> dict[str, Any]:
    texts = StringTable.of(["a", "", "é"]).array
    return {
        "empty": StringTable.of([]).array,
        "lists": pa.LargeListArray.from_arrays(pa.array([0, 2, 3], pa.int64()), texts),
        "matrix": pa.FixedSizeListArray.from_arrays(pa.array(NUMBERS), 3),
        "texts": texts,
    }


def read(folder: Path, version: int = 1) -> dict[str, Any]:
    return read_folder(folder, "things", version, "save()")[1]


def test_arrays_are_mapped_and_the_same(tmp_path: Path) -> None:
    write_folder(tmp_path, "things", 1, arrays(), {"note": "mine"})
    allocated = pa.total_allocated_bytes()
    about, found = read_folder(tmp_path, "things", 1, "save()")
    assert about["note"] == "mine" and list(found) == list(arrays())
    assert all(found[name].equals(array) for name, array in arrays().items())
    assert pa.total_allocated_bytes() == allocated
    assert fingerprint(found) == fingerprint(arrays())


def test_fingerprints() -> None:
    whole = arrays()
    others = [
        {**whole, "texts": StringTable.of(["a", "é", ""]).array},
        {**whole, "texts": StringTable.of(["aé", "", ""]).array},
        {**whole, "matrix": pa.FixedSizeListArray.from_arrays(pa.array(NUMBERS), 4)},
        {**whole, "matrix": pa.FixedSizeListArray.from_arrays(pa.array(NUMBERS.view("u2")), 3)},
        {**whole, "lists": pa.LargeListArray.from_arrays([0, 1, 3], whole["texts"])},
        {name: array for name, array in whole.items() if name != "empty"},
        {("other" if name == "empty" else name): array for name, array in whole.items()},
    ]
    assert len({fingerprint(whole), *map(fingerprint, others)}) == 8
    double = {name: pa.concat_arrays([array, array]) for name, array in whole.items()}
    halves = {name: array[len(array) // 2 :] for name, array in double.items()}
    assert fingerprint(halves) == fingerprint(whole)  # wherever they begin in memory


def test_a_failed_write_leaves_the_old_arrays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path, "things", 1, arrays(), {})
    written = folders._write_array

    def fail(path: Path, array: Any) -> None:
        if path.name == "texts.arrow":
            raise OSError("disk full")
        written(path, array)

    monkeypatch.setattr(folders, "_write_array", fail)
    with pytest.raises(OSError, match="disk full"):
        write_folder(tmp_path, "things", 1, {"texts": arrays()["texts"]}, {})
    assert list(read(tmp_path)) == list(arrays())
    assert len(list(tmp_path.iterdir())) == 2


def test_other_formats_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path, "things", 2, arrays(), {})
    with pytest.raises(ValueError, match=r"has format 2, written by a newer hf_adapt.*Upgrade"):
        read(tmp_path)
    with pytest.raises(
        ValueError, match=r"has format 2, written by an older .* reads format 3 only"
    ):
        read(tmp_path, 3)


@pytest.mark.parametrize("kept", [0, 4, 0.5, -8, -1])
def test_a_file_that_is_not_whole(kept: float, tmp_path: Path) -> None:
    write_folder(tmp_path, "things", 1, arrays(), {})
    (file,) = tmp_path.glob("*/matrix.arrow")
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content)) if kept == 0.5 else int(kept)])
    with pytest.raises(ValueError, match=r"matrix.arrow is missing or damaged: .* Save again"):
        read(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="is missing or damaged"):
        read(tmp_path)
