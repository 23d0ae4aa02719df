"""The HTTP side of the server. Needs the extra ``serve``."""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
import inspect
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request

from customized_grpo.rewards.endpoints.wire import CONTENT_TYPE, VERSION, BadRequest, decode_request
from customized_grpo.tools.serve.batcher import Batcher, Busy, Scored
from customized_grpo.tools.serve.config import ServeConfig


def make_app(config: ServeConfig, batchers: dict[str, Batcher], token: str | None) -> FastAPI:
    """The application; each batcher is one reward, by name."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for batcher in batchers.values():
            batcher.start()
        yield
        for batcher in batchers.values():  # by now the last request has been answered
            await batcher.stop()

    async def check_token(request: Request) -> None:
        given = request.headers.get("authorization", "").encode()
        if token is not None and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            raise HTTPException(401, "authorization: must be 'Bearer' and the server's token")

    rewards = [
        {"name": reward.label, "description": inspect.getdoc(type(reward)) or ""}
        for reward in config.rewards
    ]
    # No pages about the interface: the body is no JSON that they could describe.
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"version": VERSION, "status": "ok"}

    @app.get("/rewards", dependencies=[Depends(check_token)])
    async def list_rewards() -> dict[str, Any]:
        limits = dataclasses.asdict(config.limits)
        return {"version": VERSION, "rewards": rewards, "limits": limits}

    @app.post("/score", dependencies=[Depends(check_token)])
    async def score(request: Request) -> dict[str, Any]:
        scored = await _score(request, config, batchers)
        return {
            "version": VERSION,
            "scores": [value for value, _ in scored],
            "errors": [text for _, text in scored],
        }

    return app


async def _score(
    request: Request, config: ServeConfig, batchers: dict[str, Batcher]
) -> list[Scored]:
    if request.headers.get("content-type") != CONTENT_TYPE:
        raise HTTPException(415, f"content-type: must be {CONTENT_TYPE}")
    try:
        body = await _read_body(request, config.limits.max_bytes)
        name, images, examples = await asyncio.to_thread(decode_request, body, config.limits)
    except BadRequest as error:
        raise HTTPException(error.status, str(error)) from error
    if name not in batchers:
        raise HTTPException(404, f"reward: must be one of {', '.join(batchers)}, got {name!r}")
    try:
        return await _unless_gone(request, batchers[name].submit(images, examples))
    except Busy as busy:
        raise HTTPException(503, str(busy), {"Retry-After": str(busy.seconds)}) from busy
    except HTTPException:
        raise
    except Exception as error:
        # The traceback is in the server's log; clients are not told about its inside.
        raise HTTPException(500, f"reward {name!r} failed: {type(error).__name__}") from error


async def _read_body(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise BadRequest(f"body: must be at most {max_bytes} bytes", 413)
    return bytes(body)


async def _unless_gone(
    request: Request, scoring: Coroutine[Any, Any, list[Scored]]
) -> list[Scored]:
    """Result of the scoring; cancelled if the client hangs up, whose retry is elsewhere by then."""
    task = asyncio.create_task(scoring)
    while not task.done():
        await asyncio.wait([task], timeout=1)
        if not task.done() and await request.is_disconnected():
            task.cancel()
            raise HTTPException(499, "the client has gone")
    return task.result()
