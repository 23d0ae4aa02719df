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
from customized_grpo.tools.doctor.endpoints import endpoints
from customized_grpo.tools.doctor.findings import Finding

SECRET = "s3cret-k3y"
MODELS = Reply.json({"object": "list", "data": [{"id": "judge-7b"}, {"id": "other"}]})


def closed_port() -> str:
    """Where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def look(config: RunConfig, plug: Any) -> Finding:
    """As a reward and as an evaluator."""
    one, two = list(endpoints(dataclasses.replace(config, rewards=(plug,), evaluators=(plug,))))
    assert (one.check, two.check) == ("rewards.0", "evaluators.0")
    assert dataclasses.replace(two, check=one.check) == one
    return one


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
        assert (finding.status, finding.found) == ("ok", "1 of 1 replicas serve 'brightness'")
        finding = look(tiny_config, dataclasses.replace(good, urls=(url, dead)))
        assert finding.status == "warning"
        assert f"1 of 2 replicas serve 'brightness'; {dead}" in finding.found
        finding = look(tiny_config, dataclasses.replace(good, reward="brightnes"))
        assert (finding.status, finding.fix) == ("problem", "did you mean 'brightness'?")
        finding = look(tiny_config, remote(url))
        assert finding.status == "problem"
        assert "HTTP 401" in finding.found
    finding = look(tiny_config, remote(dead, token_env="NOT_SET"))
    assert (finding.status, finding.fix) == ("problem", "export it")
    assert SECRET not in str(finding)


def test_judges(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = look(tiny_config, judge(f"{closed_port()}/v1"))
    assert finding.status == "problem"
    assert "ConnectError" in finding.found
    assert "base_url" in finding.fix
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    reply = MODELS

    with scripted_server(lambda request: reply) as (url, requests):
        finding = look(tiny_config, judge(f"{url}/v1/", api_key_env="JUDGE_KEY"))
        assert (finding.status, finding.found) == ("ok", f"{url}/v1 has judge-7b")
        assert requests[0].path == "/v1/models"
        assert requests[0].headers["authorization"] == f"Bearer {SECRET}"
        finding = look(tiny_config, judge(url, model="judge-8b"))
        assert (finding.status, finding.fix) == ("warning", "did you mean 'judge-7b'?")
        reply = Reply.json({"data": None})
        assert look(tiny_config, judge(url)).fix == "correct model"
        reply = Reply(status=401, body=SECRET.encode())
        finding = look(tiny_config, judge(url, api_key_env="JUDGE_KEY"))
        assert finding.status == "problem"
        assert "HTTP 401: ***" in finding.found
        assert "api_key_env" in finding.fix
        reply = Reply(status=404, body=b"no such path")
        finding = look(tiny_config, judge(url))
        assert finding.status == "warning"
        assert "HTTP 404: no such path" in finding.found
        reply = Reply(status=500)
        assert look(tiny_config, judge(url)).status == "problem"
    finding = look(tiny_config, judge("http://127.0.0.1:9", api_key_env="NOT_SET"))
    assert (finding.status, finding.fix) == ("problem", "export it")


def test_rewards_that_run_here_are_not_asked(tiny_config: RunConfig) -> None:
    assert list(endpoints(tiny_config)) == []
