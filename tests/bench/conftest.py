"""The images of the driver's tests."""

from ..train.conftest import arrays, image_file, images

__all__ = ["arrays", "image_file", "images"]
