"""The forge's child process: runs the designs' code, traces and packages."""

from esper.config import ForgeSettings
from esper.contracts import Blueprint, Design, Pipeline, SiteSignature
from esper.kasmina.kernel import GRAPH_FILE
from esper.tezzeret.pipelines import deliver
from esper.tezzeret.trace import trace
from esper.worker import Blobs, Header, serve


def _trace(header: Header, blobs: Blobs) -> tuple[Header, Blobs]:
    blueprint, graph, _ = trace(
        Design.model_validate(header["design"]),
        SiteSignature.model_validate(header["site"]),
        header["dtype"],
        ForgeSettings.model_validate(header["settings"]),
    )
    return {"blueprint": blueprint.model_dump(mode="json")}, {GRAPH_FILE: graph}


def _package(header: Header, blobs: Blobs) -> tuple[Header, Blobs]:
    blueprint = Blueprint.model_validate(header["blueprint"])
    pipeline = Pipeline(header["pipeline"])
    delivery = deliver(blueprint, blobs[GRAPH_FILE], header["device"], pipeline)
    answer = {"manifest": delivery.manifest.model_dump(mode="json"), "remark": delivery.remark}
    return answer, delivery.files


HANDLERS = {"trace": _trace, "package": _package}

if __name__ == "__main__":
    serve(HANDLERS)
