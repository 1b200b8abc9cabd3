"""The routes by which the controllers of runs are asked; each sends one request over a run's bus."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Response
from pydantic import TypeAdapter
from starlette.exceptions import HTTPException

from esper.contracts import RequestKind, TamiyoStatus
from esper.errors import BusError
from esper.oona import Oona
from esper.oona.inquiry import Inquiry
from esper.urza.access import Role
from esper.urza.failures import Failure
from esper.urza.routes import API, allowed, as_json, make_router

ANSWER_TIMEOUT_S = 5.0
_NO_ANSWER: dict[int | str, dict[str, Any]] = {504: {"model": Failure}}
_Run = Annotated[str, Path(max_length=255, description="the namespace of its bus")]
_NAMES = TypeAdapter(list[str])


def run_routes(buses: Mapping[str, Oona], *, by_token: bool) -> APIRouter:
    """Return the routes for the runs that ``buses`` names."""
    router = make_router(by_token=by_token)
    controllers = {run: Inquiry(bus, "http") for run, bus in buses.items()}
    path = f"{API}/runs/{{run:path}}/controller"

    @router.get(f"{API}/runs", response_model=list[str])
    def list_runs() -> Response:
        """Names of the runs whose controllers can be asked."""
        return Response(_NAMES.dump_json(sorted(buses)), media_type="application/json")

    @router.get(path, response_model=TamiyoStatus, responses=_NO_ANSWER)
    async def get_controller(run: _Run) -> Response:
        """What a run's controller is about."""
        return await ask(run, RequestKind.STATUS)

    @router.post(
        f"{path}/{{action}}",
        response_model=TamiyoStatus,
        responses=_NO_ANSWER,
        dependencies=allowed(Role.OPERATOR),
    )
    async def command_controller(run: _Run, action: Literal["pause", "resume"]) -> Response:
        """Have it begin nothing new, though bring to its end what is under way; or undo that."""
        return await ask(run, RequestKind(action.upper()))

    async def ask(run: str, kind: RequestKind) -> Response:
        if run not in controllers:
            known = ", ".join(sorted(controllers)) or "none"
            raise HTTPException(404, f"no run {run!r} can be asked here; those that can: {known}")
        try:
            return as_json(await controllers[run].ask(kind, ANSWER_TIMEOUT_S))
        except BusError as error:
            raise HTTPException(503, f"run {run!r}: {error}") from error
        except TimeoutError as error:
            raise HTTPException(504, f"run {run!r}: {error}") from error

    return router
