"""The server: batches what waits, bounds what may wait, refuses what is wrong, stops gently."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import httpx2
import pytest
import safetensors.torch
import torch

pytest.importorskip("fastapi", reason="needs the extra [serve]")

from helpers import wait_until
from servers import Brightness, reward_server

from customized_grpo.cli.main import main
from customized_grpo.errors import ConfigError, DataError
from customized_grpo.rewards.endpoints.wire import (
    CONTENT_TYPE,
    Limits,
    decode_request,
    encode_request,
)
from customized_grpo.tools.serve import server
from customized_grpo.tools.serve.batcher import Batcher
from customized_grpo.tools.serve.config import read_serve_config
from customized_grpo.types import Example

WAIT = 250  # seconds: a bound on what never happens, not on a slow machine
HEADERS = {"content-type": CONTENT_TYPE}


def example(number: int = 0, **fields) -> Example:
    size = (3, 8, 6)
    return Example(
        id=str(number), prompt=f"p{number}", references=(torch.rand(size),), subject="s", **fields
    )


def grey(*levels: float, side: int = 4) -> torch.Tensor:
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, side, side)


def post(url: str, content: bytes, **headers: str) -> httpx2.Response:
    return httpx2.post(f"{url}/score", content=content, headers=HEADERS | headers, timeout=WAIT)


def ask(url: str, images: torch.Tensor, reward: str = "grey") -> httpx2.Response:
    return post(url, encode_request(reward, images, [example(i) for i in range(len(images))]))


class Gate:
    """Holds a reward back until it is opened; its first batch has been taken when `entered`."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self, images: torch.Tensor) -> None:
        self.entered.set()
        assert self.opened.wait(WAIT)


def test_health_and_rewards() -> None:
    with reward_server({"grey": Brightness()}, max_images=7) as url:
        assert httpx2.get(f"{url}/health").json() == {"version": 1, "status": "ok"}
        listed = httpx2.get(f"{url}/rewards").json()
    limits = {"max_images": 7, "max_side": 4096, "max_bytes": 512 * 2**20}
    (reward,) = listed["rewards"]
    assert listed | {"rewards": []} == {"version": 1, "rewards": [], "limits": limits}
    assert reward["name"] == "grey"
    assert reward["description"].startswith("Stands for a reward")


def test_the_answer_has_a_score_or_an_error_for_every_image() -> None:
    class Picky:
        def score(self, images: torch.Tensor, examples: Sequence[Example]) -> torch.Tensor:
            if any(e.id.startswith("2@") for e in examples):
                raise DataError("example 2 is not\nwanted")
            return torch.where(images[:, 0, 0, 0] > 0.8, torch.inf, images[:, 0, 0, 0])

    with reward_server({"grey": Picky()}) as url:
        answer = ask(url, grey(0.0, 0.25, 0.5, 0.75, 1.0)).json()
    assert answer == {
        "version": 1,
        "scores": [0, 0.25, None, 0.75, None],
        "errors": [
            None, None, "example 2 is not wanted", None, "the reward gave no finite score",
        ],
    }  # fmt: skip


class Arrivals:
    """Counts the images that came to the queue of a server, and the requests that left it again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images = self.gone = 0
        submit = Batcher.submit

        async def counted(batcher: Batcher, images: torch.Tensor, examples: list[Example]) -> list:
            self.images += len(examples)
            try:
                return await submit(batcher, images, examples)
            except asyncio.CancelledError:
                self.gone += 1
                raise

        monkeypatch.setattr(Batcher, "submit", counted)


@pytest.fixture
def arrivals(monkeypatch: pytest.MonkeyPatch) -> Arrivals:
    return Arrivals(monkeypatch)


def test_requests_that_wait_are_scored_together_up_to_the_limit(arrivals: Arrivals) -> None:
    gate = Gate()
    reward = Brightness(gate)
    with reward_server({"grey": reward}, max_images=4) as url, ThreadPoolExecutor(8) as pool:
        first = pool.submit(ask, url, grey(0.5))
        assert gate.entered.wait(WAIT)
        levels = [(i / 10, i / 20) for i in range(5)]
        others = [pool.submit(ask, url, grey(*pair)) for pair in levels]
        odd = pool.submit(ask, url, grey(0.7, side=9))
        wait_until(lambda: arrivals.images == 12)
        gate.opened.set()
        assert first.result().json()["scores"] == [0.5]
        for pair, other in zip(levels, others, strict=True):
            assert other.result().json()["scores"] == torch.tensor(pair).tolist()
        assert odd.result().json()["scores"] == torch.tensor([0.7]).tolist()
    assert sum(reward.batches) == 12
    assert max(reward.batches) == 4
    assert len(reward.batches) <= 6  # of 7 requests


def test_a_request_that_breaks_the_reward_does_not_spoil_those_it_waited_with(
    arrivals: Arrivals,
) -> None:
    gate = Gate()

    def break_on_white(images: torch.Tensor) -> None:
        gate(images)
        if (images == 1).any():
            raise ZeroDivisionError("a bug, with inner details")

    reward = Brightness(break_on_white)
    with reward_server({"grey": reward}) as url, ThreadPoolExecutor(8) as pool:
        first = pool.submit(ask, url, grey(0.5))
        assert gate.entered.wait(WAIT)
        good, bad = (pool.submit(ask, url, grey(level)) for level in (0.25, 1.0))
        wait_until(lambda: arrivals.images == 3)
        gate.opened.set()
        assert good.result().json()["scores"] == [0.25]
        assert bad.result().status_code == 500
        assert bad.result().json() == {"detail": "reward 'grey' failed: ZeroDivisionError"}
        assert first.result().status_code == 200
        assert ask(url, grey(0.75)).json()["scores"] == [0.75]
    assert reward.batches[1] == 2


def test_a_device_without_room_for_the_pictures_costs_that_request_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reward, cat = Brightness(), torch.cat

    def once(*args: object) -> torch.Tensor:
        monkeypatch.setattr(torch, "cat", cat)
        raise torch.OutOfMemoryError("no room")

    with reward_server({"grey": reward}) as url:
        monkeypatch.setattr(torch, "cat", once)
        assert ask(url, grey(0.5)).status_code == 500
        assert ask(url, grey(0.75)).json()["scores"] == [0.75]


def test_a_full_queue_answers_503_with_a_time() -> None:
    gate = Gate()
    reward = Brightness(gate)
    with (
        reward_server({"grey": reward}, max_images=2, max_waiting=2) as url,
        ThreadPoolExecutor(4) as pool,
    ):
        first = pool.submit(ask, url, grey(0.5, 0.5))
        assert gate.entered.wait(WAIT)
        others = [pool.submit(ask, url, grey(0.25, 0.25)) for _ in range(2)]
        done, (waiting,) = wait(others, WAIT, FIRST_COMPLETED)  # one place for two
        refused = done.pop().result()
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["detail"] == "2 images are waiting, at most 2 may"
        gate.opened.set()
        assert first.result().json()["scores"] == [0.5, 0.5]
        assert waiting.result().json()["scores"] == [0.25, 0.25]
        assert ask(url, grey(0.75)).status_code == 200


def test_what_a_client_no_longer_waits_for_is_not_scored(arrivals: Arrivals) -> None:
    gate = Gate()
    reward = Brightness(gate)
    content = encode_request("grey", grey(*[0.1] * 5), [example()] * 5)
    head = f"POST /score HTTP/1.1\r\nhost: here\r\ncontent-length: {len(content)}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in HEADERS.items())
    with reward_server({"grey": reward}) as url, ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, url, grey(0.5))
        assert gate.entered.wait(WAIT)
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as client:
            client.sendall(f"{head}\r\n".encode() + content)
            wait_until(lambda: arrivals.images == 6)
        wait_until(lambda: arrivals.gone == 1)
        gate.opened.set()
        assert first.result().status_code == 200
        assert ask(url, grey(0.75)).status_code == 200
    assert reward.batches == [1, 1]


def body(change: Callable[[dict, dict], object] = lambda tensors, header: None) -> bytes:
    """A good request with two images of one masked example, changed."""
    masked = example(0, reference_masks=(torch.ones(1, 8, 6),))
    good = encode_request("grey", grey(0.25, 0.5), [masked, masked])
    tensors = safetensors.torch.load(good)
    length = int.from_bytes(good[:8], "little")
    header = json.loads(json.loads(good[8 : 8 + length])["__metadata__"]["request"])
    change(tensors, header)
    return safetensors.torch.save(tensors, {"request": json.dumps(header)})


def no_header() -> bytes:
    return safetensors.torch.save({"images": torch.zeros(1, 3, 4, 4)})


BAD = [
    (b"", 400, "must be a safetensors file"),
    (b"\xff" * 100, 400, "must be a safetensors file"),
    (no_header(), 400, "its metadata under 'request'"),
    (body()[:-9], 400, "must be a safetensors file"),
    (body(lambda t, h: h.update(version=2)), 400, "version: this server speaks 1, got 2"),
    (body(lambda t, h: h.update(reward="other")), 404, "must be one of grey, got 'other'"),
    (body(lambda t, h: h.update(more=1)), 422, "more: Unexpected"),
    (body(lambda t, h: h.pop("examples")), 422, "examples: Field required"),
    (body(lambda t, h: h["examples"][0].update(prompt=3)), 422, "examples.0.prompt"),
    (body(lambda t, h: h["examples"][0].update(num_references=0)), 422, "num_references"),
    (body(lambda t, h: h.update(example_of=[0])), 422, "one entry per image, 2, got 1"),
    (body(lambda t, h: h.update(example_of=[0, 1])), 422, "below the number of examples, 1, got 1"),
    (body(lambda t, h: h.update(example_of=[0, -1])), 422, "example_of.1"),
    (body(lambda t, h: t.pop("images")), 422, "images: must be among the tensors"),
    (body(lambda t, h: t.pop("reference.0.0")), 422, "reference.0.0: must be among"),
    (body(lambda t, h: t.pop("mask.0.0")), 422, "mask.0.0: must be among"),
    (body(lambda t, h: t.update(x=torch.zeros(1))), 422, "'x' belongs to no example"),
    (body(lambda t, h: t.update(images=torch.zeros(2, 4, 4, 4))), 422, "must have the shape"),
    (body(lambda t, h: t.update(images=torch.zeros(0, 3, 4, 4))), 422, "must have the shape"),
    (body(lambda t, h: t.update(images=torch.zeros(9, 3, 4, 4))), 413, "at most 8 in a request"),
    (body(lambda t, h: t.update(images=torch.zeros(2, 3, 4, 99))), 413, "at most 64 px, got 99 x"),
    (body(lambda t, h: t["images"].fill_(1.5)), 422, "images: values must be in"),
    (body(lambda t, h: t["images"].fill_(torch.nan)), 422, "images: values must be in"),
    (body(lambda t, h: t.update(images=torch.zeros(2, 3, 4, 4).half())), 422, "float32 or uint8"),
    (body(lambda t, h: t.update({"mask.0.0": torch.zeros(1, 2, 2)})), 422, "size of its reference"),
    (b"x" * (2**20 + 1), 413, "body: must be at most 1048576 bytes"),
]


def test_bad_requests_are_named_and_the_server_goes_on() -> None:
    with reward_server({"grey": Brightness()}, max_images=8, max_side=64, max_megabytes=1) as url:
        for content, status, text in BAD:
            answer = post(url, content)
            assert (answer.status_code, text in answer.json()["detail"]) == (status, True), (
                text,
                answer.text,
            )
        assert httpx2.post(f"{url}/score", content=body()).status_code == 415
        assert post(url, body()).json()["scores"] == [0.25, 0.5]


def test_the_token_guards_all_but_health() -> None:
    with reward_server({"grey": Brightness()}, token="abc") as url:
        assert httpx2.get(f"{url}/health").status_code == 200
        assert httpx2.get(f"{url}/rewards").status_code == 401
        for given in ("", "abc", "Bearer ab", "Bearer abcd"):
            assert post(url, body(), authorization=given).status_code == 401
        assert post(url, body(), authorization="Bearer abc").status_code == 200
        assert httpx2.get(f"{url}/docs").status_code == 404


def test_the_wire_keeps_every_bit_and_sends_a_picture_once() -> None:
    photo = torch.rand(3, 33, 47)
    one = example(0, reference_masks=(torch.rand(1, 8, 6),))
    two = Example(id="two", prompt="näive \u2603", references=(photo, photo), subject="cat")
    images = torch.rand(5, 3, 40, 24)
    order = [one, two, one, two, two]
    encoded = encode_request("r", images, order)
    name, decoded, examples = decode_request(encoded, Limits())
    assert name == "r"
    assert torch.equal(decoded, images)
    for sent, got in zip(order, examples, strict=True):
        assert (got.prompt, got.subject) == (sent.prompt, sent.subject)
        assert got.id.startswith(f"{sent.id}@")
        for a, b in zip(sent.references, got.references, strict=True):
            assert torch.equal(a, b)
        assert (sent.reference_masks is None) == (got.reference_masks is None)
    assert examples[0].reference_masks is not None
    assert one.reference_masks is not None
    assert torch.equal(examples[0].reference_masks[0], one.reference_masks[0])
    floats = images.numel() + 2 * photo.numel() + 4 * 8 * 6
    assert len(encoded) < 4 * floats + 1500
    assert len(encode_request("r", images, order, "uint8")) < floats + 1500


def test_one_id_for_two_things_does_not_meet_in_a_reward_s_cache() -> None:
    a, b = example(1), example(1)
    ids = [
        decode_request(encode_request("r", grey(0.5), [e]), Limits())[2][0].id for e in (a, a, b)
    ]
    assert ids[0] == ids[1]
    assert ids[0] != ids[2]


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ({}, "rewards must be given"),
        ({"rewards": []}, "rewards"),
        ({"rewards": [{"type": "clip-text"}]}, "rewards.0.path must be given"),
        ({"prot": 1}, "prot must be a known field.*did you mean 'port'"),
        ({"port": 70000}, "port must be less than or equal to 65535"),
        ({"max_waiting": 8, "max_images": 9}, "max_waiting must be at least max_images = 9, got 8"),
        ({"host": "0.0.0.0"}, "token_env must be set to listen on '0.0.0.0'"),
    ],
)
def test_mistakes_of_the_config_get_one_line(raw: dict, text: str) -> None:
    reward = {"type": "clip-text", "path": "embedded:reward-clip"}
    raw = {"rewards": [reward]} | raw if raw else raw
    with pytest.raises(ConfigError, match=f"^server.yaml: .*{text}"):
        read_serve_config(raw, "server.yaml")
    with pytest.raises(ConfigError, match="names must be unique, got 'clip-text' twice"):
        read_serve_config({"rewards": [reward, reward]}, "server.yaml")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "either CONFIG or --reward YAML, got neither"),
        (["a.yaml", "--reward", "{}"], "either CONFIG or --reward YAML, got both"),
        (["a.yaml"], "a.yaml': No such file"),
        (["--reward", "{type: clip-tex}"], "did you mean 'clip-text'"),
        (["--reward", "{type: clip-text, path: nowhere}"], "rewards.0.path: checkpoint 'nowhere'"),
    ],
)
def test_the_command_refuses_mistakes(
    capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    assert main(["serve-reward", "--port", "0", *arguments]) == 2
    err = capsys.readouterr().err
    assert text in err
    assert err.count("\n") == 1


def test_a_taken_port_is_named_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "build_batchers", None)
    reward = '{type: clip-text, path: "embedded:reward-clip"}'
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve-reward", "--reward", reward, "--port", port]) == 2
    assert "in use" in capsys.readouterr().err


SLOW_REWARD = """
import time
from dataclasses import dataclass
from typing import Literal
from customized_grpo.config import RewardConfig

@dataclass(frozen=True, kw_only=True)
class Slow(RewardConfig):
    type: Literal["slow"] = "slow"
    def build(self, device):
        return self
    def score(self, images, examples):
        open("begun", "w").close()
        time.sleep(1)
        return images[:, 0, 0, 0]
"""


def test_the_command_serves_and_stops_gently(tmp_path: Path) -> None:
    """Even where none of the model libraries is installed, as in a reward's own environment."""
    (tmp_path / "slow.py").write_text(SLOW_REWARD)
    (tmp_path / "server.yaml").write_text('rewards: [{type: "slow:Slow", name: mine}]\n')
    block = (
        "import sys; sys.modules.update(dict.fromkeys(('transformers', 'diffusers', 'peft', "
        "'accelerate'))); from customized_grpo.cli.main import main; "
        "sys.exit(main(['serve-reward', 'server.yaml', '--port', '0']))"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", block], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line.startswith("serving mine at http://127.0.0.1:")
        url = line.split()[-1]
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(ask, url, grey(0.5), "mine")
            wait_until(lambda: (tmp_path / "begun").exists())
            os.kill(server.pid, signal.SIGTERM)
            assert answer.result().json()["scores"] == [0.5]
        assert server.wait(WAIT) in (0, -signal.SIGTERM)
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{url}/health")
    finally:
        server.kill()
        server.wait()
