"""A line that learns to be a wave: a network grows a design of its user's own.

python examples/own_design.py
"""

import tempfile

import torch
from my_designs import Sine  # not defined here: the process that compiles it has to import it
from torch import nn

import esper
from esper import blueprints


def loss_per_sample(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square().mean(1)


def main() -> None:
    torch.manual_seed(0)
    x = torch.linspace(-4, 4, 512).unsqueeze(1)
    batch = x, torch.sin(x)

    model = esper.wrap(nn.Linear(1, 1), seeds_per_layer=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    sine = blueprints.register("sine", Sine, hparams={"width": 16})

    with (
        tempfile.TemporaryDirectory() as library,
        # Called with each site of the model; without it, every registered design that fits is made.
        esper.Pipeline(model, library, designs=lambda site: [sine], synchronous=True) as pipeline,
    ):
        tolaria = esper.Tolaria(
            model,
            optimizer,
            loss_per_sample,
            train_loader=[batch] * 50,
            val_loader=[batch],
            callbacks=[pipeline],
        )
        history = tolaria.fit(30)

    print(f"loss {history[0].val_loss:.4f} at first, {history[-1].val_loss:.4f} in the end")
    [layer] = model.kasmina_layers.values()
    print(f"seed 0 is {layer.state(0).name} with {layer.kernel(0)}")


if __name__ == "__main__":
    main()
