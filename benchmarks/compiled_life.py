"""One compiled life of a seed, in a process of its own: ``python -m benchmarks.compiled_life WAY``.

Prints as JSON how long the longest step of each form took. A form lasts for some steps, or until
what was compiled for it in the background is in use; at its end the model has to compute what it
computes uncompiled. A library and an artifact may follow WAY; without them a kernel is made.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import esper
from benchmarks.gate import check_close
from benchmarks.kernels import Kernels, randomize
from benchmarks.models import NEVER_OBSERVED
from esper import MorphableModel
from esper.contracts import GraftingStrategy

DORMANT_STEPS = 20
STEPS = 20  # of a form, at least
PATIENCE_S = 120.0  # for what is compiled in the background
LAYER = "0.up"
DESIGN = "residual_mlp"
BY_HAND = GraftingStrategy(training_steps=2**31, grafting_steps=2**31, stabilization_steps=2**31)


@dataclass(frozen=True)
class Way:
    """How a model is compiled."""

    whole: bool = False  # by torch.compile
    on_germination: str = "stall"
    ahead: bool = False  # the trainer's own first step compiles what will germinate
    foreseen: bool = False  # a child process has compiled it, as a pipeline has it do


WAYS = {
    "whole": Way(whole=True),
    "stall": Way(),
    "ahead": Way(ahead=True),
    "eager": Way(on_germination="eager"),
    "background": Way(on_germination="background"),
    "foreseen": Way(on_germination="background", foreseen=True),
}


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


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    with ExitStack() as stack:
        if len(arguments) == 1:
            kernels = stack.enter_context(Kernels(torch.device("cpu")))
            library, artifact_id = kernels.library(), made_by(kernels)
        else:
            library = stack.enter_context(esper.Urza(Path(arguments[1])))
            artifact_id = arguments[2]
        if arguments[0] == "dormant":
            for way in (Way(whole=True), Way()):
                Training(way, model_of(library), artifact_id).dormant_ms()
        else:
            print(json.dumps(live(WAYS[arguments[0]], model_of(library), artifact_id)))


def made_by(kernels: Kernels) -> str:
    """Return the artifact of the kernel that germinates."""
    return kernels.artifact(DESIGN, model_of(kernels.library()).kasmina_layers[LAYER].site(0))


def model_of(library: esper.Urza) -> MorphableModel:
    torch.manual_seed(0)
    net = nn.Sequential(*(Block(128, 512) for _ in range(2)))
    settings = NEVER_OBSERVED.model_copy(update={"seeds_per_layer": 4, "deterministic": True})
    model = esper.wrap(net, settings=settings)
    model(batch())
    model.attach_optimizer(torch.optim.SGD(model.parameters(), lr=1e-3))
    model.connect(library)
    return model


def batch() -> Tensor:
    """Return what every step sees; as in a network, its gradient is asked for."""
    return torch.randn(64, 128, generator=torch.Generator().manual_seed(1)).requires_grad_()


class Training:
    """Training steps of a model that is compiled in one of the ways."""

    def __init__(self, way: Way, model: MorphableModel, artifact_id: str) -> None:
        self.model = model
        self._run: Callable[[Tensor], Tensor] = model
        if way.whole:
            self._run = torch.compile(model, fullgraph=True)
        else:
            esper.compile(
                model,
                ahead=[artifact_id] if way.ahead else [],
                on_germination=way.on_germination,  # type: ignore[arg-type]
                fullgraph=True,
            )
        [attachment] = model.kasmina.enrollment.attachments
        self._optimizer = attachment.optimizer
        self._inp = batch()

    def step(self) -> float:
        """Return the milliseconds that one step takes."""
        start_s = time.perf_counter()
        self._optimizer.zero_grad()
        self._run(self._inp).square().mean().backward()
        self._optimizer.step()
        self.model.step()
        return (time.perf_counter() - start_s) * 1e3

    def dormant_ms(self) -> float:
        return statistics.median([self.step() for _ in range(DORMANT_STEPS)])

    def longest_ms(self, form: str) -> float:
        """Return the longest of some steps, the last of which run as all that follow would."""
        times_ms = [self.step() for _ in range(STEPS)]
        end_s = time.monotonic() + PATIENCE_S
        while num_pending(self.model) and time.monotonic() < end_s:
            times_ms.append(self.step())
        times_ms.append(self.step())
        self._check(form)
        return max(times_ms)

    def _check(self, form: str) -> None:
        """Compare output and gradients with what the model computes uncompiled."""
        seen = self._computed()
        with torch.compiler.set_stance("force_eager"):
            expected = self._computed()
        for what, value in expected.items():
            check_close(f"{form}: {what}", value, seen[what])

    def _computed(self) -> dict[str, Tensor]:
        self.model.zero_grad()
        out = self._run(self._inp)
        out.square().mean().backward()
        kernel = self.model.kasmina_layers[LAYER].kernel(0)
        weights = dict(self.model.named_parameters())
        if kernel is not None:
            weights |= {f"the kernel's {name}": w for name, w in kernel.named_parameters()}
        grads = {name: w.grad.clone() for name, w in weights.items() if w.grad is not None}
        return {"output": out.detach(), **grads}


def live(way: Way, model: MorphableModel, artifact_id: str) -> dict[str, object]:
    training = Training(way, model, artifact_id)
    dormant_ms = training.dormant_ms()
    if way.foreseen:
        model.kasmina.foresee((LAYER, 0), artifact_id)
        while num_pending(model):
            training.step()
    layer, start_s, before = model.kasmina_layers[LAYER], time.perf_counter(), num_graphs()
    layer.request_germination(0, artifact_id, BY_HAND)
    training_ms = training.longest_ms("TRAINING")
    randomize(layer, 0)  # a fresh kernel adds nothing, which would check nothing
    layer.graft(0, BY_HAND)
    layer.kasmina.bank.set_alpha(layer.first_seed, 0.5)
    longest_ms = {"TRAINING": training_ms, "GRAFTING": training.longest_ms("GRAFTING")}
    layer.stabilize(0, 0.5)
    longest_ms["STABILIZATION"] = training.longest_ms("STABILIZATION")
    life_s, grown = time.perf_counter() - start_s, num_graphs()
    layer.cull(0, "the end")
    for _ in range(STEPS):
        training.step()
    return {
        "dormant_ms": dormant_ms,
        "longest_ms": longest_ms,
        "life_s": life_s,
        "num_graphs": grown - before,
        "num_at_culling": num_graphs() - grown,
    }


def num_pending(model: MorphableModel) -> int:
    return sum(report.num_pending for report in model.compile_report())


def num_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


if __name__ == "__main__":
    main(sys.argv[1:])
