"""What a step of a distributed run waits for, in microseconds: the smallest of several rounds.

torchrun --standalone --nproc-per-node 2 benchmarks/distributed_step.py LIBRARY

Over gloo on the CPU, 32 rows a rank through 128-512-10, one low-rank kernel. LIBRARY is a folder.
"""

import asyncio
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import esper
from esper import blueprints
from esper.kasmina.model import MorphableModel

STEPS, ROUNDS = 25, 20


def main(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    report("model.step() of one process, nothing due", smallest_us(wrapped().step))
    with esper.Urza(folder) as library:
        model = esper.distribute(wrapped())
        model.connect(library)
        ddp, batch = DistributedDataParallel(model), torch.randn(32, 128)

        def train() -> None:
            ddp(batch).square().mean().backward()

        measure("nothing due", model, train)
        artifact_id = asyncio.run(made(model, library))
        assert asyncio.run(model.load_kernel("0", 0, artifact_id)), "the log says why"
        measure("one kernel", model, train)
    dist.destroy_process_group()


def measure(case: str, model: MorphableModel, train: Callable[[], None]) -> None:
    report(f"model.step(), {case}", smallest_us(model.step))
    report(f"forward and backward under DDP, {case}", smallest_us(train))


def wrapped() -> MorphableModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(128, 512), nn.ReLU(), nn.Linear(512, 10))
    return esper.wrap(net, ["0"], telemetry_enabled=False)


async def made(model: MorphableModel, library: esper.Urza) -> str:
    """Have rank 0 make a kernel, and tell its id to all."""
    digest = torch.zeros(32, dtype=torch.uint8)
    if dist.get_rank() == 0:
        async with esper.Tezzeret(library) as tezzeret, esper.Urabrask(library) as urabrask:
            site = model.kasmina_layers["0"].site(0)
            blueprint_id = await tezzeret.submit(blueprints.get("low_rank"), site, "float32")
            artifact_id = await tezzeret.compile(blueprint_id)
            await urabrask.evaluate(artifact_id)
        digest.copy_(torch.tensor([*bytes.fromhex(artifact_id)]))
    dist.broadcast(digest, 0)
    return bytes(digest.tolist()).hex()


def smallest_us(work: Callable[[], None]) -> float:
    work()
    dist.barrier()
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(STEPS):
            work()
        rounds.append((time.perf_counter() - start) / STEPS)
    return min(rounds) * 1e6


def report(what: str, microseconds: float) -> None:
    if dist.get_rank() == 0:
        print(f"{what:<52}{microseconds:10.1f} us", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
