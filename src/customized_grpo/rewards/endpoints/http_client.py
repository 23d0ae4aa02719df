"""What the rewards behind HTTP share: a bounded request, and retries with backoff and jitter.

httpx2 is the maintained httpx; it is there anyway, through huggingface_hub.
"""

from __future__ import annotations

import email.utils
import ipaddress
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.request import proxy_bypass

import httpx2

from customized_grpo.errors import ConfigError
from customized_grpo.files import read_variable

T = TypeVar("T")

_RETRIED = {408, 425, 429}  # and every 5xx
_TEXT_LIMIT = 300
_MAX_LINES = 3
PROXY_VARIABLES = tuple(
    name
    for variable in ("http_proxy", "https_proxy", "all_proxy")
    for name in (variable, variable.upper())
)


class TemporaryFailure(Exception):
    """Worth another try, after ``retry_after`` seconds where the server named a time."""

    def __init__(self, text: str, retry_after: float | None = None) -> None:
        super().__init__(text)
        self.retry_after = retry_after


class PermanentFailure(Exception):
    """Another try would fail in the same way."""

    def __init__(self, text: str, status: int | None = None) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True, kw_only=True, slots=True)
class Backoff:
    """Exponential waits with jitter; a server's Retry-After is never undercut."""

    retries: int
    """Further tries after the first."""
    base: float = 0.5
    """Seconds before the first retry, on average; doubles with each."""
    cap: float = 60.0
    """Longest wait in seconds; a server that asks for more counts as failed."""
    sleep: Callable[[float], None] = time.sleep
    jitter: Callable[[], float] = random.Random().random  # its own: leaves the global state alone

    def run(self, attempt: Callable[[], T]) -> T:
        """Result of the first attempt that succeeds.

        Raises:
            TemporaryFailure: of the last try.
            PermanentFailure: at once; also if the server asks for a longer wait than ``cap``.
        """
        for number in range(self.retries):
            try:
                return attempt()
            except TemporaryFailure as failure:
                asked = failure.retry_after or 0.0
                if asked > self.cap:
                    raise PermanentFailure(
                        f"{failure}; asks to wait {asked:.0f} s, at most {self.cap:.0f} are waited"
                    ) from failure
            backoff = min(self.cap, self.base * 2**number)
            self.sleep(max(asked, backoff / 2) + self.jitter() * backoff)  # never all in step
        return attempt()


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """An HTTP client with its bounds and its secret, which is kept out of every message."""

    client: httpx2.Client
    timeout: float
    """Seconds for the whole answer, however slowly it comes."""
    max_bytes: int = 16 * 2**20
    """Longest answer that is read."""
    secret: str | None = field(default=None, repr=False)

    def send(
        self, method: str, url: str, content: bytes | None = None, content_type: str | None = None
    ) -> Any:
        """The JSON of the answer.

        Raises:
            TemporaryFailure: no connection, no whole answer in time, 408, 425, 429, 5xx, no JSON.
            PermanentFailure: any other status but 200, with the server's own words.
        """
        headers = {} if content_type is None else {"content-type": content_type}
        if self.secret is not None:
            headers["authorization"] = f"Bearer {self.secret}"
        try:
            status, reply_headers, body = self._exchange(method, url, content, headers)
        except httpx2.TimeoutException as error:
            raise TemporaryFailure(f"no answer within {self.timeout:g} s") from error
        except httpx2.RequestError as error:
            text = " ".join(str(error).split()) or "connection lost"
            if variable := _proxy_for(self.client, url):
                host = httpx2.URL(url).host
                text += f", through the proxy in {variable}; no_proxy={host} asks without it"
            raise TemporaryFailure(f"{type(error).__name__}: {text}") from error
        if status != 200:
            raise self._failure(status, reply_headers, body)
        try:
            return json.loads(body)
        except ValueError as error:
            kind = self.hide(reply_headers.get("content-type", "no content type"))
            raise TemporaryFailure(f"the answer is not JSON ({kind})") from error

    def _exchange(
        self, method: str, url: str, content: bytes | None, headers: dict[str, str]
    ) -> tuple[int, Mapping[str, str], bytes]:
        # The client's time-outs are per read: an answer that trickles in would never run into them.
        deadline = time.monotonic() + self.timeout
        body = bytearray()
        with self.client.stream(
            method, url, content=content, headers=headers, timeout=self.timeout
        ) as response:
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) > self.max_bytes:
                    raise TemporaryFailure(f"the answer is longer than {self.max_bytes} bytes")
                if time.monotonic() > deadline:
                    raise TemporaryFailure(f"no complete answer within {self.timeout:g} s")
            return response.status_code, response.headers, bytes(body)

    def hide(self, text: str) -> str:
        """For whatever a server says that goes into a message: it may repeat what it was sent.

        Not for the answer itself: in `{"score": 1}` stands the token `1`.
        """
        return text if self.secret is None else text.replace(self.secret, "***")

    def _failure(
        self, status: int, headers: Mapping[str, str], body: bytes
    ) -> TemporaryFailure | PermanentFailure:
        text = f"HTTP {status}: {_server_text(body, self.hide)}"
        if status in _RETRIED or status >= 500:
            return TemporaryFailure(text, retry_after(headers.get("retry-after")))
        return PermanentFailure(text, status)


def open_endpoint(
    timeout: float, field: str, variable: str | None, urls: Sequence[str]
) -> Endpoint:
    """An endpoint whose secret is in an environment variable, which ``field`` of a config names.

    Raises:
        ConfigError: if the variable is not set, or a proxy of the environment cannot be used.
    """
    client = open_client(urls)
    return Endpoint(client=client, timeout=timeout, secret=read_secret(field, variable))


def open_client(urls: Sequence[str]) -> httpx2.Client:
    """A client that asks this machine directly, and others through the environment's proxies.

    Raises:
        ConfigError: if a proxy that is needed cannot be used.
    """
    hosts = {httpx2.URL(url).host for url in urls}
    here = {host for host in hosts if is_loopback(host)}
    direct = {f"all://[{host}]" if ":" in host else f"all://{host}": None for host in here}
    try:
        return httpx2.Client(
            limits=httpx2.Limits(max_connections=None),
            mounts=direct,
            trust_env=here != hosts,
            verify=httpx2.create_ssl_context(),  # with the environment's certificates, always
        )
    except (ValueError, ImportError) as error:  # socks://; socks5:// without its package
        said = re.sub(r"//[^/@\s]*@", "//***@", str(error))  # without a password
        given = [name for name in PROXY_VARIABLES if read_variable(name)]
        raise ConfigError(
            f"{' and '.join(given)}: must be a proxy such as http://host:3128, which can be used "
            f"to ask {', '.join(sorted(hosts - here))}, got another kind "
            f"({said}); correct the environment variable, or unset it"
        ) from error


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, as no proxy knows it."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _proxy_for(client: httpx2.Client, url: str) -> str | None:
    """The environment variable with the proxy through which a client asks; None: it asks itself."""
    target = httpx2.URL(url)
    if not client.trust_env or is_loopback(target.host) or proxy_bypass(target.host):
        return None
    names = (f"{target.scheme}_proxy", "all_proxy")
    return next((n for name in names for n in (name, name.upper()) if read_variable(n)), None)


def _server_text(body: bytes, hide: Callable[[str], str]) -> str:
    """One short line of an error answer: FastAPI's `detail`, OpenAI's `error.message`, or all."""
    text = body.decode("utf-8", errors="replace")
    try:
        found: Any = json.loads(text)
    except ValueError:
        found = None
    if isinstance(found, dict):
        error = found.get("error")
        inner = error.get("message") if isinstance(error, dict) else error
        text = str(found.get("detail") or inner or text)
    return " ".join(hide(text).split())[:_TEXT_LIMIT] or "no text"


def retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header: a number or a date; None if there is none to be read."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if seconds == seconds else None


def failure_lines(texts: Counter[str], count: int, what: str = "images") -> list[str]:
    """A line for each of the most frequent reasons why some of ``count`` could not be scored."""
    common = texts.most_common(_MAX_LINES)
    lines = [f"{lost} of {count} {what}: {text}" for text, lost in common]
    rest = texts.total() - sum(lost for _, lost in common)
    return [*lines, f"{rest} of {count} {what}: other reasons"] if rest else lines


def check_url(field: str, url: str) -> None:
    """Refuses what is no plain http(s) URL; one with a password would end up in files and logs.

    Raises:
        ValueError: naming the field; as pydantic wants it of a config's ``__post_init__``.
    """
    shown = re.sub(r"//[^/]*@|\?.*", "***", url)  # the one may hold a password, the other a key
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ValueError(f"{field} must be an http(s) URL, got {shown!r}: {error}") from error
    if parsed.userinfo:
        raise ValueError(
            f"{field} must hold no user or password, got one for {parsed.host!r}; name an "
            "environment variable instead"
        )
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query:
        raise ValueError(
            f"{field} must be an http(s) URL without a query, got {shown!r}; write it like "
            "http://host:8100"
        )


def read_secret(field: str, variable: str | None) -> str | None:
    """Value of the environment variable that a config names.

    Raises:
        ConfigError: if it is not set, or cannot stand in an HTTP header.
    """
    if variable is None:
        return None
    secret = read_variable(variable)
    if not secret or not secret.isascii() or not secret.isprintable():
        raise ConfigError(
            f"{field}: the environment variable {variable!r} must hold a token of printable ASCII "
            f"characters, got {'something else' if secret else 'nothing'}; export it"
        )
    return secret
