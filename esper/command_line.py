"""What the subcommands of ``esper`` share: how they refuse, what their options accept, their log."""

import argparse
import logging
import math
import sys
from typing import NoReturn

_PORTS = range(2**16)


def refuse(command: str, reason: object) -> NoReturn:
    """End the program with one line on stderr and exit status 2."""
    print(f"esper {command}: {'; '.join(str(reason).splitlines())}", file=sys.stderr)
    sys.exit(2)


def configure_logging(log_format: str, level: int = logging.WARNING) -> None:
    """Log our records from ``level`` on, and of other libraries warnings: httpx logs each request."""
    logging.basicConfig(format=log_format)
    logging.getLogger("esper").setLevel(level)


def port(text: str) -> int:
    """A TCP port; 0 takes a free one."""
    if not text.isdecimal() or int(text) not in _PORTS:
        raise argparse.ArgumentTypeError(f"must be a port, 0 to {_PORTS[-1]}, got {text!r}")
    return int(text)


def count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text!r}")
    return int(text)


def count_above_zero(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def number_above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value
