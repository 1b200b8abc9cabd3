"""A folder that holds one checkpoint, replaced as a whole or not at all.

``manifest.json`` names the files and their SHA-256. A new checkpoint's files are written beside
those of the old one, under names of their own; exchanging the manifest, one atomic rename, is what
makes them the checkpoint. Only then the old files are removed. One writer at a time.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from esper.errors import CheckpointError

FORMAT_VERSION = 2  # 1 knew a single optimizer
MANIFEST = "manifest.json"

Writer = Callable[[Path], None]

_DATA_FILE = re.compile(r"[a-z]+-[0-9a-f]{16}\.(safetensors|json)")
_PARTIAL_FILE = re.compile(r"\.[a-z]+\.(safetensors|json)\.partial")


def publish(folder: Path, parts: Mapping[str, Writer]) -> None:
    """Make what ``parts`` (``"model.safetensors"`` -> its writer) write the folder's checkpoint.

    Durable when it returns. Killed at any instant, or failing, it leaves the former checkpoint or
    the new one; what is left of an unfinished one is removed by the next.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _remove(folder, _PARTIAL_FILE)
    files = {part: _publish_file(folder, part, write) for part, write in parts.items()}
    _sync_directory(folder)
    content = {"esper_checkpoint": FORMAT_VERSION, "files": files}
    manifest = json.dumps({**content, "sha256": _digest_of(content)}, indent=2)
    _write(folder, MANIFEST, lambda path: _write_text(path, manifest)).replace(folder / MANIFEST)
    _sync_directory(folder)
    _remove(folder, _DATA_FILE, keep={entry["file"] for entry in files.values()})


def verified_files(folder: Path) -> dict[str, Path]:
    """Return part -> path of the folder's checkpoint, once every byte of it has been checked.

    Raises :class:`CheckpointError` that names the file which is missing, altered or cut short, or
    the version if a newer Esper wrote it.
    """
    entries = _read_manifest(folder)["files"]
    for entry in entries.values():
        _check_file(folder, **entry)
    return {part: folder / entry["file"] for part, entry in entries.items()}


def _publish_file(folder: Path, part: str, write: Writer) -> dict[str, Any]:
    partial = _write(folder, part, write)
    digest = _file_digest(partial)
    stem, _, suffix = part.partition(".")
    name = f"{stem}-{digest[:16]}.{suffix}"
    entry = {"file": name, "num_bytes": partial.stat().st_size, "sha256": digest}
    partial.replace(folder / name)
    return entry


def _write(folder: Path, name: str, write: Writer) -> Path:
    partial = folder / f".{name}.partial"
    write(partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    return partial


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        version = manifest["esper_checkpoint"]
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no checkpoint: it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, this Esper reads version {FORMAT_VERSION}"
        )
    claimed = manifest.pop("sha256", None)
    if claimed != _digest_of(manifest):
        raise CheckpointError(f"{path} was altered: its content does not have digest {claimed}")
    return manifest


def _check_file(folder: Path, file: str, num_bytes: int, sha256: str) -> None:
    path = folder / file
    if not _DATA_FILE.fullmatch(file):
        raise CheckpointError(f"{folder / MANIFEST} names {file!r}, which is no checkpoint file")
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    found = path.stat().st_size
    if found != num_bytes:
        raise CheckpointError(f"{path} has {found} bytes, expected {num_bytes}")
    if _file_digest(path) != sha256:
        raise CheckpointError(f"{path} was altered: its bytes do not have digest {sha256}")


def _remove(folder: Path, pattern: re.Pattern[str], keep: Iterable[str] = ()) -> None:
    for path in folder.iterdir():
        if pattern.fullmatch(path.name) and path.name not in keep:
            path.unlink()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
