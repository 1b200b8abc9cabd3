"""``verify_bundle``: what a loader refuses, and why it says so."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from urza_samples import digest, graph, judge, kernel_files, manifest, publish

import esper.trust
from esper.contracts import KernelBundle, KernelStatus
from esper.errors import ArtifactIntegrityError, ArtifactNotValidatedError
from esper.trust import TrustedKey, verify_bundle, verify_files
from esper.urza import EvaluatorKey, Urza


@pytest.fixture
def urza(tmp_path: Path) -> Iterator[Urza]:
    with Urza(tmp_path / "library") as library:
        yield library


@pytest.fixture
def bundle(urza: Urza) -> KernelBundle:
    artifact_id = publish(urza)
    judge(urza, artifact_id)
    return urza.fetch_kernel(artifact_id)


@pytest.fixture
def trusted(urza: Urza) -> TrustedKey:
    return urza.trusted_key


def changed(bundle: KernelBundle, **changes: Any) -> KernelBundle:
    record = bundle.record.model_copy(update=changes)
    return bundle.model_copy(update={"record": record})


def refused(bundle: KernelBundle, trusted: TrustedKey, because: str) -> None:
    with pytest.raises(ArtifactIntegrityError, match=re.escape(because)):
        verify_bundle(bundle, trusted)


def test_a_validated_bundle_passes(bundle: KernelBundle, trusted: TrustedKey) -> None:
    verify_bundle(bundle, trusted)


@pytest.mark.parametrize("status", [KernelStatus.PENDING_BENCHMARKING, KernelStatus.REJECTED])
def test_another_status_is_refused(urza: Urza, status: KernelStatus) -> None:
    artifact_id = publish(urza)
    if status is KernelStatus.REJECTED:
        judge(urza, artifact_id, status=status)
    with pytest.raises(
        ArtifactNotValidatedError,
        match=f"^kernel {artifact_id} is {status}; only VALIDATED kernels may be loaded$",
    ):
        verify_bundle(urza.fetch_kernel(artifact_id), urza.evaluator_key.trusted())


def test_a_swapped_manifest_is_refused(bundle: KernelBundle, trusted: TrustedKey) -> None:
    other = manifest(torch_version="2.12")
    refused(
        changed(bundle, manifest=other),
        trusted,
        f"kernel {bundle.record.artifact_id}: its manifest is that of artifact {other.artifact_id}",
    )


def test_a_bundle_under_another_id_is_refused(bundle: KernelBundle, trusted: TrustedKey) -> None:
    other = manifest(torch_version="2.12")
    refused(
        changed(bundle, manifest=other, artifact_id=other.artifact_id),
        trusted,
        f"kernel {other.artifact_id}: its statement is about kernel {bundle.record.artifact_id}",
    )


@pytest.mark.parametrize("field", ["statement", "signature"])
def test_an_unsigned_bundle_is_refused(
    bundle: KernelBundle, trusted: TrustedKey, field: str
) -> None:
    refused(changed(bundle, **{field: None}), trusted, "carries no signed statement")


def test_a_rejected_kernel_relabelled_as_validated_is_refused(urza: Urza) -> None:
    artifact_id = publish(urza)
    judge(urza, artifact_id, status=KernelStatus.REJECTED)
    relabelled = changed(urza.fetch_kernel(artifact_id), status=KernelStatus.VALIDATED)
    refused(relabelled, urza.trusted_key, "its record says VALIDATED, its statement says REJECTED")
    said = relabelled.record.statement
    assert said is not None
    forged = said.model_copy(update={"status": KernelStatus.VALIDATED})
    refused(changed(relabelled, statement=forged), urza.trusted_key, "does not hold")


def test_a_rejected_kernel_signed_as_validated_by_a_foreign_key_is_refused(
    urza: Urza, tmp_path: Path
) -> None:
    artifact_id = publish(urza)
    judge(urza, artifact_id, status=KernelStatus.REJECTED)
    rejected = urza.fetch_kernel(artifact_id)
    assert rejected.record.statement is not None
    forged = rejected.record.statement.model_copy(update={"status": KernelStatus.VALIDATED})
    foreign = EvaluatorKey.load_or_create(tmp_path / "foreign.pem")
    bundle = changed(
        rejected, status=KernelStatus.VALIDATED, statement=forged, signature=foreign.sign(forged)
    )
    refused(bundle, urza.trusted_key, "the signature over its VALIDATED statement does not hold")
    verify_bundle(bundle, foreign.trusted())  # it is the key alone that was wrong


def test_a_signature_taken_from_another_kernel_is_refused(urza: Urza, bundle: KernelBundle) -> None:
    other = publish(urza, "gated")
    judge(urza, other)
    stolen = urza.kernel(other).signature
    refused(changed(bundle, signature=stolen), urza.trusted_key, "does not hold")


def test_altered_bytes_are_refused(bundle: KernelBundle, trusted: TrustedKey) -> None:
    files = bundle.files | {"graph.json": b"{}"}
    refused(
        bundle.model_copy(update={"files": files}),
        trusted,
        f"file 'graph.json' has digest {digest(b'{}')}, expected {digest(graph('low_rank'))}",
    )


def test_swapped_bytes_are_refused(bundle: KernelBundle, trusted: TrustedKey) -> None:
    names = sorted(bundle.files)
    files = dict(zip(names, [bundle.files[name] for name in reversed(names)], strict=True))
    refused(bundle.model_copy(update={"files": files}), trusted, "file 'graph.json' has digest")


def test_a_missing_or_extra_file_is_refused(bundle: KernelBundle, trusted: TrustedKey) -> None:
    fewer = {"graph.json": bundle.files["graph.json"]}
    refused(
        bundle.model_copy(update={"files": fewer}),
        trusted,
        "files ['params.safetensors'] are missing",
    )
    more = bundle.files | {"forward.so": b""}
    refused(
        bundle.model_copy(update={"files": more}),
        trusted,
        "files ['forward.so'] are not named by its manifest",
    )


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", ".hidden", "a\0b", "a\n", "x" * 129],
)
def test_a_file_name_that_could_leave_its_folder_is_refused(name: str) -> None:
    tricky = manifest(files={name: digest(b"")})
    with pytest.raises(ArtifactIntegrityError) as caught:
        verify_files(tricky, {name: b""})
    assert str(caught.value) == (f"kernel {tricky.artifact_id}: file name {name!r} is not allowed")


def test_plain_file_names_pass() -> None:
    verify_files(manifest(), kernel_files())


def test_trust_stands_below_kasmina_in_the_import_order() -> None:
    tree = ast.parse(Path(esper.trust.__file__).read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    ours = {module for module in modules if module and module.startswith("esper")}
    assert ours == {"esper.contracts", "esper.errors"}
    assert not {module for module in modules if module and module.startswith("torch")}
