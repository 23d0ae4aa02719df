"""The page of `cgrpo vote` and what it asks of this machine. Needs the extra ``playground``.

Of ``page.html`` nothing is made here: its script asks ``/groups`` and sends ``/votes``.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from pydantic import Field
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from customized_grpo.config import decode
from customized_grpo.errors import ConfigError, CustomizedGRPOError
from customized_grpo.rewards.ballots import Ballots, Group, Vote, is_answered

_HOST, _FIRST_PORT, _NUM_PORTS = "127.0.0.1", 7870, 100
_MOST_BYTES = 10_000
_FILES = {"/": "page.html", "/page.css": "page.css", "/page.js": "page.js"}
_HEADERS = {"content-security-policy": "default-src 'self' data:", "cache-control": "no-store"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What the page sends."""

    group: str
    best: str | None
    worst: str | None
    voter: Annotated[str, Field(min_length=1, max_length=60)]


class Booth:
    """The groups of some folders, and the votes on them."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._ballots = [Ballots(folder) for folder in folders]

    def groups(self, voter: str) -> dict[str, Any]:
        """Those that wait for this person, and how far all are."""
        asked = [(ballots.votes(), group) for ballots in self._ballots for group in ballots.asked()]
        waiting = [
            asdict(group)
            for votes, group in asked
            if not is_answered(group, votes)
            and voter not in (vote.voter for vote in votes.get(group.id, ()))
        ]
        num_answered = sum(is_answered(group, votes) for votes, group in asked)
        return {"groups": waiting, "num_asked": len(asked), "num_answered": num_answered}

    def picture(self, digest: str) -> Path | None:
        """The file of a picture that is shown somewhere."""
        files = (ballots.picture(digest) for ballots in self._ballots)
        return next((file for file in files if digest.isalnum() and file.is_file()), None)

    def cast(self, choice: Choice) -> None:
        """Appends the vote to the file of its folder.

        Raises:
            KeyError: if the group is not asked about, any more.
            ConfigError: if it is no choice between the group's pictures.
        """
        for ballots in self._ballots:
            for group in ballots.asked():
                if group.id == choice.group:
                    _check(choice, group)
                    ballots.cast(_vote(choice, group))
                    return
        raise KeyError(choice.group)


def _check(choice: Choice, group: Group) -> None:
    wanted = choice.best is not None and group.needs_worst
    if choice.best not in (None, *group.pictures):
        raise ConfigError(f"best must be one of the group's pictures, got {choice.best!r}")
    if (choice.worst is not None) != wanted or choice.worst not in (None, *group.pictures):
        what = "another of the group's pictures" if wanted else "null"
        raise ConfigError(f"worst must be {what}, got {choice.worst!r}")


def _vote(choice: Choice, group: Group) -> Vote:
    return Vote(
        group=group.id,
        prompt=group.prompt,
        pictures=group.pictures,
        best=choice.best,
        worst=choice.worst,
        voter=choice.voter,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def make_app(booth: Booth, title: str) -> Starlette:
    """The application; ``title`` heads the page."""

    def page(request: Request) -> Response:
        return FileResponse(Path(__file__).with_name(_FILES[request.url.path]), headers=_HEADERS)

    def groups(request: Request) -> Response:
        found = booth.groups(request.query_params.get("voter", ""))
        return JSONResponse({"title": title, **found}, headers=_HEADERS)

    def picture(request: Request) -> Response:
        file = booth.picture(request.path_params["digest"])
        if file is None:
            raise HTTPException(404)
        kept = {"cache-control": "max-age=86400, immutable"}
        return FileResponse(file, media_type="image/png", headers=_HEADERS | kept)

    async def vote(request: Request) -> Response:
        # A page of another host can send a form or plain text, and JSON it may not.
        if request.headers.get("content-type") != "application/json":
            raise HTTPException(415)
        body = await _read(request)
        try:
            booth.cast(decode(body, "vote", Choice))
        except KeyError as error:
            raise HTTPException(409, "nobody waits for this group any more") from error
        except ConfigError as error:
            raise HTTPException(400, str(error)) from error
        return JSONResponse({}, 201)

    def failed(_: Request, error: Exception) -> Response:
        return JSONResponse({"detail": str(error)}, 500)

    def refused(_: Request, error: Any) -> Response:
        return JSONResponse({"detail": error.detail}, error.status_code)

    answers: Mapping[Any, Any] = dict.fromkeys((CustomizedGRPOError, OSError), failed)
    return Starlette(
        routes=[
            *(Route(path, page) for path in _FILES),
            Route("/groups", groups),
            Route("/pictures/{digest}.png", picture),
            Route("/votes", vote, methods=["POST"]),
        ],
        # A name of another host that leads here is no way in either.
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[_HOST, "localhost"])],
        exception_handlers={HTTPException: refused, **answers},
    )


async def _read(request: Request) -> Any:
    if int(request.headers.get("content-length", _MOST_BYTES + 1)) > _MOST_BYTES:
        raise HTTPException(413)
    try:
        return await request.json()
    except ValueError as error:
        raise HTTPException(400, "the vote must be JSON") from error


@contextmanager
def serving(booth: Booth, title: str, port: int | None = None) -> Iterator[str]:
    """The page is at the address inside.

    Raises:
        ConfigError: if the port is taken.
    """
    with _listener(port) as listener:
        settings = uvicorn.Config(make_app(booth, title), log_level="warning", lifespan="off")
        server = uvicorn.Server(settings)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://{_HOST}:{listener.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()


def _listener(port: int | None) -> socket.socket:
    ports = range(_FIRST_PORT, _FIRST_PORT + _NUM_PORTS) if port is None else [port]
    reason: Exception | None = None
    for number in ports:
        try:
            return socket.create_server((_HOST, number))
        except (OSError, OverflowError) as error:
            reason = error
    raise ConfigError(f"--port must be free, got {port} ({reason}); leave it out")
