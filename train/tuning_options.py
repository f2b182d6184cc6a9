"""The options of fine-tuning: what of the backbone is trained, and how its layers differ."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .options import Section


@dataclass(frozen=True, kw_only=True)
class TuningConfig(Section):
    """Fine-tuning of the backbone."""

    #: Part of the backbone that is trained. all: all of it; head: none, the head alone; norm: its normalization layers;
    #: last-N: its last N layers, such as last-2; lora: low-rank updates of its linear layers by peft, which
    #: the extra foundation installs. The model file holds them merged into the weights. Frozen parts have no
    #: gradients, and frozen batch normalization keeps its statistics.
    tune: str = "all"
    #: Rank of the updates of --tune lora.
    lora_rank: int = 8
    #: Each layer of a backbone timm/NAME has this multiple of the learning rate of the layer after it, and 1-d
    #: parameters of the backbone have no weight decay. All layers have the same rate if not given.
    layer_decay: float | None = None

    def __post_init__(self) -> None:
        valid = re.fullmatch(r"all|head|norm|lora|last-[1-9]\d*", self.tune) is not None
        self._expect("tune", valid, "all, head, norm, last-N with a number of layers N, or lora")
        self._expect_at_least(1, "lora_rank")
        valid = self.layer_decay is None or 0 < self.layer_decay <= 1
        self._expect("layer_decay", valid, "a factor, above 0 and at most 1")
