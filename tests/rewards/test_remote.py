"""The client: the scores of a local reward, whatever the replicas are up to."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_near, targets

pytest.importorskip("fastapi", reason="needs the extra [serve]")

from servers import Brightness, Reply, Request, reward_server, scripted_server

from customized_grpo.data.emoji.source import EmojiSource
from customized_grpo.errors import ConfigError, RewardError
from customized_grpo.rewards.base import RewardSet
from customized_grpo.rewards.clip_text import ClipTextConfig
from customized_grpo.rewards.dinov2 import Dinov2Config
from customized_grpo.rewards.endpoints import http_client
from customized_grpo.rewards.endpoints.http_client import Backoff
from customized_grpo.rewards.endpoints.remote import RemoteReward, RemoteRewardConfig
from customized_grpo.rewards.endpoints.wire import Limits, decode_request
from customized_grpo.types import Example

CPU = torch.device("cpu")
LOCAL = {
    "clip": ClipTextConfig(path="embedded:reward-clip", objective="prompt"),
    "dino": Dinov2Config(path="embedded:reward-dino", objective="identity"),
    "subject": Dinov2Config(path="embedded:reward-dino", objective="identity", region="subject"),
}


def config(*urls: str, reward: str = "brightness", **fields) -> RemoteRewardConfig:
    return RemoteRewardConfig(urls=urls, reward=reward, objective="prompt", **fields)


def client(settings: RemoteRewardConfig, **fields) -> RemoteReward:
    """A client that does not really wait between its tries."""
    built = settings.build(CPU)
    built._backoff = dataclasses.replace(built._backoff, sleep=lambda seconds: None, **fields)
    return built


def levels(count: int) -> tuple[torch.Tensor, list[Example]]:
    """Images of as many levels of grey, whose brightness tells which is which."""
    grey = torch.arange(count) / count
    images = grey.view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    references = (torch.zeros(3, 8, 8),)
    examples = [
        Example(id=str(i), prompt=f"p{i}", references=references, subject="s") for i in range(count)
    ]
    return images, examples


def brightness_of(images: torch.Tensor) -> torch.Tensor:
    return images[:, 0, 0, 0]


@pytest.fixture(scope="module")
def world() -> tuple[torch.Tensor, list[Example]]:
    """Groups of three images of the same example, as a rollout has them."""
    examples = [e for e in EmojiSource(seed=0).held_out(3) for _ in range(3)]
    noise = torch.rand(9, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return torch.lerp(targets(examples), noise, 0.3), examples


def test_scores_equal_those_of_the_local_reward(world: tuple[torch.Tensor, list[Example]]) -> None:
    images, examples = world
    local = {name: plug.build(CPU) for name, plug in LOCAL.items()}
    with torch.no_grad(), reward_server(local) as url:
        for name, reward in local.items():
            expected = reward.score(images, examples)
            whole = client(config(url, reward=name)).score(images, examples)
            assert torch.equal(whole, expected)  # the same numbers in one batch: the same bits
            split = client(config(url, reward=name, batch_size=2)).score(images, examples)
            assert_near(split, expected, scale=1)
            small = client(config(url, reward=name, pixels="uint8")).score(images, examples)
            torch.testing.assert_close(small, expected, atol=0.01, rtol=0)
            assert not torch.equal(small, expected)


def test_order_is_kept_under_random_delays() -> None:
    images, examples = levels(40)
    delays = random.Random(0)
    rewards = [Brightness(lambda _: time.sleep(delays.uniform(0, 0.03))) for _ in range(3)]
    with (
        reward_server({"brightness": rewards[0]}, max_images=4) as a,
        reward_server({"brightness": rewards[1]}, max_images=4) as b,
        reward_server({"brightness": rewards[2]}, max_images=4) as c,
    ):
        scores = client(config(a, b, c, batch_size=3, concurrency=3)).score(images, examples)
    assert torch.equal(scores, brightness_of(images))
    assert all(reward.batches for reward in rewards)


def test_one_batch_is_shared_out_among_the_replicas() -> None:
    images, examples = levels(16)
    rewards = [Brightness(), Brightness()]
    with (
        reward_server({"brightness": rewards[0]}) as a,
        reward_server({"brightness": rewards[1]}) as b,
    ):
        client(config(a, b, batch_size=16)).score(images, examples)
    assert [reward.batches for reward in rewards] == [[8], [8]]


def test_a_replica_that_dies_is_replaced_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    images, examples = levels(12)
    now = [0.0]
    with reward_server({"brightness": Brightness()}) as alive:
        with reward_server({"brightness": Brightness()}) as dying:
            reward = client(config(alive, dying, batch_size=2))
            reward._clock = lambda: now[0]
            assert torch.equal(reward.score(images, examples), brightness_of(images))
            assert reward.metrics()["healthy_replicas"] == 2
        port = int(dying.rsplit(":", 1)[1])
        assert torch.equal(reward.score(images, examples), brightness_of(images))
        assert reward.metrics()["healthy_replicas"] == 1
        assert reward.metrics()["retries"] >= 1
        before = reward.metrics()["requests"]
        assert torch.equal(reward.score(images, examples), brightness_of(images))
        assert reward.metrics()["requests"] == before + 6  # nothing is sent to the dead one
        back = Brightness()
        with reward_server({"brightness": back}, port=port):
            assert torch.equal(reward.score(images, examples), brightness_of(images))
            assert back.batches == []  # it still has its rest
            now[0] += 60
            assert torch.equal(reward.score(images, examples), brightness_of(images))
            assert back.batches
            assert reward.metrics()["healthy_replicas"] == 2
    assert reward.metrics()["failed_images"] == 0
    assert reward.take_errors() == ()


def answers(request: Request, **reply) -> Reply:
    """A server that is well until it is asked for scores."""
    if request.path == "/rewards":
        limits = {"max_images": 64}
        return Reply.json({"version": 1, "rewards": [{"name": "brightness"}], "limits": limits})
    if request.path == "/health":
        return Reply.json({"version": 1, "status": "ok"})
    return Reply(**reply)


def scored(request: Request) -> dict:
    _, images, _ = decode_request(request.body, Limits())
    return {
        "version": 1,
        "scores": brightness_of(images).tolist(),
        "errors": [None] * len(images),
    }


def outcome(scores: list, **changes) -> bytes:
    errors = [None] * len(scores)
    return json.dumps({"version": 1, "scores": scores, "errors": errors} | changes).encode()


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ({"status": 500, "body": b'{"detail": "out of memory"}'}, "HTTP 500: out of memory"),
        ({"status": 502, "body": b"<html>\nbad gateway"}, "HTTP 502: <html> bad gateway"),
        ({"hang": True}, "no answer within 0.3 s"),
        ({"close": True}, "RemoteProtocolError"),
        ({"body": b"\xff\x00garbage"}, r"not JSON \(application/json\)"),
        ({"body": b"[]"}, "must be of version 1"),
        ({"body": outcome([0.5] * 3, version=2)}, "must be of version 1"),
        ({"body": outcome([0.5] * 2)}, "must have 3 scores"),
        ({"body": outcome([0.5] * 3, errors=[])}, "must have 3 errors"),
        ({"body": outcome([0.5, "1", True])}, "must be numbers or null"),
        ({"body": outcome([0.5, 10**400, 1])}, "must fit a float"),
        ({"body": outcome([0.5] * 3, errors=[None, 1, {}])}, "must be texts or null"),
    ],
)
def test_a_server_that_misbehaves_is_tried_again_and_then_an_error(reply: dict, text: str) -> None:
    images, examples = levels(3)
    with scripted_server(lambda request: answers(request, **reply)) as (url, requests):
        reward = client(config(url, retries=2))
        if "hang" in reply:  # a busy machine may need longer for all others
            reward._endpoint = dataclasses.replace(reward._endpoint, timeout=0.3)
        with pytest.raises(RewardError, match=f"none of {url} scored any of the 3 images.*{text}"):
            reward.score(images, examples)
        assert sum(request.path == "/score" for request in requests) == 3
    assert reward.metrics()["failed_images"] == 3


def test_an_answer_that_trickles_in_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every read is in time; all together they are not."""
    images, examples = levels(3)
    clock = itertools.count(step=100.0)
    with scripted_server(lambda r: answers(r, body=outcome([0.5] * 3))) as (url, _):
        reward = client(config(url, retries=0, timeout=60))
        monkeypatch.setattr(http_client, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        with pytest.raises(RewardError, match="no complete answer within 60 s"):
            reward.score(images, examples)


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_what_would_fail_again_is_not_tried_again(status: int) -> None:
    images, examples = levels(3)
    with scripted_server(lambda r: answers(r, status=status, body=b"no")) as (url, requests):
        with pytest.raises(RewardError, match=f"HTTP {status}: no"):
            client(config(url)).score(images, examples)
        assert sum(request.path == "/score" for request in requests) == 1


def test_a_part_that_fails_is_nan_and_the_others_are_scored() -> None:
    images, examples = levels(8)

    def answer(request: Request) -> Reply:
        if request.path == "/score" and b"p5" in request.body:
            return Reply(status=500, body=b"cannot do this one")
        return Reply.json(scored(request)) if request.path == "/score" else answers(request)

    with scripted_server(answer) as (url, _):
        reward = client(config(url, batch_size=2, retries=1))
        scores = reward.score(images, examples)
    assert scores.isnan().tolist() == [False] * 4 + [True] * 2 + [False] * 2
    assert torch.equal(scores[:4], brightness_of(images[:4]))
    (error,) = reward.take_errors()
    assert error == f"2 of 8 images: {url}: HTTP 500: cannot do this one"
    assert reward.take_errors() == ()
    assert reward.metrics()["failed_images"] == 2


@pytest.mark.parametrize("pixels", ["float32", "uint8"])
def test_what_is_not_finite_is_not_sent(pixels: str) -> None:
    images, examples = levels(4)
    images = images.clone()
    images[2, 0, 0, 0] = torch.nan
    with reward_server({"brightness": Brightness()}) as url:
        reward = client(config(url, pixels=pixels))
        scores = reward.score(images, examples)
        assert reward.score(images[2:3], examples[2:3]).isnan().all()
    assert scores.isnan().tolist() == [False, False, True, False]
    assert (scores - brightness_of(images))[[0, 1, 3]].abs().max() < 1 / 255
    assert reward.metrics()["requests"] == 1


def test_totals_go_on_after_a_break() -> None:
    images, examples = levels(4)
    with reward_server({"brightness": Brightness()}) as url:
        rewards = RewardSet([config(url)], CPU)
        before = {"requests": 7.0, "retries": 2.0, "failed_images": 3.0, "healthy_replicas": 0.0}
        rewards.restore({f"remote/{name}": value for name, value in before.items()})
        rewards.score(images, examples)
        after = before | {"requests": 8.0, "healthy_replicas": 1.0}
        assert rewards.metrics() == {f"remote/{name}": value for name, value in after.items()}


def test_unscorable_images_are_nan_with_the_server_s_words() -> None:
    images, examples = levels(4)
    body = outcome([0.1, None, 0.3, None], errors=[None, "too dark", None, "too dark"])
    with scripted_server(lambda request: answers(request, body=body)) as (url, _):
        settings = config(url, name="far")
        rewards = RewardSet([settings], CPU)
        result = rewards.score(images, examples)
    assert result.scores[:, 0].isnan().tolist() == [False, True, False, True]
    assert result.errors == ("far: 2 of 4 images: too dark",)
    assert rewards.metrics()["far/failed_images"] == 2


def test_a_busy_server_is_asked_again_when_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    images, examples = levels(2)
    busy = [Reply(status=503, headers={"retry-after": "7"}), Reply(status=429)]

    def answer(request: Request) -> Reply:
        if request.path != "/score":
            return answers(request)
        return busy.pop() if busy else Reply.json(scored(request))

    waits: list[float] = []
    with scripted_server(answer) as (url, _):
        reward = config(url).build(CPU)
        reward._backoff = Backoff(retries=3, sleep=waits.append, jitter=lambda: 0.5)
        reward._clock = lambda: 0.0
        assert torch.equal(reward.score(images, examples), brightness_of(images))
    assert waits == [0.25 + 0.25, 7 + 0.5]


def test_backoff_doubles_with_jitter_up_to_its_cap() -> None:
    from customized_grpo.rewards.endpoints.http_client import PermanentFailure, TemporaryFailure

    waits: list[float] = []

    def fail(retry_after: float | None = None) -> None:
        raise TemporaryFailure("down", retry_after)

    backoff = Backoff(retries=6, base=1, cap=8, sleep=waits.append, jitter=lambda: 0.25)
    with pytest.raises(TemporaryFailure, match="down"):
        backoff.run(fail)
    assert waits == [0.75, 1.5, 3, 6, 6, 6]
    with pytest.raises(PermanentFailure, match="asks to wait 9 s, at most 8 are waited"):
        backoff.run(lambda: fail(9.0))
    assert len(waits) == 6


def test_a_token_is_needed_and_never_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    images, examples = levels(2)
    monkeypatch.setenv("REWARD_TOKEN", "s3cret-t0ken")
    with (
        caplog.at_level("DEBUG"),
        reward_server({"brightness": Brightness()}, token="s3cret-t0ken") as url,
    ):
        with pytest.raises(ConfigError, match="HTTP 401"):
            config(url).build(CPU)
        reward = client(config(url, token_env="REWARD_TOKEN"))
        assert torch.equal(reward.score(images, examples), brightness_of(images))
        monkeypatch.setenv("REWARD_TOKEN", "another")
        with pytest.raises(ConfigError, match="HTTP 401"):
            config(url, token_env="REWARD_TOKEN").build(CPU)
    assert "s3cret-t0ken" not in caplog.text

    def echo(request: Request) -> Reply:
        return answers(request, status=403, body=request.headers["authorization"].encode())

    monkeypatch.setenv("REWARD_TOKEN", "s3cret-t0ken")
    with scripted_server(echo) as (url, _):
        reward = client(config(url, token_env="REWARD_TOKEN"))
        with pytest.raises(RewardError, match=r"HTTP 403: Bearer \*\*\*$"):
            reward.score(images, examples)
    monkeypatch.delenv("REWARD_TOKEN")
    with pytest.raises(ConfigError, match="token_env: the environment variable 'REWARD_TOKEN'"):
        config(url, token_env="REWARD_TOKEN").build(CPU)


@pytest.mark.parametrize("token", ["1", "score", "version"])
def test_a_short_token_leaves_the_answers_whole(
    monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    images, examples = levels(2)
    monkeypatch.setenv("REWARD_TOKEN", token)

    def answer(request: Request) -> Reply:
        said = request.headers["authorization"]
        body = outcome([1.0, None], errors=[None, said])
        return answers(request, body=body)

    with scripted_server(answer) as (url, _):
        reward = client(config(url, token_env="REWARD_TOKEN"))
        scores = reward.score(images, examples)
    assert scores[0] == 1
    assert reward.take_errors() == ("1 of 2 images: Bearer ***",)


def test_mistakes_show_before_the_run() -> None:
    with reward_server({"brightness": Brightness()}, max_images=8) as url:
        with pytest.raises(ConfigError, match="did you mean 'brightness'"):
            config(url, reward="brightnes").build(CPU)
        with pytest.raises(ConfigError, match=r"batch_size must be at most 8.*got 9"):
            config(url, batch_size=9).build(CPU)
        gone = "http://127.0.0.1:9"
        with pytest.raises(RewardError, match=f"no replica answers: {gone}: ConnectError"):
            config(gone).build(CPU)
        assert client(config(gone, url, batch_size=8)).metrics()["healthy_replicas"] == 1
    for reply, text in (
        ({"body": b'{"version": 1}'}, "is no reward server"),
        ({"status": 404}, "answers HTTP 404"),
        (
            {"body": b'{"version": 2, "rewards": [], "limits": {"max_images": 1}}'},
            "must speak version 1 of the protocol, got 2",
        ),
    ):
        with (
            scripted_server(lambda _, reply=reply: Reply(**reply)) as (other, _),
            pytest.raises(ConfigError, match=text),
        ):
            config(other).build(CPU)


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("gpu2:8100", "must be an http"),
        ("ftp://gpu2", "must be an http"),
        ("http://me:pw@gpu2:8100", "must hold no user or password, got one for 'gpu2'"),
        ("http://gpu2/?a=b", "must be an http.* without a query"),
        ("http://", "must be an http"),
        ("http://gpu2:port", "must be an http.*port"),
    ],
)
def test_urls_are_checked(url: str, text: str) -> None:
    with pytest.raises(ValueError, match=rf"urls\.0 {text}"):
        config(url)
