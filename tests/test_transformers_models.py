"""Model families of transformers, small and with random weights, in a wrapped model."""

import dataclasses

import pytest

pytest.importorskip("transformers", reason="transformers is not installed ([compat])")

from compat_cases import FAMILIES, family_case
from compat_checks import CHECKS, active
from compat_runs import wrapped
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

import esper
from esper.kasmina import site_types

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # transformers warns of missing fast kernels
    pytest.mark.timeout(300),
]


# Seconds each, so that one family of a kind is tried; tests/compat_report.py tries all.
SLOW_CHECKS = ["compile", "export"]
ONE_OF_A_KIND = {family.kind: name for name, family in FAMILIES.items()}.values()


@pytest.mark.parametrize("check", [check for check in CHECKS if check not in SLOW_CHECKS])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_family(name: str, check: str) -> None:
    CHECKS[check].run(family_case(name))


@pytest.mark.parametrize("check", SLOW_CHECKS)
@pytest.mark.parametrize("name", ONE_OF_A_KIND)
def test_a_model_family_of_each_kind(name: str, check: str) -> None:
    CHECKS[check].run(family_case(name))


def test_the_families_are_of_every_kind() -> None:
    kinds = [family.kind for family in FAMILIES.values()]
    assert len(kinds) >= 25
    assert {*kinds} == {
        "decoder",
        "encoder",
        "encoder-decoder",
        "mixture of experts",
        "speech",
        "state-space",
        "text and images",
        "vision",
    }


@pytest.mark.parametrize("name", ["BERT", "LLaMA", "Mamba", "ResNet", "T5", "Whisper"])
def test_seeds_are_found_in_every_block(name: str) -> None:
    layers = wrapped(family_case(name)).kasmina_layers
    assert sum(layer.host_name in {"Conv1d", "Conv2d", "Linear"} for layer in layers.values()) >= 4


OWN_TYPES: dict[str, tuple[type[nn.Module], str]] = {
    "Falcon": (FalconLinear, "transformer.h.0.mlp.dense_h_to_4h"),
    "GPT-2": (Conv1D, "transformer.h.0.mlp.c_fc"),
    "LLaMA": (LlamaRMSNorm, "model.layers.0.input_layernorm"),
}


@pytest.mark.parametrize("name", OWN_TYPES)
def test_types_of_transformers_itself_carry_seeds_once_registered(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site_types, "_READERS", dict(site_types._READERS))
    module_type, seeded = OWN_TYPES[name]
    case = dataclasses.replace(family_case(name), seeded=seeded)
    assert seeded not in wrapped(case).kasmina_layers
    esper.register_site(module_type, channel_dim=-1)
    active(case)
