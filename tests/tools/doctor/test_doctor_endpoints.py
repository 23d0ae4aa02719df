"""Remote rewards and judges: real servers on localhost, and ports where nobody listens."""

from __future__ import annotations

import dataclasses
import socket
from typing import Any

import pytest
from servers import Brightness, Reply, reward_server, scripted_server

from customized_grpo.config import RunConfig
from customized_grpo.rewards.endpoints.remote import RemoteRewardConfig
from customized_grpo.rewards.endpoints.vlm_judge import VlmJudgeConfig
from customized_grpo.tools.doctor.findings import Finding
from customized_grpo.tools.doctor.run import plugs

SECRET = "s3cret-k3y"
MODELS = Reply.json({"object": "list", "data": [{"id": "judge-7b"}, {"id": "other"}]})


def closed_port() -> str:
    """Where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def look(config: RunConfig, plug: Any) -> Finding:
    """As an evaluator."""
    (finding,) = plugs(dataclasses.replace(config, evaluators=(plug,)))
    assert finding.check == "evaluators.0"
    assert SECRET not in str(finding)
    return finding


def remote(*urls: str, **fields: Any) -> RemoteRewardConfig:
    return RemoteRewardConfig(objective="any", urls=urls, reward="brightness", **fields)


def judge(url: str, **fields: Any) -> VlmJudgeConfig:
    fields = {"model": "judge-7b", **fields}
    return VlmJudgeConfig(objective="any", criterion="prompt", base_url=url, **fields)


def test_remote_rewards(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = closed_port()
    finding = look(tiny_config, remote(dead))
    assert finding.status == "problem"
    assert f"no replica answers: {dead}: ConnectError" in finding.found
    assert "cgrpo serve-reward" in finding.fix
    monkeypatch.setenv("REWARD_TOKEN", SECRET)
    with reward_server({"brightness": Brightness()}, SECRET) as url:
        good = remote(url, token_env="REWARD_TOKEN")
        finding = look(tiny_config, good)
        assert (finding.status, finding.found) == ("ok", f"it uses {url.removeprefix('http://')}")
        finding = look(tiny_config, dataclasses.replace(good, urls=(url, dead)))
        assert finding.status == "warning"
        assert f"not there yet: {dead}: ConnectError" in finding.found
        finding = look(tiny_config, dataclasses.replace(good, reward="brightnes"))
        assert (finding.status, finding.fix) == ("problem", "did you mean 'brightness'?")
        finding = look(tiny_config, remote(url))
        assert finding.status == "problem"
        assert "HTTP 401" in finding.found
    finding = look(tiny_config, remote(dead, token_env="NOT_SET"))
    assert (finding.status, finding.fix) == ("problem", "export it")


def test_judges(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = look(tiny_config, judge(f"{closed_port()}/v1"))
    assert finding.status == "problem"
    assert finding.found.startswith("base_url: ")
    assert "ConnectError" in finding.found
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    reply = MODELS

    with scripted_server(lambda request: reply) as (url, requests):
        finding = look(tiny_config, judge(f"{url}/v1/", api_key_env="JUDGE_KEY"))
        assert (finding.status, finding.found) == ("ok", f"it uses {url.removeprefix('http://')}")
        assert requests[0].path == "/v1/models"
        assert requests[0].headers["authorization"] == f"Bearer {SECRET}"
        finding = look(tiny_config, judge(url, model="judge-8b"))
        assert (finding.status, finding.fix) == ("warning", "did you mean 'judge-7b'?")
        reply = Reply(status=401, body=SECRET.encode())
        finding = look(tiny_config, judge(url, api_key_env="JUDGE_KEY"))
        assert finding.status == "problem"
        assert "api_key_env: " in finding.found
        assert "HTTP 401: ***" in finding.found
        reply = Reply(status=404, body=b"an endpoint may list no models")
        assert look(tiny_config, judge(url)).status == "ok"
        reply = Reply.json({"data": None})
        assert look(tiny_config, judge(url)).status == "ok"
        reply = Reply(status=500)
        assert look(tiny_config, judge(url)).status == "problem"
    finding = look(tiny_config, judge("http://127.0.0.1:9", api_key_env="NOT_SET"))
    assert (finding.status, finding.fix) == ("problem", "export it")
