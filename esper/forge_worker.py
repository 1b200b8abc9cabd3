"""One worker process of ``esper forge``: a forge or an evaluator at a library of many.

``python -m esper.forge_worker tezzeret`` works until it is told to stop, by SIGTERM or SIGINT. Then
it finishes what it has at hand, but in ``--drain-s`` seconds at most: what is not finished by then
goes back to the library. With ``--once`` it ends when nothing waits any more.
"""

import argparse
import asyncio
import ctypes
import logging
import signal
import sys
from collections.abc import Callable
from contextlib import closing

import esper.command_line as command_line
import esper.oona as oona
from esper.config import EvaluatorSettings, ForgeSettings
from esper.errors import BusError, EsperError
from esper.oona import Oona
from esper.tezzeret import Tezzeret
from esper.urabrask import Urabrask
from esper.urza import Library, connect

logger = logging.getLogger("esper.forge_worker")  # also as __main__

ROLES = ("tezzeret", "urabrask")

_PR_SET_PDEATHSIG = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what a worker and the service that starts it have in common."""
    parser.add_argument(
        "--library",
        help="folder of the library, or URL of its server (default: $URZA_API_URL, else where "
        "$URZA_URL and $URZA_BLOBS say)",
    )
    parser.add_argument(
        "--bus",
        metavar="URL",
        help="Redis server that announces work (default: $REDIS_URL; without one the library "
        "alone is looked at)",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="what kernels are made for"
    )
    parser.add_argument("--once", action="store_true", help="work off what waits, then end")
    parser.add_argument(
        "--drain-s",
        type=command_line.number_above_zero,
        default=20.0,
        help="seconds in which work at hand may be finished after SIGTERM (default: %(default)s)",
    )
    parser.add_argument(
        "--lease-s",
        type=command_line.number_above_zero,
        default=60.0,
        help="seconds after which a silent worker is taken for lost (default: %(default)s)",
    )
    parser.add_argument(
        "--poll-s",
        type=command_line.number_above_zero,
        default=5.0,
        help="seconds between two looks at what waits (default: %(default)s)",
    )
    parser.add_argument(
        "--no-recompiling", action="store_true", help="leave idle time and budget unused"
    )
    parser.add_argument("--verbose", action="store_true", help="log at DEBUG")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m esper.forge_worker", description=__doc__)
    parser.add_argument("role", choices=ROLES)
    parser.add_argument("--name", default="", help="shown in the log")
    add_arguments(parser)
    options = parser.parse_args(argv)
    configure_logging(options.name or options.role, verbose=options.verbose)
    _end_with_parent()
    try:
        with closing(connect(options.library)) as urza:
            if options.once:
                asyncio.run(work(urza, None, options))
                _check_done(urza, options.role)
            else:
                with closing(oona.connect(options.bus)) as bus:
                    asyncio.run(work(urza, bus, options))
    except (EsperError, ValueError, OSError) as error:
        sys.exit(f"{options.role}: {error}")


def configure_logging(name: str, *, verbose: bool) -> None:
    command_line.configure_logging(
        f"%(asctime)s {name} %(levelname)s: %(message)s",
        logging.DEBUG if verbose else logging.INFO,
    )


async def work(urza: Library, bus: Oona | None, options: argparse.Namespace) -> None:
    """Run one worker until nothing waits, where there is no bus, or until a signal closes it.

    Raises :class:`BusError` if the bus ended without a signal: the worker was not to end then.
    """
    told = asyncio.Event()
    async with _WORKERS[options.role](urza, bus, options) as worker:
        running = asyncio.create_task(worker.run())
        loop = asyncio.get_running_loop()

        def drain(number: signal.Signals) -> None:
            logger.info("told to stop by %s", number.name)
            told.set()
            if bus is not None:
                loop.run_in_executor(None, bus.close)  # it may wait for its server
            loop.call_later(options.drain_s, running.cancel)

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, drain, number)
        try:
            await running
        except asyncio.CancelledError:
            if not told.is_set():
                raise
            logger.info("what was not finished was given back")
    if bus is not None and not told.is_set():
        raise BusError("the bus has ended though nobody had told it to, see the log")


def _make_tezzeret(urza: Library, bus: Oona | None, options: argparse.Namespace) -> Tezzeret:
    settings = ForgeSettings(
        lease_s=options.lease_s,
        poll_interval_s=options.poll_s,
        recompiles_when_idle=not options.no_recompiling,
    )
    return Tezzeret(urza, bus, settings, device=options.device)


def _make_urabrask(urza: Library, bus: Oona | None, options: argparse.Namespace) -> Urabrask:
    settings = EvaluatorSettings(lease_s=options.lease_s, poll_interval_s=options.poll_s)
    return Urabrask(urza, bus, settings, device=options.device)


_WORKERS: dict[str, Callable[[Library, Oona | None, argparse.Namespace], Tezzeret | Urabrask]] = {
    "tezzeret": _make_tezzeret,
    "urabrask": _make_urabrask,
}


def _check_done(urza: Library, role: str) -> None:
    """Raise EsperError if something waits that this worker could not do; others may be at it."""
    status = urza.forge_status()
    waiting = status.waiting_blueprints if role == "tezzeret" else status.waiting_kernels
    if waiting:
        raise EsperError(f"{waiting} still wait, see the log")


def _end_with_parent() -> None:
    """Be told to stop when the service that started this process dies, of SIGKILL too."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    main()
