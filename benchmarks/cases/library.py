"""How fast is the library? Eight writers that publish at once, and queries among 100,000 kernels.

SQLite and a folder, in the temporary folder: every publication is synced to the disk twice.
"""

import hashlib
import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from tempfile import TemporaryDirectory

from sqlalchemy import insert

from benchmarks.gate import WrongResultError
from benchmarks.harness import Plan
from benchmarks.kernels import DTYPE, Kernels
from benchmarks.rows import Finding
from benchmarks.schedule import each
from benchmarks.tails import quantile
from esper import Urza, blueprints
from esper.contracts import (
    Blueprint,
    KernelManifest,
    KernelQuery,
    KernelStatus,
    Pipeline,
    SiteSignature,
)
from esper.urza.rows import kernel_values
from esper.urza.schema import kernels as kernel_rows

WRITERS = 8
PUBLICATIONS = 25  # of each writer
NUM_KERNELS = 100_000
NUM_SITES = 100
GRAPH = b"{}"


def samples(plan: Plan, kernels: Kernels) -> Iterator[Finding]:
    publications = 2 if plan.quick else PUBLICATIONS
    with TemporaryDirectory() as folder, Urza(folder) as library:
        row = f"publish an artifact, {WRITERS} writers at once"
        times_ns = publish_at_once(library, publications)
        yield quantile(row, times_ns, 50)
        yield quantile(row, times_ns, 99)
    num_kernels = NUM_SITES if plan.quick else NUM_KERNELS
    with TemporaryDirectory() as folder, Urza(folder) as library:
        fill(library, num_kernels)
        check_answers(library, num_kernels)
        times_ns = query_times_ns(library, 10 if plan.quick else 2_000)
        row = f"query among {num_kernels:,} kernels"
        yield quantile(row, times_ns, 50)
        yield quantile(row, times_ns, 99, at_most=5_000)


def publish_at_once(library: Urza, publications: int) -> list[int]:
    """Return what each publication took; every row, blob and audit link is checked afterwards."""
    blueprint_id = submit(library)

    def write(writer: int) -> list[int]:
        times_ns = []
        for number in range(publications):
            data = f"weights {writer} {number}".encode()
            made = manifest(blueprint_id, site(0), number, weights=data)
            start = time.perf_counter_ns()
            library.publish_kernel(made, {"graph.json": GRAPH, "params.safetensors": data})
            times_ns.append(time.perf_counter_ns() - start)
        return times_ns

    with ThreadPoolExecutor(WRITERS) as pool:
        times_ns = [time_ns for times in pool.map(write, range(WRITERS)) for time_ns in times]
    library.verify()
    if len(library.kernels()) != WRITERS * publications:
        raise WrongResultError(f"{WRITERS * publications} published, {len(library.kernels())} kept")
    return times_ns


def fill(library: Urza, num_kernels: int) -> None:
    """Write rows of validated kernels: publishing so many would take minutes."""
    blueprint_id = submit(library)
    judged = {"status": KernelStatus.VALIDATED, "latency_us": 10.0, "memory_bytes": 4096}
    rows = [
        kernel_values(manifest(blueprint_id, site(number % NUM_SITES), number))
        | judged
        | {"risk_score": number % 97 / 97}
        for number in range(num_kernels)
    ]
    with library._database.write() as connection:
        connection.execute(insert(kernel_rows), rows)


def check_answers(library: Urza, num_kernels: int) -> None:
    expected = sorted(range(3, num_kernels, NUM_SITES), key=lambda n: n % 97)[:16]
    found = [record.manifest.flops_per_sample for record in library.query(query(3))]
    if [n % 97 for n in found] != [n % 97 for n in expected]:
        raise WrongResultError(f"a query found {found}, expected {expected}")


def query_times_ns(library: Urza, count: int) -> list[float]:
    """Return what each query took, but for its wait for a core."""
    asked = itertools.cycle([query(number) for number in range(NUM_SITES)])
    return [spent.own_ns for spent in each(lambda: library.query(next(asked)), count)]


def query(number: int) -> KernelQuery:
    return KernelQuery(site=site(number), dtype=DTYPE, device="cpu", max_latency_us=100.0)


def site(number: int) -> SiteSignature:
    return SiteSignature(
        host="Linear", inp_shape=(None, 8 + number), act_shape=(None, 4), channel_dim=1
    )


def submit(library: Urza) -> str:
    blueprint = Blueprint(
        design=blueprints.get("low_rank"),
        site=site(0),
        dtype=DTYPE,
        graph_digest=hashlib.sha256(GRAPH).hexdigest(),
        num_parameters=1,
        flops_per_sample=1,
    )
    return library.submit_blueprint(blueprint, GRAPH)


def manifest(
    blueprint_id: str, where: SiteSignature, number: int, weights: bytes = b""
) -> KernelManifest:
    files = {"graph.json": GRAPH, "params.safetensors": weights}
    return KernelManifest(
        blueprint_id=blueprint_id,
        design=blueprints.get("low_rank"),
        pipeline=Pipeline.FAST,
        site=where,
        dtype=DTYPE,
        device="cpu",
        torch_version="2.13",
        num_parameters=1,
        flops_per_sample=number,
        files={name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    )
