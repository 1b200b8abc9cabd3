"""Who may ask what of Urza's server: roles, and the bearer tokens that stand for them.

A token has 256 random bits, so its SHA-256 can be kept instead of it without salt or stretching.
"""

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path

from esper.errors import LibraryError, TokenError


class Role(StrEnum):
    """What a token is for. Every role may read."""

    RESEARCHER = "researcher"  # submits blueprints, and reports what became of kernels
    FORGE = "forge"  # takes blueprints, and publishes kernels
    EVALUATOR = "evaluator"  # records signed verdicts
    OPERATOR = "operator"  # everything


_LINE = re.compile(r"([a-z,]+) sha256:([0-9a-f]{64})")


class Tokens:
    """Known tokens, as their digests. ``lines``: ``researcher,forge sha256:<64 digits>``."""

    def __init__(self, lines: Iterable[str]) -> None:
        numbered = enumerate((line.strip() for line in lines), 1)
        self._roles = dict(
            _parsed(number, line) for number, line in numbered if line and line[0] != "#"
        )

    def __bool__(self) -> bool:
        return bool(self._roles)

    def roles(self, authorization: str | None) -> frozenset[Role]:
        """Return the roles of the token in the header ``Authorization``; TokenError for none.

        Every known digest is compared, in constant time, so the time tells nothing.
        """
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise TokenError("this library asks for a token: Authorization: Bearer ...")
        shown = _digest(token.strip())
        matches = [
            roles for digest, roles in self._roles.items() if hmac.compare_digest(digest, shown)
        ]
        if not matches:
            raise TokenError("the token is not known here")
        return matches[0]


def load_tokens(path: Path | None) -> Tokens:
    """Read the file at ``path`` and the environment's ``URZA_TOKENS``, which has lines as well.

    Raises LibraryError for a file that others than its owner may read, or that cannot be read.
    """
    lines = os.environ.get("URZA_TOKENS", "").splitlines()
    if path is not None:
        try:
            mode = path.stat().st_mode
            lines += path.read_text().splitlines()
        except OSError as error:
            raise LibraryError(f"tokens {path}: {error.strerror}") from error
        if mode & 0o077:
            raise LibraryError(
                f"tokens {path}: others than its owner may use it, mode {mode & 0o777:04o}; "
                "expected 0600"
            )
    return Tokens(lines)


def add_token(path: Path, roles: frozenset[Role]) -> str:
    """Make a token, append its digest to the file, which is made if needed, and return it."""
    if not roles:
        raise ValueError("a token needs a role")
    token = secrets.token_urlsafe(32)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(f"{','.join(sorted(roles))} sha256:{_digest(token)}\n")
    return token


def _parsed(number: int, line: str) -> tuple[str, frozenset[Role]]:
    """The error does not show the line, which may hold a token by mistake."""
    match = _LINE.fullmatch(line)
    if match is None:
        raise ValueError(f"tokens, line {number}: expected 'role,role sha256:<64 digits>'")
    roles, digest = match.groups()
    return digest, frozenset(Role(role) for role in roles.split(","))


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
