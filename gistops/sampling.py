"""Class-balanced batches."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from math import gcd
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Sampler

from ._numbers import check_integer

Integers = npt.NDArray[np.int64]
#: Samples drawn by all replicas at the largest position; far below the counters of 64 bits.
_MAX_POSITION = 2**62


class ClassBalancedBatchSampler(Sampler[list[int]]):
    """Endless batches of `classes_per_batch` distinct classes with `samples_per_class` samples each.

    GistNet (Liu, Li, Kang, Hua, Vasconcelos, ICCV 2021) draws 32 classes × 4 samples for its balanced loss.
    The classes come from an endless sequence of shuffled cycles over all classes. The samples of a class come from
    an endless sequence of shuffled cycles over its samples. Hence, at any moment and counted over all replicas, the
    numbers of visits of any two classes differ by at most one, and so do the visits of any two samples of a class.
    The classes in a batch are distinct. The samples of a class in a batch are distinct if the class has at least
    `samples_per_class` samples; otherwise they repeat. Classes without samples are skipped.

        sampler = ClassBalancedBatchSampler(dataset.targets)
        loader = DataLoader(dataset, batch_sampler=sampler, num_workers=4, persistent_workers=True)

    Replicas: all replicas follow the same sequence of batches. Replica r takes batch r of each group of
    `num_replicas` batches, so that no position is drawn twice. With at least `num_replicas * classes_per_batch`
    classes, no class occurs in two batches of a group.

    The sequence depends on the arguments alone, not on the versions of numpy and torch. It is endless. A batch takes a
    few microseconds per class in the batch, independently of the numbers of classes and samples.

    Epochs: with `num_batches`, an iterator ends after this number of batches, which is the sampler's length. Without it,
    an iterator has no end and `len()` raises a TypeError, so that a loop over a `DataLoader` has to end itself. A new
    iterator continues at the position of the last one. A `DataLoader` with workers draws ahead: if a loop ends early, the
    next one skips the batches drawn ahead. `set_epoch(epoch)` moves to the beginning of an epoch, whatever was drawn
    before. Lightning calls it for each epoch; construct the sampler after the process group, and the
    `Trainer` with `use_distributed_sampler=False`, because the sampler divides the batches itself.

    Several threads may draw from a sampler, or from an iterator: each batch of the sequence is drawn once.

    Args:
        labels: class of each sample, integers of at least 0: a list, a numpy array or a tensor, [N].
        classes_per_batch: distinct classes per batch, at least 1 and at most the number of classes with samples.
        samples_per_class: samples per class and batch, at least 1.
        seed: at least 0; the same for all replicas.
        num_replicas: number of processes that share the sequence. Default: the world size if `torch.distributed` is
            initialized, otherwise 1.
        rank: this process, 0 to num_replicas - 1. Default: the rank in `torch.distributed` if num_replicas is its world
            size; 0 if num_replicas is 1 or `torch.distributed` is not initialized.
        num_batches: batches per iterator and replica, at least 1; default: no end.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range; the message names it.
    """

    def __init__(
        self,
        labels: Sequence[int] | npt.NDArray[Any] | Tensor,
        classes_per_batch: int = 32,
        samples_per_class: int = 4,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
        num_batches: int | None = None,
    ) -> None:
        array = _as_labels(labels)
        self.classes_per_batch = check_integer("classes_per_batch", classes_per_batch, 1)
        self.samples_per_class = check_integer("samples_per_class", samples_per_class, 1)
        self.seed = check_integer("seed", seed, 0)
        world_size, own_rank = _distributed()
        num_replicas = world_size if num_replicas is None else num_replicas
        self.num_replicas = check_integer("num_replicas", num_replicas, 1)
        if rank is None:
            if self.num_replicas not in (1, world_size) and world_size > 1:
                raise ValueError(
                    f"rank: expected 0 to {self.num_replicas - 1}, because num_replicas={self.num_replicas} is not the "
                    f"world size {world_size}; got None"
                )
            rank = own_rank if self.num_replicas == world_size else 0
        self.rank = check_integer("rank", rank, 0, self.num_replicas - 1)
        self.num_batches = None if num_batches is None else check_integer("num_batches", num_batches, 1)
        # The samples sorted by class, and the bounds of each class there: one sort serves all classes.
        self._order = np.argsort(array, kind="stable")
        ends = np.flatnonzero(np.diff(array[self._order], append=-1)) + 1
        self._bounds = np.concatenate(([0], ends))
        self.num_classes = len(ends)
        if self.classes_per_batch > self.num_classes:
            raise ValueError(
                f"classes_per_batch: expected at most {self.num_classes}, the number of classes that have "
                f"samples, got {self.classes_per_batch}"
            )
        self._checksum = zlib.crc32(array.data)
        self._key = np.asarray(np.random.SeedSequence(self.seed).generate_state(2, np.uint64), np.uint64)
        group = self.num_replicas * self.classes_per_batch
        window = group if group <= self.num_classes else self.classes_per_batch
        self._classes = _ShuffledCycles(self.num_classes, window, self._key, 0)
        self._images: dict[int, _ShuffledCycles] = {}  # of the classes drawn so far
        self._batches = 0
        self._lock = threading.Lock()  # guards the position and the cached cycles

    def __iter__(self) -> Iterator[list[int]]:
        return _Batches(self, self.num_batches)

    def __len__(self) -> int:
        if self.num_batches is None:
            raise TypeError("ClassBalancedBatchSampler has no length: expected num_batches, got None")
        return self.num_batches

    def __bool__(self) -> bool:  # otherwise the truth value would be that of the length
        return True

    def set_epoch(self, epoch: int) -> None:
        """Move to the beginning of an epoch of `num_batches` batches. Without `num_batches`, nothing changes.

        To continue in the middle of an epoch, call `load_state_dict` afterward. An iterator then yields `num_batches`
        batches from there.

        Args:
            epoch: number of the epoch, at least 0; the epochs before it have at most 2**62 samples.

        Raises:
            TypeError, ValueError: the epoch is not an integer or is out of range.
        """
        batches = self._max_batches(self.num_replicas) // (self.num_batches or 1)
        epoch = check_integer("epoch", epoch, 0, batches)
        if self.num_batches is not None:
            with self._lock:
                self._batches = epoch * self.num_batches

    def _max_batches(self, num_replicas: int) -> int:
        """Return the largest number of batches per replica at which the sampler can continue."""
        return _MAX_POSITION // (num_replicas * self.classes_per_batch * self.samples_per_class)

    def _draw(self) -> list[int]:
        """Return the next batch of this replica."""
        with self._lock:
            index = self._batches * self.num_replicas + self.rank  # in the shared sequence of all replicas
            batch = self._batch(index)
            self._batches += 1
            return batch

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def _batch(self, index: int) -> list[int]:
        """Return batch `index` of the shared sequence: a function of the arguments and `index` alone."""
        start = index * self.classes_per_batch
        images = []
        for place, label in enumerate(self._classes.take(start, self.classes_per_batch).tolist(), start):
            # Each cycle visits a class once, so the cycle's number counts the earlier visits of the class.
            visit = place // self.num_classes
            low, high = int(self._bounds[label]), int(self._bounds[label + 1])
            if label not in self._images:
                window = self.samples_per_class if self.samples_per_class <= high - low else 1
                self._images[label] = _ShuffledCycles(high - low, window, self._key, 1 + label)
            chosen = self._images[label].take(visit * self.samples_per_class, self.samples_per_class)
            images.append(self._order[low + chosen])
        result: list[int] = np.concatenate(images).tolist()
        return result

    def state_dict(self) -> dict[str, int]:
        """Return the position of the sequence as plain integers, which `torch.load(weights_only=True)` reads.

        `batches` counts the batches that this replica has drawn. A `DataLoader` with workers draws batches ahead of
        training. To resume at the batch after the last one that was trained on, set `batches` to the number of
        batches trained on since the sampler was created.
        """
        return {
            "batches": self._batches,
            "num_replicas": self.num_replicas,
            "seed": self.seed,
            "classes_per_batch": self.classes_per_batch,
            "samples_per_class": self.samples_per_class,
            "labels": self._checksum,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue at the position of `state`, with the same batches. Existing iterators follow.

        If the number of replicas differs from the state's, the sampler continues at the same position of another
        sequence, which is as balanced but has other batches.

        Raises:
            TypeError: the state is not a mapping, or its position not an integer.
            KeyError: the state lacks an entry.
            ValueError: the state belongs to a sampler with other labels or arguments.
        """
        own = self.state_dict()
        if not isinstance(state, Mapping):
            raise TypeError(f"state: expected a mapping, as of state_dict(), got {type(state).__name__}")
        if missing := own.keys() - state.keys():
            raise KeyError(
                f"state: expected entries {', '.join(own)}, got none for {', '.join(sorted(missing))}"
            )
        for name in ("seed", "classes_per_batch", "samples_per_class", "labels"):
            if state[name] != own[name]:
                what = "a checksum of " if name == "labels" else ""
                raise ValueError(f"{name}: expected {what}{state[name]}, as in the state, got {own[name]}")
        replicas = check_integer("state['num_replicas']", state["num_replicas"], 1)
        batches = check_integer("state['batches']", state["batches"], 0, self._max_batches(replicas))
        with self._lock:
            self._batches = -(-batches * replicas // self.num_replicas)  # rounded up, to whole groups


class _Batches(Iterator[list[int]]):
    """An iterator over batches; a class, because two threads cannot share a generator."""

    def __init__(self, sampler: ClassBalancedBatchSampler, left: int | None) -> None:
        self._sampler, self._left, self._lock = sampler, left, threading.Lock()

    def __next__(self) -> list[int]:
        if self._left is not None:
            with self._lock:
                if not self._left:
                    raise StopIteration
                self._left -= 1
        return self._sampler._draw()


def _distributed() -> tuple[int, int]:
    """Return the world size and the rank of `torch.distributed`; 1 and 0 if it is not initialized."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size(), distributed.get_rank()
    return 1, 0


class _ShuffledCycles:
    """An endless sequence of shuffled cycles over 0..n-1, without repeats in any aligned window of positions.

    Every cycle is a permutation, so that the visits of any two items differ by at most one at any position. A window
    is the positions from a multiple of `window` to the next, and `window <= n`. A cycle is a function of (key,
    stream, its number), and of the previous cycle if a window spans both. Windows and cycles end together every
    `window / gcd(n, window)` cycles, so that any cycle is computed without the cycles before this point, and no state
    is kept.
    """

    __slots__ = ("_cycle", "_key", "_n", "_number", "_span", "_stream", "_window")

    def __init__(self, n: int, window: int, key: npt.NDArray[np.uint64], stream: int) -> None:
        self._n, self._window, self._key, self._stream = n, window, key, stream
        self._span = window // gcd(n, window)
        self._number = -1  # of the cached cycle
        self._cycle: Integers = np.zeros(0, np.int64)

    def take(self, start: int, count: int) -> Integers:
        """Return the items at positions start..start+count-1, [count]."""
        number, offset = divmod(start, self._n)
        part = self._get(number)[offset : offset + count]
        if len(part) == count:
            return part
        parts = [part]
        while count := count - len(part):
            number += 1
            part = self._get(number)[:count]
            parts.append(part)
        return np.concatenate(parts)

    def _get(self, number: int) -> Integers:
        if number != self._number:
            first = number - number % self._span  # no window spans this cycle and the previous one
            for i in range(self._number + 1 if first <= self._number < number else first, number + 1):
                self._cycle = self._make(i)
                self._number = i
        return self._cycle

    def _make(self, number: int) -> Integers:
        """Return cycle `number`. The previous cycle must be cached if a window spans both."""
        if self._n == 1:
            return np.zeros(1, np.int64)
        # Raw words of a counter-based generator: numpy guarantees them across versions, unlike its permutations.
        words = np.random.Philox(key=self._key, counter=np.array([0, 0, number, self._stream], np.uint64))
        order = np.argsort(words.random_raw(self._n), kind="stable")
        used = number * self._n % self._window  # positions of the spanning window in the previous cycle
        if not used:
            return order
        # A uniform draw from the valid permutations: the window's other positions get items that it does not hold yet.
        # The remaining items are shuffled again, because their order is not uniform given the first ones.
        free = np.ones(self._n, bool)
        free[self._cycle[self._n - used :]] = False
        head = order[free[order]][: self._window - used]
        free[:] = True
        free[head] = False
        rest = np.flatnonzero(free)
        return np.concatenate((head, rest[np.argsort(words.random_raw(len(rest)), kind="stable")]))


def _as_labels(labels: object) -> Integers:
    if isinstance(labels, Tensor):
        if labels.is_floating_point():  # bfloat16 is unknown to numpy
            raise TypeError(f"labels: expected integers, got {labels.dtype}")
        labels = labels.detach().cpu().numpy()
    try:
        array = np.asarray(labels)
    except ValueError as error:
        raise ValueError(
            "labels: expected one class for each sample, shape [N], got rows that differ"
        ) from error
    if array.ndim != 1 or not len(array):
        raise ValueError(
            f"labels: expected one class for each sample, shape [N] with N >= 1, got {list(array.shape)}"
        )
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"labels: expected integers, got {array.dtype}")
    if array.min() < 0:
        raise ValueError(f"labels: expected classes of at least 0, got {array.min()}")
    if array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"labels: expected classes of at most 2**63 - 1, got {array.max()}")
    return array.astype(np.int64)
