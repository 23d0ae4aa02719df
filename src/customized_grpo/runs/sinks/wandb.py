"""Weights & Biases, online or into files of the run folder."""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from customized_grpo.config import SinkConfig
from customized_grpo.errors import ConfigError
from customized_grpo.runs.sinks.base import RunInfo, need_package

_TIMEOUT = 25.0  # seconds, less than the end of a run waits for a sink


@dataclass(frozen=True, slots=True, kw_only=True)
class WandbConfig(SinkConfig):
    """A run of a project; ``WANDB_MODE=offline`` keeps it in ``RUN/wandb`` for ``wandb sync``."""

    type: Literal["wandb"] = "wandb"  # pyright: ignore[reportIncompatibleVariableOverride]

    project: str = "customized-grpo"
    """Project of the run."""

    entity: str | None = None
    """User or team that has the project; null = the account's default."""

    tags: tuple[str, ...] = ()
    """Words to find the run by."""

    def check(self) -> None:
        """Package and key are there.

        Raises:
            ConfigError: if one is not.
        """
        need_package("wandb")
        if _mode() in ("online", "shared") and not _has_key():
            raise ConfigError(
                "type: 'wandb' needs the environment variable WANDB_API_KEY, got nothing; export "
                "it, run `wandb login`, or set WANDB_MODE=offline"
            )

    def starts_over(self) -> bool:
        """``wandb sync`` puts an offline run in the place of a former one of its id."""
        return _mode() == "offline"

    def place(self) -> str:
        """The project, and whether it is reached."""
        entity = self.entity or os.environ.get("WANDB_ENTITY")
        return f"{_mode()} {os.environ.get('WANDB_BASE_URL')} {entity} {self.project}"

    def build(self, run: RunInfo) -> WandbSink:
        """Begins a run, or goes on with it."""
        return WandbSink(self, run)


def _mode() -> str:
    mode = os.environ.get("WANDB_MODE") or "online"
    return {"run": "online", "dryrun": "offline"}.get(mode, mode)


def _has_key() -> bool:
    """In the environment, or where ``wandb login`` has put it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


class WandbSink:
    """wandb collects no console, code, git, command line, hardware, load or host name.

    It adds its own version and features in use, Python's version, the platform, and which of some
    known packages are imported.
    """

    def __init__(self, config: WandbConfig, run: RunInfo) -> None:
        import wandb

        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            tags=config.tags,
            name=run.name,
            id=run.id,
            resume=None if config.starts_over() else "allow",
            reinit="create_new",  # whatever else this process logs to wandb stays apart
            dir=run.folder,
            config=run.config,
            settings=wandb.Settings(
                console="off",
                quiet=True,
                init_timeout=_TIMEOUT,
                finish_timeout=_TIMEOUT,
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_disable_stats=True,
                host="-",
                x_save_requirements=False,
            ),
        )

    def metrics(self, update: int, values: Mapping[str, float]) -> None:
        """The update is wandb's step."""
        self._run.log(dict(values), step=update)

    def picture(self, update: int, file: Path) -> None:
        """Under ``samples``."""
        import wandb

        self._run.log({"samples": wandb.Image(str(file))}, step=update)

    def close(self, failed: bool) -> None:
        """Waits for the upload; what is late is on the disk, for ``wandb sync``."""
        self._run.finish(exit_code=int(failed))
