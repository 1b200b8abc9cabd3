"""The built-in designs at every kind of site, and the registry."""

import forge_samples as samples
import pytest
import torch
from forge_samples import PLANTINGS, SITES
from torch import Tensor, nn

from esper import blueprints
from esper.blueprints import bad, registry
from esper.blueprints.norm import Norm
from esper.contracts import Design, SiteSignature
from esper.errors import BlueprintError
from esper.kasmina.example import example_inputs

RESIDUAL = [planting for planting in PLANTINGS if planting[1] != "standardize"]


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_designs", dict(registry._designs))


def test_which_designs_fit_where() -> None:
    anywhere = ["residual_mlp", "low_rank", "gated"]
    norms = ["norm", "standardize"]
    spatial = [*anywhere, "conv_bottleneck", "depthwise", "channel_attention", *norms]
    sequence = [*anywhere, "channel_attention", "self_attention", *norms]
    fitting = {name: [d.name for d in blueprints.designs_for(site)] for name, site in SITES.items()}
    assert fitting == {
        "linear": [*anywhere, *norms],
        "sequence": sequence,
        "conv1d": spatial,
        "conv2d": spatial,
        "conv3d": spatial,
        "transposed": spatial,
        "activation": [*anywhere, *norms],
        "activation2d": spatial,
        "embedding": sequence,
    }


@pytest.mark.parametrize(("site_name", "design_name"), RESIDUAL)
def test_starts_as_the_host_and_can_learn(site_name: str, design_name: str) -> None:
    site = SITES[site_name]
    module = blueprints.build(blueprints.get(design_name), site)
    inp, act = example_inputs(site, "float32", 4)
    out = module(inp, act)
    assert torch.equal(out, act)
    (out * torch.randn_like(out)).sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


@pytest.mark.parametrize("site_name", ["linear", "conv2d", "activation2d"])
def test_low_rank_is_linear_in_the_input(site_name: str) -> None:
    site = SITES[site_name]
    module = blueprints.build(blueprints.get("low_rank"), site).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    a, act = example_inputs(site, "float64", 4)
    b, _ = example_inputs(site, "float64", 4)

    def branch(inp: Tensor) -> Tensor:
        out: Tensor = module(inp, act) - module(torch.zeros_like(inp), act)
        return out

    torch.testing.assert_close(branch(a + 2 * b), branch(a) + 2 * branch(b))


def test_standardize_is_a_fixed_function() -> None:
    module = blueprints.build(blueprints.get("standardize"), SITES["activation2d"])
    assert list(module.parameters()) == []
    out = module(*example_inputs(SITES["activation2d"], "float32", 3)).flatten(1)
    torch.testing.assert_close(out.mean(1), torch.zeros(3))
    torch.testing.assert_close(out.var(1, unbiased=False), torch.ones(3), atol=1e-4, rtol=0)


def test_hyper_parameters_reach_the_builder() -> None:
    design = Design(name="r2", builder=blueprints.get("low_rank").builder, hparams={"rank": 2})
    shapes = [p.shape for p in blueprints.build(design, SITES["linear"]).parameters()]
    assert shapes == [(2, 24), (8, 2), (8,)]


@pytest.mark.parametrize(
    ("name", "site_name", "message"),
    [
        ("self_attention", "linear", r"'self_attention': needs an output of rank 3 with channels"),
        ("self_attention", "conv1d", r"got Conv1d with output \(None, 5, None\) and channels in"),
        ("conv_bottleneck", "sequence", r"needs an output of rank 3 to 5 with channels in dim"),
        ("depthwise", "linear", r"needs an output of rank 3 to 5 with channels in dimension 1"),
        ("channel_attention", "linear", r"needs an output of rank 3 or more; channels in the last"),
    ],
)
def test_refuses_a_site_that_does_not_fit(name: str, site_name: str, message: str) -> None:
    with pytest.raises(BlueprintError, match=message):
        blueprints.build(blueprints.get(name), SITES[site_name])


def test_one_channel_cannot_be_normalised() -> None:
    site = SiteSignature(host="Linear", inp_shape=(None, 4), act_shape=(None, 1), channel_dim=1)
    assert not Norm.fits(site)
    with pytest.raises(BlueprintError, match="needs two channels or more"):
        Norm(site)


@pytest.mark.parametrize(
    ("host", "site_name"),
    [
        (nn.Linear(24, 8), "linear"),
        (nn.Linear(24, 8), "sequence"),
        (nn.Conv1d(6, 5, 3, 2, 0, 1), "conv1d"),
        (nn.Conv2d(6, 5, (3, 2), (2, 1), (0, 1), (1, 2)), "conv2d"),
        (nn.Conv3d(6, 5, (1, 2, 3), (1, 2, 1), (0, 1, 2), (1, 2, 3)), "conv3d"),
        (nn.ConvTranspose2d(6, 5, (3, 2), (2, 1), (0, 1), dilation=(1, 2)), "transposed"),
        (nn.Embedding(10, 8), "embedding"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_example_inputs_are_those_of_the_host(host: nn.Module, site_name: str) -> None:
    for batch_size in (1, 5):
        inp, act = example_inputs(SITES[site_name], "float32", batch_size)
        out = host(inp)
        assert act.shape == out.shape
        assert act.shape[0] == batch_size
        assert act.dtype == out.dtype


@pytest.mark.usefixtures("own_registry")
def test_register_and_get() -> None:
    design = blueprints.register("mine", samples.Tied)
    assert design == Design(name="mine", builder="forge_samples:Tied")
    assert blueprints.get("mine") == blueprints.register("mine", "forge_samples:Tied") == design
    assert design in blueprints.designs_for(SITES["linear"])
    with pytest.raises(ValueError, match="another design is registered as 'mine'"):
        blueprints.register("mine", samples.Stateful)
    with pytest.raises(ValueError, match="no design 'yours'; registered are channel_attention, "):
        blueprints.get("yours")


def test_refuses_what_another_process_cannot_import(monkeypatch: pytest.MonkeyPatch) -> None:
    class Local(samples.Tied):
        pass

    with pytest.raises(BlueprintError, match="Local cannot be imported by another process"):
        blueprints.register("local", Local)
    monkeypatch.setattr(samples.Tied, "__module__", "__main__")
    with pytest.raises(BlueprintError, match=r"__main__\.Tied cannot be imported"):
        blueprints.register("script", samples.Tied)
    with pytest.raises(BlueprintError, match="another process cannot import __main__"):
        blueprints.register("script", "__main__:Tied")


@pytest.mark.parametrize(
    ("builder", "message"),
    [
        ("no_such_module:X", "no no_such_module:X: No module named"),
        ("forge_samples:X", "no forge_samples:X: module 'forge_samples' has no attribute 'X'"),
        ("forge_samples:SITES", "forge_samples:SITES cannot be called"),
    ],
)
def test_refuses_what_is_not_there(builder: str, message: str) -> None:
    with pytest.raises(BlueprintError, match=message):
        blueprints.register("missing", builder)


def test_failure_of_a_builder_names_the_design() -> None:
    design = samples.design(samples.Tied, width=3)
    with pytest.raises(BlueprintError, match=r"'Tied': forge_samples:Tied failed: TypeError: .*"):
        blueprints.build(design, SITES["linear"])
    no_module = Design(name="d", builder="forge_samples:nothing")
    with pytest.raises(BlueprintError, match="nothing gave a NoneType, no nn"):
        blueprints.build(no_module, SITES["linear"])


def test_refuses_an_instance_for_a_builder() -> None:
    with pytest.raises(TypeError, match=r"a builder is a class or function, .*got Identity\(\)"):
        blueprints.register("x", nn.Identity())


@pytest.mark.parametrize(
    ("name", "builder", "hparams", "message"),
    [
        ("my design", "forge_samples:Tied", {}, "1 to 64 letters, digits, .* got 'my design'"),
        ("", "forge_samples:Tied", {}, "name is 1 to 64 letters"),
        ("x" * 65, "forge_samples:Tied", {}, "name is 1 to 64 letters"),
        ("x", "forge_samples.Tied", {}, "'x': an import path is 'package.module:Class', got 'for"),
        ("x", "forge samples:Tied", {}, "an import path is"),
        ("x", "forge_samples:Tied", {"width": [1]}, r"are bools, numbers or strings by name, got"),
    ],
)
def test_refuses_what_is_malformed_in_its_own_words(
    name: str, builder: str, hparams: dict[str, list[int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        blueprints.register(name, builder, hparams=hparams)
    assert type(caught.value) is ValueError


@pytest.mark.parametrize("site_name", SITES)
def test_bad_designs_are_bad_in_their_numbers_only(site_name: str) -> None:
    site = SITES[site_name]
    inp, act = example_inputs(site, "float32", 4)
    act.requires_grad_()
    exploding = bad.ExplodingBlueprint(site)(inp, act)
    assert exploding.shape == act.shape
    assert exploding.isnan().all()
    out = bad.ExplodingGradient(site)(inp, act)
    assert torch.equal(out, act)
    (grad,) = torch.autograd.grad(out.sum(), act)
    assert grad.isnan().all()
    assert not any(d.builder.startswith("esper.blueprints.bad") for d in registry._designs.values())
