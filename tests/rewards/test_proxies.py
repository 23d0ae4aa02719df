"""Proxies of the environment: this machine is asked directly, and one line names the variable."""

from __future__ import annotations

import ast
import os

import pytest
import torch

pytest.importorskip("uvicorn", reason="tests/servers.py needs the extra [serve]")

from helpers import ROOT
from servers import Brightness, Reply, reward_server, scripted_server

from customized_grpo.errors import ConfigError, RewardError
from customized_grpo.rewards.endpoints.http_client import PROXY_VARIABLES, open_client
from customized_grpo.rewards.endpoints.remote import RemoteRewardConfig
from customized_grpo.rewards.endpoints.vlm_judge import VlmJudgeConfig
from customized_grpo.tools.init.llm import Writer

CPU = torch.device("cpu")
NOBODY = "127.0.0.1:9"


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PROXY_VARIABLES, "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


def judge(url: str) -> VlmJudgeConfig:
    return VlmJudgeConfig(objective="prompt", base_url=f"{url}/v1", model="m", criterion="prompt")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("all_proxy", f"socks://{NOBODY}"),
        ("ALL_PROXY", f"socks5://{NOBODY}"),
        ("http_proxy", f"http://{NOBODY}"),
        ("HTTPS_PROXY", "nonsense://"),
    ],
)
def test_this_machine_is_asked_directly(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with reward_server({"bright": Brightness()}) as url:
        RemoteRewardConfig(objective="prompt", urls=(url,), reward="bright").build(CPU)
        local = url.replace("127.0.0.1", "localhost")
        RemoteRewardConfig(objective="prompt", urls=(local,), reward="bright").check()
    with scripted_server(lambda request: Reply.json({"data": [{"id": "m"}]})) as (url, requests):
        judge(url).check()
        assert len(requests) == 1


@pytest.mark.parametrize("scheme", ["socks", "ftp"])
@pytest.mark.parametrize("name", ["all_proxy", "HTTP_PROXY"])
def test_a_proxy_of_another_kind_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, scheme: str
) -> None:
    monkeypatch.setenv(name, f"{scheme}://user:s3cret@proxy:7890")
    for ask in (
        judge("http://judge.example").check,
        RemoteRewardConfig(objective="p", urls=("http://a.example",), reward="r").check,
        lambda: Writer(url="http://llm.example", model="m").write("dog", True, 15),
    ):
        with pytest.raises(ConfigError, match=f"^{name}: must be a proxy such as") as caught:
            ask()
        assert "\n" not in str(caught.value)
        assert "s3cret" not in str(caught.value)


def test_a_dead_proxy_is_named_and_how_to_go_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://user:s3cret@{NOBODY}")
    with pytest.raises(RewardError, match="through the proxy in http_proxy") as caught:
        judge("http://judge.example").check()
    assert "no_proxy=judge.example asks without it" in str(caught.value)
    assert "s3cret" not in str(caught.value)
    monkeypatch.setenv("no_proxy", "judge.example")
    with pytest.raises(RewardError) as caught:
        judge("http://judge.example").check()
    assert "proxy" not in str(caught.value)


def test_a_proxy_that_works_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted_server(lambda request: Reply.json({"data": [{"id": "m"}]})) as (url, requests):
        monkeypatch.setenv("http_proxy", url)
        judge("http://judge.example").check()
    assert [request.path for request in requests] == ["http://judge.example/v1/models"]


def test_both_kinds_of_hosts_in_one_client(monkeypatch: pytest.MonkeyPatch) -> None:
    def here(request: object) -> Reply:
        return Reply.json({"here": True})

    def beyond(request: object) -> Reply:
        return Reply.json({"here": False})

    with scripted_server(here) as (url, _), scripted_server(beyond) as (proxy, _):
        monkeypatch.setenv("http_proxy", proxy)
        with open_client([url, "http://b.example"]) as client:
            assert client.get(url).json() == {"here": True}
            assert client.get("http://b.example").json() == {"here": False}


def test_the_playground_starts_behind_any_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    page = pytest.importorskip("customized_grpo.tools.playground.page", reason="needs gradio")
    import httpx

    names = ("all_proxy", "HTTP_PROXY")
    for value in (f"socks://{NOBODY}", f"http://{NOBODY}"):
        for name in names:
            monkeypatch.setenv(name, value)
        with (
            scripted_server(lambda request: Reply()) as (url, _),
            page.own_server_asked_directly(share=False),
        ):
            assert httpx.get(url, timeout=5).status_code == 200  # as gradio asks itself
        assert [os.environ[name] for name in names] == [value, value]
    with page.own_server_asked_directly(share=True):
        assert os.environ["no_proxy"].endswith("127.0.0.1")
    assert "no_proxy" not in os.environ
    monkeypatch.setenv("all_proxy", f"socks://{NOBODY}")
    with pytest.raises(ConfigError, match="all_proxy"), page.own_server_asked_directly(share=True):
        raise AssertionError("it is refused before")


def test_clients_are_made_in_one_place() -> None:
    """Where a proxy that cannot be used becomes a line."""
    source = ROOT / "src" / "customized_grpo"
    makers = {"Client", "AsyncClient", "get", "post", "head", "request", "stream"}
    found = set()
    for file in source.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)):
                continue
            if node.value.id in ("httpx2", "httpx", "requests") and node.attr in makers:
                found.add(file.relative_to(source).as_posix())
    assert found == {"rewards/endpoints/http_client.py"}
