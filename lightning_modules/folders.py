"""Folders that the user names for output."""

from __future__ import annotations

import tempfile
from pathlib import Path

from lightning_modules.errors import UserInputError


def writable_folder(path: Path | str, setting: str) -> Path:
    """The folder, created if need be.

    Args:
        path: Where.
        setting: What the user calls it, for the error.

    Raises:
        UserInputError: If it cannot be created or written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserInputError(f"{setting}: cannot write to the folder {folder}: {error.strerror or error}") from error
    return folder
