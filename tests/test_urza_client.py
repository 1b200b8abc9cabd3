"""The client on a bad day: nothing altered comes through, and what was lost is asked again."""

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from command_line import refusal
from torch import nn
from urza_backends import START_TIMEOUT_S, free_port, stopped
from urza_proxy import Fault, Proxy, corrupted, lost, proxied, replaced_by, truncated
from urza_samples import (
    SITE,
    audited,
    blueprint,
    graph,
    judge,
    kernel_files,
    publish,
    submit,
)
from urza_servers import served, start_server

import esper
import esper.urza.connection
from esper.contracts import (
    BlueprintStatus,
    Compilation,
    KernelQuery,
    LifecycleEvent,
    Pipeline,
    SeedState,
)
from esper.errors import (
    ArtifactIntegrityError,
    ConflictError,
    LeaseError,
    LibraryError,
    TokenError,
)
from esper.trust import verify_bundle
from esper.urza import EvaluatorKey, Urza, connect
from esper.urza.access import Role, Tokens, add_token, load_tokens
from esper.urza.client import UrzaClient
from esper.urza.server import create_app

EVENT = LifecycleEvent(
    seed_id=("0", 0), source=SeedState.DORMANT, target=SeedState.GERMINATED, epoch=0, step=0
)
LOSSES = [lost, truncated, replaced_by(b"502 Bad Gateway"), replaced_by(b"503 Come Back Later")]


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Urza]:
    with Urza(tmp_path / "library") as urza:
        yield urza


@pytest.fixture
def url(library: Urza) -> Iterator[str]:
    with served(create_app(library, Tokens([]))) as url:
        yield url


@pytest.fixture
def proxy_and_client(url: str) -> Iterator[tuple[Proxy, UrzaClient]]:
    with proxied(url) as (proxy, proxy_url), UrzaClient(proxy_url) as client:
        yield proxy, client


# ------------------------------------------------------------------ altered on the way


def test_altered_bytes_of_a_kernel_are_refused(
    library: Urza, proxy_and_client: tuple[Proxy, UrzaClient]
) -> None:
    proxy, client = proxy_and_client
    artifact_id = publish(library)
    proxy.faults.extend([bytes, corrupted, bytes])  # the record, and one of two files
    with pytest.raises(ArtifactIntegrityError, match=r"^kernel .*: file '.*' has digest .*, expec"):
        client.fetch_kernel(artifact_id)
    assert client.fetch_kernel(artifact_id).files == kernel_files()


def test_altered_bytes_of_a_graph_are_refused(
    library: Urza, proxy_and_client: tuple[Proxy, UrzaClient]
) -> None:
    proxy, client = proxy_and_client
    blueprint_id = submit(library)
    proxy.faults.extend([bytes, corrupted])
    with pytest.raises(ArtifactIntegrityError, match=r"^graph .*: it was altered, what came has"):
        client.graph(blueprint_id)
    assert client.graph(blueprint_id) == graph("low_rank")


def replaced(old: bytes, new: bytes) -> Fault:
    assert len(old) == len(new)
    return lambda answer: answer.replace(old, new)


def test_an_altered_record_is_refused(
    library: Urza, proxy_and_client: tuple[Proxy, UrzaClient]
) -> None:
    proxy, client = proxy_and_client
    artifact_id = publish(library)
    judge(library, artifact_id)
    blueprint_id = blueprint().blueprint_id
    query = KernelQuery(site=SITE, dtype="float32", device="cpu")
    for ask in (
        lambda: client.kernel(artifact_id),
        client.kernels,
        lambda: client.query(query),
        lambda: client.blueprint_record(blueprint_id),
        client.blueprint_records,
    ):
        proxy.faults.append(replaced(b'"num_parameters":48', b'"num_parameters":47'))
        with pytest.raises(ArtifactIntegrityError, match=r": it was altered, what came has digest"):
            ask()
    proxy.faults.append(replaced(b'"risk_score":0.25', b'"risk_score":0.15'))
    with pytest.raises(ArtifactIntegrityError, match=r"its report was altered, or replaced while"):
        client.report(artifact_id)


def test_another_kernel_than_was_asked_for_is_refused(
    library: Urza, proxy_and_client: tuple[Proxy, UrzaClient]
) -> None:
    proxy, client = proxy_and_client
    asked, other = publish(library), publish(library, "gated")
    answer = library.kernel(other).canonical()
    proxy.faults.append(
        lambda _: b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(answer), answer)
    )
    with pytest.raises(ArtifactIntegrityError, match=f"^kernel {asked}: it was altered"):
        client.kernel(asked)


def test_a_forged_verdict_does_not_load(
    library: Urza, proxy_and_client: tuple[Proxy, UrzaClient]
) -> None:
    """A server may say what it likes: the signature is checked with the key that we were given."""
    proxy, client = proxy_and_client
    artifact_id = publish(library)
    proxy.faults.append(
        lambda answer: answer.replace(b'"PENDING_BENCHMARKING"', b'"VALIDATED"' + 11 * b" ")
    )
    forged = client.fetch_kernel(artifact_id)
    assert forged.record.status == "VALIDATED"
    with pytest.raises(ArtifactIntegrityError, match=r"carries no signed statement"):
        verify_bundle(forged, library.evaluator_key.trusted())


@pytest.mark.parametrize("answer", [b"{}", b"[]", b"<html>", b"\xff"])
def test_an_answer_without_sense_is_an_error(
    proxy_and_client: tuple[Proxy, UrzaClient], answer: bytes
) -> None:
    proxy, client = proxy_and_client
    proxy.faults.append(
        lambda _: b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(answer), answer)
    )
    with pytest.raises(LibraryError, match=r"^the library's server gave an answer that has no"):
        client.audit.head()


# ------------------------------------------------------------------ lost on the way


@pytest.mark.parametrize("fault", LOSSES)
def test_a_lost_answer_is_asked_for_again(
    library: Urza, proxy_and_client: tuple[Proxy, UrzaClient], fault: Fault
) -> None:
    proxy, client = proxy_and_client
    proxy.faults.extend([fault] * 2)
    artifact_id = publish(client)  # two requests
    proxy.faults.extend([fault] * 3)
    assert client.fetch_kernel(artifact_id).files == kernel_files()
    assert audited(library) == ["blueprint.submitted", "kernel.published"]
    assert len(proxy.requests) == 2 + 2 + 3 + 3
    library.verify()


@pytest.mark.parametrize("fault", LOSSES)
def test_what_must_not_be_done_twice_is_not_asked_again(
    library: Urza, proxy_and_client: tuple[Proxy, UrzaClient], fault: Fault
) -> None:
    proxy, client = proxy_and_client
    blueprint_id = submit(client)
    proxy.faults.append(fault)
    with pytest.raises(
        LibraryError, match=f"^POST http.*/internal/v1/blueprints/{blueprint_id}/st"
    ):
        client.set_blueprint_status(blueprint_id, BlueprintStatus.COMPILING)
    assert library.blueprint_status(blueprint_id) == (BlueprintStatus.COMPILING, "")
    with pytest.raises(ConflictError, match=r"is COMPILING; it cannot become COMPILING$"):
        client.set_blueprint_status(blueprint_id, BlueprintStatus.COMPILING)


@pytest.mark.parametrize("fault", LOSSES)
def test_a_lease_is_not_ended_twice(
    library: Urza, proxy_and_client: tuple[Proxy, UrzaClient], fault: Fault
) -> None:
    proxy, client = proxy_and_client
    artifact_id = publish(library)
    blueprint_id = blueprint().blueprint_id
    compilation = Compilation(
        blueprint_id=blueprint_id,
        pipeline=Pipeline.FAST,
        owner="worker",
        artifact_id=artifact_id,
        wall_s=2.0,
        cpu_s=1.0,
        device="cpu",
        torch_version="2.13",
    )
    library.claim_kernel("worker", 60, device="cpu", torch_version="2.13")
    for end in (
        lambda: client.release_blueprint(blueprint_id, "worker"),
        lambda: client.finish_compilation(compilation),
        lambda: client.release_kernel(artifact_id, "worker"),
    ):
        library.claim_blueprint("worker", 60)
        proxy.faults.append(fault)
        with pytest.raises(LibraryError, match=r"^POST http"):
            end()
        with pytest.raises(LeaseError, match=r"is leased to nobody, not to worker$"):
            end()


def test_what_may_not_be_repeated_is_not_sent_on_a_connection_that_may_end(
    library: Urza, proxy_and_client: tuple[Proxy, UrzaClient]
) -> None:
    proxy, client = proxy_and_client
    blueprint_id = submit(library)
    proxy.hangs_up = True
    for _ in range(3):
        assert client.claim_blueprint("worker", 60) == blueprint_id
        client.release_blueprint(blueprint_id, "worker")


def test_an_event_is_rather_told_twice_than_not_at_all(
    library: Urza, proxy_and_client: tuple[Proxy, UrzaClient]
) -> None:
    proxy, client = proxy_and_client
    proxy.faults.append(lost)
    client.record_lifecycle(EVENT)
    assert audited(library) == ["seed.lifecycle"] * 2


def test_a_server_that_stays_away_is_named() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with (
        UrzaClient(url, patience_s=0.2) as client,
        pytest.raises(LibraryError, match=f"^GET {url}/api/v1/kernels: .*onnect"),
    ):
        client.kernels()


def test_a_refusal_is_not_asked_again(proxy_and_client: tuple[Proxy, UrzaClient]) -> None:
    proxy, client = proxy_and_client
    with pytest.raises(ConflictError):
        client.set_blueprint_status(submit(client), BlueprintStatus.COMPILED)
    assert len(proxy.requests) == 2


# ------------------------------------------------------------------ servers that come and go


@pytest.mark.timeout(180)
def test_a_server_that_is_killed_and_comes_back_loses_nothing(tmp_path: Path) -> None:
    port = free_port()
    published: list[str] = []
    enough = threading.Semaphore(0)

    def work(writer: int) -> None:
        with UrzaClient(f"http://127.0.0.1:{port}", patience_s=60) as client:
            for number in range(12):
                published.append(publish(client, f"design{writer}.{number}"))
                client.record_lifecycle(EVENT)
                enough.release()

    with ThreadPoolExecutor(3) as pool:
        for sign in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM):
            with stopped(start_server(tmp_path / "library", port), sign) as server:
                if not published:
                    writers = [pool.submit(work, writer) for writer in range(3)]
                for _ in range(8):
                    assert enough.acquire(timeout=START_TIMEOUT_S)
                if sign is signal.SIGTERM:
                    for writer in writers:
                        writer.result()
            server.stdout.close()
    assert server.returncode == 0
    with Urza(tmp_path / "library") as library:
        library.verify()
        assert {record.artifact_id for record in library.kernels()} == set(published)
        assert audited(library).count("seed.lifecycle") >= 36


def test_a_client_that_was_closed_says_so(url: str) -> None:
    client = UrzaClient(url)
    client.close()
    client.close()
    with pytest.raises(LibraryError, match=r"^the library's client was closed$"):
        client.kernels()


def test_closing_ends_what_others_are_asking() -> None:
    """The server takes the connection, and never answers."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        UrzaClient(f"http://127.0.0.1:{listener.getsockname()[1]}") as client,
        ThreadPoolExecutor(1) as pool,
    ):
        asking = pool.submit(client.kernels)
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(3) == b"GET"
            client.close()
        with pytest.raises(LibraryError, match=r"^the library's client was closed$"):
            asking.result(START_TIMEOUT_S)


# ------------------------------------------------------------------ where it is, and whom it trusts


@pytest.mark.parametrize("url", ["", "ftp://host", "http://", "/folder", "localhost:8420"])
def test_a_url_of_another_kind_is_refused(url: str) -> None:
    with pytest.raises(
        ValueError, match=r"^a library's server has an http:// or https:// URL, got"
    ):
        UrzaClient(url)


def test_connect_opens_what_is_named_and_else_what_the_environment_names(
    library: Urza, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(library)
    monkeypatch.setenv("URZA_API_URL", url)
    for remote in (connect(), connect(url)):
        assert isinstance(remote, UrzaClient)
        assert remote.blueprints() == library.blueprints()
        remote.close()
    for local in (connect(tmp_path / "other"), connect(str(tmp_path / "other"))):
        assert isinstance(local, Urza)
        assert local.blueprints() == []
        local.close()
    monkeypatch.setenv("URZA_API_URL", "nowhere")
    with pytest.raises(ValueError, match=r"URL, got 'nowhere'$"):
        connect()
    monkeypatch.delenv("URZA_API_URL")
    with pytest.raises(ValueError, match=r"^a library without a folder needs URZA_URL$"):
        connect()


def test_a_server_that_is_not_there_is_said_at_once_without_its_secrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(esper.urza.connection, "_PATIENCE_S", 0.1)
    port = free_port()
    monkeypatch.setenv("URZA_API_URL", f"http://user:secret@127.0.0.1:{port}/lib")
    monkeypatch.setenv("URZA_API_TOKEN", "hidden")
    threads = threading.active_count()
    model = esper.wrap(nn.Linear(4, 4))
    with pytest.raises(LibraryError) as raised:
        esper.Pipeline(model)
    said = str(raised.value)
    server = f"http://user:***@127.0.0.1:{port}/lib"
    assert said.startswith(f"the library's server at {server} cannot be used: GET {server}/api")
    assert "secret" not in said
    assert "hidden" not in said
    assert threading.active_count() == threads


def test_a_server_that_is_silent_is_not_waited_for_longer_than_one_that_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(esper.urza.connection, "_PATIENCE_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        said = f"^the library's server at {url} cannot be used: GET .*: ReadTimeout$"
        hang_up = threading.Timer(30.0, server.close)
        hang_up.start()
        with pytest.raises(LibraryError, match=said):
            connect(url)
        hang_up.cancel()


def test_a_token_that_is_not_taken_is_said_at_once(
    library: Urza, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    add_token(tmp_path / "tokens", frozenset({Role.RESEARCHER}))
    monkeypatch.setenv("URZA_API_TOKEN", "hidden")
    with (
        served(create_app(library, load_tokens(tmp_path / "tokens"))) as url,
        pytest.raises(
            TokenError, match=f"^the library's server at {url} cannot be used: the token"
        ),
    ):
        connect(url)


def test_a_trainer_needs_the_public_key_alone(
    library: Urza, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact_id = publish(library)
    judge(library, artifact_id)
    public = tmp_path / "evaluator.pub"
    public.write_bytes(library.evaluator_key.trusted().pem())
    with UrzaClient(url, trusted_key=public) as client:
        verify_bundle(client.fetch_kernel(artifact_id), client.trusted_key)
        with pytest.raises(LibraryError, match=r"^signing a verdict needs URZA_KEY"):
            _ = client.evaluator_key
    monkeypatch.setenv("URZA_TRUSTED_KEY", str(public))
    with UrzaClient(url) as client:
        assert client.trusted_key == library.trusted_key


def test_a_client_does_not_ask_the_server_whom_to_trust(library: Urza, url: str) -> None:
    judge(library, publish(library))
    with UrzaClient(url) as client, pytest.raises(LibraryError, match=r"^no evaluator is trusted"):
        _ = client.trusted_key


def test_an_evaluator_signs_on_its_own_machine(tmp_path: Path) -> None:
    """The server has the public half alone, and there is no private key but the evaluator's."""
    key_path = tmp_path / "evaluator" / "key.pem"
    trusted = EvaluatorKey.load_or_create(key_path).trusted()
    with (
        Urza(tmp_path / "library", trusted_key=trusted) as library,
        served(create_app(library, Tokens([]))) as url,
        UrzaClient(url, key_path=key_path) as evaluator,
        UrzaClient(url, key_path=tmp_path / "foreign.pem") as foreign,
    ):
        artifact_id = publish(evaluator)
        with pytest.raises(ArtifactIntegrityError, match=r"does not hold for the trusted key"):
            judge(foreign, artifact_id)
        judge(evaluator, artifact_id)
        verify_bundle(evaluator.fetch_kernel(artifact_id), trusted)
        library.verify()
    assert not (tmp_path / "library/keys").exists()


# ------------------------------------------------------------------ the commands


def test_the_commands_make_what_serving_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def esper(*words: str) -> str:
        command = [sys.executable, "-m", "esper", "urza", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    tokens = tmp_path / "tokens"
    token = esper("token", str(tokens), "researcher", "forge").strip()
    public = tmp_path / "evaluator.pub"
    public.write_text(esper("key", str(tmp_path / "evaluator.pem")))
    port = free_port()
    options = ("--host", "0.0.0.0", "--tokens", str(tokens), "--trusted-key", str(public))
    with stopped(start_server(tmp_path / "library", port, *options), signal.SIGTERM) as server:
        url = f"http://127.0.0.1:{port}"
        assert httpx.get(f"{url}/api/v1/kernels").status_code == 401
        with UrzaClient(url, token=token, trusted_key=public) as client:
            publish(client)
        server.stdout.close()
    assert server.returncode == 0


@pytest.mark.parametrize(
    ("words", "because"),
    [
        (["serve", "library", "--host", "0.0.0.0"], "0.0.0.0 can be reached from other machines"),
        (["serve", "library", "--tokens", "none"], "tokens none: No such file"),
        (
            ["serve", "library", "--certificate", "none"],
            "[Errno 2] No such file or directory: 'none'",
        ),
        (["serve"], "a library without a folder needs URZA_URL"),
        (["key"], "signing a verdict needs URZA_KEY"),
    ],
)
def test_the_commands_name_what_is_wrong(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    because: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    port = ["--port", "0"] if words[0] == "serve" else []
    assert refusal(["urza", *words, *port], capsys).startswith(f"esper urza: {because}")
    assert list(tmp_path.iterdir()) == []
