"""The project's own exceptions: one sentence each, saying what, which value, what limit and what to do."""


class Florence2Error(ValueError):
    """Base of every error that wrong input can cause; a bug of ours is an AssertionError instead."""


class ConfigError(Florence2Error):
    """A configuration file is missing, malformed, or describes something this project does not implement."""


class CheckpointError(Florence2Error):
    """Weights are missing, misshapen, corrupt, or do not belong to the configuration beside them."""


class HubError(Florence2Error):
    """A named checkpoint cannot be had from the Hugging Face Hub or from its local cache."""


class ImageError(Florence2Error):
    """A picture cannot be read, or is larger than the stated limit."""


class PromptError(Florence2Error):
    """A task is unknown, its input is missing or superfluous, or the prompt does not fit the model."""


class OptionError(Florence2Error):
    """A generation setting is unknown, out of range, or in conflict with another."""


def shown(value: object) -> str:
    """Return a value as an error message shows it, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
