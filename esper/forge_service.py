"""``esper forge``: forges and evaluators as processes of their own, at a library that many share.

The service only starts them, starts them again when they die, and passes on the signal to stop.
"""

import argparse
import asyncio
import logging
import signal
import sys
import time
from asyncio.subprocess import Process
from contextlib import closing, suppress

import esper.command_line as command_line
import esper.forge_worker as forge_worker
import esper.oona as oona
from esper.errors import EsperError
from esper.urza import connect

logger = logging.getLogger(__name__)

_MARGIN_S = 10.0  # beyond --drain-s, for a worker to give back what it has and to end
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0
_SOUND_AFTER_S = 60.0  # a worker that lived that long begins with the first pause again


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tezzeret",
        type=command_line.count,
        default=1,
        metavar="N",
        help="number of forges (default: 1)",
    )
    parser.add_argument(
        "--urabrask",
        type=command_line.count,
        default=1,
        metavar="N",
        help="number of evaluators (default: 1)",
    )
    parser.add_argument(
        "--status", action="store_true", help="print what the library's forges do, and end"
    )
    forge_worker.add_arguments(parser)


def main(options: argparse.Namespace) -> None:
    """Run the service. Exit status 1 for work that was left, 2, and one line, for what is wrong."""
    try:
        if options.status:
            with closing(connect(options.library, create=False)) as urza:
                print(urza.forge_status().model_dump_json(indent=2))
            return
        _check(options)
    except (EsperError, ValueError, OSError) as error:
        command_line.refuse("forge", error)
    forge_worker.configure_logging("forge", verbose=options.verbose)
    if not asyncio.run(ForgeService(options).run()):
        sys.exit("esper forge: not everything was done, see the log")


def _check(options: argparse.Namespace) -> None:
    """Try what every worker needs, so that what is wrong is said once, not by each of them."""
    with closing(connect(options.library)) as urza:
        urza.forge_status()
        if options.urabrask:
            _ = urza.evaluator_key
    if not options.once:
        oona.connect(options.bus).close()


class ForgeService:
    """The worker processes of one machine. Belongs to one event loop."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._stopping = asyncio.Event()
        self._processes: set[Process] = set()

    async def run(self) -> bool:
        """Work until SIGTERM or SIGINT, or with ``--once`` until all is done; tell whether it is."""
        loop = asyncio.get_running_loop()
        for end in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(end, self._stop)
        counts = {role: getattr(self._options, role) for role in forge_worker.ROLES}
        if self._options.once:  # first the kernels, then their verdicts
            return all([await self._run_once(role, count) for role, count in counts.items()])
        async with asyncio.TaskGroup() as tasks:
            for role, count in counts.items():
                for number in range(count):
                    tasks.create_task(self._keep_running(role, number))
        return True

    def _stop(self) -> None:
        if not self._stopping.is_set():
            logger.info("stopping, in %g s at most", self._options.drain_s + _MARGIN_S)
            self._stopping.set()
            for process in self._processes:
                _send(process, signal.SIGTERM)

    async def _run_once(self, role: str, count: int) -> bool:
        if self._stopping.is_set():
            return count == 0
        ended = await asyncio.gather(*(self._run_worker(role, n) for n in range(count)))
        return not any(ended)

    async def _keep_running(self, role: str, number: int) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._stopping.is_set():
            began_s = time.monotonic()
            status = await self._run_worker(role, number)
            if self._stopping.is_set():
                return
            if time.monotonic() - began_s > _SOUND_AFTER_S:
                pause_s = _FIRST_PAUSE_S
            logger.warning("%s %d ended with %d; again in %g s", role, number, status, pause_s)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._stopping.wait()
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _run_worker(self, role: str, number: int) -> int:
        """Run one worker process to its end and return its exit status."""
        process = await asyncio.create_subprocess_exec(*self._command(role, number))
        self._processes.add(process)
        if self._stopping.is_set():
            _send(process, signal.SIGTERM)
        try:
            return await self._ended(process)
        finally:
            self._processes.discard(process)

    async def _ended(self, process: Process) -> int:
        stopping = asyncio.create_task(self._stopping.wait())
        ended = asyncio.create_task(process.wait())
        await asyncio.wait({stopping, ended}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        with suppress(TimeoutError):
            if not ended.done():
                async with asyncio.timeout(self._options.drain_s + _MARGIN_S):
                    return await asyncio.shield(ended)
        if not ended.done():
            logger.error("process %d does not stop, and is killed", process.pid)
            _send(process, signal.SIGKILL)
        return await ended

    def _command(self, role: str, number: int) -> list[str]:
        options = self._options
        command = [sys.executable, "-m", "esper.forge_worker", role, "--name", f"{role}-{number}"]
        for name in ("library", "bus", "device", "drain_s", "lease_s", "poll_s"):
            value = getattr(options, name)
            command += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
        for name in ("once", "no_recompiling", "verbose"):
            command += [f"--{name.replace('_', '-')}"] if getattr(options, name) else []
        return command


def _send(process: Process, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        process.send_signal(number)
