"""The child process of esper.kasmina.background: compiles graphs into Inductor's cache on disk."""

import torch._functorch.config
import torch._inductor.config
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx
from torch._inductor.utils import clear_caches
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import esper.ops  # noqa: F401 - the graphs call them
from esper.kasmina.ambient import ambient
from esper.kasmina.traced import read_graph, read_inputs
from esper.worker import Blobs, Header, serve


def _import(header: Header, blobs: Blobs) -> tuple[Header, Blobs]:
    """Do nothing: what takes time is to get here."""
    return {}, {}


def _compile(header: Header, blobs: Blobs) -> tuple[Header, Blobs]:
    with ambient(header["ambient"]):
        clear_caches()  # of paths below the folder of the cache, which may be another one now
        graph = read_graph(header["graph"])
        # As from Dynamo, which tells AOTAutograd which inputs stay where they are.
        graph.meta["dynamo_compile_id"] = "background"
        graph._param_name_to_source = {}  # type: ignore[assignment]
        mode = FakeTensorMode(shape_env=ShapeEnv())
        inputs = read_inputs(header["inputs"], mode)
        with (
            tracing(TracingContext(mode)),
            torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
            torch._inductor.config.patch(compile_threads=1),
        ):
            compile_fx(graph, inputs, config_patches=header["ambient"]["options"])
    return {}, {}


HANDLERS = {"import": _import, "compile": _compile}

if __name__ == "__main__":
    serve(HANDLERS)
