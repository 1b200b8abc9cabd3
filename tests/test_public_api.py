"""What users may rely on, pinned."""

import inspect
import subprocess
import sys

import pytest

import esper


def test_the_public_names() -> None:
    assert esper.__all__ == [
        "Blueprint",
        "KasminaLayer",
        "MorphableModel",
        "Oona",
        "Pipeline",
        "Tamiyo",
        "Tezzeret",
        "Tolaria",
        "Urabrask",
        "Urza",
        "compile",
        "distribute",
        "export",
        "load",
        "register_site",
        "save",
        "unwrap",
        "wrap",
    ]
    for name in esper.__all__:
        assert inspect.getdoc(getattr(esper, name)), f"{name} has no docstring"


def test_the_signature_of_wrap() -> None:
    parameters = inspect.signature(esper.wrap).parameters
    assert list(parameters)[:4] == ["net", "target_layers", "seeds_per_layer", "telemetry_enabled"]
    assert parameters["seeds_per_layer"].default == 4
    assert parameters["seeds_per_layer"].kind is inspect.Parameter.KEYWORD_ONLY


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(esper, "nothing")


@pytest.mark.parametrize("name", ["nissa.Run", "tamiyo.PlateauPolicy", "urza.connect", "errors"])
def test_a_module_is_imported_when_it_is_first_named(name: str) -> None:
    code = f"import esper; esper.{name}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_esper_does_not_import_torch() -> None:
    code = "import sys, esper; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
