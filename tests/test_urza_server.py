"""Urza's server as HTTP shows it: what it describes, refuses, limits, logs and counts."""

import logging
import math
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings, strategies
from prometheus_client.parser import text_string_to_metric_families
from schemathesis import GenerationMode
from tamiyo_samples import controller
from urza_samples import (
    UNKNOWN,
    blueprint,
    field_report,
    graph,
    judge,
    kernel_files,
    manifest,
    publish,
    report,
    statement,
    submit,
)
from urza_servers import served

import esper.errors
from esper.contracts import SeedEvaluation
from esper.errors import TooLargeError
from esper.oona import MemoryBus
from esper.urza import Urza
from esper.urza.access import Tokens
from esper.urza.client import UrzaClient
from esper.urza.failures import STATUS_OF, heard, told
from esper.urza.messages import BlueprintSubmission, KernelUpload, SignedReport
from esper.urza.server import create_app, listen

MAX_BODY_BYTES = 100_000
ROUTES, EXAMPLES = 35, 8
RUN = "run-7"
schemathesis.checks.load_all_checks()
CHECKS = [
    schemathesis.checks.CHECKS.get_one(name)
    for name in (
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
        "negative_data_rejection",
    )
]


DIVERGED = SeedEvaluation(
    seed_id=("blocks.2.mlp", 0),
    loss_with=math.nan,
    loss_without=1.5,
    contribution=-math.inf,
    standard_error=math.inf,
    num_samples=64,
)


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Urza]:
    with Urza(tmp_path / "library") as urza:
        yield urza


@pytest.fixture
def url(library: Urza) -> Iterator[str]:
    with served(create_app(library, Tokens([]), max_body_bytes=MAX_BODY_BYTES)) as url:
        yield url


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url) as client:
        yield client


# ------------------------------------------------------------------ the description


def test_every_documented_route_is_there(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    assert {
        ("/api/v1/blueprints", "post"),
        ("/api/v1/blueprints/{blueprint_id}", "get"),
        ("/api/v1/kernels/{artifact_id}", "get"),
        ("/api/v1/kernels/{artifact_id}/files/{name}", "get"),
        ("/api/v1/kernels/query", "post"),
        ("/internal/v1/kernels", "post"),
        ("/internal/v1/kernels/{artifact_id}/report", "post"),
        ("/api/v1/forge/status", "get"),
        ("/api/v1/runs/{run}/controller", "get"),
        ("/api/v1/runs/{run}/controller/{action}", "post"),
    } <= {(path, method) for path, methods in paths.items() for method in methods}
    assert "openapi.json" in http.get("/docs").text


@pytest.mark.timeout(300)
def test_every_answer_is_as_described(tmp_path: Path) -> None:
    """Schemathesis asks every route what its description allows, and what it does not."""
    with Urza(tmp_path / "library") as library:
        artifact_id = publish(library)
        judge(library, artifact_id)
        library.record_field_report(field_report(artifact_id, evaluation=DIVERGED))
        bus = MemoryBus()
        with controller(bus), served(create_app(library, Tokens([]), buses={RUN: bus})) as url:
            schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
            operations = [operation.ok() for operation in schema.get_all_operations()]
            assert len(operations) == ROUTES
            for operation in operations:
                for mode in GenerationMode:
                    ask_as_described(operation, mode, artifact_id)
        library.verify()


def ask_as_described(operation: Any, mode: GenerationMode, artifact_id: str) -> None:
    known = {"artifact_id": artifact_id, "blueprint_id": blueprint().blueprint_id, "run": RUN}

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy(generation_mode=mode), strategies.booleans())
    def ask(case: Any, of_something_there: bool) -> None:
        if of_something_there and mode is GenerationMode.POSITIVE:
            case.path_parameters |= {
                name: known[name] for name in known.keys() & case.path_parameters.keys()
            }
        case.call_and_validate(checks=CHECKS)

    if mode is GenerationMode.POSITIVE or operation.body or operation.path_parameters:
        ask()


# ------------------------------------------------------------------ errors


def test_every_error_has_a_status_of_its_own_and_comes_back_as_itself() -> None:
    assert len(set(STATUS_OF.values())) == len(STATUS_OF)
    for kind in STATUS_OF:
        status, failure = told(kind("what went wrong"))
        again = heard(status, failure.canonical(), "GET /")
        assert (type(again), str(again)) == (kind, "what went wrong")


def test_an_error_that_is_not_in_the_table_is_told_as_the_nearest_that_is() -> None:
    assert told(PermissionError(13, "denied"))[1].error == "OSError"
    assert told(UnicodeDecodeError("utf-8", b"x", 0, 1, "why"))[1].error == "ValueError"


@pytest.mark.parametrize(
    ("status", "kind"),
    [(404, "ArtifactNotFoundError"), (418, "LibraryError"), (799, "LibraryError")],
)
def test_what_something_in_between_answers_is_an_error_too(status: int, kind: str) -> None:
    error = heard(status, b"<html>", "GET http://proxy/x")
    assert type(error) is getattr(esper.errors, kind)
    assert str(error).startswith(f"GET http://proxy/x: answered by {status} ")


TRICKS = [
    "..%2f..%2fkeys%2fevaluator.pem",
    "%2e%2e/%2e%2e/etc/passwd",
    UNKNOWN.upper(),
    f"{UNKNOWN}%0a",
    f"{UNKNOWN}%00",
    "'%20OR%201=1%20--",
    "a" * 4000,
]


@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.parametrize(
    "path", ["/api/v1/kernels/{}", "/api/v1/blueprints/{}/graph", "/api/v1/kernels/{}/report"]
)
def test_an_id_that_is_none_is_refused(http: httpx.Client, path: str, trick: str) -> None:
    answer = http.get(path.format(trick))
    assert answer.status_code in (404, 422)
    assert answer.json()["error"] in ("ValueError", "LibraryError")


@pytest.mark.parametrize(
    "name", ["..%2f..%2fkeys%2fevaluator.pem", "%2e%2e", "graph.json%00", "Graph.json", "%20"]
)
def test_a_file_that_the_manifest_does_not_name_is_not_there(
    library: Urza, http: httpx.Client, name: str
) -> None:
    artifact_id = publish(library)
    answer = http.get(f"/api/v1/kernels/{artifact_id}/files/{name}")
    assert answer.status_code == 404
    assert http.get(f"/api/v1/kernels/{artifact_id}/files/graph.json").content == graph("low_rank")


@pytest.mark.parametrize(
    ("content", "because"),
    [
        (b"", "body: Field required"),
        (b"{", "JSON decode error"),
        (b"[" * 100_000, "body"),
        (b'{"blueprint": 1, "graph": "AA==", "more": 2}', "body.more: Extra inputs"),
        (b'{"graph": "?"}', "body.graph: "),
    ],
)
def test_a_body_that_is_none_is_refused(http: httpx.Client, content: bytes, because: str) -> None:
    headers = {"Content-Type": "application/json"}
    answer = http.post("/api/v1/blueprints", content=content, headers=headers)
    assert 400 <= answer.status_code < 500
    assert because in answer.json()["message"]


def test_a_form_of_a_web_page_is_no_body(library: Urza, http: httpx.Client) -> None:
    content = BlueprintSubmission(blueprint=blueprint(), graph=graph("low_rank")).canonical()
    for kind in ({}, {"Content-Type": "text/plain"}):
        assert http.post("/api/v1/blueprints", content=content, headers=kind).status_code == 422
    assert library.blueprints() == []


def test_a_report_is_for_the_kernel_in_its_path(library: Urza, url: str) -> None:
    artifact_id, other = publish(library), publish(library, "gated")
    with UrzaClient(url, key_path=Path("unused")) as client:
        signed = client_signed(library, artifact_id)
        with pytest.raises(ValueError, match=f"^a report on kernel {artifact_id} was sent for "):
            client.ask("POST", f"/internal/v1/kernels/{other}/report", signed)


def client_signed(library: Urza, artifact_id: str) -> SignedReport:
    verdict = report(artifact_id)
    said = statement(verdict)
    return SignedReport(report=verdict, statement=said, signature=library.evaluator_key.sign(said))


def test_a_full_disk_is_told(library: Urza, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: bytes) -> str:
        raise OSError(28, "No space left on device")

    with UrzaClient(url) as client:
        with monkeypatch.context() as patch:
            patch.setattr(library._blobs, "put", full)
            with pytest.raises(OSError, match="No space left on device"):
                submit(client)
        assert client.blueprints() == []
        submit(client)


def test_what_is_refused_is_logged_once_in_one_line(
    http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    http.get(f"/api/v1/kernels/{UNKNOWN}")
    http.get("/api/v1/kernels/x%0ay")
    http.get("/nowhere")
    http.post("/api/v1/blueprints", content=b" " * (MAX_BODY_BYTES + 1))
    http.get("/api/v1/kernels")
    said = [r.getMessage() for r in caplog.records if r.name.startswith(("esper", "uvicorn"))]
    refused = [line for line in said if "refused" in line]
    assert [line.partition(":")[0] for line in refused] == [
        f"GET '/api/v1/kernels/{UNKNOWN}' refused, 404 ArtifactNotFoundError",
        r"GET '/api/v1/kernels/x\ny' refused, 422 ValueError",
        "GET '/nowhere' refused, 404 LibraryError",
        "POST '/api/v1/blueprints' refused, 413 TooLargeError",
    ]
    assert not any("\n" in line for line in said)


# ------------------------------------------------------------------ limits


def large_upload(size: int) -> KernelUpload:
    return KernelUpload(manifest=manifest(), files=kernel_files() | {"forward.so": bytes(size)})


def test_an_oversized_body_is_refused_and_the_server_goes_on(library: Urza, url: str) -> None:
    with UrzaClient(url) as client:
        submit(client)
        upload = large_upload(50 * 2**20)
        with pytest.raises(
            TooLargeError, match=r"^a request may have 100000 bytes here, and has more$"
        ):
            client.publish_kernel(upload.manifest, upload.files)
        assert client.kernels() == []
        publish(client)
    library.verify()


def test_an_oversized_body_without_a_length_is_refused(http: httpx.Client) -> None:
    chunks = (b" " * 1000 for _ in range(MAX_BODY_BYTES // 500))
    headers = {"Content-Type": "application/json"}
    answer = http.post("/api/v1/blueprints", content=chunks, headers=headers)
    assert (answer.status_code, answer.json()["error"]) == (413, "TooLargeError")


def test_an_answer_s_body_does_not_wait_for_its_head_to_be_acknowledged() -> None:
    with (
        listen("127.0.0.1", 0, Tokens([])) as listener,
        socket.create_connection(listener.getsockname()),
        listener.accept()[0] as connection,
    ):
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# ------------------------------------------------------------------ counts


def test_the_forge_s_status_and_the_metrics_count(library: Urza, http: httpx.Client) -> None:
    judge(library, publish(library))
    publish(library, "gated")
    submit(library, "waiting")
    claimed = library.claim_blueprint("forge 1", 600, blueprint_id=blueprint().blueprint_id)
    status = http.get("/api/v1/forge/status").json()
    assert status["blueprints"] == {"UNVALIDATED": 2, "COMPILING": 1}
    assert status["kernels"] == {"PENDING_BENCHMARKING": 1, "VALIDATED": 1}
    [lease] = status["leases"]
    assert (lease["blueprint_id"], lease["owner"]) == (claimed, "forge 1")

    http.get(f"/api/v1/kernels/{UNKNOWN}")
    http.get("/nothing/here")
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(http.get("/metrics").text)
        for sample in family.samples
    }
    by_id = "/api/v1/kernels/{artifact_id}"
    assert samples["urza_requests_total", "GET", by_id, "404"] == 1
    assert samples["urza_requests_total", "GET", "unrouted", "404"] == 1
    assert samples["urza_requests_total", "GET", "/api/v1/forge/status", "200"] == 1
    assert samples["urza_request_duration_seconds_count", "GET", by_id] == 1
    assert samples["urza_blueprints", "UNVALIDATED"] == 2
    assert samples["urza_kernels", "VALIDATED"] == 1
    assert samples["urza_leases",] == 1
    assert samples["urza_waiting", "blueprint"] == 2
    assert samples["urza_waiting", "kernel"] == 1
    assert samples["urza_forge_throughput_per_hour",] == 0
    assert samples["urza_forge_utilisation",] == 0


def test_many_publish_at_once(library: Urza, url: str) -> None:
    def work(number: int) -> list[str]:
        with UrzaClient(url) as client:
            return [publish(client, f"design{number}.{n}") for n in range(3)] + [publish(client)]

    with ThreadPoolExecutor(8) as pool:
        published = {artifact_id for share in pool.map(work, range(8)) for artifact_id in share}
    assert len(published) == 8 * 3 + 1
    assert {record.artifact_id for record in library.kernels()} == published
    library.verify()
