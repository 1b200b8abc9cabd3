"""Who signs and whom we trust: the two halves of the evaluator's key, each for who needs it."""

import os
from functools import cached_property
from pathlib import Path

from esper.errors import LibraryError
from esper.trust import TrustedKey
from esper.urza.signing import EvaluatorKey


class Keys:
    """The evaluator's key as far as this process needs it. Thread-safe; blocks on the disk.

    Nothing is read before it is asked for, and only who signs needs the private half: it is made
    when there is none.

    Args:
        key_path: PEM file of the private key (``URZA_KEY``).
        trusted: the public key, or the path of its PEM file (``URZA_TRUSTED_KEY``). Without it the
            private key's own public half is trusted.
        default_path: where the private key is if neither argument nor environment says it.
    """

    def __init__(
        self,
        key_path: Path | None = None,
        trusted: TrustedKey | Path | None = None,
        default_path: Path | None = None,
    ) -> None:
        named = key_path or os.environ.get("URZA_KEY") or default_path
        self._key_path = None if named is None else Path(named)
        self._trusted = trusted or os.environ.get("URZA_TRUSTED_KEY")

    @cached_property
    def evaluator_key(self) -> EvaluatorKey:
        """The private key. LibraryError if no file is named, or it is not the one trusted."""
        if self._key_path is None:
            raise LibraryError("signing a verdict needs URZA_KEY, the file of the evaluator's key")
        key = EvaluatorKey.load_or_create(self._key_path)
        if self._trusted and key.trusted() != self.trusted_key:
            raise LibraryError(
                f"evaluator key {self._key_path}: its public half is {key.trusted().hex()}, "
                f"trusted is {self.trusted_key.hex()}"
            )
        return key

    @cached_property
    def trusted_key(self) -> TrustedKey:
        """The public key. LibraryError if none was given and no private one is there."""
        if isinstance(self._trusted, TrustedKey):
            return self._trusted
        if self._trusted:
            return _read(Path(self._trusted))
        if self._key_path is not None and self._key_path.exists():
            return self.evaluator_key.trusted()
        raise LibraryError(
            "no evaluator is trusted yet: URZA_TRUSTED_KEY names no public key, and there is no "
            f"private key {self._key_path or 'in URZA_KEY'}"
        )


def _read(path: Path) -> TrustedKey:
    try:
        return TrustedKey.from_pem(path.read_bytes())
    except (OSError, ValueError) as error:
        raise LibraryError(f"trusted key {path}: {error}") from error
