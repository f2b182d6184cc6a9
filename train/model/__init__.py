"""The model: normalization, a backbone and a head; and the files of trained models."""

from .model import Model, build_model, load_model, save_model

__all__ = ["Model", "build_model", "load_model", "save_model"]
