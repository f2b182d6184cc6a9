"""Classification heads of GistNet (Liu, Li, Kang, Hua, Vasconcelos, ICCV 2021) as modules."""

from .constellation import ConstellationClassifier
from .frozen import FrozenClassifier
from .gist import GistClassifier
from .head import MaxCosineHead
from .prediction import Prediction
from .replace import replace_classifier
from .subcenter import SubcenterClassifier
from .two_heads import TwoHeadClassifier
from .usage import SlotUsage

__all__ = [
    "ConstellationClassifier",
    "FrozenClassifier",
    "GistClassifier",
    "MaxCosineHead",
    "Prediction",
    "SlotUsage",
    "SubcenterClassifier",
    "TwoHeadClassifier",
    "replace_classifier",
]
