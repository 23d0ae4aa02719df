"""What looks like a secret stays on this machine."""

from __future__ import annotations

import os
import re
from typing import Any

import yaml

from customized_grpo.config import Dumper

_MASK = "***"
_SECRET = re.compile(
    r"((^|_)(keys?|pwd|auth|bearer|cookies?)|(api|access|private|secret)keys?|tokens?|secrets?"
    r"|passwords?|passwd|passphrases?|credentials?|authorization)_?\d*$"
)
_COUNT = re.compile("(max|num)_")  # of a language model's tokens
_WORD_END = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+")
_USER = re.compile(r"://[^/?#\s]*@")
_QUERY = re.compile(r"([?&])([^=&#\s]+)=[^&#\s]+")
_HEADER = re.compile(r"(authorization[\"']?\s*[:=]\s*)(\S+ )?\S+", re.I)
_BEARER = re.compile(r"(\bbearer )\S{8,}", re.I)


def is_secret(name: object) -> bool:
    """Whether something is called like a secret: ``HF_TOKEN``, ``apiKey``, ``X-Api-Key``."""
    words = _WORD_END.sub("_", str(name)).strip("_").lower()
    return bool(_SECRET.search(words)) and not _COUNT.match(words)


def without_secrets(raw: Any) -> Any:
    """Our own configs name environment variables; a stranger's plug may hold the key itself."""
    if isinstance(raw, dict):
        return {
            key: _MASK if is_secret(key) and item is not None else without_secrets(item)
            for key, item in raw.items()
        }
    if isinstance(raw, list):
        return [without_secrets(item) for item in raw]
    return _scrubbed(raw) if isinstance(raw, str) else raw


def config_without_secrets(raw: Any) -> str:
    """The YAML of a config that is shown or given to others."""
    return yaml.dump(without_secrets(raw), Dumper=Dumper, sort_keys=False)


def masked(text: str) -> str:
    """A message on one line, also without the values of environment variables called like one."""
    for name, value in os.environ.items():
        if is_secret(name) and name != "PWD" and len(value) > 5:
            text = text.replace(value, _MASK)
    return " ".join(_scrubbed(text).split())[:300]


def _scrubbed(text: str) -> str:
    """Without users in URLs, secrets in their queries and tokens of HTTP headers."""
    for pattern in (_HEADER, _BEARER):
        text = pattern.sub(rf"\1{_MASK}", text)
    text = _USER.sub("://", text)
    return _QUERY.sub(lambda m: f"{m[1]}{m[2]}={_MASK}" if is_secret(m[2]) else m[0], text)
