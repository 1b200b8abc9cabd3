"""A library of very many kernels, written by bare SQL: publishing them takes minutes."""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

from urza_samples import SITE, manifest, submit

from esper.contracts import KernelQuery, KernelStatus, SiteSignature
from esper.urza import Urza
from esper.urza.library import _tag_set

DESIGNS = ("low_rank", "gated", "residual_mlp", "conv_bottleneck", "depthwise", "norm")
SPEEDS = ("high_speed", "medium_speed", "low_speed")
MEMORIES = ("low_memory", "high_memory", None)
STABILITIES = ("numerically_stable", None)


@dataclass(frozen=True)
class Shelved:
    """What a query can ask of one kernel."""

    artifact_id: str
    site: int
    tags: frozenset[str]
    num_parameters: int
    latency_us: float
    memory_bytes: int
    risk_score: float
    manifest: str


def site(number: int) -> SiteSignature:
    return SITE.model_copy(update={"inp_shape": (None, 8 + number)})


def shelve(urza: Urza, count: int, *, sites: int) -> list[Shelved]:
    """Fill an empty library with validated kernels for ``sites`` sites, and return them."""
    submit(urza)
    shelved = list(_kernels(count, sites))
    digests = [site(number).digest() for number in range(sites)]
    blueprint_id = manifest().blueprint_id
    with urza._database.write() as connection:
        sets = {tags: _tag_set(connection, tags) for tags in {kernel.tags for kernel in shelved}}
        connection.exec_driver_sql(
            "INSERT INTO kernels (artifact_id, blueprint_id, manifest, site_digest, dtype, device, "
            "num_parameters, status, tags, latency_us, memory_bytes, risk_score, tag_set) "
            "VALUES (?, ?, ?, ?, 'float32', 'cpu', ?, ?, ?, ?, ?, ?, ?)",
            [
                (
                    kernel.artifact_id,
                    blueprint_id,
                    kernel.manifest,
                    digests[kernel.site],
                    kernel.num_parameters,
                    KernelStatus.VALIDATED.value,
                    json.dumps(sorted(kernel.tags)),
                    kernel.latency_us,
                    kernel.memory_bytes,
                    kernel.risk_score,
                    sets[kernel.tags],
                )
                for kernel in shelved
            ],
        )
    return shelved


def _kernels(count: int, sites: int) -> Iterator[Shelved]:
    chance = random.Random(0)
    templates = [_manifest_template(number) for number in range(sites)]
    for number in range(count):
        where = number % sites
        num_parameters = chance.randrange(100) * 1000
        # Its FLOPs tell two kernels apart that are alike in all else.
        text = templates[where] % {"flops": number, "parameters": num_parameters}
        drawn = (chance.choice(pool) for pool in (DESIGNS, SPEEDS, MEMORIES, STABILITIES))
        yield Shelved(
            artifact_id=hashlib.sha256(text.encode()).hexdigest(),
            site=where,
            tags=frozenset(tag for tag in drawn if tag is not None),
            num_parameters=num_parameters,
            latency_us=chance.uniform(1, 1000),
            memory_bytes=chance.randrange(1, 2**20),
            risk_score=chance.randrange(100) / 100,
            manifest=text,
        )


def _manifest_template(number: int) -> str:
    unlikely = {"flops": 987_654_321, "parameters": 123_456_789}
    sample = manifest(
        site=site(number),
        flops_per_sample=unlikely["flops"],
        num_parameters=unlikely["parameters"],
    )
    text = sample.canonical().decode().replace("%", "%%")
    for name, value in unlikely.items():
        text = text.replace(str(value), f"%({name})d")
    return text


def best(shelved: list[Shelved], query: KernelQuery) -> list[str]:
    """Return the ids that the query should find, in the plainest way."""
    fitting = [
        kernel
        for kernel in shelved
        if site(kernel.site) == query.site
        and query.required_tags <= kernel.tags
        and not query.excluded_tags & kernel.tags
        and (query.max_latency_us is None or kernel.latency_us <= query.max_latency_us)
        and (query.max_memory_bytes is None or kernel.memory_bytes <= query.max_memory_bytes)
        and (query.max_parameters is None or kernel.num_parameters <= query.max_parameters)
    ]
    fitting.sort(
        key=lambda kernel: (
            -len(query.preferred_tags & kernel.tags),
            kernel.risk_score,
            kernel.num_parameters,
            kernel.artifact_id,
        )
    )
    return [kernel.artifact_id for kernel in fitting[: query.limit]]
