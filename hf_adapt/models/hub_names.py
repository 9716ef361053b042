"""Names of models and data: folders, or ids on the hub."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id


def check_hub_name(name: str | os.PathLike[str]) -> None:
    """Refuse a name that is neither a folder nor can be an id on the hub.

    The hub's own message is about the characters of an id, which a wrong path is not.

    Raises:
        ValueError: Saying where the folder was looked for.
    """
    path = Path(name)
    if path.is_dir():
        return
    if path.is_file():
        raise ValueError(
            f"{name} is a file; a model is named by the folder that save_pretrained made, or by "
            "its id on the hub."
        )
    try:
        validate_repo_id(str(name))
    except HFValidationError as error:
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise ValueError(
            f"There is no folder {name}{where}, and it is no id on the hub either (these look like "
            "'name' or 'organisation/name'). Is the path right?"
        ) from error
