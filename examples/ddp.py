"""A line that learns to be a wave, on several processes: own_design.py under torchrun.

torchrun --nproc-per-node 2 examples/ddp.py LIBRARY

LIBRARY is a folder that all processes see.
"""

import sys

import torch
import torch.distributed as dist
from my_designs import Sine
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import esper
from esper import blueprints


def loss_per_sample(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square().mean(1)


def main(library: str) -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    x = torch.linspace(-4, 4, 512).unsqueeze(1)[rank::size]  # this rank's part of the data
    target = torch.sin(x)

    model = esper.wrap(nn.Linear(1, 1), seeds_per_layer=1)
    ddp = DistributedDataParallel(esper.distribute(model))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    model.attach_optimizer(optimizer)
    sine = blueprints.register("sine", Sine, hparams={"width": 16})

    # The same on every rank. That of rank 0 makes kernels and decides, the others follow it.
    with esper.Pipeline(model, library, designs=lambda site: [sine], synchronous=True) as pipeline:
        for _ in range(30):
            for _ in range(50):
                optimizer.zero_grad()
                loss = loss_per_sample(ddp(x), target).mean()
                loss.backward()
                optimizer.step()
                model.step()  # waits for the other ranks: they move their seeds together
            event = pipeline.end_epoch([(x, target)], loss_per_sample, train_loss=loss.item())

    [layer] = model.kasmina_layers.values()
    for speaker in range(size):
        dist.barrier()
        if speaker == rank:
            print(f"rank {rank}: loss {event.val_loss:.6f}, {layer.state(0).name}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
