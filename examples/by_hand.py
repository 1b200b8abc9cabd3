"""Everything that the pipeline does, one step at a time and without it.

python examples/by_hand.py
"""

import asyncio
import tempfile

import torch
from torch import nn

import esper
from esper import blueprints


async def main() -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(8, 4), nn.Tanh()), ["0"], seeds_per_layer=1)
    layer = model.kasmina_layers["0"]
    model(torch.randn(2, 8))  # shows the layer what shapes it works on

    with tempfile.TemporaryDirectory() as folder, esper.Urza(folder) as urza:
        # Tezzeret traces a design for the seed's place and makes a kernel of it, in a process of
        # its own. Nothing may load the kernel before Urabrask has tried it out and signed for it.
        async with esper.Tezzeret(urza) as tezzeret, esper.Urabrask(urza) as urabrask:
            design = blueprints.get("residual_mlp")
            blueprint_id = await tezzeret.submit(design, layer.site(0), "float32")
            artifact_id = await tezzeret.compile(blueprint_id)
            report = await urabrask.evaluate(artifact_id)
            print(f"{design.name}: {report.status}, {', '.join(report.tags)}")

        model.connect(urza)
        assert await model.load_kernel("0", 0, artifact_id), "the log says why"
        show(layer)  # GRAFTING: 0.3 of the way from the layer's own output to the kernel's

    layer.stabilize(0, alpha=1.0)
    show(layer)  # STABILIZATION: all the way; the kernel no longer learns

    layer.cull(0, "example")
    show(layer)  # CULLED: the layer is what it was before


def show(layer: esper.KasminaLayer) -> None:
    alpha = layer.state_layout.value("alpha_blend", 0)
    print(f"seed 0: {layer.state(0).name}, alpha {alpha:.1f}, kernel {layer.kernel(0)}")


if __name__ == "__main__":
    asyncio.run(main())
