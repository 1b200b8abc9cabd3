"""What Esper's compatibility is tried on: modules of torch.nn and models of transformers.

A case builds the same model each time it is asked, and fresh inputs for it.
"""

import copy
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A model, inputs for it, and the layer whose seed gets a kernel."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    seeded: str  # FQN
    no_seeds: str | None = None  # why its type can carry none
    trains: bool = True


class Holder(nn.Module):
    """A module in a model that can be wrapped whatever the module is.

    The module's input passes through a copy, since the user's tensor may be a leaf that an
    in-place module must not modify.
    """

    def __init__(self, subject: nn.Module):
        super().__init__()
        self.stem = nn.Linear(2, 2)
        self.subject = subject

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
        return self.subject(*args, **kwargs)


def fresh(inputs: Inputs) -> Inputs:
    """Return copies that are leaves of a graph of their own."""
    return tree_map_only(
        Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), inputs
    )


def _held(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return Holder(make())


def _module_case(
    name: str, make: Callable[[], nn.Module], inputs: Inputs, description: str = ""
) -> Case:
    return Case(
        name=f"{name} {description}".strip(),
        build=functools.partial(_held, make),
        inputs=functools.partial(fresh, inputs),
        seeded="subject",
        no_seeds=NO_SEEDS.get(name),
        trains=name not in ONLY_EVALUATED,
    )


# ---------------------------------------------------------------------- torch's module database


MAX_CASES_A_MODULE = 64


@functools.cache
def module_database() -> dict[str, Any]:
    """Return PyTorch's own descriptions of its modules by name, such as ``nn.Linear``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_modules import module_db
    return {info.name: info for info in module_db}


def database_cases(name: str) -> list[Case]:
    """Return a case for each way in which PyTorch's tests construct and call a module.

    Of the hundreds that some losses have, evenly chosen ones.
    """
    info = module_database()[name]
    torch.manual_seed(0)
    samples = [
        sample
        for sample in info.module_inputs_func(
            info, device="cpu", dtype=torch.float32, requires_grad=True, training=True
        )
        if sample.forward_input is not None
    ]
    return [
        _module_case(
            name,
            functools.partial(
                _construct,
                info.module_cls,
                sample.constructor_input.args,
                sample.constructor_input.kwargs,
            ),
            (tuple(sample.forward_input.args), dict(sample.forward_input.kwargs)),
            sample.desc,
        )
        for sample in samples[:: math.ceil(len(samples) / MAX_CASES_A_MODULE)]
    ]


def _construct(
    module_cls: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> nn.Module:
    return module_cls(*copy.deepcopy(args), **copy.deepcopy(kwargs)).float()


# ---------------------------------------------------------------------- what the database lacks

_VECTORS = (5, 8)
_SEQUENCES = (3, 5, 8)
_SIGNALS = (3, 4, 8)
_IMAGES = (3, 4, 8, 8)
_VOLUMES = (2, 4, 4, 4, 4)


def _maximum(dims: int, shape: tuple[int, ...]) -> Inputs:
    """Return what a MaxUnpool takes: pooled values and where they came from."""
    pool = getattr(nn, f"MaxPool{dims}d")(2, return_indices=True)
    values, indices = pool(torch.randn(shape))
    return (values.requires_grad_(), indices), {}


def _random(*shapes: tuple[int, ...]) -> Inputs:
    return tuple(torch.randn(shape, requires_grad=True) for shape in shapes), {}


def _bag() -> Inputs:
    return (torch.tensor([1, 2, 4, 5, 4, 3]), torch.tensor([0, 2, 3])), {}


def _classes(shape: tuple[int, ...], classes: int) -> Inputs:
    return (torch.randn(shape, requires_grad=True), torch.randint(classes, shape[:1])), {}


def _decoder() -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 2)


_Extra = tuple[Callable[[], nn.Module], Callable[[], Inputs]]

EXTRA_MODULES: dict[str, _Extra] = {
    "nn.AdaptiveLogSoftmaxWithLoss": (
        lambda: nn.AdaptiveLogSoftmaxWithLoss(8, 12, [4]),
        lambda: _classes(_VECTORS, 12),
    ),
    "nn.AlphaDropout": (lambda: nn.AlphaDropout(0.3), lambda: _random(_VECTORS)),
    "nn.ChannelShuffle": (lambda: nn.ChannelShuffle(2), lambda: _random(_IMAGES)),
    "nn.CosineSimilarity": (nn.CosineSimilarity, lambda: _random(_VECTORS, _VECTORS)),
    "nn.CrossMapLRN2d": (lambda: nn.CrossMapLRN2d(3), lambda: _random(_IMAGES)),
    "nn.DataParallel": (
        lambda: nn.DataParallel(nn.Linear(8, 6)),
        lambda: _random(_VECTORS),
    ),
    "nn.Dropout": (lambda: nn.Dropout(0.3), lambda: _random(_VECTORS)),
    "nn.Dropout1d": (lambda: nn.Dropout1d(0.3), lambda: _random(_SIGNALS)),
    "nn.Dropout2d": (lambda: nn.Dropout2d(0.3), lambda: _random(_IMAGES)),
    "nn.Dropout3d": (lambda: nn.Dropout3d(0.3), lambda: _random(_VOLUMES)),
    "nn.EmbeddingBag": (lambda: nn.EmbeddingBag(7, 6), _bag),
    "nn.FeatureAlphaDropout": (lambda: nn.FeatureAlphaDropout(0.3), lambda: _random(_IMAGES)),
    "nn.Flatten": (nn.Flatten, lambda: _random(_IMAGES)),
    "nn.Fold": (lambda: nn.Fold((4, 4), 2, stride=2), lambda: _random((3, 16, 4))),
    "nn.Hardsigmoid": (nn.Hardsigmoid, lambda: _random(_VECTORS)),
    "nn.Identity": (nn.Identity, lambda: _random(_VECTORS)),
    "nn.LazyBatchNorm1d": (nn.LazyBatchNorm1d, lambda: _random(_SIGNALS)),
    "nn.LazyBatchNorm2d": (nn.LazyBatchNorm2d, lambda: _random(_IMAGES)),
    "nn.LazyBatchNorm3d": (nn.LazyBatchNorm3d, lambda: _random(_VOLUMES)),
    "nn.LazyInstanceNorm1d": (
        lambda: nn.LazyInstanceNorm1d(affine=True),
        lambda: _random(_SIGNALS),
    ),
    "nn.LazyInstanceNorm2d": (
        lambda: nn.LazyInstanceNorm2d(affine=True),
        lambda: _random(_IMAGES),
    ),
    "nn.LazyInstanceNorm3d": (
        lambda: nn.LazyInstanceNorm3d(affine=True),
        lambda: _random(_VOLUMES),
    ),
    "nn.LazyLinear": (lambda: nn.LazyLinear(6), lambda: _random(_VECTORS)),
    "nn.MaxUnpool1d": (lambda: nn.MaxUnpool1d(2), lambda: _maximum(1, _SIGNALS)),
    "nn.MaxUnpool2d": (lambda: nn.MaxUnpool2d(2), lambda: _maximum(2, _IMAGES)),
    "nn.MaxUnpool3d": (lambda: nn.MaxUnpool3d(2), lambda: _maximum(3, _VOLUMES)),
    "nn.PairwiseDistance": (nn.PairwiseDistance, lambda: _random(_VECTORS, _VECTORS)),
    "nn.PixelShuffle": (lambda: nn.PixelShuffle(2), lambda: _random((3, 8, 4, 4))),
    "nn.PixelUnshuffle": (lambda: nn.PixelUnshuffle(2), lambda: _random(_IMAGES)),
    "nn.RReLU": (nn.RReLU, lambda: _random(_VECTORS)),
    "nn.Sequential": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 6)),
        lambda: _random(_SEQUENCES),
    ),
    "nn.SyncBatchNorm": (lambda: nn.SyncBatchNorm(4), lambda: _random(_IMAGES)),
    "nn.TransformerDecoder": (_decoder, lambda: _random(_SEQUENCES, _SEQUENCES)),
    "nn.TripletMarginLoss": (nn.TripletMarginLoss, lambda: _random(_VECTORS, _VECTORS, _VECTORS)),
    "nn.TripletMarginWithDistanceLoss": (
        nn.TripletMarginWithDistanceLoss,
        lambda: _random(_VECTORS, _VECTORS, _VECTORS),
    ),
    "nn.Unflatten": (lambda: nn.Unflatten(1, (2, 4)), lambda: _random(_VECTORS)),
    "nn.Unfold": (lambda: nn.Unfold(2), lambda: _random(_IMAGES)),
    "nn.Upsample": (lambda: nn.Upsample(scale_factor=2), lambda: _random(_IMAGES)),
    "nn.UpsamplingBilinear2d": (
        lambda: nn.UpsamplingBilinear2d(scale_factor=2),
        lambda: _random(_IMAGES),
    ),
    "nn.UpsamplingNearest2d": (
        lambda: nn.UpsamplingNearest2d(scale_factor=2),
        lambda: _random(_IMAGES),
    ),
}

_NO_CHANNELS = "its output has no channels"

# Modules that can carry no seeds, and why. They run unchanged in a wrapped model all the same.
NO_SEEDS = {
    **dict.fromkeys(
        (
            "nn.AdaptiveLogSoftmaxWithLoss",
            "nn.BCELoss",
            "nn.BCEWithLogitsLoss",
            "nn.CTCLoss",
            "nn.CosineEmbeddingLoss",
            "nn.CosineSimilarity",
            "nn.CrossEntropyLoss",
            "nn.GaussianNLLLoss",
            "nn.HingeEmbeddingLoss",
            "nn.HuberLoss",
            "nn.KLDivLoss",
            "nn.L1Loss",
            "nn.LinearCrossEntropyLoss",
            "nn.MSELoss",
            "nn.MarginRankingLoss",
            "nn.MultiLabelMarginLoss",
            "nn.MultiLabelSoftMarginLoss",
            "nn.MultiMarginLoss",
            "nn.NLLLoss",
            "nn.PairwiseDistance",
            "nn.PoissonNLLLoss",
            "nn.SmoothL1Loss",
            "nn.SoftMarginLoss",
            "nn.TripletMarginLoss",
            "nn.TripletMarginWithDistanceLoss",
        ),
        _NO_CHANNELS,
    ),
    "nn.DataParallel": "calls the module in it, which can carry seeds",
    "nn.Sequential": "would run the kernels as further layers; its layers can carry seeds",
}

# Modules that run in training mode on GPUs only.
ONLY_EVALUATED = {"nn.SyncBatchNorm"}

# Module classes of torch.nn that no case can call.
NOT_CALLABLE = {
    "nn.Container": "has no forward",
    "nn.Module": "has no forward",
    "nn.ModuleDict": "has no forward; the modules in it are sites",
    "nn.ModuleList": "has no forward; the modules in it are sites",
    "nn.NLLLoss2d": "deprecated alias of NLLLoss",
    "nn.ParameterDict": "has no forward",
    "nn.ParameterList": "has no forward",
    "nn.RNNBase": "abstract",
    "nn.RNNCellBase": "abstract",
}


def module_names() -> list[str]:
    return sorted({*module_database(), *EXTRA_MODULES})


def module_cases(name: str) -> list[Case]:
    """Return all cases of one module type."""
    if name in module_database():
        return database_cases(name)
    make, make_inputs = EXTRA_MODULES[name]
    torch.manual_seed(0)
    return [_module_case(name, make, make_inputs())]


# ---------------------------------------------------------------------- transformers


@dataclass(frozen=True)
class Family:
    """A model family of transformers in a size that runs in a moment."""

    kind: str
    model: str  # class in transformers
    config: dict[str, Any]
    seeded: str  # FQN of the layer that gets a kernel
    inputs: Callable[[], Inputs]


def _tokens() -> Inputs:
    return (), {"input_ids": torch.arange(2, 18).reshape(2, 8)}


def _two_sequences() -> Inputs:
    ids = torch.arange(2, 18).reshape(2, 8)
    return (), {"input_ids": ids, "decoder_input_ids": ids.flip(1)}


def _images(size: int = 32) -> Inputs:
    pixels = torch.linspace(-1, 1, 2 * 3 * size * size).sin().reshape(2, 3, size, size)
    return (), {"pixel_values": pixels}


def _waves() -> Inputs:
    return (), {"input_values": torch.linspace(0, 300, 2 * 400).sin().reshape(2, 400)}


def _spectrograms() -> Inputs:
    features = torch.linspace(0, 99, 2 * 8 * 32).sin().reshape(2, 8, 32)
    ids = torch.arange(2, 10).reshape(2, 4)
    return (), {"input_features": features, "decoder_input_ids": ids}


def _text_and_images() -> Inputs:
    return (), _tokens()[1] | _images()[1]


_TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = _TEXT | {"num_key_value_heads": 1, "head_dim": 16}
_SEQ2SEQ = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
_SPEECH = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
}
_CLIP_TOWER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}

FAMILIES: dict[str, Family] = {
    # encoders
    "ALBERT": Family(
        "encoder",
        "AlbertModel",
        _TEXT | {"embedding_size": 16},
        "encoder.albert_layer_groups.0.albert_layers.0.ffn",
        _tokens,
    ),
    "BERT": Family("encoder", "BertModel", _TEXT, "encoder.layer.0.intermediate.dense", _tokens),
    "DeBERTa-v2": Family(
        "encoder",
        "DebertaV2Model",
        _TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        "encoder.layer.0.output.dense",
        _tokens,
    ),
    "DistilBERT": Family(
        "encoder",
        "DistilBertModel",
        {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48},
        "transformer.layer.0.ffn.lin1",
        _tokens,
    ),
    "ELECTRA": Family(
        "encoder",
        "ElectraModel",
        _TEXT | {"embedding_size": 16},
        "embeddings_project",
        _tokens,
    ),
    "ModernBERT": Family(
        "encoder",
        "ModernBertModel",
        _TEXT | {"cls_token_id": 1, "sep_token_id": 2, "attn_implementation": "eager"},
        "layers.0.mlp.Wo",
        _tokens,
    ),
    "RoBERTa": Family(
        "encoder", "RobertaModel", _TEXT, "encoder.layer.1.attention.self.value", _tokens
    ),
    # decoders
    "BLOOM": Family(
        "decoder",
        "BloomForCausalLM",
        {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 2},
        "transformer.h.0.mlp.dense_h_to_4h",
        _tokens,
    ),
    "Falcon": Family(
        "decoder", "FalconForCausalLM", _TEXT, "transformer.h.0.input_layernorm", _tokens
    ),
    "Gemma 2": Family(
        "decoder", "Gemma2ForCausalLM", _GROUPED, "model.layers.0.mlp.up_proj", _tokens
    ),
    "GPT-2": Family(
        "decoder",
        "GPT2LMHeadModel",
        {
            "vocab_size": 64,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 32,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "transformer.h.0.ln_2",
        _tokens,
    ),
    "GPT-NeoX": Family(
        "decoder",
        "GPTNeoXForCausalLM",
        _TEXT,
        "gpt_neox.layers.0.mlp.dense_h_to_4h",
        _tokens,
    ),
    "LLaMA": Family(
        "decoder", "LlamaForCausalLM", _GROUPED, "model.layers.0.mlp.gate_proj", _tokens
    ),
    "Mistral": Family(
        "decoder", "MistralForCausalLM", _GROUPED, "model.layers.0.self_attn.o_proj", _tokens
    ),
    "OPT": Family(
        "decoder",
        "OPTForCausalLM",
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 48,
            "max_position_embeddings": 32,
        },
        "model.decoder.layers.0.fc1",
        _tokens,
    ),
    "Phi": Family("decoder", "PhiForCausalLM", _TEXT, "model.layers.0.mlp.fc1", _tokens),
    "Qwen2": Family(
        "decoder", "Qwen2ForCausalLM", _GROUPED, "model.layers.0.mlp.down_proj", _tokens
    ),
    # encoder-decoders
    "BART": Family(
        "encoder-decoder", "BartModel", _SEQ2SEQ, "decoder.layers.0.fc1", _two_sequences
    ),
    "Marian": Family(
        "encoder-decoder", "MarianModel", _SEQ2SEQ, "encoder.layers.0.fc2", _two_sequences
    ),
    "Pegasus": Family(
        "encoder-decoder", "PegasusModel", _SEQ2SEQ, "encoder.layers.0.fc1", _two_sequences
    ),
    "T5": Family(
        "encoder-decoder",
        "T5Model",
        {
            "vocab_size": 64,
            "d_model": 32,
            "d_kv": 16,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 2,
        },
        "decoder.block.0.layer.2.DenseReluDense.wi",
        _two_sequences,
    ),
    # vision
    "BEiT": Family("vision", "BeitModel", _VISION, "layers.0.mlp.fc1", _images),
    "ConvNeXT": Family(
        "vision",
        "ConvNextModel",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "layer_scale_init_value": 1.0},
        "encoder.stages.0.layers.0.dwconv",
        _images,
    ),
    "DINOv2": Family("vision", "Dinov2Model", _VISION, "encoder.layer.0.mlp.fc1", _images),
    "ResNet": Family(
        "vision",
        "ResNetModel",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        "encoder.stages.0.layers.0.layer.0.convolution",
        _images,
    ),
    "SegFormer": Family(
        "vision",
        "SegformerModel",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [16, 32],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
        },
        "stages.0.blocks.0.mlp.fc1",
        _images,
    ),
    "Swin": Family(
        "vision",
        "SwinModel",
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 4,
        },
        "encoder.layers.0.blocks.0.mlp.fc1",
        _images,
    ),
    "ViT": Family("vision", "ViTModel", _VISION, "layers.0.mlp.fc1", _images),
    # speech
    "HuBERT": Family(
        "speech",
        "HubertModel",
        _SPEECH,
        "encoder.layers.0.feed_forward.intermediate_dense",
        _waves,
    ),
    "Wav2Vec2": Family(
        "speech",
        "Wav2Vec2Model",
        _SPEECH,
        "feature_extractor.conv_layers.1.conv",
        _waves,
    ),
    "Whisper": Family(
        "speech",
        "WhisperModel",
        _SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16},
        "encoder.conv2",
        _spectrograms,
    ),
    # state-space models
    "Mamba": Family(
        "state-space",
        "MambaForCausalLM",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        "backbone.layers.0.mixer.in_proj",
        _tokens,
    ),
    "Mamba 2": Family(
        "state-space",
        "Mamba2ForCausalLM",
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 4,
            "head_dim": 16,
            "n_groups": 1,
            "chunk_size": 4,
        },
        "backbone.layers.0.mixer.in_proj",
        _tokens,
    ),
    # mixtures of experts
    "Mixtral": Family(
        "mixture of experts",
        "MixtralForCausalLM",
        _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
        "model.layers.0.self_attn.q_proj",
        _tokens,
    ),
    "Qwen2-MoE": Family(
        "mixture of experts",
        "Qwen2MoeForCausalLM",
        _GROUPED
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
        "model.layers.0.mlp.shared_expert.up_proj",
        _tokens,
    ),
    # text and images
    "CLIP": Family(
        "text and images",
        "CLIPModel",
        {
            "text_config": _CLIP_TOWER
            | {
                "vocab_size": 64,
                "max_position_embeddings": 32,
                "bos_token_id": 1,
                "eos_token_id": 17,
            },
            "vision_config": _CLIP_TOWER | {"image_size": 32, "patch_size": 8},
            "projection_dim": 16,
        },
        "visual_projection",
        _text_and_images,
    ),
}


def family_case(name: str) -> Case:
    family = FAMILIES[name]
    return Case(
        name=name,
        build=functools.partial(_build_family, family),
        inputs=family.inputs,
        seeded=family.seeded,
    )


def _build_family(family: Family) -> nn.Module:
    import transformers

    model_cls = getattr(transformers, family.model)
    torch.manual_seed(0)
    return model_cls(model_cls.config_class(**family.config))


def family_names() -> Iterator[str]:
    return iter(FAMILIES)
