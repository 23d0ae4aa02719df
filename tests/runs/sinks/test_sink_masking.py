"""What looks like a secret is in nothing that goes elsewhere."""

from __future__ import annotations

from typing import Any

import pytest

from customized_grpo.runs.sinks.masking import masked, without_secrets

SECRET = "s3cr3t-t0k3n"


@pytest.mark.parametrize(
    "name",
    [
        "key", "api_key", "api_keys", "apikey", "apiKey", "APIKEY", "X-Api-Key", "OPENAI_API_KEY",
        "token", "tokens", "accessToken", "hftoken", "HF_TOKEN", "secret", "secrets", "secret_key",
        "client_secret", "password", "passwords", "passwd", "db_pwd", "passphrase", "credentials",
        "credential", "Authorization", "Proxy-Authorization", "auth", "X-Auth", "Cookie",
        "private_key", "secretAccessKey", "token2", "api_key_1",
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", [SECRET, 1234, 0.5, True, [SECRET], {"a": {"b": SECRET}}])
def test_values_of_every_type_are_masked(name: str, value: Any) -> None:
    raw = {"plug": [{name: value, "type": "x"}], "n": 1}
    assert without_secrets(raw) == {"plug": [{name: "***", "type": "x"}], "n": 1}


def test_what_is_none_stays() -> None:
    raw = {
        "api_key_env": "API_KEY",
        "api_key": None,
        "token_env": "HF_TOKEN",
        "max_tokens": 256,
        "max_completion_tokens": 2000,
        "monkey": "a",
        "author": "b",
        "keyframes": [1],
        1: "c",
        "url": "https://host:80/path@v1?page=2#a@b",
        "criterion": "a basic drawing of a bearer of news: who bears it",
    }
    assert without_secrets(raw) == raw


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"https://me:{SECRET}@host/x", "https://host/x"),
        (f"postgres://{SECRET}@host", "postgres://host"),
        (f"http://me:{SECRET}@{SECRET}@host:80/a@b", "http://host:80/a@b"),
        (f"http://h/?write_token={SECRET}&page=2", "http://h/?write_token=***&page=2"),
        (f"h?a=1&apiKey={SECRET}#x", "h?a=1&apiKey=***#x"),
        (f"Authorization: Bearer {SECRET}", "Authorization: ***"),
        (f"authorization={SECRET}", "authorization=***"),
        (f"{{'Authorization': 'Basic {SECRET}', 'a': 1}}", "{'Authorization': *** 'a': 1}"),
        (f"sent bearer {SECRET} there", "sent bearer *** there"),
    ],
)
def test_texts_are_scrubbed(text: str, expected: str) -> None:
    assert without_secrets([text]) == [expected]
    assert masked(text) == expected


def test_messages_do_not_show_the_environment_s_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SINK_TOKEN", "DB_PASSWD", "myApiKey", "AWS_CREDENTIALS"):
        with monkeypatch.context() as patch:
            patch.setenv(name, SECRET)
            assert masked(f"no\nroute {SECRET}!") == "no route ***!"
    monkeypatch.setenv("PWD", "/home/me")
    monkeypatch.setenv("A_KEY", "short")
    assert masked("/home/me is a short way") == "/home/me is a short way"
