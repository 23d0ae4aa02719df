"""Errors a user can cause; each message is one line: field, requirement, value received, fix."""


class CustomizedGRPOError(Exception):
    """Base of every error below; the command line prints it as one line and exits with 2."""


class ConfigError(CustomizedGRPOError):
    """A configuration, an override or a plug is not valid."""


class DataError(CustomizedGRPOError):
    """A data source is missing, empty or has an unreadable example."""


class RewardError(CustomizedGRPOError):
    """A reward model cannot be built or used."""


class CheckpointError(CustomizedGRPOError):
    """A checkpoint or a run folder is missing, incomplete or not of the expected kind."""


class GeneratorError(CustomizedGRPOError):
    """A generator cannot be built, or refuses its inputs."""
