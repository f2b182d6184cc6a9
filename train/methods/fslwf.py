"""FSLwF: weights of classes with few samples, generated from their features and the weights of the other classes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gistops
from gistops.nn import ConstellationClassifier

from .. import distributed
from ..config import Config
from ..model.model import Model
from ..model.precision import wide
from ..shot_groups import split_classes
from .method import Method, Stage, StageData, describe_constellation
from .residual_directions import many_shot
from .two_stage import constellation

# The authors' configuration for ImageNet (imagenet_ResNet10CosineClassifierWeightAtt*).
TAU = 10.0
ATTENTION_TAU = 30.0  # γ
NOVEL_SHARE = 250 / 389  # of the base classes, in an episode

IGNORED = -100  # the target of samples without a loss
CHUNK = 4096  # samples whose attention is computed at once


class WeightGenerator(nn.Module):
    """The few-shot classification weight generator with attention (Gidaris & Komodakis, CVPR 2018, section 3.2).

    The weight of a class with exemplars f_1 … f_n is w' = 1/n Σ_i u_i:

        u_i = φ_avg ⊙ f̂_i + φ_att ⊙ Σ_b a_ib ŵ_b,    a_i = softmax_b γ cos(Q f̂_i + q, κ_b),    b: the base classes

    Parameters of the module:
        average_scale, attention_scale: φ_avg and φ_att, [in_features]; ones at the start.
        query: Q, the identity with a little noise at the start, and q.
        keys: κ, [num_base, in_features].
        attention_tau: γ, [1].

    Args:
        in_features: the dimension d of the features.
        num_base: the number of base classes.
    """

    def __init__(self, in_features: int, num_base: int) -> None:
        super().__init__()
        self.average_scale = nn.Parameter(torch.ones(in_features))
        self.attention_scale = nn.Parameter(torch.ones(in_features))
        self.query = nn.Linear(in_features, in_features)
        self.keys = nn.Parameter(torch.empty(num_base, in_features))
        self.attention_tau = nn.Parameter(torch.tensor([ATTENTION_TAU]))
        with torch.no_grad():
            nn.init.normal_(self.query.weight, std=1e-3).diagonal().add_(1.0)
            nn.init.zeros_(self.query.bias)
            nn.init.normal_(self.keys, std=(2 / in_features) ** 0.5)

    def forward(self, features: Tensor, base_weights: Tensor, attended: Tensor | None = None) -> Tensor:
        """Return the contributions u of exemplars to the weights of their classes, [n, d].

        Args:
            features: f, [n, d].
            base_weights: w, [num_base, d].
            attended: the base classes with attention, [num_base] bool, at least one; all if None.
        """
        unit = F.normalize(features, dim=1)
        keys = F.normalize(self.keys, dim=1)
        scores = self.attention_tau * F.normalize(self.query(unit), dim=1) @ keys.T
        if attended is not None:
            scores = scores.masked_fill(~attended, -torch.inf)
        recalled = scores.softmax(1) @ F.normalize(base_weights, dim=1)
        return self.average_scale * unit + self.attention_scale * recalled


class Fslwf(Method):
    """Dynamic few-shot visual learning without forgetting (Gidaris & Komodakis, CVPR 2018), for long-tailed classes.

    The base classes are the many-shot ones (`base_classes`), and no other class is trained on.

        stage 1, random stream:    L = CE(s, y) over the base classes,    s_k = τ cos(f, w_k)
        stage 2, balanced stream:  the same, on fixed features, with generated weights for classes that act as novel

    In the second stage each micro-batch is an episode. A random 64 % of the base classes act as novel if they have two samples
    in the micro-batch. The first half of the samples of each are exemplars, from which the `WeightGenerator` makes the
    weight of the class in place of w_k. The loss is the mean over all other samples of the micro-batch, so it depends on the
    division into micro-batches. The numbers come from torch's generator, which checkpoints contain. Unlike in the authors'
    data loader, a step's samples are those of the balanced stream, so exemplars are as many as the stream takes of a class. The
    authors' bias, which all classes share, is left out: it does not change the softmax.

    The weights of the other classes are generated from all their training samples after each epoch: in the first stage
    as means of unit features, in the second stage by the `WeightGenerator`.
    """

    def __init__(self, config: Config, counts: Tensor) -> None:
        super().__init__(config, counts)
        base = base_classes(counts, config.run.split_rule)
        self.base, self.novel = base.nonzero().flatten(), (~base).nonzero().flatten()
        self.position = base.cumsum(0) - 1  # of a base class among the base classes
        self.num_novel = int(NOVEL_SHARE * len(self.base))  # in an episode
        epochs = config.optim
        self.stages = [
            Stage("stage 1", epochs.stage1_epochs, "random", base),
            Stage("stage 2", epochs.stage2_epochs, "balanced", base, frozen_features=True),
        ]
        self.loss_coefficients = {"loss_balanced": 1.0, "loss_random": 1.0}

    def make_head(self, in_features: int, num_classes: int) -> nn.Module:
        return ConstellationClassifier(in_features, num_classes, 0, tau=TAU, backend=self.backend)

    def restructure(self, model: Model) -> None:
        if self.stages[1].epochs:
            head = constellation(model)
            model.auxiliary = WeightGenerator(head.in_features, len(self.base)).to(head.centers)

    def begin_stage(self, stage: int, model: Model, data: StageData) -> None:
        if stage == 1:
            self.restructure(model)

    def training_losses(
        self, model: Model, samples: Tensor, features: Tensor, labels: Tensor, num_balanced: int
    ) -> dict[str, Tensor]:
        head, target = constellation(model), self.position[labels]
        weights = head.centers[self.base]
        if model.auxiliary is None:
            return {"loss_random": self._cross_entropy(head, features, weights, target)}
        with torch.autocast(features.device.type, enabled=False):
            features = wide(features)
            novel, exemplar = self._episode(target)
            contributions = model.auxiliary(features, weights, ~novel)
            classes = torch.arange(len(weights), device=target.device)
            chosen = ((target == classes[:, None]) & exemplar).to(features)
            generated = chosen @ contributions / chosen.sum(1, keepdim=True).clamp(min=1)
            weights = torch.where(novel[:, None], generated, weights)
            target = target.masked_fill(exemplar, IGNORED)
            return {"loss_balanced": self._cross_entropy(head, features, weights, target)}

    def _cross_entropy(
        self, head: ConstellationClassifier, features: Tensor, weights: Tensor, target: Tensor
    ) -> Tensor:
        loss = gistops.constellation_cross_entropy(
            features,
            weights,
            head.displacements,
            head.tau,
            target,
            ignore_index=IGNORED,
            backend=head.backend,
        )
        assert isinstance(loss, Tensor)
        return loss

    def _episode(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Draw the classes that act as novel; return masks over the base classes and, of exemplars, over the samples.

        Args:
            target: the positions of the samples' classes among the base classes, [b].
        """
        same = target[:, None] == target
        count, before = same.sum(1), same.tril(-1).sum(1)  # samples of the same class: all, and those before
        num_base = len(self.base)
        drawn = torch.rand(num_base, device=target.device).topk(self.num_novel).indices
        novel = torch.zeros(num_base, dtype=torch.bool, device=target.device).index_fill_(0, drawn, True)
        novel &= (target == torch.arange(num_base, device=target.device)[:, None]).sum(1) >= 2
        return novel, novel[target] & (before < count // 2)

    def reads_training_features(self) -> bool:
        return len(self.novel) > 0

    @torch.no_grad()
    def end_epoch(self, model: Model, data: StageData) -> None:
        """Generate the weights of all classes but the base classes from their training samples."""
        if not len(self.novel):
            return
        head, (features, labels) = constellation(model), data.training()

        def weights() -> Tensor:
            sums = torch.zeros_like(head.centers, dtype=torch.float64)
            for rows in torch.isin(labels, self.novel).nonzero().flatten().split(CHUNK):
                unit = F.normalize(features[rows].float(), dim=1)
                base = head.centers[self.base]
                contributions = unit if model.auxiliary is None else model.auxiliary(unit, base)
                sums.index_add_(0, labels[rows], contributions.double())
            return (sums[self.novel] / self.counts[self.novel, None]).cpu()

        # On rank 0 only: features may differ in the last bit between GPUs.
        head.centers[self.novel] = distributed.broadcast_from_rank0(weights).to(head.centers)

    def describe(self, head: ConstellationClassifier) -> dict[str, Any]:
        return describe_constellation(head)


def base_classes(counts: Tensor, split_rule: str) -> Tensor:
    """Return a mask over the base classes, [K] bool: the many-shot ones, at least three.

    An episode needs a class that acts as novel and two that get attention. If fewer classes are many-shot by the rule, those
    with more than the mean number of samples and the three largest are base classes.

    Args:
        counts: the number of training samples of each class, [K].
        split_rule: the rule of the groups of classes.
    """
    base = split_classes(counts, split_rule)["many"]
    if int(base.sum()) < 3:
        base = many_shot(counts) | (counts >= counts.topk(min(3, len(counts))).values[-1])
    return base
