"""A server, a forge, an evaluator and a trainer, each a process of its own with a token of its own."""

import signal
from contextlib import ExitStack
from pathlib import Path

import pytest
from redis_servers import RedisServer
from test_forge_service import DEADLINE_S, forge, wait_for
from test_pipeline import EAGER, QUICK, fit, one_design
from torch import nn
from urza_backends import free_port, stopped
from urza_servers import start_server

import esper
from esper.config import SeedSettings
from esper.contracts import BlueprintStatus, KernelStatus
from esper.pipeline import Pipeline
from esper.tamiyo import PlateauPolicy
from esper.urza import EvaluatorKey, Urza
from esper.urza.access import Role, add_token

# With a bus nobody looks again by himself while the test lasts: then it must have told them.
POLLING, TOLD = ("--poll-s", "0.2"), ("--poll-s", "3600")


@pytest.fixture(params=["polling", pytest.param("redis", marks=pytest.mark.redis)])
def redis_url(request: pytest.FixtureRequest) -> str | None:
    if request.param == "polling":
        return None
    server: RedisServer = request.getfixturevalue("redis_server")
    return server.url()


@pytest.mark.timeout(400)
def test_a_seed_grows_though_nothing_is_compiled_beside_the_training(
    redis_url: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, key_path, public = (tmp_path / name for name in ("tokens", "key.pem", "key.pub"))
    token = {role: add_token(tokens, frozenset({role})) for role in Role}
    public.write_bytes(EvaluatorKey.load_or_create(key_path).trusted().pem())
    port = free_port()
    environment = {"URZA_API_URL": f"http://127.0.0.1:{port}", "XDG_STATE_HOME": str(tmp_path)}
    options = POLLING
    if redis_url is not None:
        environment["REDIS_URL"], options = redis_url, TOLD

    with ExitStack() as stack:
        server = stack.enter_context(
            stopped(
                start_server(
                    *(tmp_path / "library", port, "--tokens", str(tokens)),
                    *("--trusted-key", str(public)),
                ),
                signal.SIGTERM,
            )
        )
        workers = [
            stack.enter_context(forge(environment | own, *options, *counts))
            for own, *counts in (
                ({"URZA_API_TOKEN": token[Role.FORGE]}, "--urabrask", "0"),
                (
                    {"URZA_API_TOKEN": token[Role.EVALUATOR], "URZA_KEY": str(key_path)},
                    *("--tezzeret", "0"),
                ),
            )
        ]
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("URZA_API_TOKEN", token[Role.RESEARCHER])
        monkeypatch.setenv("URZA_TRUSTED_KEY", str(public))
        train()
        for worker in workers:
            worker.send_signal(signal.SIGTERM)
        for worker in workers:
            _, log = worker.communicate(timeout=DEADLINE_S)
            assert worker.returncode == 0, log
            assert "Traceback" not in log
            assert "WARNING" not in log, log
            assert "HTTP Request" not in log
        server.stdout.close()

    with Urza(tmp_path / "library", trusted_key=public) as library:
        library.verify()
        assert len(library.blueprints(BlueprintStatus.COMPILED)) == 1
        events = [entry.event for entry in library.audit.entries()]
    assert events.count("kernel.published") == events.count("kernel.reported") == 1
    assert {"seed.lifecycle", "adaptation.reported"} <= set(events)


def train() -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    settings = SeedSettings(seeds_per_layer=1, observe_every=2, deterministic=True)
    model = esper.wrap(net, ["0"], settings=settings)
    pipeline = Pipeline(
        model,
        designs=one_design,
        policy=PlateauPolicy(EAGER, QUICK),
        synchronous=True,
        local_workers=False,
    )
    with pipeline:
        fit(model, pipeline, 2)
        wait_for(lambda: len(pipeline.urza.kernels(KernelStatus.VALIDATED)) == 1)
        fit(model, pipeline, 8)
        assert pipeline.urza.field_reports()
