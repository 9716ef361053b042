"""The rows of a file or folder, and their tokens."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from hf_adapt.engine.texts import check_cell, check_columns, is_words, missing_cells
from hf_adapt.models.hub_names import check_hub_name

FORMATS = {"csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}


def read_rows(
    source: str, split: str | None = None, columns: Sequence[str] = ()
) -> datasets.Dataset:
    """The rows of one split: see [`read_splits`].

    Args:
        source: The folder, file or id.
        split: Which split, if there are several.
        columns: Columns with texts.

    Raises:
        ValueError: If there are several splits and none is named, or the file cannot be read.
    """
    found = read_splits(source, columns)
    if split is None and len(found) > 1:
        raise ValueError(f"{source} has the splits {', '.join(found)}: name one with --split.")
    if split is not None and split not in found:
        raise ValueError(f"{source} has no split {split!r}; it has {', '.join(found)}.")
    return found[split or next(iter(found))]


def read_splits(source: str, columns: Sequence[str] = ()) -> dict[str, datasets.Dataset]:
    """Rows of a folder made by `save_to_disk`, a csv/tsv/json/jsonl/parquet file, or a hub id.

    Args:
        source: The folder, file or id; `id:configuration` names a configuration.
        columns: Columns with texts: in a csv or tsv file their cells are read unchanged (`NA`,
            `007`), and only an empty one is missing.

    Returns:
        The rows by split; a file is the split `"train"`.

    Raises:
        ValueError: If the file cannot be read.
    """
    path = Path(source)
    suffix = next((s[1:] for s in reversed(path.suffixes) if s.lower() != ".gz"), "").lower()
    kind = FORMATS.get(suffix)
    if path.is_dir():
        found = datasets.load_from_disk(source)
    elif kind is not None:
        options: dict[str, Any] = {"delimiter": "\t"} if suffix == "tsv" else {}
        if kind == "csv":
            options |= {"keep_default_na": False, "na_values": [""], "skip_blank_lines": False}
            options["converters"] = dict.fromkeys(columns, _cell)
        if path.exists() and not path.stat().st_size:
            raise ValueError(f"{source} has no rows: it is empty.")
        # A name may hold brackets, which would be a pattern.
        file = glob.escape(source) if path.exists() else source
        try:
            found = datasets.load_dataset(kind, data_files={"train": file}, **options)
        except (datasets.exceptions.DatasetGenerationError, pa.ArrowInvalid) as error:
            reason = str(error.__cause__ or error).strip()
            raise ValueError(
                f"{source} cannot be read as {kind}: {reason}{_fix(reason)}"
            ) from error
        except StopIteration as error:
            raise ValueError(f"{source} has no rows: it is empty.") from error
        except ValueError as error:
            if "corresponds to no data" not in str(error):
                raise
            raise ValueError(f"{source} has no rows.") from error
        if kind == "csv":
            _check_cells(source, found["train"], suffix)
    elif path.exists():
        raise ValueError(
            f"{source} is no file of rows: expected .csv, .tsv, .json, .jsonl or .parquet, or a "
            "folder made by save_to_disk."
        )
    else:
        name, _, configuration = source.partition(":")
        check_hub_name(name)
        found = datasets.load_dataset(name, configuration or None)
    if isinstance(found, datasets.DatasetDict):
        return {str(split): rows for split, rows in found.items()}
    assert isinstance(found, datasets.Dataset)
    return {"train": found}


def _check_cells(source: str, rows: datasets.Dataset, suffix: str) -> None:
    """Refuse a file that pandas reads without an error, but not as it was meant."""
    if any(name.startswith("__index_level_") for name in rows.column_names):
        raise ValueError(
            f"{source}: its rows have more cells than its first line names. Put texts that hold a "
            "comma in quotation marks, and no comma at the end of a line; or save it as jsonl."
        )
    kinds = (datasets.Value("string"), datasets.Value("large_string"))
    texts = [name for name, each in rows.features.items() if each in kinds]
    for name in texts if suffix == "tsv" else ():
        for number, cell in enumerate(rows[name], start=1):
            if cell is not None and "\n" in cell and "\t" in cell:
                raise ValueError(
                    f"{source}: row {number} holds several lines in one cell of {name!r}, from one "
                    f"that begins with a quotation mark on{_fix('EOF inside string')}"
                )


def _fix(reason: str) -> str:
    """The fix for a csv file that ends within a cell."""
    if "EOF inside string" not in reason:
        return ""
    return (
        ". A cell with a quotation mark must have another at its end, and double those in between; "
        "jsonl and parquet files need none."
    )


def _cell(text: str) -> str | None:
    """A cell of a csv file; only an empty one is missing."""
    return text or None


def with_texts(
    rows: datasets.Dataset, columns: Sequence[str]
) -> tuple[datasets.Dataset, list[int]]:
    """The rows that have a text in these columns, and the numbers of the others.

    Rows that are tokenised already are all kept.

    Raises:
        ValueError: If a column is missing, or no row has a text.
    """
    if is_tokenised(rows):
        return rows, []
    if not len(rows):
        raise ValueError("The file has no rows.")
    check_columns(rows.column_names, columns, "the rows", "Name the text with --text-column.")
    for column in columns:
        kind = str(getattr(rows.features[column], "dtype", "list"))
        if kind not in ("string", "large_string", "list", "null"):
            raise ValueError(
                f"Column {column!r} holds {kind}; expected texts or lists of words. Name the text "
                "with --text-column."
            )
    left_out = sorted({row for _, row in missing_cells(rows, columns)})
    if len(left_out) == len(rows):
        raise ValueError(f"There is no row with a text in {', '.join(map(repr, columns))}.")
    if not left_out:
        return rows, []
    gone = set(left_out)
    return rows.select([row for row in range(len(rows)) if row not in gone]), left_out


def is_tokenised(rows: datasets.Dataset) -> bool:
    """Whether rows are inputs of a model already."""
    return bool({"input_ids", "pixel_values", "input_values"} & set(rows.column_names))


def tokenised(
    rows: datasets.Dataset, tokenizer: Any, columns: Sequence[str], max_length: int | None
) -> datasets.Dataset:
    """Tokenise the text of rows; rows that are tokenised already are returned unchanged.

    Args:
        rows: With `input_ids` or `pixel_values`, or with the text columns.
        tokenizer: Called with the texts, or with the words where a cell is a list of words.
        columns: One text column, or two for pairs.
        max_length: The length at which tokens are truncated; None for no truncation.

    Raises:
        ValueError: If there is no tokenizer, or a cell is neither a text nor words.
    """
    if is_tokenised(rows):
        return rows
    if tokenizer is None:
        raise ValueError("Rows of text need a tokenizer, and the teacher's folder has none.")
    kept = [name for name in ("label", "labels") if name in rows.column_names]

    def tokenise(batch: dict[str, list[Any]], numbers: list[int]) -> Any:
        for name in columns:
            for cell, number in zip(batch[name], numbers, strict=True):
                check_cell(cell, name, f"row {number} of the file")
        return tokenizer(
            *(batch[name] for name in columns),
            truncation=max_length is not None,
            max_length=max_length,
            is_split_into_words=any(is_words(cell) for cell in batch[columns[0]]),
        )

    return rows.map(
        tokenise,
        batched=True,
        with_indices=True,
        remove_columns=[name for name in rows.column_names if name not in kept],
        desc="Tokenising",
    )


def longer_rows(rows: datasets.Dataset, limit: int | None) -> list[int]:
    """The indices of the rows with more tokens than this."""
    if limit is None or "input_ids" not in rows.column_names:
        return []
    tables = rows.select_columns(["input_ids"]).with_format("arrow").iter(10_000)
    lengths = [n for t in tables for n in pc.list_value_length(t["input_ids"]).to_pylist()]
    return [number for number, length in enumerate(lengths) if length > limit]
