"""Classification heads of GistNet (Liu, Li, Kang, Hua, Vasconcelos, ICCV 2021) as modules."""

from .constellation import ConstellationClassifier
from .gist import GistClassifier
from .head import MaxCosineHead, Prediction
from .subcenter import SubcenterClassifier
from .usage import SlotUsage

__all__ = [
    "ConstellationClassifier",
    "GistClassifier",
    "MaxCosineHead",
    "Prediction",
    "SlotUsage",
    "SubcenterClassifier",
]
