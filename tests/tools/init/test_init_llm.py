"""Prompts by a language model: a real server on localhost, whose answers are checked."""

import itertools
import json

import pytest
from servers import Reply, Request, scripted_server

from customized_grpo.errors import ConfigError, DataError
from customized_grpo.tools.init.llm import Writer
from customized_grpo.tools.init.prompts import KINDS

numbers = itertools.count()


def completion(text: object) -> Reply:
    return Reply.json({"choices": [{"message": {"content": text}}]})


def good(request: Request) -> Reply:
    """Ten new prompts, whatever is asked, wrapped as chatty models do."""
    prompts = [f"a dog beside {next(numbers)} candles" for _ in range(10)]
    return completion(f"Here you are:\n```json\n{json.dumps({'prompts': prompts})}\n```")


def writer(url: str, **fields) -> Writer:
    return Writer(url=f"{url}/v1/", model="m", **({"retries": 0} | fields))


def test_good_answers_become_prompts_of_every_kind(caplog: pytest.LogCaptureFixture) -> None:
    info = caplog.at_level("INFO", "customized_grpo")
    with info, scripted_server(good) as (url, requests):
        prompts = writer(url).write("dog", True, 40)
    assert caplog.messages == ["asking m for 40 prompts"]
    everything = [*prompts.training, *prompts.validation, *prompts.held_out]
    assert len({p.text for p in everything}) == 40
    counts = [sum(p.kind == kind for p in everything) for kind in KINDS]
    assert counts == [14, 13, 13]
    assert (len(prompts.validation), len(prompts.held_out)) == (3, 6)
    assert {request.path for request in requests} == {"/v1/chat/completions"}
    first, second = (json.loads(request.body) for request in requests[:2])
    assert first["model"] == "m"
    assert '"dog", a live subject' in first["messages"][0]["content"]
    assert "candles" in second["messages"][0]["content"]  # what it has said, not to be said again
    assert "authorization" not in requests[0].headers


def test_what_cannot_be_used_is_left_out_and_asked_for_again() -> None:
    def answer(request: Request) -> Reply:
        number = next(numbers)
        usable = [f"a dog on {number} cushions", f"a Dog on {number} stones"]
        useless = ["a cat on a mat", "", 7, "a dog\nin two lines", "dog " * 200]
        return completion(json.dumps({"prompts": [*usable, *useless, usable[0]]}))

    with scripted_server(answer) as (url, _):
        prompts = writer(url).write("dog", True, 15)
    everything = [p.text for p in (*prompts.training, *prompts.validation, *prompts.held_out)]
    assert len(everything) == 15
    assert all("dog on" in text.lower() for text in everything)


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (completion('{"prompts": ["a cat on a mat"]}'), r"only 0 of 5 .*does not say 'dog'"),
        (completion('{"prompts": []}'), r"only 0 of 5 .*empty answers"),
        (completion("Certainly! A dog on a beach."), "holds no JSON object .* 'Certainly!"),
        (completion('{"prompts": "a dog"}'), "holds no JSON object"),
        (completion(None), "no chat completion with a text"),
        (Reply.json([]), "no chat completion with a text"),
        (Reply(body=b"<html>"), "not JSON"),
        (Reply.json({"error": {"message": "wrong key"}}, status=401), "HTTP 401: wrong key"),
        (Reply(close=True), "m at http"),
    ],
)
def test_a_failure_is_one_clear_error(reply: Reply, says: str) -> None:
    with (
        scripted_server(lambda request: reply) as (url, _),
        pytest.raises(DataError, match=says) as caught,
    ):
        writer(url).write("dog", True, 15)
    assert "leave --llm out" in str(caught.value)


def test_a_server_that_is_busy_is_asked_again() -> None:
    replies = iter([Reply(status=503, headers={"retry-after": "0"})])
    with scripted_server(lambda request: next(replies, None) or good(request)) as (url, _):
        assert writer(url, retries=1).write("dog", True, 30).training


def test_the_key_comes_from_the_environment_and_stays_secret(monkeypatch) -> None:
    monkeypatch.setenv("MY_KEY", "s3cret-key")
    refused = Reply.json({"error": {"message": "bad key s3cret-key"}}, status=403)
    with (
        scripted_server(lambda request: refused) as (url, requests),
        pytest.raises(DataError, match="HTTP 403") as caught,
    ):
        writer(url, key_env="MY_KEY").write("dog", True, 15)
    assert requests[0].headers["authorization"] == "Bearer s3cret-key"
    assert "s3cret" not in str(caught.value)
    with pytest.raises(ConfigError, match="--llm-key-env: the environment variable 'NONE'"):
        writer("http://127.0.0.1:1", key_env="NONE").write("dog", True, 15)
    with pytest.raises(ConfigError, match="--llm must be an http"):
        writer("localhost:8000").write("dog", True, 15)
