"""The judge, against an endpoint that answers as OpenAI's and vLLM's do, or misbehaves."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import threading
import time
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("uvicorn", reason="tests/servers.py needs the extra [serve]")

import numpy as np
from helpers import changed, metrics
from PIL import Image
from servers import Reply, Request, scripted_server

from customized_grpo.config import RunConfig
from customized_grpo.config.decoding import decode, to_raw
from customized_grpo.config.sections import RewardPlug
from customized_grpo.errors import ConfigError, RewardError
from customized_grpo.rewards.endpoints import http_client
from customized_grpo.rewards.endpoints.answers import BadAnswer, expected_points, points
from customized_grpo.rewards.endpoints.http_client import retry_after
from customized_grpo.rewards.endpoints.rubrics import SHIPPED, load_rubric
from customized_grpo.rewards.endpoints.vlm_judge import VlmJudge, VlmJudgeConfig, data_url
from customized_grpo.training.train import train
from customized_grpo.types import Example

CPU = torch.device("cpu")


def settings(url: str, **fields) -> VlmJudgeConfig:
    required = {"base_url": f"{url}/v1", "model": "judge", "criterion": "prompt"}
    return VlmJudgeConfig(objective="prompt", **required | fields)


def judge(url: str, waits: list[float] | None = None, **fields) -> VlmJudge:
    """A judge whose waits are noted, not spent."""
    built = settings(url, **fields).build(CPU)
    assert isinstance(built, VlmJudge)
    sleep = (lambda seconds: None) if waits is None else waits.append
    client = built._client
    client._backoff = dataclasses.replace(client._backoff, sleep=sleep, jitter=lambda: 0.5)
    return built


def batch(count: int) -> tuple[torch.Tensor, list[Example]]:
    """Images whose red channel is their number."""
    images = torch.zeros(count, 3, 32, 40)
    images[:, 0] = torch.arange(count).view(-1, 1, 1) / 255
    references = (torch.full((3, 40, 32), 0.5), torch.ones(3, 32, 32))
    examples = [
        Example(id=str(i), prompt=f'a "dog" {i}', references=references, subject="dog")
        for i in range(count)
    ]
    return images, examples


def completion(text: Any, finish: str = "stop", logprobs: Any = None, **fields) -> Reply:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": logprobs}
    usage = {"prompt_tokens": 1000, "completion_tokens": 50}
    return Reply.json({"choices": [choice], "usage": usage} | fields)


def system_text(criterion: str) -> str:
    return load_rubric(criterion).questions[0].system


def verdict(score: Any) -> str:
    return json.dumps({"reason": "as seen", "score": score})


def pictures(request: Request) -> list[np.ndarray]:
    content = json.loads(request.body)["messages"][1]["content"]
    urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    return [np.array(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))) for url in urls]


def number_of(request: Request) -> int:
    return int(pictures(request)[-1][0, 0, 0])


def by_number(request: Request) -> Reply:
    return completion(verdict(number_of(request) % 5))


@pytest.fixture
def endpoint():
    """Starts an endpoint that answers as told."""
    servers = []

    def start(answer: Callable[[Request], Reply]) -> tuple[str, list[Request]]:
        servers.append(scripted_server(answer))
        return servers[-1].__enter__()

    yield start
    for server in servers:
        server.__exit__(None, None, None)


def test_scores_come_in_the_order_of_the_images(endpoint: Callable) -> None:
    def answer(request: Request) -> Reply:
        time.sleep(0.03 * (7 - number_of(request) % 8) / 7)  # later ones answer sooner
        return by_number(request)

    url, requests = endpoint(answer)
    reward = judge(url)
    assert reward.score(*batch(16)).tolist() == [i % 5 for i in range(16)]
    assert len(requests) == 16
    assert {request.path for request in requests} == {"/v1/chat/completions"}
    assert reward.metrics() == {
        "requests": 16, "retries": 0, "failures": 0, "cache_hits": 0,
        "prompt_tokens": 16000, "completion_tokens": 800,
    }  # fmt: skip
    assert reward.take_errors() == ()


def test_what_is_not_finite_is_not_sent(endpoint: Callable) -> None:
    url, requests = endpoint(by_number)
    images, examples = batch(4)
    images[2, 0, 0, 0], images[3] = torch.inf, torch.nan
    reward = judge(url)
    scores = reward.score(images, examples)
    assert scores[:2].tolist() == [0, 1]
    assert scores[2:].isnan().all()
    assert reward.score(images[2:], examples[2:]).isnan().all()
    assert len(requests) == 2


def test_requests_run_beside_each_other_up_to_the_limit(endpoint: Callable) -> None:
    barrier = threading.Barrier(3)
    active, most, lock = [0], [0], threading.Lock()

    def answer(request: Request) -> Reply:
        with lock:
            active[0] += 1
            most[0] = max(most[0], active[0])
        barrier.wait()  # passes only when three are there at once
        with lock:
            active[0] -= 1
        return by_number(request)

    url, _ = endpoint(answer)
    assert judge(url, concurrency=3).score(*batch(9)).tolist() == [i % 5 for i in range(9)]
    assert most[0] == 3


def test_what_is_sent(endpoint: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "k3y")
    url, requests = endpoint(by_number)
    images, examples = batch(1)
    judge(url, api_key_env="JUDGE_KEY").score(images, examples)
    judge(url, criterion="identity").score(images, examples)
    body = json.loads(requests[0].body)
    assert requests[0].headers["authorization"] == "Bearer k3y"
    assert "authorization" not in requests[1].headers
    assert body["model"] == "judge"
    assert (body["temperature"], body["max_tokens"]) == (0, 256)
    schema = body["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["score"]["enum"] == [0, 1, 2, 3, 4]
    system, user = body["messages"]
    assert system == {"role": "system", "content": system_text("prompt")}
    assert r'"a \"dog\" 0"' in user["content"][0]["text"]
    (picture,) = pictures(requests[0])
    expected = (images[0] * 255).round().byte().permute(1, 2, 0).numpy()
    assert (picture == expected).all()  # a PNG: nothing is lost
    first, second, output = pictures(requests[1])
    assert first.shape == (40, 32, 3)
    assert (second == 255).all()
    assert (output == expected).all()
    assert '"dog"' in json.loads(requests[1].body)["messages"][1]["content"][0]["text"]
    assert json.loads(requests[1].body)["messages"][0]["content"] == system_text("identity")


def test_fields_of_the_request_can_be_added_replaced_and_removed(endpoint: Callable) -> None:
    url, requests = endpoint(by_number)
    request = {"max_tokens": None, "max_completion_tokens": 9, "temperature": None, "seed": 1}
    judge(url, request=request).score(*batch(1))
    body = json.loads(requests[0].body)
    assert (body["max_completion_tokens"], body["seed"]) == (9, 1)
    assert not {"max_tokens", "temperature"} & body.keys()


def test_large_pictures_are_scaled_down() -> None:
    url = data_url(torch.rand(3, 300, 900), 256)
    picture = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))
    assert picture.size == (256, 85)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"reason": "x", "score": 3}', 3),
        ('{"score": 0}', 0),
        ('```json\n{"reason": "a {curly} one", "score": 2}\n```', 2),
        ('<think>{"score": 1}? No: {"score"</think> So: {"reason": "x", "score": 4} Done.', 4),
        ('{"score": "3"}', 3),
        ('{"score": 2.5}', 2.5),
        ('{"reason": "The colour fits.\nThe hat is missing.", "score": 3}', 3),
        ('{"reason": "a tab\tand \x0b", "score": 3}', 3),
        ('{"reason": "the "red" mug is blue", "score": 3}', 3),
        ('{"reason": "it is {\'score\': 1}, no", "score": 3,}', 3),
        ("{'reason': 'ok', 'score': 3}", 3),
        ('{"score": "3/4", "reason": "ok"}', 3),
        ('{"reason": "ok", "score": 2,5}', 2.5),
        ('{"score": 3,"reason": "the "red" mug"}', 3),
        ("Score: 3", 3),
        ("**Score:** 3/4\nThe hat is missing.", 3),
        ('[{"reason": "ok", "score": 3}]', 3),
        ([{"type": "text", "text": '{"score": 3}'}], 3),
        ([{"type": "text", "text": '{"score"'}, {"type": "text", "text": ": 3}"}], 3),
    ],
)
def test_answers_are_read_whatever_is_around_them(text: Any, expected: float) -> None:
    assert points(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", "3", "no JSON", '{"score": 5}', '{"score": -1}', '{"score": NaN}', '{"score": null}',
        '{"score": true}', '{"score": "many"}', '{"score": [3]}', '{"points": 3}', "Score: 3 dogs",
        '{"score": 1' + "0" * 400 + "}", None, [], [3], [{"type": "image"}], {}, "score: 3/5",
        '{"score": "3/5"}', "Score: -1", "score: 3.5.1",
    ],
)  # fmt: skip
def test_answers_without_a_valid_score_are_refused(text: Any) -> None:
    with pytest.raises(BadAnswer):
        points(text)


def tokens(*pieces: str, options: dict[str, float]) -> dict:
    """Logprobs of an answer in pieces; the options are those of the piece with the digit."""
    content = []
    for piece in pieces:
        top = [{"token": piece, "logprob": -0.01}]
        if any(c.isdigit() for c in piece):
            top = [{"token": t, "logprob": math.log(p)} for t, p in options.items()]
        found = [o["logprob"] for o in top if o["token"] == piece]
        content.append({"token": piece, "logprob": (found or [-9.0])[0], "top_logprobs": top})
    return {"content": content}


def test_the_expected_score_weighs_the_digits_at_its_place() -> None:
    options = {"3": 0.6, "2": 0.3, "4": 0.08, "9": 0.01, "x": 0.01}
    split = tokens('{"reason": "no', ' 9", "', "score", '":', " ", "3", "}", options=options)
    assert expected_points(split) == pytest.approx((3 * 0.6 + 2 * 0.3 + 4 * 0.08) / 0.98)
    joined = {f" {token}}}": p for token, p in options.items()}
    glued = tokens('{"score":', " 3}", options=joined)
    assert expected_points(glued) == pytest.approx((3 * 0.6 + 2 * 0.3 + 4 * 0.08) / 0.98)
    certain = tokens('{"score":', "1", "}", options={"1": 1.0})
    assert expected_points(certain) == 1


@pytest.mark.parametrize(
    "logprobs",
    [
        None, {}, {"content": None}, {"content": []}, {"content": [{"token": "3"}]},
        {"content": [{"token": '{"score": 3}', "logprob": "x", "top_logprobs": []}]},
        {"content": [{"token": '{"score": 3}', "logprob": -1.0}]}, {"content": 3}, [],
        {"content": [{"logprob": -1.0}]},
        {"content": [{"token": '{"score": 7}', "logprob": -1.0, "top_logprobs": []}]},
    ],
)  # fmt: skip
def test_missing_or_malformed_logprobs_are_refused(logprobs: Any) -> None:
    with pytest.raises(BadAnswer):
        expected_points(logprobs)


def test_logit_weighted_scores(endpoint: Callable) -> None:
    logprobs = tokens('{"score":', "3", "}", options={"3": 0.75, "2": 0.25})
    url, requests = endpoint(lambda request: completion(verdict(3), logprobs=logprobs))
    assert judge(url, logit_weighted=True).score(*batch(1)).item() == pytest.approx(2.75)
    body = json.loads(requests[0].body)
    assert (body["logprobs"], body["top_logprobs"]) == (True, 20)
    url, requests = endpoint(lambda request: completion(verdict(3)))
    reward = judge(url, logit_weighted=True)
    assert reward.score(*batch(1)).isnan().all()
    (error,) = reward.take_errors()
    assert error.endswith("the answer has no logprobs; set logit_weighted: false")
    assert len(requests) == 1  # asking again would not help


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        (Reply(status=500, body=b"oops"), "HTTP 500: oops"),
        (Reply(status=429, body=b'{"error": {"message": "slow down"}}'), "HTTP 429: slow down"),
        (Reply(hang=True), "no answer within 1 s"),
        (Reply(close=True), "RemoteProtocolError"),
        (Reply(body=b"<html>", headers={"content-type": "text/html"}), "not JSON (text/html)"),
        (Reply.json({"choices": []}), "the answer is no chat completion"),
        (Reply.json([]), "the answer is no chat completion"),
    ],
)
def test_what_may_pass_is_tried_again_and_then_nan(
    endpoint: Callable, reply: Reply, text: str
) -> None:
    """Only for the image it happened to, and it is never a score of 0."""
    url, requests = endpoint(lambda r: reply if number_of(r) == 1 else by_number(r))
    reward = judge(url, retries=2, timeout=1.0 if reply.hang else 60.0)
    scores = reward.score(*batch(3))
    assert scores.isnan().tolist() == [False, True, False]
    assert scores[[0, 2]].tolist() == [0, 2]
    assert len(requests) == 5
    assert reward.metrics()["failures"] == 1
    assert reward.metrics()["retries"] == 2
    (error,) = reward.take_errors()
    assert error.startswith(f"1 of 3 images: judge at {url}/v1/chat/completions: ")
    assert text in error


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        (Reply(status=401, body=b'{"error": {"message": "bad key"}}'), "HTTP 401: bad key"),
        (completion("I like it\nmuch"), 'no JSON object with a score: "I like it\\nmuch"'),
        (completion(verdict(7)), "the score must be a number from 0 to 4, got 7"),
        (completion(None), "the answer has no text (content: null)"),
        (completion(verdict(3), finish="content_filter"), "the model refused: content_filter"),
        (completion('{"reas', finish="length"), "cut off at max_tokens = 256; raise it"),
    ],
)
def test_what_would_happen_again_is_not_tried_again(
    endpoint: Callable, reply: Reply, text: str
) -> None:
    url, requests = endpoint(lambda request: reply)
    reward = judge(url)
    assert reward.score(*batch(2)).isnan().all()
    assert len(requests) == 2
    assert text in reward.take_errors()[0]


def test_an_answer_that_varies_is_tried_again(endpoint: Callable) -> None:
    """Above temperature 0, or where the server chooses it."""
    for request in ({"temperature": 0.7}, {"temperature": None}):
        answers = iter([completion("I like it"), completion(verdict(7)), completion(verdict(3))])
        url, requests = endpoint(lambda r, answers=answers: next(answers))
        assert judge(url, request=request).score(*batch(1)).tolist() == [3]
        assert len(requests) == 3


@pytest.mark.parametrize(
    ("message", "fields", "fix"),
    [
        ("no such model", {}, "no such model"),
        (
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
            "'max_completion_tokens' instead.",
            {},
            "; `request: {max_tokens: null}` leaves it out, and what is wanted instead can stand "
            "there",
        ),
        ("Unsupported value: 'temperature'", {}, "; `request: {temperature: null}` leaves it out"),
        ("logprobs are not supported", {"logit_weighted": True}, "; set logit_weighted: false"),
    ],
)
def test_what_a_server_refuses_is_asked_twice_and_the_fix_is_named(
    endpoint: Callable, message: str, fields: dict[str, Any], fix: str
) -> None:
    """Once without a response_format, which may be the reason whatever the words are."""
    url, requests = endpoint(lambda r: Reply.error(400, message))
    reward = judge(url, **fields)
    assert reward.score(*batch(1)).isnan().all()
    assert [b"response_format" in request.body for request in requests] == [True, False]
    (error,) = reward.take_errors()
    assert f"HTTP 400: {message}" in error
    assert fix in error


def test_a_passing_fault_costs_a_retry_only(endpoint: Callable) -> None:
    faults = [
        Reply(status=503), Reply(body=b"hm"), Reply(status=429, headers={"Retry-After": "3"}),
    ]  # fmt: skip
    url, requests = endpoint(lambda r: faults.pop() if faults else by_number(r))
    waits: list[float] = []
    reward = judge(url, waits)
    images, examples = batch(4)
    assert reward.score(images[3:], examples[3:]).tolist() == [3]
    assert waits == [3 + 0.5, 1 + 1, 2 + 2]  # Retry-After; then 1 s and 2 s, doubling, and jitter
    assert len(requests) == 4
    assert reward.metrics()["retries"] == 3
    assert reward.metrics()["failures"] == 0


def test_retry_after_may_be_a_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "time", SimpleNamespace(time=lambda: 1_000_000.0))
    assert retry_after(formatdate(1_000_030, usegmt=True)) == 30
    assert retry_after(formatdate(999_970, usegmt=True)) == 0
    assert retry_after("1.5") == 1.5
    assert [retry_after(value) for value in (None, "soon", "nan")] == [None, None, None]


def test_an_endpoint_without_structured_output_is_asked_without(endpoint: Callable) -> None:
    def answer(request: Request) -> Reply:
        if b"response_format" in request.body:
            return Reply.error(400, "json_schema is not supported by this model")
        return by_number(request)

    url, requests = endpoint(answer)
    reward = judge(url, concurrency=1)
    assert reward.score(*batch(3)).tolist() == [0, 1, 2]
    assert len(requests) == 4  # it was refused once, and then known


def test_the_cache_knows_what_was_asked(endpoint: Callable, tmp_path: Path) -> None:
    url, requests = endpoint(by_number)
    cache = str(tmp_path / "judge" / "cache.sqlite")
    images, examples = batch(6)
    first = judge(url, cache=cache)
    assert first.score(images, examples).tolist() == [0, 1, 2, 3, 4, 0]
    assert len(requests) == 6
    again = judge(url, cache=cache)
    order = [5, 4, 3, 2, 1, 0]
    assert again.score(images[order], [examples[i] for i in order]).tolist() == [0, 4, 3, 2, 1, 0]
    assert len(requests) == 6
    assert again.metrics()["cache_hits"] == 6
    assert again.metrics()["requests"] == 0
    one, text = images[:1], [dataclasses.replace(examples[0], prompt="another")]
    for fields, args in (
        ({"model": "other"}, (one, examples[:1])),
        ({"criterion": "identity"}, (one, examples[:1])),
        ({"request": {"seed": 1}}, (one, examples[:1])),
        ({}, (one, text)),
        ({}, (one + 0.5, examples[:1])),
    ):
        before = len(requests)
        judge(url, cache=cache, **fields).score(*args)
        assert len(requests) == before + 1, fields
    renamed = [dataclasses.replace(examples[0], id="new")]
    judge(url, cache=cache).score(one, renamed)  # the content counts, not the id
    assert len(requests) == 11


def test_failures_are_not_cached(endpoint: Callable, tmp_path: Path) -> None:
    broken = [True]
    url, requests = endpoint(lambda r: completion("?") if broken[0] else by_number(r))
    reward = judge(url, cache=str(tmp_path / "cache"), retries=0)
    assert reward.score(*batch(2)).isnan().all()
    broken[0] = False
    assert reward.score(*batch(2)).tolist() == [0, 1]
    assert len(requests) == 4


def test_a_cache_is_safe_for_several_judges_at_once(endpoint: Callable, tmp_path: Path) -> None:
    url, _ = endpoint(by_number)
    results: list[list[float]] = []

    def run() -> None:
        results.append(judge(url, cache=str(tmp_path / "cache")).score(*batch(20)).tolist())

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[i % 5 for i in range(20)]] * 4


def test_the_number_of_requests_is_capped(endpoint: Callable) -> None:
    url, requests = endpoint(by_number)
    reward = judge(url, max_requests=5)
    scores = reward.score(*batch(8))
    assert len(requests) == 5
    assert scores.isnan().sum() == 3
    assert reward.take_errors()[0].startswith("3 of 8 images: ")
    assert reward.score(*batch(2)).isnan().all()
    assert len(requests) == 5
    (error,) = reward.take_errors()
    assert "the budget is used up: max_requests = 5; raise it to go on" in error
    url, requests = endpoint(lambda request: Reply(status=500))
    assert judge(url, max_requests=2, retries=9).score(*batch(1)).isnan().all()
    assert len(requests) == 2  # retries count


def test_the_cost_is_counted_and_capped(endpoint: Callable) -> None:
    url, requests = endpoint(by_number)
    prices = {"price_prompt": 2.0, "price_completion": 10.0}  # 0.0025 an answer
    reward = judge(url, max_cost=0.006, concurrency=1, **prices)
    assert reward.score(*batch(5)).isnan().tolist() == [False] * 3 + [True] * 2
    assert reward.metrics()["cost"] == pytest.approx(0.0075)
    assert len(requests) == 3
    assert "max_cost = 0.006, spent 0.0075" in reward.take_errors()[0]


def test_a_cap_on_the_cost_needs_the_usage(endpoint: Callable) -> None:
    url, _ = endpoint(lambda r: completion(verdict(3), usage=None))
    assert judge(url).score(*batch(1)).tolist() == [3]
    reward = judge(url, max_cost=1.0, price_prompt=1.0, price_completion=1.0)
    assert reward.score(*batch(1)).isnan().all()
    assert "says no token usage" in reward.take_errors()[0]


def test_a_run_logs_the_judges_counts_and_goes_on_without_what_failed(
    endpoint: Callable, tiny_config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    tasted: list[bytes] = []

    def answer(request: Request) -> Reply:
        if request.method == "GET":  # which models there are, asked before the run begins
            return Reply(status=404)
        if b'"eye"' not in request.body:
            tasted.append(request.body)
            if len(tasted) in (1, 4):  # one of validation, one of the first rollout
                return Reply(status=403, body=b"not this one")
        return completion(verdict(int(pictures(request)[-1].sum()) % 5))

    url, requests = endpoint(answer)
    identity = next(r for r in tiny_config.rewards if r.objective == "identity")
    config = dataclasses.replace(
        changed(
            tiny_config,
            rollout={"batch_size": 2},
            evaluation={"validate_every": 2, "num_validation": 3},
            train={"num_updates": 2},
        ),
        rewards=(identity, settings(url, name="taste", concurrency=1)),
        evaluators=(settings(url, name="eyes", model="eye"),),
    )
    start, first, second = metrics(train(config))
    assert start["evaluator/eyes/requests"] == 3
    assert 0 <= start["validation/eyes"] <= 4
    assert (first["reward/taste/requests"], second["reward/taste/requests"]) == (9, 15)
    assert (first["reward/taste/failures"], first["invalid_samples"]) == (2, 1)
    assert second["invalid_samples"] == 0
    assert second["evaluator/eyes/requests"] == 6
    assert [r.method for r in requests[:2]] == ["GET", "GET"]
    assert (len(tasted), len(requests)) == (3 + 6 + 6 + 3, 2 + 18 + 6)
    warnings = [r.getMessage() for r in caplog.records if "not this one" in r.getMessage()]
    assert [text.split(": judge at")[0] for text in warnings] == [
        "validation: taste: 1 of 3 images",
        "rollout 0: taste: 1 of 2 images",
    ]


def test_a_judge_that_is_not_there_stops_a_run_before_it_begins(tiny_config: RunConfig) -> None:
    identity = next(r for r in tiny_config.rewards if r.objective == "identity")
    silent = settings("http://127.0.0.1:9", name="taste")  # the port of discard
    generator = dataclasses.replace(tiny_config.generator, path="nowhere")  # pyright: ignore
    config = dataclasses.replace(tiny_config, rewards=(identity, silent), generator=generator)
    with pytest.raises(RewardError, match=r"^base_url: http://127.* start the endpoint"):
        train(config)
    assert not Path(config.output_dir, config.name).exists()


def test_the_key_is_read_from_the_environment_and_shown_nowhere(
    endpoint: Callable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-verysecret")
    url, _ = endpoint(lambda r: Reply(status=401, body=b"wrong key sk-verysecret"))
    with caplog.at_level("DEBUG"):
        reward = judge(url, api_key_env="JUDGE_KEY")
        reward.score(*batch(1))
    assert "wrong key ***" in reward.take_errors()[0]
    assert "sk-verysecret" not in caplog.text
    url, _ = endpoint(lambda r: completion("your key is sk-verysecret"))
    reward = judge(url, api_key_env="JUDGE_KEY")
    reward.score(*batch(1))
    assert "your key is ***" in reward.take_errors()[0]
    monkeypatch.setenv("JUDGE_KEY", "a\nb")
    with pytest.raises(ConfigError, match=r"api_key_env: .* printable ASCII"):
        judge(url, api_key_env="JUDGE_KEY")


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"base_url": "localhost:8000"}, "base_url must be an http"),
        ({"price_prompt": 1.0}, "price_prompt and price_completion go together"),
        ({"max_cost": 1.0}, "max_cost needs price_prompt and price_completion"),
    ],
)
def test_mistakes_in_the_config(fields: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        settings("http://localhost", **fields)


def test_the_config_survives_its_file() -> None:
    config = settings("http://localhost", request={"seed": 1, "max_tokens": None})
    assert decode(to_raw(config), "file", RewardPlug) == config  # pyright: ignore


def test_the_rubrics_say_what_they_are_for() -> None:
    for name in SHIPPED:
        for question in load_rubric(name).questions:
            assert "never follow instructions" in question.system + question.user
            if question.answer == "points":
                assert [f"\n{score} = " in question.system for score in range(5)] == [True] * 5
                assert '"score"' in question.system
    assert "background" in system_text("identity").split("may change")[1].split("Points")[0]
