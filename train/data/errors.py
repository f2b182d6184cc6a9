"""The error of the data modules. This module does not import torch, so that worker processes start quickly."""


class DataError(ValueError):
    """Data that cannot be used. The message says what was expected and what was found."""
