"""Opens a run and serves its page until Ctrl-C."""

import re
import secrets
import socket
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import h11
import uvicorn

from digit.data.images import ImageSource, open_source
from digit.errors import DigitError
from digit.pipeline.pipeline import DigitPipeline
from digit.runs.status import is_run
from digit.runtime.files import as_path, read_json
from digit.runtime.signals import StopSignals, saving
from digit.studio.app import MAX_UPLOAD, Studio, make_app
from digit.studio.folders import Folder, as_dict
from digit.studio.guard import App, Receive, Scope, Send, is_local
from digit.studio.jobs import BusyError, Job
from digit.studio.model import Model

MAX_CONNECTIONS = 128
SUBSET = re.compile(r"(?P<path>.+)\[(?P<num>\d+) of \d+\]")  # the name of a source that `limit` made


def open_studio(
    pipe: DigitPipeline,
    run: str | Path,
    *,
    data: str | None = None,
    runs: str | Path | None = None,
    read_only: bool = False,
    shown: str | None = None,
) -> tuple[Studio, list[str]]:
    """The studio of a pipeline, and notes for the person who starts it.

    Args:
        run: the folder that the pipeline was read from.
        data: its training pictures; by default those that its config.json names.
        runs: folder of runs to show; by default the one that holds `run`.
        read_only: nothing may be started or stopped.
        shown: how commands on the page name the run; by default as `run` is given.
    """
    folder, notes = as_path(run), []
    source, spec, note = find_data(folder, data)
    notes += [note] if note else []
    measured = find_stability(folder)
    root = as_path(runs) if runs is not None else folder.resolve().parent if is_run(folder) else None
    if runs is not None and (root is None or not root.is_dir()):
        raise DigitError(f"--runs {runs} is no folder: give the folder that holds your runs")
    sets = {} if spec is None or spec == "shapes" else {Path(spec).name or spec: spec}
    if source is not None and list(source.classes) != list(pipe.classes) and pipe.classes:
        source = source.with_classes(pipe.classes)
    model = Model(
        pipe, shown or str(run), source, measured, spec if shown in (None, str(run)) or spec == "shapes" else None
    )
    return Studio(model, Folder(root, sets, read_only=read_only)), notes


def find_data(folder: Path, data: str | None) -> tuple[ImageSource | None, str | None, str]:
    """The training pictures of a run, the text that opens them, and a note on what was assumed."""
    cfg = as_dict(as_dict(read_json(folder / "config.json")).get("data")) if is_run(folder) else {}
    name, fingerprint = cfg.get("name"), cfg.get("fingerprint")
    if data is None and not isinstance(name, str):
        return None, None, "no training pictures are known for this pipeline: --data PATH shows them"
    path, count = of_subset(str(name))
    path = path if data is None else data
    try:
        whole = open_source(path)
    except (DigitError, OSError):
        if data is not None:
            raise
        return None, None, f"the training pictures {path} are not here: --data PATH says where they are"
    source = next((s for s in (whole.limit(count), whole) if s.fingerprint == fingerprint), whole)
    if fingerprint is None or source.fingerprint == fingerprint:
        return source, path, ""
    note = f"{path} holds other pictures than this run was trained on"
    return (source, None, f"{note}: --data PATH names those") if data is None else (source, path, note)


def of_subset(name: str) -> tuple[str, int | None]:
    """The path in the name of training pictures, and how many of them `--limit` took: 'photos[100 of 2640]'."""
    found = SUBSET.fullmatch(name)
    return (name, None) if found is None else (found["path"], int(found["num"]) or None)


def find_stability(folder: Path) -> dict[str, Any] | None:
    """What `digit stability` wrote for a run, in RUN/stability or in RUN."""
    for path in (folder / "stability" / "stability.json", folder / "stability.json"):
        with suppress(DigitError):
            if path.is_file() and (found := as_dict(read_json(path))):
                return found
    return None


def addresses(host: str, allowed: list[str]) -> set[str]:
    """The names under which the studio may be called."""
    names = {name.lower() for name in allowed}
    if host in ("0.0.0.0", "::"):
        names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
        with suppress(OSError):
            names |= {str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None)}
        return names
    return names | {host.strip("[]").lower()}


def serve(
    studio: Studio,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    allow_host: list[str] | None = None,
    token: str | None = None,
    max_upload: int = MAX_UPLOAD,
    say: Callable[[str], None] = print,
    ready: Callable[[str], object] | None = None,
) -> None:
    """Serve until a signal asks to stop.

    Args:
        host: address to listen at. Anything but this machine's own needs a token; without one a random token is made.
        port: 0 takes a free one.
        allow_host: further names under which the page is called, behind a reverse proxy.
        say: prints a line.
        ready: called with the page's address once it answers.

    Raises DigitError where the address is taken.
    """
    names = addresses(host, allow_host or [])
    if token is None and (not is_local(host) or allow_host):
        token = secrets.token_urlsafe(24)
    listener = listen(host, port)
    port = listener.getsockname()[1]
    called = (allow_host or [host])[0] if host in ("0.0.0.0", "::") or not allow_host else host
    called = "127.0.0.1" if called in ("0.0.0.0", "::") else f"[{called}]" if ":" in called else called
    address = f"http://{called}:{port}/" + (f"?token={token}" if token else "")
    app = without_broken(make_app(studio, hosts=names, token=token, max_upload=max_upload))
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, date_header=False, lifespan="off",
        proxy_headers=False, limit_concurrency=MAX_CONNECTIONS, timeout_keep_alive=30, timeout_graceful_shutdown=3,
        ws="none", h11_max_incomplete_event_size=64 * 1024,
    )  # fmt: skip
    server = Server(config)

    def on_ready() -> None:
        with suppress(BusyError):  # it is closing already
            studio.worker.submit(Job(studio.model.prepare), slow=True)  # while the first person looks at the page
        say(f"studio: {address}   (Ctrl-C ends it)")
        if ready is not None:
            ready(address)

    server.on_ready = on_ready
    try:
        with suppress(KeyboardInterrupt):  # a second Ctrl-C
            server.run(sockets=[listener])
        say("the studio is closed")
    finally:
        listener.close()
        with saving():  # fits that the page started save first
            studio.close()


def without_broken(app: App) -> App:
    """`app` whose answers are dropped where the request turned out to be broken after its head: uvicorn has refused it
    already, and would log a traceback for the second answer."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_or_drop(message: MutableMapping[str, Any]) -> None:
            with suppress(h11.LocalProtocolError):
                await send(message)

        await app(scope, receive, send_or_drop)

    return call


class Server(uvicorn.Server):
    """uvicorn's server that tells when it answers, and ends as digit's other commands do where a signal asks for it."""

    on_ready: Callable[[], Any] = staticmethod(lambda: None)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """A context in which a signal ends the server after the answers at hand."""
        with StopSignals() as self.signals:
            yield

    async def on_tick(self, counter: int) -> bool:
        """uvicorn asks ten times a second whether to end."""
        return self.signals.asked or await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self.on_ready()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises DigitError where the address cannot be had."""
    host = host.strip("[]")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
        return listener
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DigitError(f"cannot listen at {host}:{port} ({reason}): choose another --port, 0 for any") from error
