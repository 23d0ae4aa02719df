"""`cgrpo serve-reward`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from customized_grpo.cli.shared import hide_loading_bars
from customized_grpo.errors import ConfigError

if TYPE_CHECKING:
    from customized_grpo.tools.serve.config import ServeConfig


def add(commands: Any) -> None:
    """Adds the parser."""
    parser = commands.add_parser(
        "serve-reward",
        help="serve rewards over HTTP, for runs in other environments or on other machines",
        description="Serve the rewards of a YAML file (`rewards:`, as in a run's config), or of "
        "--reward, for `type: remote` rewards of runs. See docs/remote_rewards.md.",
        epilog="examples:\n  cgrpo serve-reward rewards.yaml --port 8100\n"
        "  cgrpo serve-reward --reward '{type: clip-text, path: openai/clip-vit-large-patch14}'",
    )
    file = "YAML file of a server"
    parser.add_argument("config", metavar="CONFIG", type=Path, nargs="?", help=file)
    reward = "a reward instead of a CONFIG; may be repeated"
    parser.add_argument("--reward", action="append", metavar="YAML", help=reward)
    parser.add_argument("--host", help="address to listen on (default: the config's, 127.0.0.1)")
    parser.add_argument("--port", type=int, help="0 = a free one (default: the config's, 8100)")
    parser.add_argument("--device", help="auto, cpu or cuda (default: the config's, auto)")
    token = "environment variable with the token that clients have to send"
    parser.add_argument("--token-env", metavar="NAME", help=token)
    parser.set_defaults(run=_serve_reward)


def _serve_reward(options: argparse.Namespace) -> None:
    from customized_grpo.tools.serve.server import serve

    config = read_config(options)
    hide_loading_bars()
    names = ", ".join(reward.label for reward in config.rewards)
    serve(config, lambda url: print(f"serving {names} at {url}", flush=True))


def read_config(options: argparse.Namespace) -> ServeConfig:
    """The server's config, from a file or from flags.

    Raises:
        ConfigError: at the first mistake.
    """
    from customized_grpo.config import read_mapping
    from customized_grpo.config.yaml_text import parse_yaml
    from customized_grpo.tools.serve.config import read_serve_config

    if (options.config is None) == (options.reward is None):
        raise ConfigError(
            "serve-reward takes either CONFIG or --reward YAML, got "
            f"{'neither' if options.config is None else 'both'}; see `cgrpo serve-reward --help`"
        )
    if options.config is None:
        raw = {"rewards": [parse_yaml(text, "--reward") for text in options.reward]}
    else:
        raw = read_mapping(str(options.config), "CONFIG")
    flags = {name: getattr(options, name) for name in ("host", "port", "device", "token_env")}
    raw |= {name: value for name, value in flags.items() if value is not None}
    return read_serve_config(raw, str(options.config or "serve-reward"))
