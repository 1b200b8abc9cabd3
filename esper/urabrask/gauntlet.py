"""The checks that an artifact has to pass, cheapest first; the first failure ends the matter.

The candidate runs in the sandbox and returns raw results. What they should be is computed here,
and it is here that they are compared, so a candidate has nothing to read its verdict from.
"""

import platform
import secrets

import torch

from esper.config import EvaluatorSettings
from esper.contracts import Confidence, KernelManifest, KernelStatus, UrabraskValidationReport
from esper.errors import ArtifactError, ArtifactMismatchError
from esper.kasmina.native import mismatch
from esper.trust import verify_files
from esper.urabrask import risk, tags
from esper.urabrask.examination import Examination, Findings
from esper.urabrask.judge import TOLERANCES
from esper.urabrask.ledger import Ledger, RejectedError, passed
from esper.urabrask.oracle import Oracle
from esper.urabrask.questions import KERNEL_LOADER
from esper.urabrask.sandbox import Sandbox

_SEED_BITS = 48  # JSON's numbers are exact up to 53
_TORCH_RELEASE = ".".join(torch.__version__.split(".")[:2])


class Gauntlet:
    """Examines artifacts, one at a time.

    ``loader`` is the import path of what makes a kernel of manifest and files in the candidate's
    process; tests name their own to send hostile kernels through the same gates.
    """

    def __init__(
        self, settings: EvaluatorSettings, sandbox: Sandbox, loader: str = KERNEL_LOADER
    ) -> None:
        self._settings = settings
        self._sandbox = sandbox
        self._loader = loader

    def run(self, manifest: KernelManifest, files: dict[str, bytes]) -> UrabraskValidationReport:
        """Return the verdict; its numbers, but those that follow the clock, are always the same.

        The risk is not judged yet: that takes what is known of other kernels.

        Raises ``ArtifactIntegrityError`` if the files are not those of the manifest, and
        ``ArtifactMismatchError`` if only another machine could tell: neither says anything about
        the artifact.
        """
        verify_files(manifest, files)
        _refuse_other_machines(manifest)
        ledger = Ledger()
        hidden_seed = secrets.randbits(_SEED_BITS)
        confinement = ""
        try:
            oracle = _check_statically(ledger, manifest, files)
            with self._sandbox.launch(self._settings) as candidate:
                confinement = candidate.confinement
                examination = Examination(self._settings, oracle, candidate, ledger, hidden_seed)
                findings = examination.conduct(files, self._loader)
        except RejectedError:
            report = _rejected(manifest, ledger)
        else:
            report = _passed(manifest, ledger, findings)
        return report.model_copy(update={"sandbox": confinement, "hidden_seed": hidden_seed})


def _refuse_other_machines(manifest: KernelManifest) -> None:
    if manifest.torch_version != _TORCH_RELEASE:
        raise ArtifactMismatchError(
            f"kernel {manifest.artifact_id} is for torch {manifest.torch_version}, "
            f"this evaluator has {_TORCH_RELEASE}"
        )
    if manifest.native and (reason := mismatch(manifest.native.target, manifest.device)):
        raise ArtifactMismatchError(f"kernel {manifest.artifact_id} was {reason}")
    if manifest.device == "cuda" and not torch.cuda.is_available():
        raise ArtifactMismatchError(
            f"kernel {manifest.artifact_id} is for cuda, this evaluator has none"
        )


def _check_statically(ledger: Ledger, manifest: KernelManifest, files: dict[str, bytes]) -> Oracle:
    """Check what can be told without running anything; return what the artifact should compute."""
    if manifest.dtype not in TOLERANCES or manifest.device not in ("cpu", "cuda"):
        ledger.reject("manifest", f"no kernel can be for {manifest.dtype} on {manifest.device}")
    ledger.enter(passed("manifest", "names its files, a dtype and a device"))
    try:
        oracle = Oracle(manifest, files)
    except ArtifactError as error:
        ledger.reject("graph", str(error))
    if fault := _disagreement(manifest, oracle):
        ledger.reject("graph", fault)
    ledger.enter(passed("graph", "calls whitelisted operators only, and fits the manifest"))
    return oracle


def _disagreement(manifest: KernelManifest, oracle: Oracle) -> str | None:
    program, site = oracle.program, manifest.site
    found = (program.inp.shape, program.act.shape, program.act.dtype)
    stated = (site.inp_shape, site.act_shape, manifest.dtype)
    if found != stated:
        return f"the graph takes {found}, the manifest says {stated}"
    num_parameters = sum(oracle.state[name].numel() for name in oracle.parameters)
    if num_parameters != manifest.num_parameters:
        return f"{num_parameters} parameters, the manifest says {manifest.num_parameters}"
    return None


def _rejected(manifest: KernelManifest, ledger: Ledger) -> UrabraskValidationReport:
    return UrabraskValidationReport(
        artifact_id=manifest.artifact_id,
        status=KernelStatus.REJECTED,
        checks=ledger.checks,
        machine=platform.machine(),
        torch_version=torch.__version__,
    )


def _passed(
    manifest: KernelManifest, ledger: Ledger, findings: Findings
) -> UrabraskValidationReport:
    relative_error = ledger.largest("relative_error")
    reach = risk.reach(manifest, findings.random_training)
    return UrabraskValidationReport(
        artifact_id=manifest.artifact_id,
        status=KernelStatus.VALIDATED if findings.decided else KernelStatus.UNDECIDED,
        checks=ledger.checks,
        measurement=findings.measurement,
        max_relative_error=relative_error,
        tags=tags.tags(manifest, findings.measurement, relative_error, findings.given_bytes),
        confidence=reach if findings.decided else Confidence.SPECULATIVE,
        machine=findings.device_name,
        torch_version=torch.__version__,
    )
