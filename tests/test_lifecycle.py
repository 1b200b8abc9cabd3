"""Every edge of the lifecycle, legal or not, and that an illegal one changes nothing."""

import itertools

import pytest
from kasmina_library import MemoryLibrary
from torch import nn

import esper
from esper.contracts import GraftingStrategy, SeedState
from esper.errors import LifecycleError
from esper.kasmina.layer import KasminaLayer
from esper.kasmina.lifecycle import check_edge

S = SeedState

# Written out by hand from the design, not computed from the code under test.
LEGAL = {
    S.DORMANT: {S.GERMINATED},
    S.GERMINATED: {S.LOADING, S.CANCELLED},
    S.LOADING: {S.TRAINING, S.GRAFTING, S.CULLED},
    S.TRAINING: {S.GRAFTING, S.CULLED, S.CANCELLED},
    S.GRAFTING: {S.STABILIZATION, S.CULLED},
    S.STABILIZATION: {S.EVALUATING, S.CULLED},
    S.EVALUATING: {S.FINE_TUNING, S.FOSSILIZED, S.CULLED},
    S.FINE_TUNING: {S.FOSSILIZED, S.CULLED},
    S.FOSSILIZED: set(),
    S.CULLED: {S.DORMANT},
    S.CANCELLED: {S.DORMANT},
    S.ROLLED_BACK: set(),
}
FINAL = {S.FOSSILIZED, S.ROLLED_BACK}


@pytest.mark.parametrize(("source", "target"), list(itertools.product(S, S)))
def test_each_edge(source: SeedState, target: SeedState) -> None:
    legal = LEGAL[source] | (set() if source in FINAL else {S.ROLLED_BACK})
    if target in legal:
        check_edge(source, target, "seed 0 on 'fc'")
    else:
        with pytest.raises(
            LifecycleError, match=f"seed 0 on 'fc': no edge {source.name} > {target.name}"
        ):
            check_edge(source, target, "seed 0 on 'fc'")


# What may be asked of a seed by hand, and the states in which it is legal.
VERBS = {
    "graft": (lambda layer: layer.graft(0, GraftingStrategy()), {S.TRAINING}),
    "stabilize": (lambda layer: layer.stabilize(0), {S.GRAFTING}),
    "evaluate": (lambda layer: layer.evaluate(0), {S.STABILIZATION}),
    "fine_tune": (lambda layer: layer.fine_tune(0), {S.EVALUATING}),
    "fossilize": (lambda layer: layer.fossilize(0), {S.EVALUATING, S.FINE_TUNING}),
    "cull": (
        lambda layer: layer.cull(0, "by hand"),
        {S.LOADING, S.TRAINING, S.GRAFTING, S.STABILIZATION, S.EVALUATING, S.FINE_TUNING},
    ),
    "revive": (lambda layer: layer.revive(0), {S.CULLED, S.CANCELLED}),
    "cancel_germination": (
        lambda layer: layer.cancel_germination(0),
        {S.GERMINATED, S.TRAINING},
    ),
    "request_germination": (lambda layer: layer.request_germination(0, "0" * 64), {S.DORMANT}),
}


def layer_in(state: SeedState) -> KasminaLayer:
    """Walk a real seed, with a real kernel, to ``state``."""
    library = MemoryLibrary()
    model = esper.wrap(nn.Sequential(nn.Linear(8, 4)), seeds_per_layer=1)
    model.connect(library)
    layer = model.kasmina_layers["0"]
    loader = model.kasmina.loads._loader
    kernel = loader.prepare(library.add(), layer.site(0), layer.dtype, model.kasmina.bank.device)
    walk = [
        (S.GERMINATED, lambda: layer.germinate(0, kernel.artifact_id, "test")),
        (S.LOADING, lambda: layer.await_kernel(0)),
        (S.TRAINING, lambda: layer.train(layer.make_seat(0, kernel, layer.make_room()))),
        (S.GRAFTING, lambda: layer.graft(0, GraftingStrategy())),
        (S.STABILIZATION, lambda: layer.stabilize(0)),
        (S.EVALUATING, lambda: layer.evaluate(0)),
        (S.FINE_TUNING, lambda: layer.fine_tune(0)),
        (S.FOSSILIZED, lambda: layer.fossilize(0)),
    ]
    last = S.EVALUATING if state is S.CULLED else state
    for reached, move in walk:
        if layer.state(0) is last:
            break
        move()
        assert layer.state(0) is reached
    if state is S.CULLED:
        layer.cull(0, "test")
    assert layer.state(0) is state
    return layer


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("state", [s for s in S if s not in (S.CANCELLED, S.ROLLED_BACK)])
def test_a_verb_in_a_wrong_state_raises_and_changes_nothing(verb: str, state: SeedState) -> None:
    call, legal = VERBS[verb]
    layer = layer_in(state)
    host = layer.default_transform
    before = (type(host), list(host.state_dict()), dict(layer.kasmina.tenancies), bytes_of(layer))
    if state in legal:
        call(layer)
        assert layer.state(0) is not state
        return
    with pytest.raises(LifecycleError, match=f"no edge {state.name} >"):
        call(layer)
    after = (type(host), list(host.state_dict()), dict(layer.kasmina.tenancies), bytes_of(layer))
    assert after == before


def bytes_of(layer: KasminaLayer) -> bytes:
    return bytes(layer.kasmina.bank.block)
