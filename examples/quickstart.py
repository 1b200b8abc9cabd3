"""Grow a small network on scikit-learn's digits: the shortest complete program.

python examples/quickstart.py [EPOCHS]
"""

import logging
import sys
import tempfile

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split

import esper


def loss_per_sample(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return cross_entropy(output, target, reduction="none")


def main(epochs: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the other cores are the pipeline's
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    train, held_out = random_split(data, [0.75, 0.25])

    net = nn.Sequential(nn.Linear(64, 4), nn.GELU(), nn.Linear(4, 10))
    model = esper.wrap(net, seeds_per_layer=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    with (
        tempfile.TemporaryDirectory() as library,
        esper.Pipeline(model, library, synchronous=True) as pipeline,
    ):
        tolaria = esper.Tolaria(
            model,
            optimizer,
            loss_per_sample,
            DataLoader(train, batch_size=32, shuffle=True, drop_last=True),
            DataLoader(held_out, batch_size=512),
            callbacks=[pipeline],
        )
        history = tolaria.fit(epochs)

    print(f"held-out accuracy {history[-1].val_accuracy:.1%}")
    for name, layer in model.kasmina_layers.items():
        for seed_idx in layer.state_layout.get_active_seeds():
            kernel = layer.kernel(seed_idx)
            print(f"layer {name}, seed {seed_idx}: {kernel}, {layer.state(seed_idx).name}")


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logging.getLogger("esper").setLevel(logging.INFO)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 60)
