"""Folders: that they are there, and that their names outlive a crash."""

import os
from pathlib import Path

from esper.errors import LibraryError


def made_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LibraryError(f"library {path}: cannot be a folder: {error.strerror}") from error
    return path


def sync_directory(folder: Path) -> None:
    """Make the names in ``folder`` durable; fsync of a file does not."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
