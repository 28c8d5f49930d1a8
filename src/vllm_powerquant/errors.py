"""Errors of this package; each kind also subclasses the built-in one a caller would catch."""


class PowerQuantError(Exception):
    """Base of every error this package raises on purpose."""


class PowerQuantConfigError(PowerQuantError, ValueError):
    """An option has a bad value, is unknown, or is given twice with different values."""


class PowerQuantUnsupportedError(PowerQuantError, NotImplementedError):
    """The request is valid but this package does not support it; the message says what to use instead."""


class PowerQuantEngineError(PowerQuantError, RuntimeError):
    """The sparse engine or a server in its place could not be built, started or reached, or it failed while it answered."""
