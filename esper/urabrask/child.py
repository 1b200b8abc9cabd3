"""The evaluator's worker process: ``python -m esper.urabrask.child``.

It draws inputs, computes references and judges; candidates run in processes of their own, forked
from a server that lives as long as this process.
"""

from functools import cache

import torch

from esper.config import EvaluatorSettings
from esper.contracts import KernelManifest
from esper.urabrask.gauntlet import Gauntlet
from esper.urabrask.sandbox import Sandbox
from esper.worker import Blobs, Header, serve


def evaluate(header: Header, blobs: Blobs) -> tuple[Header, Blobs]:
    """Judge the artifact made of ``manifest`` and the blobs, under ``settings``."""
    gauntlet = _gauntlet(EvaluatorSettings.model_validate(header["settings"]))
    report = gauntlet.run(KernelManifest.model_validate(header["manifest"]), blobs)
    return {"report": report.model_dump(mode="json")}, {}


@cache
def _gauntlet(settings: EvaluatorSettings) -> Gauntlet:
    return Gauntlet(settings, Sandbox(settings))


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve({"evaluate": evaluate})
