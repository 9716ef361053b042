"""Names of models and datasets: folders, or ids on the Hub."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id


def check_hub_name(name: str | os.PathLike[str]) -> None:
    """Refuse a name that is neither a folder nor a valid id on the Hub.

    The Hub's own message is about the characters of an id, which does not help with a wrong path.

    Raises:
        ValueError: If it is neither; names the folder in which it was looked for.
    """
    path = Path(name)
    if path.is_dir():
        return
    if path.is_file():
        raise ValueError(
            f"{name} is a file. Name a model by the folder that save_pretrained wrote, or by "
            "its id on the Hub."
        )
    try:
        validate_repo_id(str(name))
    except HFValidationError as error:
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise ValueError(
            f"There is no folder {name}{where}, and it is not a valid id on the Hub either ('name' "
            "or 'organisation/name'). Check the path."
        ) from error
