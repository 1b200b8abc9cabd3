"""Which layers carry seeds, how they are chosen, and what kernels on them see."""

import asyncio
import copy
import io
import logging
from typing import Any, NamedTuple

import pytest
import torch
from kasmina_library import MemoryLibrary, Residual
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import esper
from esper.blueprints.channel_attention import ChannelAttention
from esper.blueprints.low_rank import LowRank
from esper.blueprints.registry import designs_for
from esper.config import SeedSettings
from esper.contracts import SeedState, SiteSignature
from esper.errors import EsperError
from esper.kasmina import site_types
from esper.kasmina.example import example_inputs
from esper.kasmina.model import MorphableModel
from esper.kasmina.site_types import site_type

LIBRARY = MemoryLibrary()
ONE_SEED = SeedSettings(seeds_per_layer=1)


def plant(net: nn.Module, targets: Any = None) -> MorphableModel:
    model = esper.wrap(net, targets, settings=ONE_SEED)
    model.connect(LIBRARY)
    return model


def grow(model: MorphableModel, name: str, builder: Any = LowRank) -> None:
    """Put a kernel that is not zero on the layer's only seed, at full strength."""
    layer = model.kasmina_layers[name]
    artifact_id = LIBRARY.add(builder, layer.site(0))
    assert asyncio.run(model.load_kernel(name, 0, artifact_id, alpha=1.0))
    kernel = layer.kernel(0)
    assert kernel is not None
    with torch.no_grad():
        for weight in kernel.weights():
            weight.normal_(std=0.3)


def by_kernel(model: MorphableModel, name: str, inp: Tensor, act: Tensor) -> Tensor:
    kernel = model.kasmina_layers[name].kernel(0)
    assert kernel is not None
    out: Tensor = kernel(inp, act)
    return out


def encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2, **options)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.1)),
        nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.1)),
        nn.Linear(8, 4),
    )


# ---------------------------------------------------------------------- choosing layers

CHOICES: dict[str, tuple[Any, list[str]]] = {
    "default": (None, ["0.0", "0.1", "1.0", "1.1", "2"]),
    "names": (["2", "0.0"], ["0.0", "2"]),
    "a name that is no default": (["0.2"], ["0.2"]),
    "a type": ([nn.Linear], ["0.0", "1.0", "2"]),
    "a type that is no default": ([nn.Dropout], ["0.2", "1.2"]),
    "every type": ([nn.Module], ["0.0", "0.1", "1.0", "1.1", "2"]),
    "a pattern": (["*.0"], ["0.0", "1.0"]),
    "a pattern over all below": (["1.*"], ["1.0", "1.1"]),
    "a pattern for no defaults": (["?.2"], ["0.2", "1.2"]),
    "a predicate": (lambda name, module: name.startswith("0"), ["0.0", "0.1"]),
    "a predicate for no defaults": (
        [lambda name, module: isinstance(module, nn.Dropout)],
        ["0.2", "1.2"],
    ),
    "a mixture": ([nn.Tanh, "0.*", "2", lambda name, module: False or name == "1.0"],
                  ["0.0", "0.1", "1.0", "1.1", "2"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CHOICES)
def test_target_layers_choose(case: str) -> None:
    targets, expected = CHOICES[case]
    assert list(esper.wrap(network(), targets).kasmina_layers) == expected


WRONG_CHOICES: dict[str, tuple[Any, type[Exception], str]] = {
    "a name that is near": (
        ["0.00"],
        ValueError,
        r"Layer 0.00 not found in Sequential \(near: '0.0'",
    ),
    "a pattern": (["encoder.*"], ValueError, "'encoder.*' matches no layer of Sequential$"),
    "a near pattern": (["0.0*1*"], ValueError, r"matches no layer of Sequential \(near: '0.1"),
    "a type": ([nn.Conv2d], ValueError, "Conv2d matches no layer of Sequential$"),
    "a near type": ([nn.LazyLinear], ValueError, r"LazyLinear matches no layer .*\(near: 'Linear"),
    "a predicate": (lambda name, module: False, ValueError, "matches no layer of Sequential"),
    "a container": ([nn.Sequential], ValueError, "would run the kernels as further layers"),
    "a number": ([3], TypeError, "target_layers holds 3; expected a name"),
    "nothing": ([], ValueError, "target_layers is empty"),
    "one string": ("0.0", TypeError, "must be a list of names, patterns"),
    "one type": (nn.Linear, TypeError, "must be a list of names, patterns"),
}


@pytest.mark.parametrize("case", WRONG_CHOICES)
def test_targets_that_match_nothing_are_refused_and_nothing_is_changed(case: str) -> None:
    targets, error, message = WRONG_CHOICES[case]
    net = network()
    with pytest.raises(error, match=message):
        esper.wrap(net, targets)
    assert type(net) is nn.Sequential
    assert type(net[0][1]) is nn.ReLU


def test_a_model_without_default_sites_is_told_what_it_could_name() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Dropout())
    with pytest.raises(ValueError, match="name '0', '1' in target_layers"):
        esper.wrap(net)


def test_layers_in_nested_containers_are_found() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(2, 2), nn.GELU()])})

    assert list(esper.wrap(Nested()).kasmina_layers) == ["blocks.a.0", "blocks.a.1"]


def test_print_seeds_shows_layers_types_widths_and_states() -> None:
    model = plant(network())
    grow(model, "2")
    output = io.StringIO()
    model.print_seeds(Console(file=output, width=100))
    rows = [line.replace("│", " ").split() for line in output.getvalue().splitlines()]
    assert ["0.0", "Linear", "8", "1", "dormant"] in rows
    assert ["0.1", "ReLU", "seen", "at", "the", "first", "forward", "1", "dormant"] in rows
    assert ["2", "Linear", "4", "1", "grafting"] in rows
    assert "5 layers with seeds" in output.getvalue()


# ---------------------------------------------------------------------- what a kernel there fits


def signature(host: str, inp: Any, act: Any, **more: Any) -> SiteSignature:
    fields = {"channel_dim": len(act) - 1, **more}
    return SiteSignature(host=host, inp_shape=inp, act_shape=act, **fields)


_IDS = torch.tensor([[1, 2, 3]])
_CONV = {"channel_dim": 1, "stride": (1,), "padding": (0,), "dilation": (1,)}

SIGNATURES: dict[str, tuple[nn.Module, Tensor, SiteSignature]] = {
    "Embedding": (
        nn.Embedding(7, 6),
        _IDS,
        signature("Embedding", (None, None), (None, None, 6), shares_positions=False),
    ),
    "GRU, sequence first": (
        nn.GRU(4, 6),
        torch.randn(5, 3, 4),
        signature("GRU", (None, None, 4), (None, None, 6), batch_dim=1),
    ),
    "LSTM, both directions": (
        nn.LSTM(4, 6, batch_first=True, bidirectional=True, proj_size=2),
        torch.randn(3, 5, 4),
        signature("LSTM", (None, None, 4), (None, None, 4)),
    ),
    "attention": (
        nn.MultiheadAttention(8, 2, batch_first=True),
        torch.randn(3, 5, 8),
        signature("MultiheadAttention", (None, None, 8), (None, None, 8)),
    ),
    "attention, sequence first": (
        nn.MultiheadAttention(8, 2),
        torch.randn(5, 3, 8),
        signature("MultiheadAttention", (None, None, 8), (None, None, 8), batch_dim=1),
    ),
    "Conv1d": (
        nn.Conv1d(4, 6, 3),
        torch.randn(3, 4, 8),
        signature("Conv1d", (None, 4, None), (None, 6, None), kernel_size=(3,), **_CONV),
    ),
    "Conv1d, even and same": (
        nn.Conv1d(4, 6, 4, padding="same"),
        torch.randn(3, 4, 8),
        signature("Conv1d", (None, 4, None), (None, 6, None), channel_dim=1),
    ),
    "ConvTranspose1d": (
        nn.ConvTranspose1d(4, 6, 3),
        torch.randn(3, 4, 8),
        signature("ConvTranspose1d", (None, 4, None), (None, 6, None), kernel_size=(3,), **_CONV),
    ),
    "BatchNorm1d": (
        nn.BatchNorm1d(4),
        torch.randn(3, 4, 8),
        signature("BatchNorm1d", (None, 4, None), (None, 4, None), channel_dim=1),
    ),
    "GLU": (
        nn.GLU(1),
        torch.randn(3, 8, 5),
        signature("GLU", (None, 8, None), (None, 4, None), channel_dim=1),
    ),
    "MaxPool2d": (
        nn.MaxPool2d(2),
        torch.randn(3, 4, 8, 8),
        signature(
            "MaxPool2d",
            (None, 4, None, None),
            (None, 4, None, None),
            channel_dim=1,
            shares_positions=False,
        ),
    ),
    "LazyLinear": (
        nn.LazyLinear(6),
        torch.randn(3, 8),
        signature("Linear", (None, 8), (None, 6)),
    ),
    "LazyConv1d": (
        nn.LazyConv1d(6, 3),
        torch.randn(3, 4, 8),
        signature("Conv1d", (None, 4, None), (None, 6, None), kernel_size=(3,), **_CONV),
    ),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections", "ignore:Using padding='same'")
@pytest.mark.parametrize("case", SIGNATURES)
def test_the_site_is_what_the_layer_gives(case: str) -> None:
    layer, inp, expected = SIGNATURES[case]
    watched = SeedSettings(seeds_per_layer=1, observe_every=1)
    model = esper.wrap(nn.ModuleDict({"layer": layer}), ["layer"], settings=watched)
    model.step()
    args = (inp, inp, inp) if isinstance(layer, nn.MultiheadAttention) else (inp,)
    model["layer"](*args)
    assert model.kasmina_layers["layer"].site(0) == expected


def test_the_input_of_a_site_has_a_width_even_where_it_holds_indices() -> None:
    _, _, embedding = SIGNATURES["Embedding"]
    _, _, conv = SIGNATURES["Conv1d"]
    assert (embedding.inp_channels, conv.inp_channels) == (6, 4)


def test_example_inputs_put_the_batch_where_the_site_has_it() -> None:
    _, _, gru = SIGNATURES["GRU, sequence first"]
    inp, act = example_inputs(gru, "float32", 3)
    assert (inp.shape[1], act.shape[1]) == (3, 3)
    assert inp.shape[0] == act.shape[0] != 3


def test_example_inputs_that_do_not_correspond_have_other_sizes() -> None:
    _, _, pool = SIGNATURES["MaxPool2d"]
    inp, act = example_inputs(pool, "float32", 3)
    assert inp.shape[:2] == act.shape[:2]
    assert not set(inp.shape[2:]) & set(act.shape[2:])


def test_designs_that_mix_positions_leave_the_samples_apart() -> None:
    _, _, by_sequence = SIGNATURES["attention, sequence first"]
    _, _, by_batch = SIGNATURES["attention"]
    first, second = ({d.name for d in designs_for(site)} for site in (by_sequence, by_batch))
    assert second - first == {"self_attention"}
    assert "channel_attention" in first
    inp, act = example_inputs(by_sequence, "float32", 3)
    watched = SeedSettings(seeds_per_layer=1, observe_every=1)
    model = esper.wrap(nn.ModuleDict({"layer": nn.MultiheadAttention(8, 2)}), settings=watched)
    model.connect(LIBRARY)
    model.step()
    model["layer"](inp, inp, inp)
    grow(model, "layer", ChannelAttention)
    out = by_kernel(model, "layer", inp, act)
    inp[:, 0] += 1
    moved = (by_kernel(model, "layer", inp, act) != out).any(dim=(0, 2))
    assert moved.tolist() == [True, False, False]


# ---------------------------------------------------------------------- traps


def test_the_output_projection_of_attention_is_no_site() -> None:
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    assert list(esper.wrap(net).kasmina_layers) == ["attention"]
    with pytest.raises(ValueError, match=r"'attention.out_proj'.* is never called as a module"):
        esper.wrap(nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)}), ["*.out_proj"])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", ["layers.0.linear1", "layers.0.self_attn", "layers.1", ""])
@pytest.mark.parametrize("padding", [False, True])
def test_an_active_seed_is_heard_on_the_fast_path_of_an_encoder(name: str, padding: bool) -> None:
    model = plant(encoder(), [name])
    inp = torch.randn(3, 5, 8)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 3:] = padding
    model(inp)
    grow(model, name)
    model.eval()
    with torch.no_grad():
        fast = model(inp, src_key_padding_mask=mask)
    slow = model(inp, src_key_padding_mask=mask)  # with gradients there is no fast path
    torch.testing.assert_close(fast[~mask], slow[~mask])
    with torch.no_grad(), model.kasmina_layers[name].silenced(0):
        assert not torch.allclose(model(inp, src_key_padding_mask=mask)[~mask], fast[~mask])


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_kernel_on_packed_sequences_computes_what_it_does_on_each_alone(
    batch_first: bool,
) -> None:
    model = plant(nn.GRU(4, 6, batch_first=batch_first))
    sequences = [torch.randn(length, 4) for length in (3, 5, 2)]
    grow(model, "")
    packed, last = model(pack_sequence(sequences, enforce_sorted=False))
    outputs, _ = pad_packed_sequence(packed, batch_first=True)
    for sequence, output in zip(sequences, outputs, strict=True):
        alone, _ = model(sequence.unsqueeze(0 if batch_first else 1))
        torch.testing.assert_close(output[: len(sequence)], alone.squeeze(0 if batch_first else 1))
    assert last.shape == (1, 3, 6)
    packed.data.sum().backward()
    kernel = model.kasmina_layers[""].kernel(0)
    assert kernel is not None
    assert all(weight.grad is not None and weight.grad.any() for weight in kernel.weights())


def test_packed_sequences_are_observed() -> None:
    model = esper.wrap(nn.GRU(4, 6), settings=SeedSettings(seeds_per_layer=1, observe_every=1))
    model.step()
    model(pack_sequence([torch.randn(3, 4), torch.randn(2, 4)]))
    assert model.kasmina.bank.fields["health_accumulator"][0, 0] == 5 * 6


# ---------------------------------------------------------------------- modules in odd places


class Twice(nn.Module):
    """One Linear under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x)))
        return out


def test_a_shared_module_has_one_set_of_seeds_that_both_names_find() -> None:
    model = plant(Twice(), ["second"])
    layers = model.kasmina_layers
    assert list(layers) == ["first"]
    assert len(layers) == 1
    assert layers["second"] is layers["first"] is layers.get("second")
    assert "second" in layers
    assert "third" not in layers
    with pytest.raises(KeyError, match="third"):
        layers["third"]
    grow(model, "second")
    assert layers["first"].state(0) is SeedState.GRAFTING
    x = torch.randn(3, 4)
    linear = nn.functional.linear

    def grown(y: Tensor) -> Tensor:
        return by_kernel(model, "first", y, linear(y, model.first.weight, model.first.bias))

    torch.testing.assert_close(model(x), grown(torch.tanh(grown(x))))
    model(x).sum().backward()
    layers["second"].cull(0, "test")
    assert type(model.second) is nn.Linear


def test_a_copy_finds_shared_modules_by_both_names_too() -> None:
    twin = copy.deepcopy(plant(Twice()))
    assert twin.kasmina_layers["second"] is twin.kasmina_layers["first"]
    assert twin.kasmina_layers["first"].default_transform is twin.second


def test_an_activation_that_is_called_at_several_widths_has_seeds_at_the_first() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.Tanh()

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.act(x), self.act(y)

    model = plant(Wide())
    x, y = torch.randn(3, 4), torch.randn(3, 6)
    model(x, y)
    grow(model, "act")
    narrow, wide = model(x, y)
    torch.testing.assert_close(narrow, by_kernel(model, "act", x, torch.tanh(x)))
    assert torch.equal(wide, torch.tanh(y))


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.head(self.embed(ids))
            return out

    model = plant(Tied())
    before = model(_IDS)
    for name in ("embed", "head"):
        grow(model, name)
        assert not torch.equal(model(_IDS), before)
    model(_IDS).sum().backward()
    assert model.head.weight is model.embed.weight
    assert len([name for name, _ in model.named_parameters() if "esper" not in name]) == 1
    for name in ("embed", "head"):
        model.kasmina_layers[name].cull(0, "test")
    assert torch.equal(model(_IDS), before)


PARAMETRIZED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.parametrize("case", PARAMETRIZED)
def test_parametrized_modules_carry_seeds(case: str) -> None:
    linear = PARAMETRIZED[case](nn.Linear(8, 8)).eval()
    parametrized_class = type(linear)
    model = plant(nn.Sequential(linear))
    x = torch.randn(3, 8)
    before = model(x)
    assert model.kasmina_layers["0"].site(0).host == "Linear"
    grow(model, "0")
    torch.testing.assert_close(model(x), by_kernel(model, "0", x, before))
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in linear.parameters())
    model.kasmina_layers["0"].cull(0, "test")
    assert type(linear) is parametrized_class
    assert torch.equal(model(x), before)


def test_types_that_add_no_forward_are_read_like_their_base_and_others_are_not() -> None:
    class Named(nn.Linear):
        pass

    class Other(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sum()

    kind = site_type(Named(2, 2))
    assert kind is not None
    assert kind.host == "Linear"
    assert site_type(Other(2, 2)) is None


def test_hooks_see_the_grown_layer() -> None:
    model = plant(nn.Sequential(nn.Linear(4, 4)))
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda module, args, out: seen.append(out) or out + 1)
    x = torch.randn(3, 4)
    grow(model, "0")
    out = model(x)
    act = nn.functional.linear(x * 2, model[0].weight, model[0].bias)
    torch.testing.assert_close(seen[0], by_kernel(model, "0", x * 2, act))
    torch.testing.assert_close(out, seen[0] + 1)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("grown", [False, True])
def test_checkpointed_modules_have_the_gradients_of_plain_ones(
    use_reentrant: bool, grown: bool
) -> None:
    model = plant(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))
    x = torch.randn(3, 4, requires_grad=True)
    if grown:
        model(x)
        grow(model, "1")

    def grads(run: Any) -> list[Tensor]:
        model.zero_grad()
        x.grad = None
        run(x).square().sum().backward()
        assert x.grad is not None
        return [x.grad, *(p.grad.clone() for p in model.parameters())]

    # First, so that with dormant seeds the forward that shows the widths is checkpointed.
    recomputed = grads(lambda x: checkpoint(model, x, use_reentrant=use_reentrant))
    for ours, plain in zip(recomputed, grads(model), strict=True):
        assert torch.equal(ours, plain)
    assert len(recomputed) == (8 if grown else 5)


def test_a_model_on_the_meta_device_is_wrapped_and_moved() -> None:
    with torch.device("meta"):
        net = network()
    model = plant(net)
    assert model(torch.randn(2, 8, device="meta")).shape == (2, 4)
    assert model.kasmina_layers["0.1"].site(0).act_shape == (None, 8)
    assert not asyncio.run(model.load_kernel("2", 0, LIBRARY.add(Residual)))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    before = model.eval()(torch.ones(2, 8))
    grow(model, "2")
    assert not torch.equal(model(torch.ones(2, 8)), before)


def test_lazy_modules_are_sites_once_they_are_materialised() -> None:
    model = plant(nn.Sequential(nn.LazyLinear(6), nn.LazyBatchNorm1d(), nn.ReLU()))
    with pytest.raises(EsperError, match=r"layer '0' \(Linear\) has shown no output yet"):
        model.kasmina_layers["0"].site(0)
    before = model.eval()(torch.randn(3, 8))
    assert [type(m) for m in model] == [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert before.shape == (3, 6)
    grow(model, "0")
    grow(model, "1")
    model(torch.randn(3, 8)).sum().backward()
    for name in ("0", "1"):
        model.kasmina_layers[name].cull(0, "test")
    assert [type(m) for m in model] == [nn.Linear, nn.BatchNorm1d, nn.ReLU]


def test_a_call_without_a_batch_passes_by() -> None:
    model = plant(nn.Conv2d(3, 4, 1))
    image = torch.randn(3, 5, 5)
    expected = model(image)
    grow(model, "")
    assert torch.equal(model(image), expected)
    assert not torch.equal(model(image[None]), expected[None])


# ---------------------------------------------------------------------- types of one's own


class Pair(NamedTuple):
    hidden: Tensor
    weight: Tensor


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, *, named: bool = False) -> Any:
        hidden = self.linear(x)
        return Pair(hidden, x) if named else (hidden, x)


class InADict(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"hidden": x}


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget afterwards what a test registers."""
    monkeypatch.setattr(site_types, "_READERS", dict(site_types._READERS))


@pytest.mark.usefixtures("registry")
def test_a_registered_type_carries_seeds_on_its_first_output() -> None:
    esper.register_site(TwoOutputs, channel_dim=-1)
    model = plant(nn.ModuleDict({"block": TwoOutputs()}), [TwoOutputs])
    x = torch.randn(3, 5, 4)
    act, _ = model["block"](x)
    assert model.kasmina_layers["block"].site(0) == signature(
        "TwoOutputs", (None, None, 4), (None, None, 4)
    )
    grow(model, "block")
    for named in (False, True):
        out = model["block"](x, named=named)
        assert type(out) is (Pair if named else tuple)
        torch.testing.assert_close(out[0], by_kernel(model, "block", x, act))
        assert out[1] is x


@pytest.mark.usefixtures("registry")
def test_a_registered_type_may_be_read_in_another_way_than_before() -> None:
    esper.register_site(nn.ReLU, channel_dim=1)
    model = plant(nn.Sequential(nn.Conv1d(3, 6, 3), nn.ReLU()))
    model(torch.randn(2, 3, 9))
    assert model.kasmina_layers["1"].site(0).act_shape == (None, 6, None)


@pytest.mark.usefixtures("registry")
def test_a_type_registered_by_name_only_is_planted_only_where_it_is_named() -> None:
    esper.register_site(TwoOutputs, channel_dim=-1, by_default=False)
    assert list(esper.wrap(nn.ModuleDict({"a": TwoOutputs()})).kasmina_layers) == ["a.linear"]
    assert list(esper.wrap(nn.ModuleDict({"a": TwoOutputs()}), ["a"]).kasmina_layers) == ["a"]


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("channel_dim", "module", "message"),
    [
        (-1, InADict, "output, or the first element of it, is a floating-point tensor"),
        (3, nn.Hardswish, r"said to be 3, but the output of Hardswish has shape \(2, 4\)"),
    ],
)
def test_a_type_that_is_not_what_it_was_registered_as_is_left_alone_and_says_why(
    channel_dim: int, module: type[nn.Module], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    esper.register_site(module, channel_dim=channel_dim)
    model = plant(nn.ModuleDict({"odd": module()}))
    model["odd"](torch.randn(2, 4))
    [line] = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert line.startswith("layer 'odd' is not observed")
    with pytest.raises(EsperError, match=message):
        model.kasmina_layers["odd"].site(0)


BAD_REGISTRATIONS: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "no type": (nn.Linear(2, 2), {"channel_dim": 1}, TypeError, "expects a subclass of nn.Module"),
    "no module": (int, {"channel_dim": 1}, TypeError, "expects a subclass of nn.Module"),
    "a word": (TwoOutputs, {"channel_dim": "last"}, TypeError, "must be an int .* got 'last'"),
    "a bool": (TwoOutputs, {"channel_dim": True}, TypeError, "must be an int .* got True"),
    "the batch": (TwoOutputs, {"channel_dim": 0}, ValueError, "are both 0; seeds divide channels"),
    "a negative batch": (
        TwoOutputs,
        {"channel_dim": 1, "batch_dim": -1},
        ValueError,
        "batch_dim must be 0 or more, got -1",
    ),
    "a list": (nn.ModuleList, {"channel_dim": 1}, ValueError, "is never called as a module"),
    "a container": (nn.Sequential, {"channel_dim": 1}, ValueError, "run the kernels as further"),
}


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("case", BAD_REGISTRATIONS)
def test_bad_registrations_are_refused(case: str) -> None:
    module_type, options, error, message = BAD_REGISTRATIONS[case]
    with pytest.raises(error, match=message):
        esper.register_site(module_type, **options)


def test_a_type_that_is_not_known_says_how_to_make_it_known() -> None:
    with pytest.raises(ValueError, match=r"esper.register_site\(TwoOutputs, channel_dim="):
        esper.wrap(nn.ModuleDict({"block": TwoOutputs()}), ["block"])
