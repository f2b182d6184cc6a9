"""The methods that `--methods` offers: the rows of the paper's Table 3, and later classifiers for long-tailed data.

To add a method:

1. Write a subclass of `Method` (method.py) in a file of its own. `SingleStageMethod` (single_stage.py) is the base class for
   methods with one stage, `TwoStageMethod` (two_stage.py) for methods whose displacements are added in a second stage.
2. Add its name to `MethodName` in method_options.py, and to METHODS and TITLES below. Add it to FIRST_STAGES if it differs from
   another method in the second stage only, so that their first stage is trained once.
3. If the softmax of its logits estimates probabilities, set `prior_exponent` (method.py), for `evaluate --adjust`.

The gradients of GistNet's two streams are routed in `gistops.nn.GistClassifier.losses`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from ..config import Config
from .cb_focal import ClassBalancedFocal
from .crt import ClassifierRetraining
from .focal import Focal
from .fslwf import Fslwf
from .gist import Gist
from .ldam_drw import LdamDrw
from .lfme import Lfme
from .lifted import LiftedLoss
from .lws import WeightScaling
from .method import Method
from .ncm import NearestClassMean
from .oltr import Oltr
from .one_head import CombinedHead, OneHead
from .range_loss import RangeLoss
from .softmax import SoftmaxClassifier
from .tau_norm import TauNormalized

#: Methods by name; called with the options and the number of training samples of each class, [K].
METHODS: dict[str, Callable[[Config, Tensor], Method]] = {
    "gist": Gist,
    "plain": SoftmaxClassifier,
    "cos-cb": functools.partial(OneHead, displacements=False),
    "cos-cs-cb": functools.partial(OneHead, displacements=True),
    "cos-gist": functools.partial(Gist, displacements=False),
    "gist-combined": CombinedHead,
    "gist-rotation": functools.partial(Gist, transform="rotation"),
    "gist-mlp": functools.partial(Gist, transform="mlp"),
    "balanced-softmax": functools.partial(SoftmaxClassifier, prior=True),
    "cos-balanced-softmax": functools.partial(SoftmaxClassifier, cosine=True, prior=True),
    "focal": Focal,
    "cb-focal": ClassBalancedFocal,
    "ldam-drw": LdamDrw,
    "lifted": LiftedLoss,
    "range": RangeLoss,
    "fslwf": Fslwf,
    "oltr": Oltr,
    "lfme": Lfme,
    "ncm": NearestClassMean,
    "crt": ClassifierRetraining,
    "tau-norm": TauNormalized,
    "lws": WeightScaling,
}

#: Groups of methods with the same first stage: a method's name -> the group's name.
FIRST_STAGES = {
    "plain": "plain",
    "ncm": "plain",
    "crt": "plain",
    "tau-norm": "plain",
    "lws": "plain",
    "cos-gist": "cos-gist",
    "gist": "cos-gist",
    "gist-rotation": "cos-gist",
    "gist-mlp": "cos-gist",
    "cos-cb": "cos-cb",
    "cos-cs-cb": "cos-cb",
}

#: Titles in reports; those of the paper's Table 3 where it has the method.
TITLES = {
    "gist": "GistNet (COS+CS+GIST)",
    "plain": "plain softmax",
    "cos-cb": "COS+CB",
    "cos-cs-cb": "COS+CS+CB",
    "cos-gist": "COS+GIST",
    "gist-combined": "w/v combined",
    "gist-rotation": "GistNet, rotation",
    "gist-mlp": "GistNet, MLP",
    "balanced-softmax": "balanced softmax",
    "cos-balanced-softmax": "cosine balanced softmax",
    "focal": "Focal loss",
    "cb-focal": "CB-Focal",
    "ldam-drw": "LDAM+DRW",
    "lifted": "Lifted loss",
    "range": "Range loss",
    "fslwf": "FSLwF",
    "oltr": "OLTR",
    "lfme": "LFME",
    "ncm": "Decoupling, NCM",
    "crt": "Decoupling, cRT",
    "tau-norm": "Decoupling, τ-normalized",
    "lws": "Decoupling, LWS",
}
