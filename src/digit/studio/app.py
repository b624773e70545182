"""The studio's server: addresses, what each takes, and the stream of events that a job sends back.

    GET  /                   the page; /style.css, /*.js
    GET  /api/about          the model: classes, settings, grids
    POST /api/draw ...       a job: JSON in, server-sent events out; closing the connection ends the job
    POST /api/picture        an uploaded picture: its bytes in, its crop and its settings out
    GET  /api/runs ...       runs of the folder; POST starts, stops and continues them

Nothing that a page sends names a path. The server writes no file, except for a fit that somebody starts.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from functools import partial
from importlib.resources import files
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from digit.errors import DigitError
from digit.runs.recipes import RECIPES
from digit.runtime.hardware import in_own_thread
from digit.studio import requests as wanted
from digit.studio.folders import Folder, without_paths
from digit.studio.guard import Guard, TooLargeError
from digit.studio.jobs import BusyError, Job, Worker
from digit.studio.model import Model
from digit.studio.pictures import data_url, png, read_upload, settings_in

STATIC = files("digit.studio") / "static"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
MIB = 2**20
MAX_UPLOAD = 16  # MiB of a picture that is dropped onto the page
DECODED_AT_A_TIME = 2  # uploads; each may take 92 MiB
RECEIVED_AT_A_TIME, UPLOAD_SECONDS = 8, 120  # uploads that arrive, and how long one may take
OTHER_BYTES = 128 * 1024  # of a request beside its pictures
T = TypeVar("T", bound=BaseModel)


class Studio:
    """What the server needs: the model with its thread, and the folder of runs."""

    def __init__(self, model: Model, folder: Folder) -> None:
        self.model, self.folder, self.worker = model, folder, Worker()

    def close(self) -> None:
        """End the thread, and stop fits that the page has started."""
        self.worker.stop()
        self.folder.close()


def make_app(
    studio: Studio, *, hosts: set[str] | None = None, token: str | None = None, max_upload: int = MAX_UPLOAD
) -> Guard:
    """The whole application, guarded. `hosts` and `token` as of `Guard`; `max_upload` in MiB."""
    api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    add_errors(api)
    add_page(api)
    add_jobs(api, studio)
    add_runs(api, studio.folder)
    picture = 5 * studio.model.pipe.image_size**2  # bytes of a PNG of noise as a data URL: 4 a pixel
    limits = {
        "": OTHER_BYTES + picture,
        "/api/picture": max_upload * MIB,
        "/api/judge": OTHER_BYTES + wanted.MAX_COUNT * picture,
    }
    return Guard(api, hosts=hosts or set(), token=token, limits=limits)


# -------------------------------------------------------------------- answers


class Answer(JSONResponse):
    """JSON in ASCII: a name on the disk may hold what UTF-8 does not."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def refuse(status: int, text: str) -> Answer:
    """An error as JSON: one line for a person."""
    return Answer({"error": without_paths(text)}, status, headers={"cache-control": "no-store"})


def give(value: Any) -> Answer:
    """A value as JSON that no cache keeps."""
    return Answer(value, headers={"cache-control": "no-store"})


def add_errors(api: FastAPI) -> None:
    """Every mistake becomes a status of 4xx and one line."""

    @api.exception_handler(DigitError)
    async def mistake(_: Request, error: DigitError) -> Response:
        return refuse(429 if isinstance(error, BusyError) else 400, str(error))

    @api.exception_handler(TooLargeError)
    async def too_large(_: Request, error: TooLargeError) -> Response:
        return refuse(413, str(error))

    @api.exception_handler(ClientDisconnect)
    async def cut_off(_: Request, __: ClientDisconnect) -> Response:
        return refuse(400, "the request ended before its body did")  # nobody reads it

    @api.exception_handler(HTTPException)
    async def missing(_: Request, error: HTTPException) -> Response:
        texts = {404: "there is nothing at this address", 405: "this address does not take this method"}
        return refuse(error.status_code, texts.get(error.status_code, str(error.detail)))

    @api.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Response:
        return refuse(400, in_words(error.errors()[0]))


def in_words(problem: Any) -> str:
    """The first problem of a request: 'num: Input should be less than or equal to 64'."""
    place = ".".join(str(part) for part in problem.get("loc", ()) if part not in ("body", "query", "path"))
    return f"{place or 'the request'}: {problem.get('msg', 'not understood')}"[:400]


async def read(request: Request, kind: type[T]) -> T:
    """The JSON of a request as one of `requests`. Raises DigitError that names the first mistake."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "send JSON, with the content type application/json")
    body = await request.body()
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise DigitError(in_words(error.errors(include_url=False, include_input=False)[0])) from None


# -------------------------------------------------------------------- page


def add_page(api: FastAPI) -> None:
    """The files of the page, read once; nothing else of the disk has an address."""
    found = {
        entry.name: entry.read_bytes() for entry in STATIC.iterdir() if entry.name[entry.name.rfind(".") :] in TYPES
    }

    @api.api_route("/", methods=["GET", "HEAD"])
    async def page() -> Response:
        return file("index.html")

    @api.api_route("/{name}", methods=["GET", "HEAD"])
    async def static(name: str) -> Response:
        return file(name)

    def file(name: str) -> Response:
        if name not in found:
            raise HTTPException(404)
        kind = TYPES[name[name.rfind(".") :]]
        return Response(found[name], media_type=f"{kind}; charset=utf-8", headers={"cache-control": "no-cache"})


# -------------------------------------------------------------------- jobs


def add_jobs(api: FastAPI, studio: Studio) -> None:
    """The addresses of the model."""
    model, worker = studio.model, studio.worker
    receiving, decoding = asyncio.Semaphore(RECEIVED_AT_A_TIME), asyncio.Semaphore(DECODED_AT_A_TIME)

    def stream(request: Request, work: Callable[[Job], Any], *, slow: bool = False) -> Response:
        owner = request.headers.get("x-studio-page", "")[:64] or (request.client.host if request.client else "")
        return sent(request, worker.submit(Job(work, owner, asyncio.get_running_loop()), slow=slow), worker)

    @api.get("/api/about")
    async def about() -> Response:
        about = model.about()
        if studio.folder.root is None:
            about["missing"]["runs"] = "This studio has no folder of runs: start it with --runs FOLDER."
        about |= {
            "read_only": studio.folder.read_only,
            "runs": studio.folder.root is not None,
            "recipes": {
                name: (recipe.__doc__ or "").strip().splitlines()[0] for name, recipe in sorted(RECIPES.items())
            },
            "data_sets": list(studio.folder.data),
        }
        return give(about)

    @api.get("/api/waiting")
    async def waiting() -> Response:
        return give({"waiting": worker.waiting, "finished": worker.finished})

    @api.post("/api/picture")
    async def picture(request: Request) -> Response:
        async with receiving:
            try:
                async with asyncio.timeout(UPLOAD_SECONDS):
                    data = await request.body()
            except TimeoutError:
                raise HTTPException(408, f"the picture did not arrive within {UPLOAD_SECONDS} s") from None
            async with decoding:
                cut = partial(read_upload, data, model.pipe.image_size, model.pipe.preprocess.fit)
                image = await asyncio.to_thread(in_own_thread, cut)
        settings = settings_in(data)
        same = settings is not None and settings.get("model") == model.fingerprint
        return give({"image": data_url(png(image)), "settings": settings, "same_model": same})

    @api.post("/api/draw")
    async def draw(request: Request) -> Response:
        asked = await read(request, wanted.Draw)
        model.sampling(asked)  # a mistake is a 4xx, not an event
        model.pipe.labels(asked.num, model.labels_of(asked.labels))
        return stream(request, lambda job: model.draw(job, asked))

    @api.post("/api/complete")
    async def complete(request: Request) -> Response:
        asked = await read(request, wanted.Complete)
        model.sampling(asked)
        return stream(request, lambda job: model.complete(job, asked))

    @api.post("/api/vary")
    async def vary(request: Request) -> Response:
        asked = await read(request, wanted.Variations)
        model.sampling(asked)
        return stream(request, lambda job: model.vary(job, asked))

    @api.post("/api/render")
    async def render(request: Request) -> Response:
        asked = await read(request, wanted.Render)
        model.sampling(asked)
        return stream(request, lambda job: model.render(job, asked))

    @api.post("/api/encode")
    async def encode(request: Request) -> Response:
        asked = await read(request, wanted.Encode)
        return stream(request, lambda job: model.encode(job, asked))

    @api.post("/api/noise")
    async def noise(request: Request) -> Response:
        asked = await read(request, wanted.Noise)
        return stream(request, lambda job: model.noise(job, asked))

    @api.post("/api/judge")
    async def judge(request: Request) -> Response:
        asked = await read(request, wanted.Judge)
        return stream(request, lambda job: model.judge(job, asked), slow=True)

    @api.get("/api/palettes")
    async def palettes(request: Request) -> Response:
        if not model.painted:
            return stream(request, model.palettes)
        job = Job(model.palettes, loop=asyncio.get_running_loop())
        model.palettes(job)  # nothing is left to compute: it waits for nobody
        job.finish("done")
        return sent(request, job, worker)

    @api.get("/api/examples")
    async def examples(request: Request) -> Response:
        return stream(request, model.examples)

    @api.get("/api/data")
    async def data(request: Request, start: int = 0, num: int = 24) -> Response:
        first, count = min(max(start, 0), 10**6), min(max(num, 1), 48)
        return stream(request, lambda job: model.training_pictures(job, first, count))

    @api.get("/api/patches/{token}")
    async def patches(request: Request, token: int) -> Response:
        return stream(request, lambda job: model.patches(job, token), slow=True)

    @api.get("/api/curve")
    async def curve(request: Request) -> Response:
        return stream(request, model.curve, slow=True)


def sent(request: Request, job: Job, worker: Worker) -> Response:
    """The events of a job as a stream, which no proxy keeps back."""
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(events(request, job, worker), media_type="text/event-stream", headers=headers)


async def events(request: Request, job: Job, worker: Worker) -> AsyncIterator[bytes]:
    """A job's events as server-sent events; a closed connection ends the job."""
    try:
        async for event in job.events():
            if event is None:
                if await request.is_disconnected():
                    return
                yield b": waiting\n\n"
                continue
            data = event.data
            if event.kind == "error":
                data = {**data, "text": without_paths(str(data.get("text", "")))}
            yield f"event: {event.kind}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()
            if await request.is_disconnected():
                return
    finally:
        with contextlib.suppress(RuntimeError):
            worker.cancel(job)


# -------------------------------------------------------------------- runs


def add_runs(api: FastAPI, folder: Folder) -> None:
    """The addresses of the folder of runs."""

    @api.get("/api/runs")
    async def runs() -> Response:
        found = await asyncio.to_thread(folder.describe_all)
        return give({"runs": found, "starting": folder.starting(), "read_only": folder.read_only})

    @api.get("/api/runs/{name}/curves")
    async def curves(name: str) -> Response:
        return give(await asyncio.to_thread(folder.curves, name))

    @api.get("/api/runs/{name}/pictures/{picture}")
    async def picture(name: str, picture: str) -> Response:
        path = folder.picture(name, picture)
        data = await asyncio.to_thread(path.read_bytes)
        return Response(data, media_type="image/png", headers={"cache-control": "no-cache"})

    @api.get("/api/runs/{name}/previews/{picture}")
    async def preview(name: str, picture: str) -> Response:
        path = await asyncio.to_thread(folder.preview, name, picture)
        data = await asyncio.to_thread(path.read_bytes)
        return Response(data, media_type="image/png", headers={"cache-control": "no-cache"})

    @api.get("/api/compare")
    async def compare(first: str, second: str) -> Response:
        return give(await asyncio.to_thread(folder.compare, first, second))

    @api.post("/api/runs")
    async def start(request: Request) -> Response:
        asked = await read(request, wanted.Fit)
        await asyncio.to_thread(folder.start, asked.name, asked.recipe, asked.data, asked.seed)
        return give({"started": asked.name})

    @api.post("/api/runs/act")
    async def act(request: Request) -> Response:
        asked = await read(request, wanted.Named)
        await asyncio.to_thread(folder.stop if asked.action == "stop" else folder.go_on, asked.name)
        return give({"done": asked.action})
