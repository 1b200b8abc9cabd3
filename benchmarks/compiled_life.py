"""One compiled life of a seed, in a process of its own: ``python -m benchmarks.compiled_life WAY``.

Prints as JSON how long the longest step of each form took. A form lasts for some steps, or until
what was compiled for it in the background is in use.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import esper
from benchmarks.kernels import Kernels
from esper import MorphableModel
from esper.contracts import GraftingStrategy

DORMANT_STEPS = 20
STEPS = 20  # of a form, at least
PATIENCE_S = 120.0  # for what is compiled in the background
LAYER = "0.up"
DESIGN = "residual_mlp"
BY_HAND = GraftingStrategy(training_steps=2**31, grafting_steps=2**31, stabilization_steps=2**31)


class Block(nn.Module):
    """A residual perceptron."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.act = nn.ReLU()
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(self.act(self.up(x)))
        return out


def main(way: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = nn.Sequential(*(Block(128, 512) for _ in range(2)))
    inp = torch.randn(64, 128)
    with Kernels(torch.device("cpu")) as kernels:
        model, artifact_id = kernels.connected(net, inp, LAYER, DESIGN, seeds_per_layer=4)
        print(json.dumps(live(way, model, artifact_id, inp)))


def live(way: str, model: MorphableModel, artifact_id: str, inp: Tensor) -> dict[str, object]:
    run = compiled(way, model, artifact_id)
    [attachment] = model.kasmina.enrollment.attachments

    def step() -> float:
        start_s = time.perf_counter()
        attachment.optimizer.zero_grad()
        run(inp).square().mean().backward()
        attachment.optimizer.step()
        model.step()
        return (time.perf_counter() - start_s) * 1e3

    dormant_ms = [step() for _ in range(DORMANT_STEPS)]
    wait_for_ahead(way, model, step)
    layer, start_s, before = model.kasmina_layers[LAYER], time.perf_counter(), num_graphs()
    layer.request_germination(0, artifact_id, BY_HAND)
    longest_ms = {"TRAINING": longest(model, step)}
    layer.graft(0, BY_HAND)
    longest_ms["GRAFTING"] = longest(model, step)
    layer.stabilize(0)
    longest_ms["STABILIZATION"] = longest(model, step)
    grown = num_graphs()
    life_s = time.perf_counter() - start_s
    layer.cull(0, "the end")
    for _ in range(STEPS):
        step()
    return {
        "dormant_ms": statistics.median(dormant_ms),
        "longest_ms": longest_ms,
        "life_s": life_s,
        "num_graphs": grown - before,
        "num_at_culling": num_graphs() - grown,
    }


def compiled(way: str, model: MorphableModel, artifact_id: str) -> Callable[[Tensor], Tensor]:
    if way == "whole":
        whole: Callable[[Tensor], Tensor] = torch.compile(model, fullgraph=True)
        return whole
    ahead = [artifact_id] if "ahead" in way else []
    mode = way.split(",", maxsplit=1)[0]
    on_germination = "stall" if mode == "ahead" else mode
    esper.compile(model, ahead=ahead, on_germination=on_germination, fullgraph=True)  # type: ignore[arg-type]
    return model


def wait_for_ahead(way: str, model: MorphableModel, step: Callable[[], float]) -> None:
    """Go on training until the child has done what was ordered ahead."""
    if way == "background, ahead":
        while any(report.num_pending for report in model.compile_report()):
            step()


def longest(model: MorphableModel, step: Callable[[], float]) -> float:
    """Return the longest of some steps, the last of which run as all that follow would."""
    times_ms = [step() for _ in range(STEPS)]
    end_s = time.monotonic() + PATIENCE_S
    while any(r.num_pending for r in model.compile_report()) and time.monotonic() < end_s:
        times_ms.append(step())
    times_ms.append(step())
    return max(times_ms)


def num_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


if __name__ == "__main__":
    main(sys.argv[1])
