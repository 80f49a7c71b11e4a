"""Errors and warnings that users may want to catch."""


class ConfigError(ValueError):
    """A configuration value is out of its domain. The message names the field, the value and what is allowed."""


class UnsupportedModelError(TypeError):
    """The model can't be accelerated. The message names its class and the reason."""


class TAPWarning(UserWarning):
    """A trajectory ran without the effect that was asked for."""


class UsageError(ValueError):
    """A value given on the command line can't be used. The message names it and what is allowed."""
