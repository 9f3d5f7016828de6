"""The HTTP interface: OpenAI's images API, what only this model can do, the page, and what operators ask.

    POST /v1/images/generations   a prompt's pictures
    POST /v1/images/edits         pictures that start from a picture
    POST /v1/images/upscales      a low picture, finished at a higher resolution
    GET  /v1/images/files/NAME    a picture that was asked for as a URL
    GET  /v1/models, /v1/models/NAME
    GET  /healthz, /readyz, /metrics, /openapi.json, /docs, /

Errors have OpenAI's form. A stream begins when the pictures are accepted; until then errors are statuses of HTTP, later events.
Paints through a `Painter`, and knows no Ray. Called by `ingress` on a cluster, and by whoever serves from one process.
"""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException as StarletteHTTPException

from pipelines.sections import ServeConfig
from pipelines.serving.batch import Batch, Gone
from pipelines.serving.clients import Keys
from pipelines.serving.description import DESCRIPTION, OTHERS, PICTURES, REFUSALS
from pipelines.serving.guard import Guard, Refused, error_body, retry_after
from pipelines.serving.meters import MEDIA_TYPE, Meters
from pipelines.serving.orders import (
    BadOrder,
    Busy,
    ModelFacts,
    Order,
    Painter,
    Picture,
    Preview,
    TooLate,
    Unavailable,
)
from pipelines.serving.shelf import Shelf
from pipelines.serving.wire import (
    MEDIA_TYPES,
    EditWanted,
    Wanted,
    common_answer,
    event_answer,
    facts_answer,
    first_mistake,
    orders_of,
    picture_file,
    random_seed,
    size_text,
)

W = TypeVar("W", bound=Wanted)
PAGE = Path(__file__).parent / "page"
IDLE_SECONDS = 10.0
"""Of silence in a stream, after which a comment says that we are still here: proxies cut what is silent."""

CLIENT_GONE = 499
"""For the log; nobody reads the answer."""


def create_app(painter: Painter, settings: ServeConfig, keys: Keys) -> FastAPI:
    """The interface.

    Args:
        painter: Paints what is ordered.
        settings: Limits, and who may call from other sites.
        keys: Of those who may draw, see `clients.load_keys`.
    """
    app = FastAPI(title="Layered diffusion", description=DESCRIPTION, docs_url=None, redoc_url=None)
    meters = Meters()
    Desk(painter, settings, meters).add_to(app)
    _add_operations(app, painter, meters)
    _add_page(app)
    _add_errors(app)
    app.add_middleware(Guard, settings=settings, keys=keys, meters=meters)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["retry-after", "x-request-id"],
        )
    return app


class Desk:
    """Where requests become orders, and what was painted is handed out."""

    def __init__(self, painter: Painter, settings: ServeConfig, meters: Meters) -> None:
        self._painter, self._settings, self._meters = painter, settings, meters
        self._shelf = Shelf(settings.url_seconds)

    def add_to(self, app: FastAPI) -> None:
        """Adds the routes."""
        form = "multipart/form-data"
        for path, answer, media_type, kind in (
            ("generations", self.generate, "application/json", Wanted),
            ("edits", self.edit, form, EditWanted),
            ("upscales", self.upscale, form, EditWanted),
        ):
            body = {"required": True, "content": {media_type: {"schema": kind.model_json_schema()}}}
            app.post(
                f"/v1/images/{path}",
                responses=PICTURES,
                response_model=None,
                openapi_extra={"requestBody": body},
            )(answer)
        app.get(
            "/v1/images/files/{name}",
            responses={
                200: {"content": {kind: {} for kind in MEDIA_TYPES.values()}},
                404: REFUSALS[404],
                **OTHERS,
            },
            response_class=Response,
        )(self.file)
        app.get("/v1/models", responses=REFUSALS | OTHERS)(self.models)
        app.get("/v1/models/{name}", responses=REFUSALS | OTHERS)(self.model)

    async def generate(self, request: Request) -> Response:
        """Draws pictures of a prompt."""
        return await self._answer(request, await _json(request))

    async def edit(self, request: Request) -> Response:
        """Draws pictures that start from a picture, which is cropped to a square."""
        return await self._answer(request, await _form(request))

    async def upscale(self, request: Request) -> Response:
        """Finishes a picture of a lower resolution: drawn with the same prompt and seed, it is that picture, larger."""
        return await self._answer(request, await _form(request), "finish")

    async def file(self, name: str) -> Response:
        """A picture that was asked for as a URL."""
        file = self._shelf.get(name)
        if file is None:
            raise Refused(404, "there is no such picture, or no longer", code="not_found")
        return Response(file.content, media_type=file.media_type)

    async def models(self) -> dict[str, Any]:
        """The models: there is one."""
        facts = await self._painter.facts()
        return {"object": "list", "data": [facts_answer(facts, self._settings)]}

    async def model(self, name: str) -> dict[str, Any]:
        """One model."""
        facts = await self._painter.facts()
        if name != facts.name:
            raise Refused(404, f"there is no model {name!r}", code="model_not_found")
        return facts_answer(facts, self._settings)

    async def _answer(
        self, request: Request, wanted: Wanted, start: Literal["image", "finish"] = "image"
    ) -> Response:
        facts = await self._painter.facts()
        seed = random_seed() if wanted.seed is None else wanted.seed
        orders = await asyncio.to_thread(
            orders_of, wanted, facts, self._settings, seed=seed, start=start
        )
        batch = Batch(self._painter, orders, lambda: _gone(request))
        if not wanted.stream:
            async with batch:
                return JSONResponse(await self._gather(batch, request, wanted, orders, facts))
        stream = self._stream(batch, wanted, orders, facts)
        first = await anext(stream)  # errors before acceptance are raised here
        return StreamingResponse(_chain(first, stream), media_type="text/event-stream")

    async def _gather(
        self,
        batch: Batch,
        request: Request,
        wanted: Wanted,
        orders: Sequence[Order],
        facts: ModelFacts,
    ) -> dict[str, Any]:
        """The answer when all pictures are there."""
        data: dict[int, dict[str, Any]] = {}
        async for item in batch.events():
            assert item is not None
            index, picture = item
            order = orders[index]
            file = await self._file(order, picture, wanted, facts, batch)
            data[index] = self._handed_out(file, request, wanted) | {
                "seed": order.seed,
                "resolution": order.resolution,
            }
        return {
            "created": int(time.time()),
            "model": facts.name,
            "weights_sha256": facts.weights_sha256,
            **common_answer(wanted, orders[0]),
            "data": [data[index] for index in sorted(data)],
        }

    async def _stream(
        self, batch: Batch, wanted: Wanted, orders: Sequence[Order], facts: ModelFacts
    ) -> AsyncIterator[str]:
        """The answer as server-sent events; the first says that all is accepted."""
        async with batch:
            try:
                yield f": accepted, {batch.num_ahead} before it\n\n"
                async for item in batch.events(IDLE_SECONDS):
                    if item is None:
                        yield ": still here\n\n"
                        continue
                    index, event = item
                    file = await self._file(orders[index], event, wanted, facts, batch)
                    told = event_answer(wanted, orders[index], index, event, file)
                    yield _sse(told["type"], told)
            except Gone:
                return
            except (BadOrder, Busy, TooLate, Unavailable) as error:
                refused = _refused(error)
                told = error_body(refused.status_code, refused.detail, refused.code)
                yield _sse("error", {"type": "error", **told})

    async def _file(
        self,
        order: Order,
        event: Preview | Picture,
        wanted: Wanted,
        facts: ModelFacts,
        batch: Batch,
    ) -> bytes:
        size = size_text(order.resolution)
        if isinstance(event, Picture):
            self._meters.pictures.labels(size).observe(event.seconds)
        elif event.index == 0:
            self._meters.previews.labels(size).observe(time.monotonic() - batch.began)
        return await asyncio.to_thread(picture_file, event, wanted, order, facts)

    def _handed_out(self, file: bytes, request: Request, wanted: Wanted) -> dict[str, str]:
        if wanted.response_format == "b64_json":
            return {"b64_json": base64.b64encode(file).decode()}
        suffix = wanted.output_format
        name = self._shelf.put(file, MEDIA_TYPES[suffix], suffix)
        return {"url": str(request.url_for("file", name=name))}


async def _chain(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    async for text in rest:
        yield text


def _sse(name: str, told: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(told)}\n\n"


async def _json(request: Request) -> Wanted:
    """The body of a generation.

    Raises:
        Refused: it is not JSON, or a field is missing, unknown or wrong.
    """
    # Any other type could be sent by other sites' pages, without asking us first.
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise Refused(400, "the body must be JSON, sent with content-type: application/json")
    try:
        values = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {error}") from error
    return _checked(Wanted, values)


async def _form(request: Request) -> EditWanted:
    """The form of an edit.

    Raises:
        Refused: it is no form, or a field is missing, unknown or wrong.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise Refused(400, "the body must be a form, sent with content-type: multipart/form-data")
    values: dict[str, Any] = {}
    async with request.form(max_files=1, max_fields=50) as form:
        for key, value in form.multi_items():
            name = "image" if key == "image[]" else key
            if name in values:
                raise Refused(400, f"{name} was given twice; one is read", param=name)
            values[name] = await value.read() if isinstance(value, UploadFile) else value
    return _checked(EditWanted, values)


def _checked(kind: type[W], values: Any) -> W:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        message, param = first_mistake(kind, error)
        raise Refused(400, message, param=param) from error


async def _gone(request: Request) -> None:
    """Returns when the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _add_operations(app: FastAPI, painter: Painter, meters: Meters) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether this process answers."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: REFUSALS[503]})
    async def readyz() -> dict[str, str]:
        """Whether pictures can be drawn."""
        await painter.facts()
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(meters.exposition(await painter.work()), media_type=MEDIA_TYPE)


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def index() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(PAGE / "docs.html")

    app.mount("/page", StaticFiles(directory=PAGE))


def _add_errors(app: FastAPI) -> None:
    async def order(request: Request, error: Exception) -> JSONResponse:
        return _error_response(_refused(error))

    async def refused(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, StarletteHTTPException)
        return _error_response(error)

    for kind in (BadOrder, Busy, TooLate, Unavailable, Gone):
        app.add_exception_handler(kind, order)
    app.add_exception_handler(StarletteHTTPException, refused)  # also routes that are not there


def _error_response(error: StarletteHTTPException) -> JSONResponse:
    body = error_body(
        error.status_code,
        str(error.detail),
        getattr(error, "code", None),
        getattr(error, "param", None),
    )
    return JSONResponse(body, error.status_code, headers=dict(error.headers or {}))


def _refused(error: Exception) -> Refused:
    """What a client is told of an order's error."""
    text = str(error)
    if isinstance(error, BadOrder):
        param = "size" if error.param == "resolution" else error.param
        code = "model_not_found" if param == "model" else None
        return Refused(404 if code else 400, text, code=code, param=param or None)
    if isinstance(error, Busy):
        return Refused(429, text, code="queue_full", headers=retry_after(error.retry_after_seconds))
    if isinstance(error, TooLate):
        return Refused(504, text, code="deadline")
    if isinstance(error, Gone):
        return Refused(CLIENT_GONE, text)
    return Refused(503, text, code="unavailable", headers=retry_after(1))
