"""The controllers of runs over HTTP: asked, paused, unknown, silent, and by whom."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import pytest
from command_line import refusal
from redis_servers import MakeBus, RedisServer
from tamiyo_samples import controller
from urza_servers import served

from esper.contracts import RequestKind, TamiyoRequest, Topic
from esper.oona import MemoryBus, Oona
from esper.oona.inquiry import Inquiry
from esper.oona.redis import RedisBus
from esper.urza import Urza, run_routes
from esper.urza.access import Role, Tokens, add_token, load_tokens
from esper.urza.server import create_app

CONTROLLER = "/api/v1/runs/run-7/controller"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def serve(stack: ExitStack, tmp_path: Path, bus: Oona, tokens: Tokens | None = None) -> str:
    """Return the URL of a server that knows one run."""
    library = stack.enter_context(Urza(tmp_path / "library"))
    tokens = tokens or Tokens([])
    return stack.enter_context(served(create_app(library, tokens, buses={"run-7": bus}), tokens))


@pytest.fixture
def http(stack: ExitStack, tmp_path: Path, make_bus: MakeBus) -> httpx.Client:
    bus = make_bus()
    stack.enter_context(controller(bus))
    return stack.enter_context(httpx.Client(base_url=serve(stack, tmp_path, bus)))


def test_a_controller_is_paused_and_goes_on(http: httpx.Client) -> None:
    assert http.get("/api/v1/runs").json() == ["run-7"]
    status = http.get(CONTROLLER).json()
    assert (status["paused"], status["policy"]) == (False, "PlateauPolicy")
    assert http.post(f"{CONTROLLER}/pause").json()["paused"] is True
    assert http.get(CONTROLLER).json()["paused"] is True
    assert http.post(f"{CONTROLLER}/resume").json()["paused"] is False


def test_an_unknown_run_is_not_there(http: httpx.Client) -> None:
    for answer in (
        http.get("/api/v1/runs/run-8/controller"),
        http.post("/api/v1/runs/run-8/controller/pause"),
    ):
        assert answer.status_code == 404
        assert answer.json()["message"] == (
            "no run 'run-8' can be asked here; those that can: run-7"
        )


def test_a_namespace_with_slashes_is_a_run_s_name_too(stack: ExitStack, tmp_path: Path) -> None:
    bus = MemoryBus()
    stack.enter_context(controller(bus))
    library = stack.enter_context(Urza(tmp_path / "library"))
    url = stack.enter_context(served(create_app(library, Tokens([]), buses={"team/run-7": bus})))
    for run in ("team/run-7", "team%2Frun-7"):
        asked = f"{url}/api/v1/runs/{run}/controller"
        assert httpx.get(asked).json()["paused"] is False
        assert httpx.post(f"{asked}/pause").json()["paused"] is True
        assert httpx.post(f"{asked}/resume").json()["paused"] is False


def test_another_action_is_refused(http: httpx.Client) -> None:
    answer = http.post(f"{CONTROLLER}/stop")
    assert (answer.status_code, answer.json()["error"]) == (422, "ValueError")
    assert "'pause' or 'resume'" in answer.json()["message"]


def test_a_controller_that_is_not_there_is_told_of_and_obeys_later(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_routes, "ANSWER_TIMEOUT_S", 0.05)
    bus = MemoryBus()
    url = serve(stack, tmp_path, bus)
    answer = httpx.post(f"{url}{CONTROLLER}/pause")
    assert answer.status_code == 504
    assert answer.json()["message"] == "run 'run-7': no controller has answered in 0.05 s"
    monkeypatch.undo()
    stack.enter_context(controller(bus))
    assert httpx.get(f"{url}{CONTROLLER}").json()["paused"] is True


def test_a_bus_that_is_closed_is_told_of(stack: ExitStack, tmp_path: Path) -> None:
    bus = MemoryBus()
    url = serve(stack, tmp_path, bus)
    bus.close()
    answer = httpx.get(f"{url}{CONTROLLER}")
    assert answer.status_code == 503
    assert answer.json()["message"] == "run 'run-7': the bus is closed"


def test_an_application_may_be_served_again(stack: ExitStack, tmp_path: Path) -> None:
    """By another event loop, after the first has ended with all of its tasks."""
    bus = MemoryBus()
    stack.enter_context(controller(bus))
    library = stack.enter_context(Urza(tmp_path / "library"))
    app = create_app(library, Tokens([]), buses={"run-7": bus})
    for _ in range(2):
        with served(app) as url:
            assert httpx.get(f"{url}{CONTROLLER}").status_code == 200


async def test_a_server_that_nobody_has_asked_keeps_nobody_waiting(tmp_path: Path) -> None:
    """Others read the answers to what they have asked; the trainer waits until all is read."""
    with closing(MemoryBus()) as bus, Urza(tmp_path) as library:
        create_app(library, Tokens([]), buses={"run-7": bus})
        with controller(bus):
            await Inquiry(bus, "cli").ask(RequestKind.STATUS, 5.0)
            async with asyncio.timeout(5.0):
                await bus.drained()


def test_a_bus_that_is_full_is_told_of(stack: ExitStack, tmp_path: Path) -> None:
    bus = MemoryBus(capacity=1)
    bus.subscribe(Topic.TAMIYO_REQUESTS, "tamiyo")
    url = serve(stack, tmp_path, bus)
    bus.publish(Topic.TAMIYO_REQUESTS, "cli", TamiyoRequest(kind=RequestKind.STATUS))
    answer = httpx.get(f"{url}{CONTROLLER}")
    assert answer.status_code == 503
    assert answer.json()["message"].startswith("run 'run-7': group 'tamiyo' has 1 unread messages")


def test_all_may_ask_and_operators_may_pause(stack: ExitStack, tmp_path: Path) -> None:
    shown = {role: add_token(tmp_path / "tokens", frozenset({role})) for role in Role}
    tokens = load_tokens(tmp_path / "tokens")
    bus = MemoryBus()
    stack.enter_context(controller(bus))
    url = serve(stack, tmp_path, bus, tokens)
    for role, token in shown.items():
        client = stack.enter_context(
            httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"})
        )
        assert client.get(CONTROLLER).status_code == 200
        answer = client.post(f"{CONTROLLER}/pause")
        if role is Role.OPERATOR:
            assert answer.json()["paused"] is True
        else:
            assert (answer.status_code, answer.json()["error"]) == (403, "RoleError")
            assert client.get(CONTROLLER).json()["paused"] is False
    assert httpx.get(f"{url}{CONTROLLER}").status_code == 401


@pytest.mark.redis
def test_asking_often_leaves_one_group_behind(
    stack: ExitStack, tmp_path: Path, redis_server: RedisServer
) -> None:
    runs, server = RedisBus(redis_server.url("run-7")), RedisBus(redis_server.url("run-7"))
    stack.callback(server.close)
    stack.enter_context(controller(runs))
    url = serve(stack, tmp_path, server)
    for _ in range(5):
        assert httpx.get(f"{url}{CONTROLLER}").status_code == 200
    with redis_server.client() as client:
        [group] = client.xinfo_groups(f"{{run-7}}:stream:{Topic.TAMIYO_STATUS}")
    assert group["name"].startswith(b"http-")


@pytest.mark.parametrize(
    ("words", "because"),
    [
        (["--bus", "http://x"], "the bus is at redis://"),
        (["--bus", "unix:///x"], "cannot reach Redis at unix:/x"),
    ],
)
def test_a_bus_that_cannot_be_had_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], because: str
) -> None:
    command = ["urza", "serve", str(tmp_path / "library"), "--port", "0", *words]
    assert refusal(command, capsys).startswith(f"esper urza: {because}")


@pytest.mark.redis
def test_two_runs_need_two_namespaces(
    tmp_path: Path, shared_redis_server: RedisServer, capsys: pytest.CaptureFixture[str]
) -> None:
    url = shared_redis_server.url("run-7")
    command = ["urza", "serve", str(tmp_path / "library"), "--port", "0", "--bus", url]
    said = refusal([*command, "--bus", url], capsys)
    assert said.startswith("esper urza: two buses of the namespace 'run-7'")
