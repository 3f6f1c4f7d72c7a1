"""The package's exceptions. Each message names the problem, the value, the limit and the remedy."""


class Florence2Error(ValueError):
    """Base class of all errors that wrong input causes. A bug in this package raises AssertionError instead."""


class ConfigError(Florence2Error):
    """A configuration file is missing, malformed, or describes something this project does not implement."""


class CheckpointError(Florence2Error):
    """Weights are missing or corrupt, have wrong shapes, or do not belong to the configuration next to them."""


class HubError(Florence2Error):
    """A checkpoint can be read neither from the Hugging Face Hub nor from its local cache."""


class ImageError(Florence2Error):
    """An image cannot be read, or is larger than the limit."""


class PromptError(Florence2Error):
    """A task is unknown, its input is missing or superfluous, or the prompt does not fit the model."""


class OptionError(Florence2Error):
    """A generation setting is unknown, out of range, or contradicts another."""


def shown(value: object) -> str:
    """Return the repr of a value for a message, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
