"""Arrow arrays in a folder: replaced as a whole when written, memory-mapped when read."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa


def write_folder(
    folder: str | Path, kind: str, version: int, arrays: Mapping[str, Any], about: dict[str, Any]
) -> None:
    """Write arrays and a description; earlier ones stay valid until the new ones are complete.

    Each array becomes a file in the Arrow IPC format, `{kind}-{id}/{name}.arrow`, and `{kind}.json`
    names the folder that counts.

    Args:
        folder: Created if missing. Its other files are left alone.
        kind: What the arrays are, such as `"knowledge_graph"`.
        version: The version of the format.
        arrays: Arrow arrays by name.
        about: Further entries of the description.

    Raises:
        OSError: If the disk is full, or `folder` is a file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    description = folder / f"{kind}.json"
    old = _read_json(description).get("folder") if description.exists() else None
    data = folder / f"{kind}-{uuid.uuid4().hex[:12]}"
    data.mkdir()
    half = description.with_suffix(f".{uuid.uuid4().hex[:8]}.tmp")
    try:
        for name, array in arrays.items():
            _write_array(data / f"{name}.arrow", array)
        text = {"format": version, **about, "folder": data.name, "arrays": list(arrays)}
        half.write_text(json.dumps(text, indent=1, ensure_ascii=False), encoding="utf-8")
        half.replace(description)  # from here on the new one counts
    except BaseException:
        shutil.rmtree(data, ignore_errors=True)
        half.unlink(missing_ok=True)
        raise
    if isinstance(old, str) and old.startswith(f"{kind}-") and "/" not in old:
        # Processes that have it mapped keep it; a system that forbids this leaves the files there.
        shutil.rmtree(folder / old, ignore_errors=True)


def _write_array(path: Path, array: Any) -> None:
    table = pa.record_batch([array], ["values"])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_batch(table)


def read_folder(
    folder: str | Path, kind: str, version: int, made_by: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the description and the memory-mapped arrays that `write_folder` wrote.

    Args:
        folder: The folder that was written.
        kind: The same as it was written with.
        version: The only version of the format that is understood.
        made_by: The call that writes such a folder, for error messages.

    Raises:
        FileNotFoundError: If the folder does not hold arrays of this kind.
        ValueError: If the folder is damaged or has another version of the format.
    """
    folder = Path(folder)
    description = folder / f"{kind}.json"
    if not description.is_file():
        there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else None
        holds = "is no folder" if there is None else f"holds {', '.join(there[:8]) or 'nothing'}"
        raise FileNotFoundError(
            f"{folder} {holds}: expected {kind}.json, which {made_by} writes. Pass the folder that "
            "was saved to."
        )
    about = _read_json(description)
    if isinstance(found := about.get("format"), int) and found != version:
        age, fix = "an older", "Save it again."
        if found > version:
            age, fix = "a newer", "Upgrade: pip install -U hf-adapt."
        raise ValueError(
            f"{folder} has format {found}, written by {age} hf_adapt; this version reads format "
            f"{version} only. {fix}"
        )
    if not isinstance(about.get("arrays"), list) or not isinstance(about.get("folder"), str):
        raise ValueError(f"{description} is damaged: it does not say what it holds. Save again.")
    files = {name: folder / about["folder"] / f"{name}.arrow" for name in about["arrays"]}
    return about, {name: _read_array(file) for name, file in files.items()}


def _read_array(path: Path) -> Any:
    try:
        with pa.memory_map(str(path)) as file:
            (array,) = pa.ipc.open_file(file).get_batch(0).columns
        array.validate()
    except (OSError, ValueError, IndexError, pa.ArrowException) as error:
        raise ValueError(f"{path} is missing or damaged: {error}. Save again.") from error
    return array


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # an editor may add a mark
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}. Save again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: expected an object. Save again.")
    return content
