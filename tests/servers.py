"""Real HTTP servers on localhost: the reward server under uvicorn, and one that misbehaves."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import numpy as np
import torch
import uvicorn
from helpers import wait_until
from PIL import Image

from customized_grpo.config import RewardConfig
from customized_grpo.rewards.base import Reward
from customized_grpo.tools.serve.app import make_app
from customized_grpo.tools.serve.batcher import Batcher
from customized_grpo.tools.serve.config import ServeConfig
from customized_grpo.types import Example

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Offered(RewardConfig):
    """Stands for a reward that the test builds itself."""

    type: Literal["offered"] = "offered"  # pyright: ignore[reportIncompatibleVariableOverride]

    def build(self, device: torch.device) -> Reward:
        raise AssertionError("the test has built it")


class Brightness:
    """Scores the corner, so that every score is known exactly; records its batches."""

    def __init__(self, before: Callable[[torch.Tensor], object] = lambda images: None) -> None:
        self.batches: list[int] = []
        self._before = before

    def score(self, images: torch.Tensor, examples: Sequence[Example]) -> torch.Tensor:
        self.batches.append(len(images))
        self._before(images)
        return images[:, 0, 0, 0]


@contextmanager
def reward_server(
    rewards: dict[str, Reward], token: str | None = None, port: int = 0, **settings: Any
) -> Iterator[str]:
    """URL of a server of these rewards, run by uvicorn in a thread."""
    offered = tuple(Offered(name=name, objective="any") for name in rewards)
    config = ServeConfig(rewards=offered, **settings)
    batchers = {
        name: Batcher(reward, CPU, config.max_images, config.max_waiting)
        for name, reward in rewards.items()
    }
    app = make_app(config, batchers, token)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@dataclass
class Reply:
    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})
    hang: bool = False
    """Do not answer while the server lives."""
    close: bool = False
    """Hang up instead of answering."""

    @classmethod
    def json(cls, value: Any, **fields: Any) -> Reply:
        return cls(body=json.dumps(value).encode(), **fields)

    @classmethod
    def error(cls, status: int, message: str) -> Reply:
        """As OpenAI's API refuses a request."""
        return cls.json({"error": {"message": message}}, status=status)


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@contextmanager
def scripted_server(
    answer: Callable[[Request], Reply],
) -> Iterator[tuple[str, list[Request]]]:
    """URL of a server that answers as told, and the requests it got."""
    requests: list[Request] = []
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            length = int(self.headers.get("content-length", 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Request(self.command, self.path, headers, self.rfile.read(length))
            requests.append(request)
            try:
                self._send(answer(request))
            except OSError:  # the client has lost patience, as it should
                self.close_connection = True

        do_GET = do_POST

        def _send(self, reply: Reply) -> None:
            if reply.hang:
                over.wait()
            if reply.hang or reply.close:
                self.close_connection = True
                return
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(reply.body)))
            self.end_headers()
            self.wfile.write(reply.body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        over.set()
        server.shutdown()
        server.server_close()
        thread.join()


def pictures_of(request: Request) -> list[np.ndarray]:
    """The pictures ``[H, W, 3]`` of a chat completion's last message, in order."""
    parts = json.loads(request.body)["messages"][-1]["content"]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    return [
        np.array(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))), dtype=float)
        for url in urls
    ]


def ranked_by_redness(request: Request) -> Reply:
    """Answers ``prompt-ranking`` as a model does that likes red."""
    if request.method == "GET":  # which models there are
        return Reply(status=404)
    means = [picture.mean((0, 1)) for picture in pictures_of(request)]
    found = [red - (green + blue) / 2 for red, green, blue in means]
    order = sorted(range(1, len(found) + 1), key=lambda number: -found[number - 1])
    text = json.dumps({"reason": "redder", "ranking": order})
    return Reply.json({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})
