"""What do active seeds cost? Grown networks against the same ones written in other ways.

The kernels are in GRAFTING at alpha 1: host and kernels learn, and the seed reaches the output.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from benchmarks import peers
from benchmarks.findings import UNWRAPPED, added_ratio, ratio
from benchmarks.gate import check_alike
from benchmarks.harness import Build, Plan, Times, Trial
from benchmarks.kernels import Kernels, Seeds
from benchmarks.models import CONVOLUTIONS, MLP, SEEDS_PER_LAYER, Subject, copied, every_seed
from benchmarks.modes import MODES, Mode
from benchmarks.rows import Finding, Point
from esper import MorphableModel
from esper.kasmina.ensemble import Individuals
from esper.kasmina.seats import seats_of

ONLY = "0"  # the layer of the networks that have one
HIDDEN = "2"  # the hidden layer of the MLP
SECOND = "2"  # of the convolutions, from 16 to 32 channels
CONVOLUTIONAL = ("conv_bottleneck", "depthwise")
WIDTHS = (64, 128, 256, 512, 1024, 2048)
NUMBERS = (1, 2, 4, 8, 16)

OURS = "active"
BY_HAND = "by hand"
NAIVE = "naive wrapper"
PEFT = "PEFT LoRA"
PEFT_DISABLED = "PEFT LoRA disabled"

MAX_OF_PEFT = 0.5
MAX_OF_BY_HAND = {"cpu": 1.05, "cuda": 1.00}
MAX_OF_GROUP = {"cpu": 1.3, "cuda": 1.15}

Template = Callable[[], nn.Module]  # made once a trial; every round copies it


@dataclass(frozen=True)
class Bench:
    """One network and what is grown on it, with everything that it is compared with."""

    plan: Plan
    kernels: Kernels
    net: nn.Module
    inp: Tensor

    def grown(
        self, seeds: Seeds, design: str = "low_rank", seeds_per_layer: int = SEEDS_PER_LAYER
    ) -> Callable[[], MorphableModel]:
        graft = self.kernels.graft
        return functools.cache(
            lambda: graft(self.net, self.inp, seeds, design, seeds_per_layer=seeds_per_layer)
        )

    def trial(
        self,
        name: str,
        mode: Mode,
        templates: Mapping[str, Template],
        report: Callable[[Times], Iterable[Finding]],
        check: Callable[[], None],
    ) -> Trial:
        def build(template: Template) -> Build:
            return lambda: mode.work(copied(template()), self.inp)

        works = {variant: build(template) for variant, template in templates.items()}
        return Trial(name, works, check, report, mode.grad)

    def check(self, name: str, reference: Template, *models: Template) -> None:
        for model in models:
            check_alike(name, reference(), model(), self.inp)


def bench(subject: Subject, plan: Plan, kernels: Kernels) -> Bench:
    return Bench(plan, kernels, *subject.prepare(plan.device, plan.seed))


def trials(plan: Plan, kernels: Kernels) -> list[Trial]:
    if not peers.HAS_PEFT:
        print(peers.NO_PEFT, file=sys.stderr)
    widths, numbers = ((64,), (1, 2)) if plan.quick else (WIDTHS, NUMBERS)
    made = [against_peers(mode, alone, plan, kernels) for mode in MODES for alone in (False, True)]
    made += [second_design(mode, plan, kernels) for mode in MODES]
    made += [whole_network(mode, plan, kernels) for mode in MODES]
    made += [grouped(MLP, HIDDEN, "low_rank", mode, plan, kernels) for mode in MODES]
    designs = CONVOLUTIONAL[:1] if plan.quick else CONVOLUTIONAL
    made += [
        grouped(CONVOLUTIONS, SECOND, design, mode, plan, kernels)
        for design in designs
        for mode in MODES
    ]
    made += [width(size, mode, plan, kernels) for mode in MODES for size in widths]
    made += [number_of_seeds(numbers, mode, plan, kernels) for mode in MODES]
    return made


def against_peers(mode: Mode, alone: bool, plan: Plan, kernels: Kernels) -> Trial:
    """Compare ways to have rank 8 beside a Linear, called as users do or the layer ``alone``."""
    subject = one_linear(128, 64)
    at = bench(subject, plan, kernels)
    grown = at.grown({ONLY: [0]}, seeds_per_layer=1)
    models: dict[str, Template] = {
        UNWRAPPED: lambda: at.net,
        OURS: grown,
        BY_HAND: functools.cache(lambda: peers.by_hand(at.net, grown())),
        NAIVE: functools.cache(lambda: peers.naive(at.net, grown())),
    }
    if peers.HAS_PEFT:
        models[PEFT] = functools.cache(lambda: peers.peft_lora(at.net, grown()))
        models[PEFT_DISABLED] = functools.cache(lambda: peers.peft_disabled(at.net, grown()))

    def check() -> None:
        at.check(subject.name, models[BY_HAND], models[OURS], models[NAIVE])
        if peers.HAS_PEFT:
            without_bias = peers.without_bias(models[BY_HAND]())
            check_alike(f"{subject.name}, {PEFT}", without_bias, models[PEFT](), at.inp)
            at.check(f"{subject.name}, {PEFT_DISABLED}", models[UNWRAPPED], models[PEFT_DISABLED])

    name = f"{subject.name}, {'the layer alone' if alone else 'the model'}, {mode.name}"

    def report(times: Times) -> Iterator[Finding]:
        row = f"{name}, 1 active seed"
        yield ratio(times, OURS, UNWRAPPED, f"{row} / {UNWRAPPED}")
        if peers.HAS_PEFT:
            row_of_added = f"{name}, added by 1 active seed / by {PEFT}"
            yield added_ratio(times, OURS, PEFT, UNWRAPPED, row_of_added, at_most=MAX_OF_PEFT)
        at_most = MAX_OF_BY_HAND[plan.device.type]
        yield ratio(times, OURS, BY_HAND, f"{row} / {BY_HAND}", at_most=at_most)
        yield ratio(times, OURS, NAIVE, f"{row} / {NAIVE}")
        for peer in (peer for peer in models if peer not in (UNWRAPPED, OURS)):
            yield ratio(times, peer, UNWRAPPED, f"{name}, {peer} / {UNWRAPPED}")

    templates = {peer: layer_of(model) for peer, model in models.items()} if alone else models
    return at.trial(name, mode, templates, report, check)


def layer_of(model: Template) -> Template:
    """Return the one layer of a network, wherever PEFT has put it."""

    def template() -> nn.Module:
        net = model()
        path = f"{peers.PEFT_PREFIX}.{ONLY}" if peers.is_peft(net) else ONLY
        return net.get_submodule(path)

    return template


def second_design(mode: Mode, plan: Plan, kernels: Kernels) -> Trial:
    """Compare a residual MLP, with twice the seed's channels in between, to the same by hand."""
    at = bench(one_linear(128, 64), plan, kernels)
    grown = at.grown({ONLY: [0]}, "residual_mlp", seeds_per_layer=1)
    return against_by_hand("Linear(128, 64), residual_mlp", mode, at, {"1 active seed": grown})


def whole_network(mode: Mode, plan: Plan, kernels: Kernels) -> Trial:
    """Compare the MLP of the suite with one seed and with all of them active."""
    at = bench(MLP, plan, kernels)
    return against_by_hand(
        MLP.name,
        mode,
        at,
        {
            "1 active seed": at.grown({HIDDEN: [0]}),
            "all seeds active": at.grown(every_seed(at.net, at.inp)),
        },
    )


def against_by_hand(
    subject: str, mode: Mode, at: Bench, grown: Mapping[str, Callable[[], MorphableModel]]
) -> Trial:
    """Compare grown models to the unwrapped one, and each to the same one written by hand."""
    written = {
        f"{variant}, {BY_HAND}": functools.cache(functools.partial(_written, at, model))
        for variant, model in grown.items()
    }

    def check() -> None:
        for variant, model in grown.items():
            at.check(f"{subject}, {variant}", written[f"{variant}, {BY_HAND}"], model)

    def report(times: Times) -> Iterator[Finding]:
        at_most = MAX_OF_BY_HAND[at.plan.device.type]
        for variant in grown:
            row, hand = f"{subject}, {mode.name}, {variant}", f"{variant}, {BY_HAND}"
            yield ratio(times, variant, UNWRAPPED, f"{row} / {UNWRAPPED}")
            yield ratio(times, variant, hand, f"{row} / {BY_HAND}", at_most=at_most)

    templates: dict[str, Template] = {UNWRAPPED: lambda: at.net, **grown, **written}
    return at.trial(f"{subject}, {mode.name}", mode, templates, report, check)


def _written(at: Bench, model: Callable[[], MorphableModel]) -> nn.Module:
    return peers.by_hand(at.net, model())


def grouped(
    subject: Subject, layer: str, design: str, mode: Mode, plan: Plan, kernels: Kernels
) -> Trial:
    """Compare four seeds of one layer with the same design to one of them."""
    at = bench(subject, plan, kernels)
    one, four = at.grown({layer: [0]}, design), at.grown({layer: range(4)}, design)

    def check() -> None:
        for name, model in (("1 seed", one), ("4 seeds", four)):
            reference = functools.partial(one_by_one, model, layer)
            at.check(f"{subject.name}, {design}, {name}", reference, model)

    name = f"{subject.name}, {design}, {mode.name}"

    def report(times: Times) -> Iterator[Finding]:
        row = f"{name}, 4 seeds of layer '{layer}'"
        at_most = MAX_OF_GROUP[plan.device.type]
        yield ratio(times, "4 seeds", "1 seed", f"{row} / 1 seed", at_most=at_most)
        row = f"{name}, added by 4 seeds of layer '{layer}' / by 1 seed"
        yield added_ratio(times, "4 seeds", "1 seed", UNWRAPPED, row)

    templates: dict[str, Template] = {UNWRAPPED: lambda: at.net, "1 seed": one, "4 seeds": four}
    return at.trial(f"{name}, grouped", mode, templates, report, check)


def one_by_one(grown: Callable[[], MorphableModel], layer: str) -> nn.Module:
    """Return a copy in which each seed of a layer is computed by itself."""
    model = copied(grown())
    seats = seats_of(model.get_submodule(layer))
    assert seats is not None
    seats._heard = [Individuals(seats.occupants())]
    return model


def width(size: int, mode: Mode, plan: Plan, kernels: Kernels) -> Trial:
    """Compare one seed on a Linear of this width to the unwrapped layer and to that by hand."""
    subject = one_linear(size, size)
    at = bench(subject, plan, kernels)
    grown = at.grown({ONLY: [0]}, seeds_per_layer=1)
    written = functools.cache(lambda: peers.by_hand(at.net, grown()))

    def report(times: Times) -> Iterator[Finding]:
        for variant in (OURS, BY_HAND):
            row = f"{subject.name}, {mode.name}, {variant} / {UNWRAPPED}"
            point = Point(curve=f"{variant}, {mode.name}", axis="width of the Linear", x=size)
            yield ratio(times, variant, UNWRAPPED, row, point=point)

    return at.trial(
        f"{subject.name}, {mode.name}",
        mode,
        {UNWRAPPED: lambda: at.net, OURS: grown, BY_HAND: written},
        report,
        check=lambda: at.check(subject.name, written, grown),
    )


def number_of_seeds(numbers: Sequence[int], mode: Mode, plan: Plan, kernels: Kernels) -> Trial:
    """Compare a Linear with more and more of its 16 seeds active to the unwrapped one."""
    subject = one_linear(512, 512)
    at = bench(subject, plan, kernels)
    grown = {
        str(number): at.grown({ONLY: range(number)}, seeds_per_layer=max(NUMBERS))
        for number in numbers
    }

    def check() -> None:
        for number, model in grown.items():
            written = functools.partial(_written, at, model)
            at.check(f"{subject.name}, {number} active seeds", written, model)

    def report(times: Times) -> Iterator[Finding]:
        for number in numbers:
            row = f"{subject.name}, {mode.name}, {number} of {max(NUMBERS)} seeds / {UNWRAPPED}"
            axis = f"number of active seeds on {subject.name}"
            point = Point(curve=mode.name, axis=axis, x=number)
            yield ratio(times, str(number), UNWRAPPED, row, point=point)

    templates: dict[str, Template] = {UNWRAPPED: lambda: at.net, **grown}
    return at.trial(f"{subject.name}, seeds, {mode.name}", mode, templates, report, check)


def one_linear(inputs: int, outputs: int) -> Subject:
    return Subject(
        f"Linear({inputs}, {outputs})",
        lambda: nn.Sequential(nn.Linear(inputs, outputs)),
        (32, inputs),
    )
