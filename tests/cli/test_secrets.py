"""A token or key is in no log, no config, no report and no message, whatever a server says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
from servers import Reply, Request, scripted_server

from customized_grpo.cli.main import main
from customized_grpo.config import RunConfig, dump_config, load_config
from customized_grpo.errors import ConfigError
from customized_grpo.rewards.endpoints.http_client import Endpoint, check_url
from customized_grpo.rewards.endpoints.remote import RemoteRewardConfig
from customized_grpo.rewards.endpoints.wire import VERSION, read_header
from customized_grpo.tools.serve.config import ServeConfig, read_serve_config

SECRET = "s3cret-t0ken"


def echo(request: Request) -> Reply:
    """Repeats the token wherever a run might take it over."""
    said = request.headers["authorization"]
    if request.method == "GET":
        limits = {"max_images": 64}
        return Reply.json({"version": VERSION, "rewards": [{"name": "echo"}], "limits": limits})
    count = len(read_header(request.body).example_of)
    if count % 2:
        return Reply(status=403, body=said.encode())
    scores = [None, *(i / count for i in range(1, count))]
    errors = [said, *[None] * (count - 1)]
    return Reply.json({"version": VERSION, "scores": scores, "errors": errors})


@pytest.mark.slow
def test_a_token_is_in_no_file_log_or_report(
    tiny_config: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("REWARD_TOKEN", SECRET)
    with scripted_server(echo) as (url, requests), caplog.at_level("DEBUG"):
        remote = RemoteRewardConfig(
            urls=(url,), reward="echo", name="echo", objective="prompt", token_env="REWARD_TOKEN"
        )
        config = replace(tiny_config, rewards=(*tiny_config.rewards, remote))
        (tmp_path / "run.yaml").write_text(dump_config(config))
        assert main(["train", str(tmp_path / "run.yaml")]) == 0
        run = str(Path(config.output_dir) / config.name)
        assert main(["evaluate", run]) == 0
        assert main(["report", run]) == 0
    assert any(SECRET in request.headers.get("authorization", "") for request in requests)
    assert "Bearer ***" in caplog.text
    shown = capsys.readouterr()
    assert SECRET not in caplog.text + shown.out + shown.err
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"config.yaml", "metrics.jsonl", "report.html"} <= {file.name for file in files}
    assert [file for file in files if SECRET.encode() in file.read_bytes()] == []


@pytest.mark.parametrize(
    "plug",
    [
        {"type": "remote", "urls": ["http://h"], "reward": "r", "token_env": SECRET},
        {"type": "vlm-judge", "base_url": "http://h", "model": "m", "criterion": "prompt",
         "api_key_env": SECRET},
        {"type": "remote", "urls": [f"http://user:{SECRET}@h"], "reward": "r"},
        {"type": "remote", "urls": [f"http://user:{SECRET}@h:99999999999"], "reward": "r"},
        {"type": "remote", "urls": [f"http://user:{SECRET}@[::"], "reward": "r"},
        {"type": "remote", "urls": [f"http://h?key={SECRET}"], "reward": "r"},
        {"type": "remote", "urls": [f"ftp://user:{SECRET}@h"], "reward": "r"},
    ],
)  # fmt: skip
def test_a_secret_in_the_wrong_field_is_refused_and_not_shown(
    tiny_config: RunConfig, tmp_path: Path, plug: dict
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(tiny_config))
    raw = json.dumps([plug | {"objective": "prompt"}])
    for flag in ("--rewards", "--evaluators"):
        with pytest.raises(ConfigError) as caught:
            load_config(file, [flag, raw])
        assert SECRET not in str(caught.value)


def test_a_server_s_token_is_named_by_a_variable() -> None:
    rewards = [{"type": "clip-text", "path": "embedded:reward-clip"}]
    with pytest.raises(
        ConfigError, match="token_env: must be the name of an environment"
    ) as caught:
        read_serve_config({"rewards": rewards, "token_env": SECRET}, "server.yaml")
    assert SECRET not in str(caught.value)


def test_an_endpoint_does_not_show_its_secret() -> None:
    assert SECRET not in repr(Endpoint(client=httpx2.Client(), timeout=1.0, secret=SECRET))


def test_urls_that_are_right_pass() -> None:
    for url in ("http://localhost:8100", "https://host/path/v1", "http://[::1]:8100"):
        check_url("urls.0", url)


def test_a_server_listens_to_this_machine_only_unless_told_otherwise() -> None:
    rewards = [{"type": "clip-text", "path": "embedded:reward-clip"}]
    assert ServeConfig.__dataclass_fields__["host"].default == "127.0.0.1"
    for host in ("127.0.0.1", "localhost", "::1"):
        assert read_serve_config({"rewards": rewards, "host": host}, "").host == host
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", ""):
        with pytest.raises(ConfigError, match="token_env must be set to listen on"):
            read_serve_config({"rewards": rewards, "host": host}, "")
        raw = {"rewards": rewards, "host": host, "token_env": "REWARD_TOKEN"}
        assert read_serve_config(raw, "").host == host
