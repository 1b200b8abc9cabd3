"""``esper tamiyo status|pause|resume``: ask the controller of a run over Redis."""

import argparse
import asyncio
import os

import esper.command_line as command_line
import esper.oona as oona
from esper.contracts import RequestKind, TamiyoStatus
from esper.errors import BusError
from esper.oona import Oona
from esper.oona.inquiry import Inquiry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=[kind.lower() for kind in RequestKind], metavar="KIND")
    parser.description = "KIND is status, pause (begin nothing new) or resume."
    parser.add_argument("--redis", metavar="URL", help="of the run's bus (default: $REDIS_URL)")
    parser.add_argument(
        "--timeout-s",
        type=command_line.number_above_zero,
        default=5.0,
        help="for the answer (default: 5)",
    )


def main(options: argparse.Namespace) -> None:
    """Print the controller's status as JSON; what is wrong ends in one line and exit status 2."""
    url = options.redis or os.environ.get("REDIS_URL")
    if not url:
        command_line.refuse(
            "tamiyo", "give --redis URL or set REDIS_URL; a run without Redis has no bus"
        )
    try:
        bus = oona.connect(url)
    except (BusError, ValueError) as error:
        command_line.refuse("tamiyo", error)
    kind = RequestKind(options.kind.upper())
    try:
        status = asyncio.run(_ask(bus, kind, options.timeout_s))
    except (BusError, TimeoutError) as error:
        command_line.refuse("tamiyo", error)
    finally:
        bus.close()
    print(status.model_dump_json(indent=2))


async def _ask(bus: Oona, kind: RequestKind, timeout_s: float) -> TamiyoStatus:
    return await Inquiry(bus, "cli").ask(kind, timeout_s)
