"""Loads rewards and serves them until it is told to stop."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable

from customized_grpo.devices import pick_device
from customized_grpo.errors import needs_extra, within
from customized_grpo.rewards.endpoints.http_client import read_secret
from customized_grpo.tools.serve.batcher import Batcher
from customized_grpo.tools.serve.config import ServeConfig

logger = logging.getLogger("customized_grpo")

_SHUTDOWN_SECONDS = 60


def serve(config: ServeConfig, on_address: Callable[[str], None]) -> None:
    """Serves until SIGINT or SIGTERM; the requests under way are answered first.

    ``on_address`` is called with the server's URL once clients may connect: their requests wait
    until the server answers.

    Raises:
        ConfigError: if the packages are missing, or a reward cannot be built.
        OSError: if the address is taken.
    """
    with needs_extra("serve", "serve-reward"):
        import uvicorn

        from customized_grpo.tools.serve.app import make_app
    token = read_secret("token_env", config.token_env)
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.create_server((config.host, config.port), family=family):
        pass  # a port that is taken is known before anything is loaded
    app = make_app(config, build_batchers(config), token)
    with socket.create_server((config.host, config.port), family=family, backlog=128) as listener:
        host, port = listener.getsockname()[:2]
        on_address(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
        settings = uvicorn.Config(
            app, log_level="warning", timeout_graceful_shutdown=_SHUTDOWN_SECONDS
        )
        uvicorn.Server(settings).run(sockets=[listener])


def build_batchers(config: ServeConfig) -> dict[str, Batcher]:
    """Loads the rewards, each behind a queue of its own; by name."""
    device = pick_device(config.device)
    batchers: dict[str, Batcher] = {}
    for position, reward in enumerate(config.rewards):
        logger.info("loading rewards.%d: %s", position, reward.label)
        with within(f"rewards.{position}"):
            built = reward.build(device)
        batchers[reward.label] = Batcher(built, device, config.max_images, config.max_waiting)
    return batchers
