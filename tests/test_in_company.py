"""Seeds in the company of what else people do with autograd: nothing raises, nothing differs."""

import asyncio
import copy
import functools
from collections.abc import Callable

import pytest
import torch
from kasmina_library import Irregular, MemoryLibrary, Residual
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import esper
import esper.kasmina.observer as observer
from esper.config import SeedSettings
from esper.contracts import GraftingStrategy, SeedState, SiteSignature
from esper.kasmina.model import MorphableModel

Builder = Callable[..., nn.Module]
FOREVER = GraftingStrategy(training_steps=10_000)
BUILDERS = pytest.mark.parametrize("builder", [Residual, Irregular])
STATES = pytest.mark.parametrize("state", [SeedState.TRAINING, SeedState.GRAFTING])


def seeded(
    net: nn.Module,
    layer: str = "0",
    builder: Builder = Residual,
    state: SeedState = SeedState.GRAFTING,
    seeds: int = 2,
    inp: Tensor | None = None,
) -> MorphableModel:
    """Occupy all seeds of a layer whose chunks have four channels each."""
    library = MemoryLibrary()
    settings = SeedSettings(seeds_per_layer=seeds, deterministic=True)
    model = esper.wrap(net, [layer], settings=settings)
    model.connect(library)
    if inp is not None:
        model(inp)
    handle = model.kasmina_layers[layer]
    artifact_id = library.add(builder, handle.site(0))
    for seed_idx in range(seeds):
        if state is SeedState.TRAINING:
            handle.request_germination(seed_idx, artifact_id, FOREVER)
        else:
            assert asyncio.run(handle.load_kernel(seed_idx, artifact_id, alpha=0.5))
    model.step()
    assert handle.state_layout.lifecycle_states() == [state] * seeds
    return model


def healthy(model: MorphableModel, state: SeedState) -> bool:
    model.step()
    [handle] = model.kasmina_layers.values()
    return handle.state_layout.lifecycle_states() == [state] * handle.num_seeds


def gradients(model: nn.Module, call: Callable[[Tensor], Tensor]) -> list[Tensor]:
    inp = torch.linspace(-1, 1, 48).reshape(6, 8).requires_grad_()
    model.zero_grad()
    call(inp).square().sum().backward()
    assert inp.grad is not None
    return [inp.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@BUILDERS
@STATES
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_block_may_end_in_a_seeded_layer(
    use_reentrant: bool, state: SeedState, builder: Builder
) -> None:
    model = seeded(nn.Sequential(nn.Linear(8, 8)), "0", builder, state)
    expected = gradients(model, model)
    found = gradients(model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert healthy(model, state)


def test_a_checkpointed_block_may_end_in_an_observed_relu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observer, "FUSED_FROM_NUMEL", 0)
    net = nn.Sequential(nn.Linear(8, 4), nn.ReLU())
    plain = copy.deepcopy(net)
    model = esper.wrap(net, settings=SeedSettings(seeds_per_layer=2, observe_every=1))
    expected = gradients(plain, plain)
    for _ in range(3):
        found = gradients(model, lambda x: checkpoint(model, x, use_reentrant=False))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        model.step()


@BUILDERS
def test_what_selective_checkpointing_keeps_is_not_written_over(builder: Builder) -> None:
    model = seeded(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), "0", builder)
    keep_products = functools.partial(
        create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default]
    )
    expected = gradients(model, lambda x: model(x).sin())
    found = gradients(
        model,
        lambda x: checkpoint(
            lambda y: model(y).sin(), x, use_reentrant=False, context_fn=keep_products
        ),
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_seeds_first_heard_in_inference_mode_go_on_learning() -> None:
    model = seeded(nn.Sequential(nn.Linear(8, 12), nn.Tanh()), seeds=3).eval()
    with torch.inference_mode():
        model(torch.randn(6, 8))
    model.train()(torch.randn(6, 8)).sum().backward()
    assert healthy(model, SeedState.GRAFTING)


@BUILDERS
@STATES
def test_hosts_whose_output_autocast_leaves_in_float32(state: SeedState, builder: Builder) -> None:
    net = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 2))
    model = seeded(net, "0", builder, state, inp=torch.randn(6, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(torch.randn(6, 8))
    out.float().sum().backward()
    assert healthy(model, state)


class TanhConv(nn.Conv1d):
    """Inherits ``forward``, but saves what that returns for its backward pass."""

    def _conv_forward(self, *args: Tensor) -> Tensor:  # type: ignore[override]
        return torch.tanh(super()._conv_forward(*args))


def test_the_output_of_a_subclass_is_not_written_over() -> None:
    esper.register_site(TanhConv, channel_dim=1)
    net = nn.Sequential(TanhConv(3, 4, 1), nn.Flatten(), nn.Linear(20, 2))
    inp = torch.randn(2, 3, 5)
    model = esper.wrap(net, ["0"], settings=SeedSettings(seeds_per_layer=1, deterministic=True))
    model(inp)
    library = MemoryLibrary()
    model.connect(library)
    site = model.kasmina_layers["0"].site(0)
    assert asyncio.run(model.load_kernel("0", 0, library.add(Shifted, site), alpha=0.5))
    model(inp).sum().backward()
    assert healthy(model, SeedState.GRAFTING)


class Shifted(nn.Module):
    """``act`` and a shift that learns; it keeps nothing of ``act``."""

    def __init__(self, site: SiteSignature):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        return act + self.shift


@BUILDERS
@STATES
def test_an_input_that_the_host_has_copied_may_be_changed(
    state: SeedState, builder: Builder
) -> None:
    model = seeded(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), "0", builder, state)
    inp = (torch.randn(2, 8, 5, requires_grad=True) * 1).transpose(1, 2)
    out = model(inp)
    inp.mul_(2)
    (out.sum() + inp.sum()).backward()
    assert healthy(model, state)


def kernels(model: MorphableModel) -> list[nn.Module]:
    [handle] = model.kasmina_layers.values()
    found = [handle.kernel(seed_idx) for seed_idx in range(handle.num_seeds)]
    return [kernel for kernel in found if kernel is not None]


def test_tied_weights_stay_tied() -> None:
    model = seeded(nn.Sequential(nn.Linear(8, 12)), seeds=3)
    first, second, _ = kernels(model)
    second.up__weight = first.up__weight
    inp = torch.randn(6, 8)
    before = model(inp)
    with torch.no_grad():
        first.up__weight.mul_(3)
    after = model(inp)
    assert not torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4:8], after[:, 4:8])


def test_memory_that_somebody_else_has_a_hand_in_stays_where_it_is() -> None:
    model = seeded(nn.Sequential(nn.Linear(8, 12)), seeds=3)
    weights = [parameter for kernel in kernels(model) for parameter in kernel.parameters()]
    flat = torch.cat([weight.detach().flatten() for weight in weights])
    for weight, part in zip(weights, flat.split([w.numel() for w in weights]), strict=True):
        weight.data = part.view_as(weight)
    model(torch.randn(6, 8))
    model.kasmina_layers["0"].rearrange()
    with torch.no_grad():
        flat.fill_(0.25)
    assert all(bool((weight == 0.25).all()) for weight in weights)
    model.share_memory()
    model(torch.randn(6, 8))
    model.kasmina_layers["0"].rearrange()
    assert all(weight.is_shared() for weight in weights)


def test_one_kernel_of_another_dtype_fails_alone() -> None:
    model = seeded(nn.Sequential(nn.Linear(8, 12)), seeds=3)
    kernels(model)[1].double()
    model(torch.randn(6, 8))
    model.step()
    states = model.kasmina_layers["0"].state_layout.lifecycle_states()
    assert states == [SeedState.GRAFTING, SeedState.CULLED, SeedState.GRAFTING]


def test_weights_of_the_last_of_a_group_lie_by_themselves() -> None:
    model = seeded(nn.Sequential(nn.Linear(8, 12)), seeds=3)
    for seed_idx in (0, 2):
        model.kasmina_layers["0"].cull(seed_idx, "test")
    [kernel] = kernels(model)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in kernel.parameters())


@BUILDERS
@STATES
def test_weights_may_change_before_the_backward_pass_where_torch_allows_it(
    state: SeedState, builder: Builder, autograd_language: str
) -> None:
    model = seeded(nn.Sequential(nn.Linear(8, 8)), "0", builder, state)
    weights = [
        *model[0].parameters(recurse=False),
        *(weight for kernel in kernels(model) for weight in kernel.parameters()),
    ]
    inp = torch.linspace(-1, 1, 48).reshape(6, 8)
    expected = torch.autograd.grad(model(inp).square().sum(), weights)
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        loss = model(inp).square().sum()
        with torch.no_grad():
            for weight in weights:
                weight.mul_(3)
        found = torch.autograd.grad(loss, weights)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert healthy(model, state)


@BUILDERS
@STATES
def test_a_subclass_of_tensor_comes_out_as_one(state: SeedState, builder: Builder) -> None:
    class Marked(Tensor):
        pass

    model = seeded(nn.Sequential(nn.Linear(8, 8)), "0", builder, state)
    out = model(torch.randn(6, 8).as_subclass(Marked))
    assert type(out) is Marked
    out.square().sum().backward()
    assert healthy(model, state)


@BUILDERS
def test_writing_over_what_the_host_has_saved_is_refused_as_without_seeds(builder: Builder) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    inp = torch.randn(6, 8)
    model = seeded(net, "1", builder, SeedState.TRAINING, inp=inp)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(inp).relu_().sum().backward()


def test_an_error_in_a_hook_of_the_users_is_the_users() -> None:
    model = seeded(nn.Sequential(nn.Linear(8, 12)), seeds=3)

    def refuse(_: Tensor) -> Tensor:
        raise MemoryError("no room")

    for parameter in model[0].parameters(recurse=False):
        parameter.requires_grad_(False)  # the host itself saves nothing
    with (
        pytest.raises(MemoryError, match="no room"),
        torch.autograd.graph.saved_tensors_hooks(refuse, lambda t: t),
    ):
        model(torch.randn(6, 8))
    assert healthy(model, SeedState.GRAFTING)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own
@BUILDERS
def test_torch_func_sees_the_blended_output(builder: Builder) -> None:
    model = seeded(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), "0", builder)
    inp = torch.randn(6, 8)
    expected = torch.autograd.functional.jacobian(lambda x: model(x).sum(0), inp)
    found = torch.func.jacrev(lambda x: model(x).sum(0))(inp)
    torch.testing.assert_close(found, expected)
    forward = torch.func.jacfwd(lambda x: model(x).sum(0))(inp)
    torch.testing.assert_close(forward, expected)
    with torch.no_grad():
        rows = torch.vmap(lambda row: model(row[None])[0])(inp)
        torch.testing.assert_close(rows, model(inp))
    assert healthy(model, SeedState.GRAFTING)


@BUILDERS
@STATES
def test_a_batch_of_backward_passes_is_refused_and_harms_nothing(
    state: SeedState, builder: Builder, autograd_language: str
) -> None:
    model = seeded(nn.Sequential(nn.Linear(8, 8)), "0", builder, state)
    inp = torch.randn(6, 8)
    if (state, builder, autograd_language) == (SeedState.TRAINING, Residual, "cpp"):
        # Nobody asks for the gradients of the seed, so it is left out.
        expected = torch.autograd.functional.jacobian(model, inp)
        found = torch.autograd.functional.jacobian(model, inp, vectorize=True)
        torch.testing.assert_close(found, expected)
    else:
        with pytest.raises(RuntimeError, match="Batching rule not implemented"):
            torch.autograd.functional.jacobian(model, inp, vectorize=True)
    assert healthy(model, state)


def test_compiled_autograd_takes_observed_steps() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    plain = copy.deepcopy(net)
    model = esper.wrap(net, settings=SeedSettings(observe_every=1))
    inp = torch.randn(6, 8)
    model(inp)
    model.step()
    assert model.kasmina.observing
    for each in (plain, model):
        with compiled_autograd._enable(lambda graph: graph):
            each(inp).square().sum().backward()
    assert all(layer.observer.trouble is None for layer in model.kasmina_layers.values())
    energy = model.kasmina.bank.fields["health_accumulator"][5]
    assert bool(energy.any())
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)


@BUILDERS
def test_a_seed_in_training_learns_from_the_output_of_a_frozen_host(builder: Builder) -> None:
    model = seeded(nn.Sequential(nn.Linear(8, 8)), "0", builder, SeedState.TRAINING)
    host = list(model[0].parameters(recurse=False))
    for parameter in host:
        parameter.requires_grad_(False)
    model(torch.randn(6, 8)).square().sum().backward()
    assert all(parameter.grad is None for parameter in host)
    assert all(weight.grad is not None for k in kernels(model) for weight in k.parameters())


@BUILDERS
def test_torch_func_does_not_see_a_seed_in_training(builder: Builder) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    plain = copy.deepcopy(net)
    model = seeded(net, "0", builder, SeedState.TRAINING)
    inp = torch.randn(6, 8)
    found = torch.func.grad(lambda x: model(x).sum())(inp)
    assert torch.equal(found, torch.func.grad(lambda x: plain(x).sum())(inp))
    assert healthy(model, SeedState.TRAINING)


def test_a_branch_that_would_be_broadcast_is_no_bottleneck() -> None:
    model = seeded(nn.Sequential(nn.Linear(8, 8)), "0", Broadcast)
    kernel = kernels(model)[0]
    inp = torch.randn(6, 8)
    act = nn.functional.linear(inp, model[0].weight, model[0].bias)[:, :4]
    expected = act + 0.5 * (kernel(inp, act) - act)
    torch.testing.assert_close(model(inp)[:, :4], expected)


class Broadcast(nn.Module):
    def __init__(self, site: SiteSignature):
        super().__init__()
        self.down = nn.Linear(site.inp_channels, 3)
        self.up = nn.Linear(3, 1)

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        return act + self.up(torch.tanh(self.down(inp)))
