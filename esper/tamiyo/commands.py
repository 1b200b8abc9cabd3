"""``esper tamiyo status|pause|resume``: ask the controller of a run over Redis."""

import argparse
import asyncio
import os
import sys
import uuid

import esper.oona as oona
from esper.contracts import RequestKind, TamiyoRequest, TamiyoStatus, Topic
from esper.errors import BusError
from esper.oona import Oona


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=[kind.lower() for kind in RequestKind], metavar="KIND")
    parser.description = "KIND is status, pause (begin nothing new) or resume."
    parser.add_argument("--redis", metavar="URL", help="of the run's bus (default: $REDIS_URL)")
    parser.add_argument("--timeout-s", type=float, default=5.0, help="for the answer (default: 5)")


def main(options: argparse.Namespace) -> None:
    """Print the controller's status as JSON; what is wrong ends in one line and exit status 1."""
    url = options.redis or os.environ.get("REDIS_URL")
    if not url:
        sys.exit("esper tamiyo: give --redis URL or set REDIS_URL; a run without Redis has no bus")
    try:
        bus = oona.connect(url)
    except (BusError, ValueError) as error:
        sys.exit(f"esper tamiyo: {error}")
    try:
        status = asyncio.run(ask(bus, RequestKind(options.kind.upper()), options.timeout_s))
    except TimeoutError:
        sys.exit(f"esper tamiyo: no controller has answered in {options.timeout_s:g} s")
    finally:
        bus.close()
    print(status.model_dump_json(indent=2))


async def ask(bus: Oona, kind: RequestKind, timeout_s: float) -> TamiyoStatus:
    """Send a request and return its answer; raises ``TimeoutError`` if none comes."""
    request = TamiyoRequest(kind=kind)
    answers = bus.subscribe(Topic.TAMIYO_STATUS, f"asked-{uuid.uuid4().hex[:8]}")
    bus.publish(Topic.TAMIYO_REQUESTS, "cli", request)
    try:
        async with asyncio.timeout(timeout_s):
            async for message in answers:
                status = message.payload
                if isinstance(status, TamiyoStatus) and status.request_id == request.request_id:
                    return status
    finally:
        await answers.aclose()
    raise TimeoutError
