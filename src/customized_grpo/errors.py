"""Errors a user can cause; each message is one line: field, requirement, value received, fix."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar


class CustomizedGRPOError(Exception):
    """Base of every error below; the command line prints it as one line and exits with 2."""

    is_everywhere = False
    """Whether all processes of a run raise it at the same point, so that they can still meet."""


class ConfigError(CustomizedGRPOError):
    """A configuration, an override or a plug is not valid."""


class DataError(CustomizedGRPOError):
    """A data source is missing, empty or has an unreadable example."""


class RewardError(CustomizedGRPOError):
    """A reward model cannot be built or used."""


class CheckpointError(CustomizedGRPOError):
    """A checkpoint or a run folder is missing, incomplete or not of the expected kind."""


class ResourceError(CustomizedGRPOError):
    """Disk, memory or file handles have run out."""


class Interrupted(CustomizedGRPOError):
    """A signal asked the run to stop; the command line exits with 128 + its number."""

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(f"stopped by {received.name}")
        self.received = received


@contextmanager
def within(section: str) -> Iterator[None]:
    """Puts the section of the config in front of a ConfigError raised inside: a plug knows its
    fields, not where it stands."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{section}.{error}") from error


@contextmanager
def needs_extra(extra: str, who: str) -> Iterator[None]:
    """Turns an ImportError raised inside into a ConfigError that says what to install for whom."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(
            f"{who} needs the extra packages ({error}); pip install 'customized-grpo[{extra}]'"
        ) from error


_Error = TypeVar("_Error", bound=CustomizedGRPOError)


def everywhere(error: _Error) -> _Error:
    """Marks an error that all processes of a run raise at the same point."""
    error.is_everywhere = True
    return error
