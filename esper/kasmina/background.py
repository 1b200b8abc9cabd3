"""Compiling in the background: a child process fills the cache that Inductor has on disk.

The trainer lets Dynamo trace a variant, which takes tenths of a second, runs it uncompiled, and
sends the graph to the child, which compiles it for no other reason than to have it in the cache.
Then the trainer compiles the variant as ever, and Inductor finds its kernels there. So the child
cannot make the trainer compute something else: what it compiled for another state of affairs is
never found, and costs the time that it was meant to save.
"""

import asyncio
import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import fx

from esper.kasmina.ambient import write_ambient
from esper.kasmina.traced import UnportableGraphError, write_graph, write_inputs
from esper.worker import Header, WorkerProcess

logger = logging.getLogger(__name__)

NICENESS = 10
MEMORY_LIMIT_BYTES = 16 * 2**30
TIMEOUT_S = 1800.0  # for the graphs of one variant, on a machine that has other things to do

Variant = tuple[Any, ...]  # a form, a mode, and what the block is called with


class BackgroundCompiler:
    """A child process that compiles what it is given, one graph at a time. Any thread."""

    def __init__(self) -> None:
        self._jobs = _Jobs()
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name="esper-compiler", daemon=True)
        thread.start()
        self.close: Callable[[], Any] = weakref.finalize(
            self, _stop, self._loop, self._jobs, thread
        )
        self.submit(())  # starts the child, whose imports take seconds

    def submit(self, graphs: Sequence[Header]) -> "Future[None]":
        """Have graphs compiled; the future raises what went wrong there."""
        self._last = asyncio.run_coroutine_threadsafe(self._jobs.run(graphs), self._loop)
        return self._last

    def is_idle(self) -> bool:
        """Whether all that was submitted is done, which is done in that order."""
        return self._last.done()


class _Jobs:
    """What the child has to do. Belongs to the event loop."""

    def __init__(self) -> None:
        self._worker = WorkerProcess(
            "esper.kasmina.compile_child",
            niceness=NICENESS,
            memory_limit_bytes=MEMORY_LIMIT_BYTES,
        )
        self._tasks: set[asyncio.Task[Any]] = set()
        # Held for a whole job. One without graphs is of a variant that an earlier graph serves,
        # which may still be waiting.
        self._turn = asyncio.Lock()

    async def run(self, graphs: Sequence[Header]) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            async with self._turn:
                await self._worker.call("import", {}, {}, timeout_s=TIMEOUT_S)
                for graph in graphs:
                    await self._worker.call("compile", graph, {}, timeout_s=TIMEOUT_S)
        finally:
            self._tasks.discard(task)

    async def give_up(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._worker.close()


def _stop(loop: asyncio.AbstractEventLoop, jobs: _Jobs, thread: threading.Thread) -> None:
    """Give up what is being compiled; also called when the interpreter ends."""
    asyncio.run_coroutine_threadsafe(jobs.give_up(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


class BackgroundVariants:
    """The variants of the blocks of one class that are compiled in the background."""

    def __init__(
        self, call: Callable[..., Any], compiler: BackgroundCompiler, options: dict[str, Any]
    ):
        self._compiler = compiler
        mode, patches = options.get("mode"), options.get("options")
        inductor = torch._TorchCompileInductorWrapper(mode, patches, options.get("dynamic"))
        self._config = inductor.config
        tracing = {k: v for k, v in options.items() if k not in ("backend", "mode", "options")}
        # What is foreseen and never comes is traced, too.
        tracing["recompile_limit"] = torch._dynamo.config.accumulated_recompile_limit
        isolated: Any = torch.compile  # whose annotations lack what isolates
        self._traced: Callable[..., Any] = isolated(
            call, backend=self._take_down, isolate_recompiles=True, **tracing
        )
        self._graphs: list[Header] = []
        self._obstacle: UnportableGraphError | None = None
        self._jobs: dict[Variant, Future[None]] = {}
        self._told: set[Variant] = set()  # of which failure

    @property
    def num_pending(self) -> int:
        return sum(not job.done() for job in self._jobs.values())

    def is_known(self, variant: Variant) -> bool:
        return variant in self._jobs

    def is_ready(self, variant: Variant) -> bool:
        """Whether the variant can be compiled from the cache."""
        job = self._jobs.get(variant)
        return job is not None and job.done() and job.exception() is None

    def take_failure(self, variant: Variant) -> BaseException | None:
        """Return, but once, why the variant will never be ready."""
        job = self._jobs[variant]
        if not job.done() or variant in self._told:
            return None
        self._told.add(variant)
        return job.exception()

    def trace(self, variant: Variant, module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        """Return what an uncompiled call returns, and have its graphs compiled meanwhile."""
        self._graphs, self._obstacle = [], None
        out = self._traced(module, *args, **kwargs)
        if self._obstacle is None:
            self._jobs[variant] = self._compiler.submit(self._graphs)
        else:
            self._jobs[variant] = Future()
            self._jobs[variant].set_exception(self._obstacle)
        return out

    def _take_down(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """As a backend of Dynamo: note the graph, and run it as it is."""
        try:
            self._graphs.append(
                {
                    "graph": write_graph(graph),
                    "inputs": write_inputs(graph, inputs),
                    "ambient": write_ambient(self._config),
                }
            )
        except UnportableGraphError as error:
            self._obstacle = error
        return graph.forward
