"""Which module types can carry seeds, and how each is read: the built-in ones and one's own.

Most carry seeds by default. Those that only choose, move, drop or normalise to probabilities what
others computed, and containers, do so where ``target_layers`` names them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from esper.kasmina.site import ChannelDim, Shape, SiteType


def _last(rank: int) -> int:
    return rank - 1


def _second(rank: int) -> int:
    return 1


def _convolution_like(rank: int) -> int:
    """(N, C), (N, T, C) and (C,) put channels last; (N, C, H, W) and more put them second."""
    return 1 if rank >= 4 else rank - 1


def _before(spatial_dims: int) -> ChannelDim:
    """(N, C, ...) and (C, ...), with as many dimensions behind."""
    return lambda rank: rank - spatial_dims - 1


def _at(dim: int) -> ChannelDim:
    return lambda rank: dim if dim >= 0 else rank + dim


@dataclass(frozen=True)
class Reader:
    """How to read the modules of one type. What depends on the module is a function of it."""

    channel_dim: ChannelDim
    by_default: bool = True
    declared: Callable[[Any], tuple[Shape, Shape]] | None = None  # -> shapes of inp and output
    geometry: Callable[[Any], dict[str, tuple[int, ...]]] | None = None
    batch_dim: Callable[[Any], int] = lambda module: 0
    shares_positions: bool = True
    own_channel_dim: Callable[[Any], ChannelDim | None] = lambda module: None

    def read(self, module: nn.Module, host: str) -> SiteType:
        tells = self.declared is not None and not isinstance(module, LazyModuleMixin)
        return SiteType(
            host=host,
            channel_dim=self.own_channel_dim(module) or self.channel_dim,
            by_default=self.by_default,
            declared=self.declared(module) if self.declared is not None and tells else None,
            geometry=self.geometry(module) if self.geometry is not None else {},
            batch_dim=self.batch_dim(module),
            shares_positions=self.shares_positions,
        )


# ---------------------------------------------------------------------- what modules tell


def _features(inp: str, out: str) -> Callable[[Any], tuple[Shape, Shape]]:
    return lambda module: ((None, getattr(module, inp)), (None, getattr(module, out)))


def _normalized(module: nn.LayerNorm | nn.RMSNorm) -> tuple[Shape, Shape]:
    channels = module.normalized_shape[-1]
    return (None, channels), (None, channels)


def _images(spatial_dims: int, inp: str, out: str) -> Callable[[Any], tuple[Shape, Shape]]:
    space = (None,) * spatial_dims
    return lambda module: (
        (None, getattr(module, inp), *space),
        (None, getattr(module, out), *space),
    )


def _recurrent(module: nn.RNNBase) -> tuple[Shape, Shape]:
    directions = 2 if module.bidirectional else 1
    channels = directions * (module.proj_size or module.hidden_size)
    return (None, module.input_size), (None, channels)


def _geometry(module: Any) -> dict[str, tuple[int, ...]]:
    """Return a convolution's geometry; none for "same" padding that is longer on one side.

    There, which takes a stride of 1, each output has the position of an input all the same.
    """
    padding = module.padding
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        if any(total % 2 for total in totals):
            return {}
        padding = [total // 2 for total in totals]
    elif padding == "valid":
        padding = [0] * len(module.kernel_size)
    return {
        "kernel_size": tuple(module.kernel_size),
        "stride": tuple(module.stride),
        "padding": tuple(padding),
        "dilation": tuple(module.dilation),
    }


def _batch_second_unless_first(module: nn.RNNBase | nn.MultiheadAttention) -> int:
    return 0 if module.batch_first else 1


def _batch_dim_of_attention_within(module: nn.Module) -> int:
    inner = (m for m in module.modules() if isinstance(m, nn.MultiheadAttention))
    return next((_batch_second_unless_first(m) for m in inner), 0)


def _second_if_per_channel(module: nn.PReLU) -> ChannelDim | None:
    return _second if module.num_parameters > 1 else None


# ---------------------------------------------------------------------- the table

_ACTIVATION = Reader(_convolution_like)
_PROBABILITIES = Reader(_convolution_like, by_default=False)
_DROPOUT = Reader(_convolution_like, by_default=False)
_RESHAPING = Reader(_convolution_like, by_default=False, shares_positions=False)
_TRANSFORMER = Reader(_last, by_default=False, batch_dim=_batch_dim_of_attention_within)
_RNN = Reader(_last, declared=_recurrent, batch_dim=_batch_second_unless_first)
_RNN_CELL = Reader(_last, declared=_features("input_size", "hidden_size"))
_LAYER_NORM = Reader(_last, declared=_normalized)
_EMBEDDING = Reader(_last, shares_positions=False)


def _moving(spatial_dims: int) -> Reader:
    """Pooling and padding: channels stay, positions do not."""
    return Reader(_before(spatial_dims), by_default=False, shares_positions=False)


def _convolution(spatial_dims: int) -> Reader:
    shapes = _images(spatial_dims, "in_channels", "out_channels")
    return Reader(_before(spatial_dims), declared=shapes, geometry=_geometry)


def _norm(spatial_dims: int) -> Reader:
    shapes = _images(spatial_dims, "num_features", "num_features")
    return Reader(_before(spatial_dims), declared=shapes)


_READERS: dict[type[nn.Module], Reader] = {
    nn.Linear: Reader(_last, declared=_features("in_features", "out_features")),
    nn.Bilinear: Reader(_last, declared=_features("in1_features", "out_features")),
    nn.Embedding: _EMBEDDING,
    nn.EmbeddingBag: _EMBEDDING,
    nn.Conv1d: _convolution(1),
    nn.Conv2d: _convolution(2),
    nn.Conv3d: _convolution(3),
    nn.ConvTranspose1d: _convolution(1),
    nn.ConvTranspose2d: _convolution(2),
    nn.ConvTranspose3d: _convolution(3),
    nn.MultiheadAttention: Reader(
        _last, declared=_features("embed_dim", "embed_dim"), batch_dim=_batch_second_unless_first
    ),
    **dict.fromkeys((nn.RNN, nn.GRU, nn.LSTM), _RNN),
    **dict.fromkeys((nn.RNNCell, nn.GRUCell, nn.LSTMCell), _RNN_CELL),
    # (N, C) and (N, C, L) are both common, so the rank has to be seen.
    nn.BatchNorm1d: Reader(_second),
    nn.BatchNorm2d: _norm(2),
    nn.BatchNorm3d: _norm(3),
    nn.SyncBatchNorm: Reader(_second),
    nn.InstanceNorm1d: _norm(1),
    nn.InstanceNorm2d: _norm(2),
    nn.InstanceNorm3d: _norm(3),
    nn.GroupNorm: Reader(_second),
    nn.LayerNorm: _LAYER_NORM,
    nn.RMSNorm: _LAYER_NORM,
    **dict.fromkeys(
        (
            nn.CELU,
            nn.ELU,
            nn.GELU,
            nn.Hardshrink,
            nn.Hardsigmoid,
            nn.Hardswish,
            nn.Hardtanh,
            nn.LeakyReLU,
            nn.LogSigmoid,
            nn.Mish,
            nn.RReLU,
            nn.ReLU,
            nn.ReLU6,
            nn.SELU,
            nn.SiLU,
            nn.Sigmoid,
            nn.Softplus,
            nn.Softshrink,
            nn.Softsign,
            nn.Tanh,
            nn.Tanhshrink,
            nn.Threshold,
        ),
        _ACTIVATION,
    ),
    nn.PReLU: Reader(_convolution_like, own_channel_dim=_second_if_per_channel),
    nn.GLU: Reader(_last, own_channel_dim=lambda module: _at(module.dim)),
    # From here on by name only.
    **dict.fromkeys((nn.Softmax, nn.Softmin, nn.LogSoftmax), _PROBABILITIES),
    nn.Softmax2d: Reader(_before(2), by_default=False),
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout), _DROPOUT),
    nn.Dropout1d: Reader(_before(1), by_default=False),
    nn.Dropout2d: Reader(_before(2), by_default=False),
    nn.Dropout3d: Reader(_before(3), by_default=False),
    **dict.fromkeys(
        (nn.LocalResponseNorm, nn.CrossMapLRN2d, nn.ChannelShuffle),
        Reader(_second, by_default=False),
    ),
    **dict.fromkeys(
        (
            nn.TransformerEncoderLayer,
            nn.TransformerDecoderLayer,
            nn.TransformerEncoder,
            nn.TransformerDecoder,
        ),
        _TRANSFORMER,
    ),
    # Its first argument is the source, its output has the target's positions.
    nn.Transformer: Reader(
        _last,
        by_default=False,
        batch_dim=_batch_dim_of_attention_within,
        shares_positions=False,
    ),
    **dict.fromkeys((nn.Flatten, nn.Unflatten), _RESHAPING),
    **{
        getattr(nn, f"{name}{dims}d"): _moving(dims)
        for name, ranks in {
            "AdaptiveAvgPool": (1, 2, 3),
            "AdaptiveMaxPool": (1, 2, 3),
            "AvgPool": (1, 2, 3),
            "CircularPad": (1, 2, 3),
            "ConstantPad": (1, 2, 3),
            "FractionalMaxPool": (2, 3),
            "LPPool": (1, 2, 3),
            "MaxPool": (1, 2, 3),
            "MaxUnpool": (1, 2, 3),
            "ReflectionPad": (1, 2, 3),
            "ReplicationPad": (1, 2, 3),
            "UpsamplingBilinear": (2,),
            "UpsamplingNearest": (2,),
            "ZeroPad": (1, 2, 3),
        }.items()
        for dims in ranks
    },
    **dict.fromkeys((nn.PixelShuffle, nn.PixelUnshuffle, nn.Fold), _moving(2)),
    **dict.fromkeys(
        (nn.Upsample, nn.Unfold), Reader(_second, by_default=False, shares_positions=False)
    ),
}

# Modules that are never called: MultiheadAttention uses the weights of its output projection only.
_NEVER_CALLED: tuple[type[nn.Module], ...] = (NonDynamicallyQuantizableLinear,)


def register_site(
    module_type: type[nn.Module],
    *,
    channel_dim: int | ChannelDim,
    batch_dim: int = 0,
    shares_positions: bool = True,
    by_default: bool = True,
) -> None:
    """Let modules of a type of one's own carry seeds, in models that are wrapped from now on.

    Its forward must return a floating-point tensor of rank 2 or more, or a tuple that begins with
    one. ``channel_dim`` is the dimension of that tensor that is divided among the seeds, negative
    ones counting from the end, or a function that gives it by the tensor's rank; ``batch_dim`` the
    dimension of the samples. Say ``shares_positions=False`` if the input (the first argument of
    forward) cannot be mapped onto the output position by position, even where their sizes agree;
    kernels then see the output only. With ``by_default=False`` such modules carry seeds only where
    ``target_layers`` names them.

    Registering a type again replaces what was said of it, also for the types of ``torch.nn``: for
    example ``register_site(nn.ReLU, channel_dim=1)`` for networks of Conv1d, whose activations'
    (N, C, L) cannot be told from (N, T, C). Derived types are read alike if they do not define a
    forward of their own.

    Raises ``TypeError`` for anything but a subclass of ``nn.Module`` and a ``channel_dim`` that is
    neither an int nor a function, ``ValueError`` for a type that is never called as a module or
    runs all its children, and for equal dimensions of channels and samples.
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"register_site expects a subclass of nn.Module, got {module_type!r}")
    name = module_type.__name__
    if isinstance(channel_dim, bool) or not (isinstance(channel_dim, int) or callable(channel_dim)):
        raise TypeError(
            f"register_site({name}): channel_dim must be an int or a function of the output's "
            f"rank, got {channel_dim!r}"
        )
    if isinstance(batch_dim, bool) or not isinstance(batch_dim, int) or batch_dim < 0:
        raise ValueError(f"register_site({name}): batch_dim must be 0 or more, got {batch_dim!r}")
    if channel_dim == batch_dim:
        raise ValueError(
            f"register_site({name}): channel_dim and batch_dim are both {batch_dim}; seeds divide "
            "channels, not samples"
        )
    if (reason := why_never(module_type)) is not None:
        raise ValueError(f"register_site({name}): {reason}")
    _READERS[module_type] = Reader(
        _at(channel_dim) if isinstance(channel_dim, int) else channel_dim,
        by_default=by_default,
        batch_dim=lambda module: batch_dim,
        shares_positions=shares_positions,
    )


def site_type(module: nn.Module) -> SiteType | None:
    """Return how to read ``module``, or None if it can carry no seeds.

    Derived types are read like the type whose forward they run: lazy and parametrized modules, and
    others that add no forward of their own. What another forward returns is not known here.
    """
    base = _known_type(type(module))
    return None if base is None else _READERS[base].read(module, base.__name__)


def _known_type(module_type: type[nn.Module]) -> type[nn.Module] | None:
    if why_never(module_type) is not None:
        return None
    if issubclass(module_type, LazyModuleMixin) and module_type.cls_to_become is not None:
        module_type = module_type.cls_to_become
    for base in module_type.__mro__:
        if base in _READERS and base.forward is module_type.forward:
            return base
    return None


def default_site_names() -> list[str]:
    """Return the names of the types that carry seeds by default."""
    return sorted(host.__name__ for host, reader in _READERS.items() if reader.by_default)


def why_never(module_type: type[nn.Module]) -> str | None:
    """Return why modules of a type can carry no seeds whatever is registered, or None."""
    if issubclass(module_type, _NEVER_CALLED) or module_type.forward is nn.Module.forward:
        return f"a {module_type.__name__} is never called as a module"
    if module_type.forward is nn.Sequential.forward:
        return f"a {module_type.__name__} would run the kernels as further layers; its layers can"
    return None
