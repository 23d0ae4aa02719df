"""The config of a server of rewards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt

from customized_grpo.config.checks import groupwise_conflicts
from customized_grpo.config.decoding import decode
from customized_grpo.config.limits import Count, Side, VariableName
from customized_grpo.config.sections import RewardPlug
from customized_grpo.errors import ConfigError
from customized_grpo.rewards.endpoints.http_client import is_loopback
from customized_grpo.rewards.endpoints.wire import Limits


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """A server of rewards."""

    rewards: Annotated[tuple[RewardPlug, ...], Field(min_length=1)]
    """The rewards, as in a run's config; clients ask for them by `name` (null = the type). Their
    `objective` may be left out: that is for the run to say."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 = all, which needs a token."""
    port: Annotated[NonNegativeInt, Field(le=65535)] = 8100
    """Port to listen on; 0 = a free one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto = cuda where there is one."""
    token_env: VariableName | None = None
    """Environment variable with the token that clients have to send; null = none."""
    max_images: Count = 64
    """Images of one request, and of one call of a reward: waiting requests are scored together."""
    max_waiting: Count = 512
    """Images waiting per reward; with more, requests are answered 503 with Retry-After."""
    max_side: Side = 4096
    """Pixels of the longest side of any picture."""
    max_megabytes: Count = 512
    """Length of a request's body."""

    @property
    def limits(self) -> Limits:
        """What clients are told."""
        return Limits(
            max_images=self.max_images,
            max_side=self.max_side,
            max_bytes=self.max_megabytes * 2**20,
        )


def read_serve_config(raw: dict[str, Any], source: str) -> ServeConfig:
    """Decodes and checks a server's config; `source` opens the message of an error.

    Raises:
        ConfigError: at the first mistake.
    """
    rewards = raw.get("rewards")
    if isinstance(rewards, list):  # a server has no objectives, and every reward's config needs one
        rewards = [{"objective": "any", **r} if isinstance(r, dict) else r for r in rewards]
        raw = {**raw, "rewards": rewards}
    config = decode(raw, source, ServeConfig)
    labels = [reward.label for reward in config.rewards]
    if repeated := {label for label in labels if labels.count(label) > 1}:
        raise ConfigError(
            f"{source}: rewards: names must be unique, got {min(repeated)!r} twice; set `name`"
        )
    for conflict in groupwise_conflicts("rewards", config.rewards):
        raise ConfigError(f"{source}: {conflict}")
    if config.max_waiting < config.max_images:
        raise ConfigError(
            f"{source}: max_waiting must be at least max_images = {config.max_images}, got "
            f"{config.max_waiting}; a full request could never wait"
        )
    if config.token_env is None and not is_loopback(config.host):
        raise ConfigError(
            f"{source}: token_env must be set to listen on {config.host!r}, which others reach, "
            "got null; export a token and name its variable"
        )
    return config
