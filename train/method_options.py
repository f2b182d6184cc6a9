"""The options of the methods: their two streams, the displacements, and the methods that GistNet is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from .options import Mark, Section, option

MethodName = Literal[
    "gist",
    "plain",
    "cos-cb",
    "cos-cs-cb",
    "cos-gist",
    "gist-combined",
    "gist-rotation",
    "gist-mlp",
    "balanced-softmax",
    "cos-balanced-softmax",
    "focal",
    "cb-focal",
    "ldam-drw",
    "lifted",
    "range",
    "fslwf",
    "oltr",
    "lfme",
    "ncm",
    "crt",
    "tau-norm",
    "lws",
]


@dataclass(frozen=True, kw_only=True)
class MethodConfig(Section):
    """The methods, and the two streams of samples that they train on."""

    #: Methods to train, all with the same number of image passes, except lfme, fslwf, crt and lws. gist is GistNet, which
    #: is COS+CS+GIST in Table 3 of the paper. cos-cb, cos-cs-cb, cos-gist, gist-combined (w = v), gist-rotation
    #: and gist-mlp are the other rows of that table. plain is a linear softmax classifier. balanced-softmax and
    #: cos-balanced-softmax add the log prior (the log of the class frequencies) to the logits in training. focal and
    #: cb-focal are focal losses, ldam-drw has larger margins for smaller classes. lifted and range add a loss of pairs
    #: of samples to the cross-entropy on the balanced stream; lifted needs `pip install '.[baselines]'`. oltr
    #: adds to each feature what a memory of class centroids holds. lfme distills networks for the groups of classes
    #: into one, and has more passes for them. fslwf trains on the many-shot classes, generates the weights of the
    #: others, and has fewer passes. ncm, crt, tau-norm and lws replace the classifier of plain after its training;
    #: crt and lws train the new one.
    methods: tuple[MethodName, ...] = option(("gist", "plain"), Mark.SECOND_STAGE)
    #: Number of displacements that all classes share; 0 for none.
    num_displacements: int = option(4, Mark.SECOND_STAGE)
    #: Factor of the log prior, where the log prior is added in training or subtracted in evaluation.
    prior_strength: float = 1.0
    #: λ in GistNet's loss L = L_random + λ L_balanced.
    balanced_loss_weight: float = option(0.5, Mark.DEPARTURE)
    #: How GistNet's balanced loss treats all classes equally. sampling: class-balanced samples, as in the paper. prior: random
    #: samples, with the log prior added to the logits (balanced softmax), so that each sample trains both
    #: heads. Not in the paper.
    balancing: Literal["sampling", "prior"] = option("sampling", Mark.DEPARTURE)
    #: Start of the centers of GistNet, its variants, cos-cb, cos-cs-cb and cos-balanced-softmax. random, or means:
    #: the class means of the unit features at the start of training, for features and pretrained networks. Not in the
    #: paper.
    center_init: Literal["random", "means"] = option("random", Mark.DEPARTURE)
    #: Share of each target that is spread evenly over all classes. For methods whose loss is a plain cross-entropy:
    #: GistNet and its variants, plain, balanced-softmax, cos-balanced-softmax, ncm, crt, tau-norm and lws.
    label_smoothing: float = 0.0
    #: Samples per step from the random stream, over all processes. An epoch is one pass of this stream.
    batch_size: int = 128
    #: Classes per step from the balanced stream. If not given, 32, or all classes if the data has fewer.
    classes_per_batch: int | None = option(None, Mark.DATASET)
    #: Samples of each of these classes. If not given, 4; if --classes-per-batch is not given either, as many
    #: as give 128 samples per step. Methods without a balanced stream take as many more samples from the
    #: random stream.
    samples_per_class: int | None = option(None, Mark.DATASET)

    def __post_init__(self) -> None:
        self._expect_at_least(1, "batch_size", "classes_per_batch", "samples_per_class")
        self._expect_at_least(0, "prior_strength", "balanced_loss_weight")
        self._expect("label_smoothing", 0 <= self.label_smoothing < 1, "a share, at least 0 and below 1")
        self._expect("num_displacements", 0 <= self.num_displacements <= 255, "0 to 255")
        self._expect("methods", len(self.methods) > 0, f"at least one of {', '.join(get_args(MethodName))}")
        self._expect("methods", len(set(self.methods)) == len(self.methods), "each method once")

    def balanced_sizes(self, num_classes: int | None = None) -> tuple[int, int]:
        """Return the classes per step of the balanced stream and the samples per class.

        Args:
            num_classes: the number of classes in the data, for options that are not given.
        """
        if self.classes_per_batch is not None:
            return self.classes_per_batch, self.samples_per_class or 4
        classes = min(32, num_classes or 32)
        return classes, self.samples_per_class or 128 // classes


@dataclass(frozen=True, kw_only=True)
class DisplacementConfig(Section):
    """Start and movement of the displacements, in the second stage."""

    marks = Mark.SECOND_STAGE | Mark.DEPARTURE

    #: Directions of the displacements at the start: random, or the directions in which features of the larger
    #: classes spread around their class means. (The paper does not specify the start. Its released code
    #: starts at zero, where displacements receive no gradient.) Rotations and MLPs always start at random.
    displacement_init: Literal["random", "residuals"] = "random"
    #: Length of the displacements at the start, relative to the mean length of the centers; 0.1 if not given,
    #: and 1 for an MLP.
    displacement_scale: float | None = None
    #: Learning rate of the displacements as a multiple of --lr; 0 keeps displacements fixed.
    displacement_lr: float = 1.0
    #: Weight decay of the displacements; --weight-decay if not given.
    displacement_weight_decay: float | None = None
    #: gradient: train the displacements. residuals: set the displacements after every epoch to the directions
    #: in which the features of the larger classes spread, with length --displacement-scale.
    displacement_update: Literal["gradient", "residuals"] = "gradient"
    #: GistNet: in the second stage, displace each feature of the balanced stream along one of this many
    #: directions in which the larger classes spread, so that small classes vary as large classes do. The
    #: directions are recomputed after every epoch. 0 turns the transfer off. Not in the paper.
    transfer_directions: int = 0
    #: Length of the transfer, for features of unit length.
    transfer_length: float = 0.7

    def __post_init__(self) -> None:
        self._expect_at_least(0, "displacement_lr", "displacement_weight_decay", "transfer_directions")
        self._expect_above_0("transfer_length", "displacement_scale")


@dataclass(frozen=True, kw_only=True)
class BaselineConfig(Section):
    """Options of the compared methods."""

    marks = Mark.SECOND_STAGE  # shared first stages do not depend on them

    #: β of cb-focal's class weights (1 − β) / (1 − β^n_k), n_k the samples of class k. 0 weighs all classes
    #: equally, values close to 1 weigh a class by 1 / n_k. The authors' scripts have 0.9999 for CIFAR-10
    #: and 0.999 for iNaturalist 2018.
    class_balanced_beta: float = 0.9999
    #: γ of cb-focal, which weighs the logarithm of a probability p by (1 − p)^γ. The authors' scripts have 1 for
    #: CIFAR-10 and 0.5 for iNaturalist 2018.
    cb_focal_gamma: float = 1.0
    #: crt: epochs of the new classifier: 10 for ImageNet-LT and Places-LT, 30 for iNaturalist 2018.
    crt_epochs: int = 10
    #: tau-norm: the exponent t of ‖w‖^t, by which weights are divided, from 0 to 2. If not given, the best one of 0, 0.1, …, 2
    #: on the validation samples (see --hold-out-val), or 0.7 if there are none.
    tau_norm: float | None = None

    def __post_init__(self) -> None:
        self._expect_at_least(0, "cb_focal_gamma")
        valid = 0 <= self.class_balanced_beta < 1
        self._expect("class_balanced_beta", valid, "at least 0 and below 1")
        self._expect_at_least(1, "crt_epochs")
        # Larger exponents than those of the paper can make weights infinite.
        self._expect("tau_norm", self.tau_norm is None or 0 <= self.tau_norm <= 2, "from 0 to 2")
