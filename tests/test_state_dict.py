"""``state_dict()`` and ``load_state_dict()`` of dormant and of grown models, strictly."""

import asyncio
import copy
import io
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from kasmina_library import Irregular, MemoryLibrary
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import esper
from esper.config import SeedSettings
from esper.contracts import GraftingStrategy, SeedState
from esper.errors import ArtifactNotFoundError, EsperError
from esper.kasmina.model import MorphableModel

S = SeedState
SETTINGS = SeedSettings(seeds_per_layer=2, deterministic=True)
HEARD = [S.GRAFTING, S.STABILIZATION, S.EVALUATING, S.FINE_TUNING, S.FOSSILIZED]


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))


def fresh(library: MemoryLibrary | None) -> MorphableModel:
    model = esper.wrap(plain(), settings=SETTINGS)
    if library is not None:
        model.connect(library)
    return model


def grown(library: MemoryLibrary, state: S = S.GRAFTING) -> MorphableModel:
    """A model with seed 1 of layer "0" in ``state`` and weights that are not the initial ones."""
    model = fresh(library)
    layer = model.kasmina_layers["0"]
    if state is S.TRAINING:
        layer.request_germination(1, library.add(), GraftingStrategy())
        model.step()
    else:
        assert asyncio.run(layer.load_kernel(1, library.add(), alpha=0.375))
    if state >= S.STABILIZATION:
        layer.stabilize(1, 0.625)
    if state >= S.EVALUATING:
        layer.evaluate(1)
    if state is S.FINE_TUNING:
        layer.fine_tune(1)
    if state is S.FOSSILIZED:
        layer.fossilize(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def outputs(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return model.eval()(torch.randn(5, 8, generator=generator))


def through_torch_save(state: dict[str, Tensor]) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Tensor] = torch.load(file, weights_only=True)
    return loaded


def through_safetensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return safetensors.torch.load(safetensors.torch.save(state))


WAYS = {"torch.save": through_torch_save, "safetensors": through_safetensors}


# ---------------------------------------------------------------------- dormant


@pytest.mark.parametrize("way", WAYS)
def test_a_dormant_models_weights_are_those_of_the_plain_one(way: str) -> None:
    net, model = plain(), fresh(None)
    for source, target in ((net, model), (model, net)):
        nn.init.normal_(source[0].weight)
        target.load_state_dict(WAYS[way](source.state_dict()), strict=True)
        assert list(target.state_dict()) == list(source.state_dict())
        for name, value in source.state_dict().items():
            assert torch.equal(target.state_dict()[name], value), name
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    whole = torch.load(file, weights_only=False)
    assert type(whole) is nn.Sequential
    assert torch.equal(outputs(whole), outputs(model))


# ---------------------------------------------------------------------- grown


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("state", HEARD)
def test_a_grown_model_goes_into_a_fresh_one(state: S, way: str) -> None:
    library = MemoryLibrary()
    model, twin = grown(library, state), fresh(library)
    twin.load_state_dict(WAYS[way](model.state_dict()), strict=True)
    assert twin.kasmina_layers["0"].state(1) is state
    assert list(twin.state_dict()) == list(model.state_dict())
    assert torch.equal(outputs(twin), outputs(model))
    with twin.kasmina_layers["0"].silenced(1):
        assert not torch.equal(outputs(twin), outputs(model)), "the kernel must have a say"


def test_its_seeds_can_be_moved_on_by_hand() -> None:
    library = MemoryLibrary()
    twin = fresh(library)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    twin.attach_optimizer(optimizer)
    twin.load_state_dict(grown(library).state_dict())
    assert len(optimizer.param_groups[0]["params"]) == 6 + 4
    for _ in range(3):
        twin.step()
    layer = twin.kasmina_layers["0"]
    assert layer.state(1) is S.GRAFTING
    layer.stabilize(1)
    layer.cull(1, "test")
    assert len(optimizer.param_groups[0]["params"]) == 6


def test_a_seed_in_training_is_not_part_of_the_model() -> None:
    library = MemoryLibrary()
    model, twin = grown(library, S.TRAINING), plain()
    twin.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(outputs(twin), outputs(model))


def test_best_weights_come_back_without_touching_state_and_alpha() -> None:
    model = grown(MemoryLibrary())
    best, expected = copy.deepcopy(model.state_dict()), outputs(model)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    layer = model.kasmina_layers["0"]
    layer.stabilize(1, 0.375)
    model.load_state_dict(best)
    assert layer.state(1) is S.STABILIZATION
    assert torch.equal(outputs(model), expected)
    layer.kasmina.bank.set_alpha(layer.first_seed + 1, 0.5)
    model.load_state_dict(best)
    assert layer.state_layout.value("alpha_blend", 1) == 0.5


def test_within_another_module() -> None:
    library = MemoryLibrary()
    model, twin = grown(library), fresh(library)
    nn.ModuleDict({"net": twin}).load_state_dict(nn.ModuleDict({"net": model}).state_dict())
    assert torch.equal(outputs(twin), outputs(model))


def test_a_root_that_is_a_layer_itself() -> None:
    library = MemoryLibrary()
    models = [esper.wrap(nn.Linear(8, 8), settings=SETTINGS) for _ in range(2)]
    for model in models:
        model.connect(library)
    assert asyncio.run(models[0].kasmina_layers[""].load_kernel(0, library.add()))
    models[1].load_state_dict(models[0].state_dict())
    assert torch.equal(outputs(models[1]), outputs(models[0]))


# ---------------------------------------------------------------------- what is refused


def refused(model: MorphableModel, state: dict[str, Tensor], message: str) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = model.kasmina_layers["0"].state_layout.lifecycle_states()
    with pytest.raises(EsperError, match=message):
        model.load_state_dict(state)
    assert model.kasmina_layers["0"].state_layout.lifecycle_states() == states
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_seeds_that_run_as_one_go_through_safetensors(tmp_path: Path) -> None:
    library = MemoryLibrary()
    model, other = fresh(library), fresh(library)
    for seed_idx in range(2):
        assert asyncio.run(model.load_kernel("0", seed_idx, library.add(), alpha=0.375))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(4, 8)
    expected = model.eval()(x)
    state = model.state_dict()
    weights = [state[f"0.esper_seeds.{seed_idx}.kernel.up__weight"] for seed_idx in range(2)]
    assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    with pytest.raises(RuntimeError, match="covering the entire storage"):
        safetensors.torch.save_model(model, tmp_path / "whole")
    safetensors.torch.save_file(state, tmp_path / "weights")
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "weights"))
    assert torch.equal(other.eval()(x), expected)


def test_a_fresh_model_needs_a_library() -> None:
    library = MemoryLibrary()
    state = grown(library).state_dict()
    [artifact] = library.bundles
    named = rf"\({artifact} for seed 1 on '0'\): call model.connect\(library\) first"
    refused(fresh(None), state, named)
    refused(fresh(MemoryLibrary()), state, f"no kernel {artifact}")
    assert issubclass(ArtifactNotFoundError, EsperError)


def test_weights_from_before_a_germination_name_the_seeds() -> None:
    message = r"no weights for kernels that are in place: [0-9a-f]{64} for seed 1 on '0'; cull them"
    refused(grown(MemoryLibrary()), plain().state_dict(), message)


def test_weights_of_another_kernel_are_refused() -> None:
    library = MemoryLibrary()
    state = grown(library).state_dict()
    other = fresh(library)
    assert asyncio.run(other.kasmina_layers["0"].load_kernel(1, library.add(Irregular)))
    refused(other, state, "for seed 1 on '0', where [0-9a-f]{64} is in place")


def test_a_seed_that_is_taken_is_refused() -> None:
    library = MemoryLibrary()
    state = grown(library).state_dict()
    message = "has a kernel for seed 1 on '0', which is TRAINING; it must be DORMANT"
    refused(grown(library, S.TRAINING), state, message)


def test_without_strict_it_is_as_ever() -> None:
    library = MemoryLibrary()
    state = grown(library).state_dict()
    unexpected = fresh(None).load_state_dict(state, strict=False).unexpected_keys
    assert "0.esper_seeds.1.kernel.down__weight" in unexpected
    missing = grown(library).load_state_dict(plain().state_dict(), strict=False).missing_keys
    assert "0.esper_seeds.1.kernel.down__weight" in missing


@pytest.mark.parametrize("state", [S.TRAINING, S.GRAFTING])
def test_a_grown_model_is_not_pickled_and_says_what_to_do(state: S) -> None:
    model = grown(MemoryLibrary(), state)
    with pytest.raises(EsperError, match=r"kernels in place cannot be pickled.*esper\.save"):
        torch.save(model, io.BytesIO())
    with pytest.raises(EsperError, match=r"kernels in place cannot be pickled; esper\.save"):
        pickle.dumps(model[0])


# ---------------------------------------------------------------------- torch.distributed.checkpoint


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_distributed_checkpoint_of_a_grown_model(tmp_path: Path) -> None:
    library = MemoryLibrary()
    model = grown(library)
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "dcp", no_dist=True)

    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        nn.init.zeros_(parameter)
    state = {"model": twin.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    twin.load_state_dict(state["model"])
    assert torch.equal(outputs(twin), outputs(model))

    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    newcomer = fresh(library)
    newcomer.load_state_dict(state["model"], strict=True)
    assert torch.equal(outputs(newcomer), outputs(model))
