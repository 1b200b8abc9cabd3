"""Tokens and roles: who is let in to what, and what is never told."""

import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
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
)
from urza_servers import served

from esper.contracts import (
    BlueprintStatus,
    Compilation,
    KernelQuery,
    LifecycleEvent,
    Pipeline,
    SeedState,
    Topic,
)
from esper.errors import LibraryError, RoleError, TokenError
from esper.oona import MemoryBus
from esper.urza import Library, Urza
from esper.urza.access import Role, Tokens, add_token, load_tokens
from esper.urza.client import UrzaClient
from esper.urza.server import create_app, listen

RESEARCHER, FORGE, EVALUATOR, OPERATOR = Role
EVENT = LifecycleEvent(
    seed_id=("blocks.2.mlp", 1),
    source=SeedState.DORMANT,
    target=SeedState.GERMINATED,
    epoch=0,
    step=0,
)


@pytest.fixture
def tokens_file(tmp_path: Path) -> Path:
    return tmp_path / "tokens.txt"


@pytest.fixture
def as_role(tmp_path: Path, tokens_file: Path) -> Iterator[Callable[[Role], Library]]:
    """Return the client that has the role, of a server that knows one token for each."""
    shown = {role: add_token(tokens_file, frozenset({role})) for role in Role}
    with ExitStack() as stack:
        library = stack.enter_context(Urza(tmp_path / "library"))
        judge(library, publish(library))
        tokens = load_tokens(tokens_file)
        url = stack.enter_context(served(create_app(library, tokens), tokens))
        key_path = tmp_path / "library/keys/evaluator.pem"
        clients = {
            role: stack.enter_context(closing(UrzaClient(url, token=token, key_path=key_path)))
            for role, token in shown.items()
        }
        yield clients.__getitem__


BLUEPRINT_ID, ARTIFACT_ID = blueprint().blueprint_id, manifest().artifact_id
HERE = {"device": "cpu", "torch_version": "2.13"}
COMPILATION = Compilation(
    blueprint_id=BLUEPRINT_ID,
    pipeline=Pipeline.FAST,
    owner="forge",
    artifact_id=ARTIFACT_ID,
    wall_s=2.0,
    cpu_s=1.0,
    **HERE,
)


def record_report(urza: Library) -> None:
    verdict = report(ARTIFACT_ID)
    said = statement(verdict)
    urza.record_report(verdict, said, urza.evaluator_key.sign(said))


ASKED = [
    (lambda urza: urza.submit_blueprint(blueprint(), graph("low_rank")), {RESEARCHER, FORGE}),
    (lambda urza: urza.set_interest(BLUEPRINT_ID, "tamiyo", 1.0), {RESEARCHER}),
    (lambda urza: urza.set_interest(BLUEPRINT_ID, "urabrask", 1.0), {EVALUATOR}),
    (lambda urza: urza.claim_blueprint("forge", 60, blueprint_id=BLUEPRINT_ID), {FORGE}),
    (
        lambda urza: urza.set_blueprint_status(BLUEPRINT_ID, BlueprintStatus.COMPILING),
        {FORGE},
    ),
    (lambda urza: urza.publish_kernel(manifest(), kernel_files()), {FORGE}),
    (lambda urza: urza.claim_kernel("evaluator", 60, **HERE), {EVALUATOR}),
    (record_report, {EVALUATOR}),
    (lambda urza: urza.record_field_report(field_report(ARTIFACT_ID)), {RESEARCHER}),
    (lambda urza: urza.record_lifecycle(EVENT), {RESEARCHER}),
    (lambda urza: urza.archive(ARTIFACT_ID), set()),
    (lambda urza: urza.audit.verify(), set()),
    (lambda urza: urza.verify(), set()),
    (lambda urza: urza.fetch_kernel(ARTIFACT_ID), set(Role)),
    (lambda urza: urza.report(ARTIFACT_ID), set(Role)),
    (lambda urza: urza.blueprint_records(), set(Role)),
    (lambda urza: urza.graph(BLUEPRINT_ID), set(Role)),
    (lambda urza: urza.kernels(), set(Role)),
    (lambda urza: urza.forge_status(), set(Role)),
    (lambda urza: urza.was_tried(BLUEPRINT_ID, Pipeline.FAST, **HERE), set(Role)),
    (lambda urza: urza.recompilation_prospects(**HERE, pipelines=[Pipeline.FAST]), set(Role)),
    (lambda urza: urza.lineage(), set(Role)),
    (lambda urza: urza.field_reports(), set(Role)),
    (lambda urza: urza.audit.head(), set(Role)),
    (lambda urza: urza.audit.entries(), set(Role)),
    (
        lambda urza: urza.query(KernelQuery(site=manifest().site, dtype="float32", device="cpu")),
        set(Role),
    ),
]


@pytest.mark.parametrize(("ask", "roles"), ASKED)
def test_a_role_may_do_what_it_is_for(
    as_role: Callable[[Role], Library], ask: Callable[[Library], object], roles: set[Role]
) -> None:
    for role in set(Role) - roles - {OPERATOR}:
        with pytest.raises(RoleError, match=rf"^this takes the role .*, the token has {role}$"):
            ask(as_role(role))
    ask(as_role(min(roles, default=OPERATOR)))


def test_an_operator_may_do_everything(as_role: Callable[[Role], Library]) -> None:
    operator = as_role(OPERATOR)
    operator.record_lifecycle(EVENT)
    operator.publish_kernel(manifest(), kernel_files())
    record_report(operator)


def test_leases_are_for_forges(as_role: Callable[[Role], Library]) -> None:
    forge = as_role(FORGE)
    assert forge.claim_blueprint("forge", 60) == BLUEPRINT_ID
    for ask in (
        lambda urza: urza.renew_lease(BLUEPRINT_ID, "forge", 60),
        lambda urza: urza.release_blueprint(BLUEPRINT_ID, "forge"),
        lambda urza: urza.claim_blueprint("forge", 60),
        lambda urza: urza.finish_compilation(COMPILATION),
    ):
        with pytest.raises(RoleError, match=r"^this takes the role forge"):
            ask(as_role(EVALUATOR))
        ask(forge)


def test_leases_of_kernels_are_for_evaluators(as_role: Callable[[Role], Library]) -> None:
    evaluator = as_role(EVALUATOR)
    artifact_id = as_role(OPERATOR).publish_kernel(
        manifest(pipeline=Pipeline.STANDARD), kernel_files()
    )
    assert evaluator.claim_kernel("evaluator", 60, **HERE) == artifact_id
    for ask in (
        lambda urza: urza.renew_kernel_lease(artifact_id, "evaluator", 60),
        lambda urza: urza.release_kernel(artifact_id, "evaluator"),
    ):
        with pytest.raises(RoleError, match=r"^this takes the role evaluator"):
            ask(as_role(FORGE))
        ask(evaluator)


@pytest.mark.parametrize(
    ("authorization", "because"),
    [
        (None, "this library asks for a token: Authorization: Bearer ..."),
        ("", "this library asks for a token: Authorization: Bearer ..."),
        ("Bearer", "this library asks for a token: Authorization: Bearer ..."),
        ("Basic dXNlcjpwYXNz", "this library asks for a token: Authorization: Bearer ..."),
        ("Bearer guessed", "the token is not known here"),
    ],
)
@pytest.mark.parametrize("path", ["/api/v1/kernels", "/metrics", "/nothing/here", "//docs"])
def test_without_a_known_token_nothing_is_told(
    tmp_path: Path, tokens_file: Path, path: str, authorization: str | None, because: str
) -> None:
    add_token(tokens_file, frozenset({RESEARCHER}))
    tokens = load_tokens(tokens_file)
    headers = {} if authorization is None else {"Authorization": authorization}
    with (
        Urza(tmp_path / "library") as library,
        served(create_app(library, tokens), tokens) as url,
    ):
        answer = httpx.get(url + path, headers=headers)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert answer.json() == {"error": "TokenError", "message": because}


def test_an_unknown_token_is_refused_before_the_body_is_read(
    tmp_path: Path, tokens_file: Path
) -> None:
    add_token(tokens_file, frozenset({OPERATOR}))
    tokens = load_tokens(tokens_file)
    head = b"POST /internal/v1/kernels HTTP/1.1\r\nHost: urza\r\nContent-Length: 1000\r\n\r\n"
    with (
        Urza(tmp_path / "library") as library,
        served(create_app(library, tokens), tokens) as url,
        socket.create_connection((urlsplit(url).hostname, urlsplit(url).port)) as client,
    ):
        client.sendall(head)  # and nothing after it
        assert client.recv(12) == b"HTTP/1.1 401"


def test_a_client_without_a_token_raises_what_the_server_says(
    tmp_path: Path, tokens_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = add_token(tokens_file, frozenset({RESEARCHER, FORGE}))
    tokens = load_tokens(tokens_file)
    with (
        Urza(tmp_path / "library") as library,
        served(create_app(library, tokens), tokens) as url,
    ):
        with UrzaClient(url) as client, pytest.raises(TokenError, match=r"^this library asks for"):
            client.kernels()
        monkeypatch.setenv("URZA_API_TOKEN", token)
        with UrzaClient(url) as client:
            assert client.kernels() == []
            client.record_lifecycle(EVENT)
            client.claim_blueprint("forge", 60)


def test_the_file_holds_no_token_and_is_its_owner_s(tokens_file: Path) -> None:
    token = add_token(tokens_file, frozenset({RESEARCHER, FORGE}))
    other = add_token(tokens_file, frozenset({OPERATOR}))
    assert stat.S_IMODE(tokens_file.stat().st_mode) == 0o600
    assert token not in tokens_file.read_text()
    tokens = load_tokens(tokens_file)
    assert tokens.roles(f"Bearer {token}") == {RESEARCHER, FORGE}
    assert tokens.roles(f"bearer {other}") == {OPERATOR}
    with pytest.raises(TokenError, match=r"^the token is not known here$"):
        tokens.roles(f"Bearer {token[:-1]}")


def test_the_environment_has_tokens_as_well(
    tokens_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = add_token(tokens_file, frozenset({EVALUATOR}))
    monkeypatch.setenv("URZA_TOKENS", f"# the evaluator's\n{tokens_file.read_text()}")
    assert load_tokens(None).roles(f"Bearer {token}") == {EVALUATOR}


def test_a_file_that_others_may_read_is_refused(tokens_file: Path) -> None:
    add_token(tokens_file, frozenset({OPERATOR}))
    tokens_file.chmod(0o640)
    with pytest.raises(
        LibraryError, match=r"others than its owner may use it, mode 0640; expected 0600$"
    ):
        load_tokens(tokens_file)
    with pytest.raises(LibraryError, match=r"none: No such file or directory$"):
        load_tokens(tokens_file.with_name("none"))


@pytest.mark.parametrize("line", ["operator my-secret", "sha256:" + UNKNOWN, "operator sha256:ab"])
def test_a_line_that_cannot_be_read_is_refused_without_showing_it(line: str) -> None:
    with pytest.raises(
        ValueError, match=r"^tokens, line 2: expected 'role,role sha256:<64 digits>'$"
    ):
        Tokens(["", line])
    with pytest.raises(ValueError, match=r"^'king' is not a valid Role$"):
        Tokens([f"king sha256:{UNKNOWN}"])
    with pytest.raises(ValueError, match=r"^a token needs a role$"):
        add_token(Path("unused"), frozenset())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
def test_off_loopback_tokens_are_needed(host: str) -> None:
    with pytest.raises(LibraryError, match=f"^{host} can be reached from other machines: serving"):
        listen(host, 0, Tokens([]))


def test_with_tokens_every_address_may_be_served() -> None:
    tokens = Tokens([f"operator sha256:{UNKNOWN}"])
    with listen("0.0.0.0", 0, tokens) as listener, pytest.raises(LibraryError, match="in use"):
        listen("0.0.0.0", listener.getsockname()[1], tokens)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8420", "", "127.0.0.1.evil.example", "["]
)
def test_a_web_page_s_own_name_for_this_machine_is_refused(tmp_path: Path, host: str) -> None:
    with Urza(tmp_path) as library, served(create_app(library, Tokens([]))) as url:
        answer = httpx.get(f"{url}/api/v1/kernels", headers={"Host": host})
        assert answer.status_code == 403
        assert answer.json()["error"] == "RoleError"
        for own in ("localhost", "localhost:1", "127.0.0.1", "[::1]:8420"):
            assert httpx.get(f"{url}/api/v1/kernels", headers={"Host": own}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1.evil.example"]
)
def test_a_page_of_elsewhere_cannot_have_the_browser_pause_a_run(
    tmp_path: Path, origin: str
) -> None:
    bus = MemoryBus()
    app = create_app(Urza(tmp_path), Tokens([]), buses={"run-7": bus})
    with closing(bus), served(app) as url, controller(bus):
        pause = f"{url}/api/v1/runs/run-7/controller/pause"
        answer = httpx.post(pause, headers={"Origin": origin})
        assert (answer.status_code, answer.json()["error"]) == (403, "RoleError")
        assert bus.stats()[Topic.TAMIYO_REQUESTS].published == 0
        own = httpx.post(pause, headers={"Origin": url})
        assert (own.status_code, own.json()["paused"]) == (200, True)
