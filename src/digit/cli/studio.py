"""The command that serves a page over a run: studio."""

import webbrowser
from typing import TYPE_CHECKING

from digit.cli.arguments import DEVICE_HELP, FROM_HELP, command, load_pipeline, parse, say, say_here
from digit.errors import DigitError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

MISSING = "the studio needs FastAPI and uvicorn ({error}): pip install 'digit-image-tokens[studio]'"


@command(
    "studio",
    "digit studio runs/demo                       # then open the address that it prints\n"
    "  digit studio runs/demo --port 0 --open true  # any free port, in the browser at once\n"
    "  digit studio runs/demo --read_only true --host 0.0.0.0   # to show it to others; it prints a token",
)
def run_studio(parser: "ArgumentParser", argv: list[str]) -> None:
    """Open a page in the browser: draw, complete, look at tokens, add noise, compare runs.

    It is served by this machine to this machine alone; --host with another address asks for a token. docs/studio.md
    shows every part, and how to put it behind a reverse proxy. Ctrl-C ends it.
    """
    parser.add_argument("run", help=FROM_HELP)
    parser.add_argument("--data", default=None, help="the training pictures, where they are not at the run's own path")
    parser.add_argument("--runs", default=None, help="folder of runs to show and to train in (default: RUN's folder)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 is every one")
    parser.add_argument("--port", type=int, default=8000, help="port; 0 takes a free one")
    parser.add_argument(
        "--read_only", type=bool, default=False, help="for showing: fits cannot be started, stopped or continued"
    )
    parser.add_argument("--token", default=None, help="what others must bring (default: a random one where needed)")
    parser.add_argument(
        "--allow_host", default=None, help="names under which a reverse proxy calls it, separated by commas"
    )
    parser.add_argument("--max_upload", type=int, default=16, help="MiB of a picture that is dropped onto the page")
    parser.add_argument("--open", type=bool, default=False, help="open the page in the browser")
    parser.add_argument("--variant", default=None, help="which released checkpoints, where RUN is DAMO-NLP-SG/DiGIT")
    parser.add_argument("--device", default=None, help=DEVICE_HELP)
    args = parse(parser, argv)
    if not 0 <= args.port < 65536:
        raise DigitError(f"--port is {args.port}: give 1 to 65535, or 0 for a free one")
    if args.max_upload < 1:
        raise DigitError(f"--max_upload is {args.max_upload}: give at least 1 MiB")
    if args.token is not None and len(args.token) < 16:
        raise DigitError("--token is shorter than 16 characters: give a longer one, or leave it out for a random one")
    try:
        from digit.studio.serve import open_studio, serve
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("fastapi", "starlette", "uvicorn", "pydantic"):
            raise
        raise DigitError(MISSING.format(error=error)) from error

    from digit.runtime.hardware import in_own_thread
    from digit.runtime.progress import quiet

    args.source = args.run
    try:
        pipe = in_own_thread(lambda: load_pipeline(args))  # the model's thread is another
    except DigitError as error:
        raise type(error)(str(error).replace("--from", "RUN")) from error
    quiet()  # bars of single requests
    shown = args.run if args.host in ("127.0.0.1", "localhost", "::1") and not args.read_only else None
    studio, notes = in_own_thread(
        lambda: open_studio(
            pipe,
            args.run,
            data=args.data,
            runs=args.runs,
            read_only=args.read_only,
            shown=shown or args.run.rstrip("/").rpartition("/")[2],
        )
    )
    for note in notes:
        say(f"note: {note}")
    serve(
        studio,
        host=args.host,
        port=args.port,
        allow_host=[name.strip() for name in args.allow_host.split(",")] if args.allow_host else None,
        token=args.token,
        max_upload=args.max_upload,
        say=say_here,
        ready=webbrowser.open if args.open else None,
    )
