"""``esper demo``: a network that is too narrow grows while it learns to read digits.

Trains three networks on scikit-learn's digits with the same data in the same order for the same
number of steps: the narrow host, the host with Esper beside it, and a static network with as many
parameters as the grown one ended up with. Choices are made on the validation set; the test set is
looked at once, for the table.
"""

import argparse
import collections
import contextlib
import importlib.util
import json
import logging
import platform
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import esper.blueprints as blueprints
import esper.command_line as command_line
from esper.config import SeedSettings, TamiyoSettings
from esper.contracts import (
    Design,
    GraftingStrategy,
    SiteSignature,
)
from esper.errors import EsperError
from esper.kasmina.export import export
from esper.kasmina.model import MorphableModel, wrap
from esper.nissa.journal import FINAL_RECORD, Journal
from esper.nissa.network import summarize_network
from esper.nissa.progress import RunProgress, result_table
from esper.nissa.record import ResultRow, RunRecord, RunRecorder
from esper.nissa.report import write_report
from esper.nissa.scribe import Scribe
from esper.nissa.story import unjudged
from esper.pipeline import Pipeline
from esper.tamiyo import PlateauPolicy
from esper.tolaria import FlopMeter, Tolaria, evaluate, training_flops
from esper.urza import Urza

NARROW = 4  # units in each hidden layer of the host
EPOCHS, FREE_RUNNING_EPOCHS = 150, 600  # the latter takes as long as the pipeline needs
INTERRUPTED = 130  # exit status: 128 and the number of SIGINT
PIXELS, CLASSES = 64, 10
BATCH_SIZE = 32
SETTINGS = SeedSettings(seeds_per_layer=2, observe_every=16, embargo_steps=150)
TAMIYO = TamiyoSettings(window_epochs=5, min_relative_improvement=0.05, warmup_epochs=8)
STRATEGY = GraftingStrategy(
    training_steps=100, grafting_steps=100, stabilization_steps=40, fine_tuning_steps=100
)


@dataclass(frozen=True)
class Digits:
    """The three parts of the data, each ``(images, labels)``: (N, 64) float32, (N,) int64."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def train_loader(self, seed: int) -> DataLoader[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(seed)
        dataset = TensorDataset(*self.train)
        return DataLoader(dataset, BATCH_SIZE, shuffle=True, drop_last=True, generator=generator)


def load_digits() -> Digits:
    """Split the 1,797 images 60 : 20 : 20, always in the same way, each digit alike."""
    from sklearn import datasets, model_selection

    images, labels = datasets.load_digits(return_X_y=True)
    indices = list(range(len(labels)))
    train, rest = model_selection.train_test_split(
        indices, test_size=0.4, random_state=0, stratify=labels
    )
    validation, test = model_selection.train_test_split(
        rest, test_size=0.5, random_state=0, stratify=labels[rest]
    )

    def part(chosen: list[int]) -> tuple[Tensor, Tensor]:
        return (
            torch.tensor(images[chosen], dtype=torch.float32) / 16,
            torch.tensor(labels[chosen], dtype=torch.int64),
        )

    return Digits(part(train), part(validation), part(test))


def make_network(width: int, seed: int) -> nn.Sequential:
    """A multilayer perceptron with two hidden layers of ``width`` units."""
    torch.manual_seed(seed)
    return nn.Sequential(
        collections.OrderedDict(
            fc1=nn.Linear(PIXELS, width),
            act1=nn.GELU(),
            fc2=nn.Linear(width, width),
            act2=nn.GELU(),
            out=nn.Linear(width, CLASSES),
        )
    )


def loss_per_sample(output: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(output, target, reduction="none")


class Demo:
    """One run: its folder, its data, and what is recorded of it."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.seed: int = options.seed
        self.epochs: int = options.epochs or _default_epochs(options.free_running)
        self.folder = _fresh_folder(Path(options.runs) / options.name)
        self.digits = load_digits()
        self.console = Console()
        images, labels = self.digits.train
        self.batch = images[:BATCH_SIZE], labels[:BATCH_SIZE]

    def run(self) -> None:
        """Train all three networks, print the table and write everything into the folder.

        On Ctrl-C, what was recorded so far is written before ``KeyboardInterrupt`` goes on.
        """
        torch.set_num_threads(1)  # the other core is the pipeline's
        model = wrap(make_network(NARROW, self.seed), settings=self._seed_settings())
        assert isinstance(model, MorphableModel)
        scribe = Scribe(model, self._recorder(model))
        self._say(f"To watch it in the browser: esper watch {self.folder}")
        with Urza(self.folder / "urza") as urza:
            flops = FlopMeter(model, self.batch, loss_per_sample)
            try:
                with Journal(scribe.recorder, self.folder):
                    self._train(model, urza, scribe, flops)
                rows = self._compare(model, flops)
            except KeyboardInterrupt:
                self._finish(model, urza, scribe, interrupted=True)
                self._say(f"Interrupted; what there was is in {self.folder}/report.html")
                raise
            record = self._finish(model, urza, scribe, results=rows)
            self._export(model)
        self.console.print(result_table(rows))
        if text := unjudged(record):
            self._say(text)
        self._say(f"Everything is in {self.folder}; open {self.folder}/report.html")

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _seed_settings(self) -> SeedSettings:
        return SETTINGS.model_copy(update={"deterministic": not self.options.free_running})

    def _train(self, model: MorphableModel, urza: Urza, scribe: Scribe, flops: FlopMeter) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=self.options.lr)
        with RunProgress(self.epochs, console=self.console) as scribe.progress:
            pipeline = Pipeline(
                model,
                urza,
                designs=_designs(self.options.with_bad_blueprint),
                policy=PlateauPolicy(TAMIYO, STRATEGY),
                listener=scribe.hear,
                metrics_port=self.options.metrics_port,
                synchronous=not self.options.free_running,
            )
            with pipeline:
                tolaria = Tolaria(
                    model,
                    optimizer,
                    loss_per_sample,
                    self.digits.train_loader(self.seed),
                    [self.digits.validation],
                    callbacks=[flops, scribe, pipeline],
                )
                try:
                    tolaria.fit(self.epochs)
                finally:
                    scribe.recorder.stop_clock()

    def _compare(self, model: MorphableModel, flops: FlopMeter) -> list[ResultRow]:
        grown_parameters = sum(p.numel() for p in model.parameters())
        width = next(
            w
            for w in range(NARROW, 10_000)
            if sum(p.numel() for p in make_network(w, 0).parameters()) >= grown_parameters
        )
        return [
            self._static_row("narrow host", NARROW),
            self._row("grown by Esper", model, float(flops.total()), "", grown=True),
            self._static_row("static, same size", width),
        ]

    def _static_row(self, label: str, width: int) -> ResultRow:
        """Train a network without Esper on the same batches for the same number of steps."""
        network = make_network(width, self.seed)
        optimizer = torch.optim.Adam(network.parameters(), lr=self.options.lr)
        loader = self.digits.train_loader(self.seed)
        steps = 0
        for _ in range(self.epochs):
            for inp, target in loader:
                optimizer.zero_grad(set_to_none=True)
                loss_per_sample(network(inp), target).mean().backward()
                optimizer.step()
                steps += 1
        flops = steps * training_flops(network, self.batch, loss_per_sample)
        return self._row(label, network, float(flops), f"width {width}")

    def _row(
        self, label: str, network: nn.Module, flops: float, note: str, *, grown: bool = False
    ) -> ResultRow:
        result = evaluate(network, [self.digits.test], loss_per_sample)
        return ResultRow(
            label=label,
            parameters=sum(p.numel() for p in network.parameters()),
            test_accuracy=result.accuracy,
            test_loss=result.loss,
            training_flops=flops,
            note=note,
            grown=grown,
        )

    def _recorder(self, model: MorphableModel) -> RunRecorder:
        model(self.digits.train[0][:1])  # shows the widths of the activations
        return RunRecorder(
            self.options.name,
            network=f"{PIXELS}-{NARROW}-{NARROW}-{CLASSES}",
            command=self._command(),
            seed=self.seed,
            machine=f"{platform.machine()}, {platform.system()}",
            torch_version=torch.__version__,
            before=summarize_network(model),
        )

    def _command(self) -> str:
        options = self.options
        words = ["esper demo", f"--seed {self.seed} --epochs {self.epochs} --lr {options.lr:g}"]
        words += ["--with-bad-blueprint"] if options.with_bad_blueprint else []
        words += ["--free-running"] if options.free_running else []
        return " ".join(words)

    def _finish(
        self,
        model: MorphableModel,
        urza: Urza,
        scribe: Scribe,
        *,
        results: Iterable[ResultRow] = (),
        interrupted: bool = False,
    ) -> RunRecord:
        """Close the record, and write it and what the library knows."""
        recorder = scribe.recorder
        recorder.finish(
            after=summarize_network(model, scribe.contributions),
            results=results,
            audit_head=urza.audit.head(),
            interrupted=interrupted,
        )
        record = recorder.record()
        write_report(record, self.folder / "report.html")
        (self.folder / FINAL_RECORD).write_text(record.to_json())
        (self.folder / "lineage.json").write_text(json.dumps(urza.lineage(), indent=2))
        urza.audit.export_jsonl(self.folder / "audit.jsonl")
        return record

    def _export(self, model: MorphableModel) -> None:
        sample = self.digits.test[0][:2]
        exported = torch.export.export(
            export(model).eval(), (sample,), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
        torch.export.save(exported, self.folder / "evolved.pt2")


def _designs(with_bad: bool) -> Callable[[SiteSignature], Iterable[Design]]:
    """Return what is compiled for a site; the bad design must be turned down by Urabrask."""
    if not with_bad:
        return blueprints.designs_for
    bad = Design(name="exploding", builder="esper.blueprints.bad:ExplodingBlueprint")
    return lambda site: [bad, *blueprints.designs_for(site)]


def _fresh_folder(wanted: Path) -> Path:
    """Return ``wanted``, or with a number behind it if a run is there already; nothing is lost."""
    for number in range(1, 10_000):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise FileExistsError(f"{wanted} and 10,000 more exist already")


def _default_epochs(free_running: bool) -> int:
    return FREE_RUNNING_EPOCHS if free_running else EPOCHS


def _folder_name(text: str) -> str:
    if text.startswith(".") or not text or {"/", "\\"} & set(text):
        raise argparse.ArgumentTypeError(f"must be the name of one folder, got {text!r}")
    return text


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2^63 - 1, got {text!r}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--name", type=_folder_name, default="demo", help="folder of the run below --runs"
    )
    parser.add_argument("--runs", default="runs", help="where runs are kept")
    parser.add_argument(
        "--epochs",
        type=command_line.count_above_zero,
        help=f"{EPOCHS}, or {FREE_RUNNING_EPOCHS} with --free-running",
    )
    parser.add_argument(
        "--lr",
        type=command_line.number_above_zero,
        default=3e-3,
        help="learning rate of Adam (default: 0.003)",
    )
    parser.add_argument("--seed", type=_seed, default=0, help="two runs with a seed are the same")
    parser.add_argument(
        "--free-running",
        action="store_true",
        help="never wait for the pipeline. By default training waits for it at the ends of epochs, "
        "since this network learns in seconds and two runs are to give the same numbers",
    )
    parser.add_argument(
        "--metrics-port",
        type=command_line.port,
        help="of this machine, where Prometheus is served meanwhile",
    )
    parser.add_argument(
        "--with-bad-blueprint",
        action="store_true",
        help="also submit a design that explodes, to see it rejected",
    )


def main(options: argparse.Namespace) -> None:
    """Run the demo; what is missing or in the way, or Ctrl-C, ends in one line and a status."""
    if importlib.util.find_spec("sklearn") is None:
        command_line.refuse("demo", "it needs scikit-learn: pip install 'esper-torch[demo]'")
    command_line.configure_logging("%(levelname)s %(name)s: %(message)s")
    logging.captureWarnings(True)
    try:
        Demo(options).run()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except (EsperError, OSError) as error:
        command_line.refuse("demo", error)
