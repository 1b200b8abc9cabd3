"""The evaluator's worker process: ``python -m esper.urabrask.child``.

It draws inputs, computes references and judges; candidates run in processes of their own, forked
from a server that lives as long as this process. It also learns risk models, and asks them.
"""

from functools import cache

import torch

from esper.config import EvaluatorSettings
from esper.contracts import KernelManifest
from esper.urabrask import learned_risk
from esper.urabrask.gauntlet import Gauntlet
from esper.urabrask.learned_risk import Lesson, Traits
from esper.urabrask.sandbox import Sandbox
from esper.worker import Blobs, Header, serve


def evaluate(header: Header, blobs: Blobs) -> tuple[Header, Blobs]:
    """Judge the artifact made of ``manifest`` and the blobs, under ``settings``."""
    gauntlet = Gauntlet(EvaluatorSettings.model_validate(header["settings"]), _sandbox())
    report = gauntlet.run(KernelManifest.model_validate(header["manifest"]), blobs)
    return {"report": report.model_dump(mode="json")}, {}


def learn_risk(header: Header, blobs: Blobs) -> tuple[Header, Blobs]:
    """Learn a model from ``lessons``, and compare it with the rules."""
    if not learned_risk.is_available():
        return {"refusal": learned_risk.NOT_INSTALLED}, {}
    try:
        comparison, model = learned_risk.learn(list(map(Lesson.model_validate, header["lessons"])))
    except ValueError as error:
        return {"refusal": str(error)}, {}
    return {"refusal": "", "comparison": comparison.model_dump(mode="json")}, {"model.json": model}


def predict_risk(header: Header, blobs: Blobs) -> tuple[Header, Blobs]:
    """Ask a model for the risk of a kernel with certain ``traits``."""
    traits = Traits.model_validate(header["traits"])
    return {"risk": learned_risk.predict(blobs["model.json"], traits)}, {}


@cache
def _sandbox() -> Sandbox:
    return Sandbox()


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve({"evaluate": evaluate, "learn_risk": learn_risk, "predict_risk": predict_risk})
