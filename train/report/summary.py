"""The summary of a page in words: what was trained, which method is best and by how much, and what to worry about."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..console import counted
from .differences import Difference, difference, difference_of_group, standard_error
from .table import percent
from .trained import TrainedMethod

UNUSED = 0.01  # share of samples below which a slot counts as unused
COMMON = 0.95  # share of classes with one best slot above which slots hardly change the predictions
MISCALIBRATED = 0.1  # expected calibration error
RISE = 0.05  # relative rise of the loss over the last three epochs of a stage


@dataclass(frozen=True)
class Summary:
    """Sentences on what was trained, on the outcome, and on what to worry about."""

    trained: list[str]
    outcome: list[str]
    worries: list[str]


def summarize(methods: list[TrainedMethod]) -> Summary:
    """Summarize the methods of all runs of a page, of which there is at least one."""
    worries = [*_worries_of_data(methods), *(worry for method in methods for worry in _worries(method))]
    return Summary(_trained(methods), [*_outcome(methods), *_seeds(methods)], worries)


def listed(names: list[str]) -> str:
    """Return names as in a sentence: "a", "a and b", "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _trained(methods: list[TrainedMethod]) -> list[str]:
    sentences = []
    facts = {method.run: method.data for method in methods if "seed" in method.data}
    datasets = [
        {key: value for key, value in data.items() if key not in ("pairs", "seed", "backbone")}
        for data in facts.values()
    ]
    if datasets and all(data == datasets[0] for data in datasets):
        data, counts = datasets[0], methods[0].result["train_counts"]
        sentences.append(
            f"The training data is {data['data']}: {data['train']:,} {data['samples']} in "
            f"{counted(len(counts), 'class', 'classes')}. The largest class has {max(counts):,} {data['samples']}, "
            f"the smallest {min(counts):,}. The test set has {data['test']:,}."
        )
    if facts:
        backbones = sorted({data["backbone"] for data in facts.values()})
        seeds = sorted({data["seed"] for data in facts.values()})
        sentences.append(
            f"{'Backbones' if len(backbones) > 1 else 'The backbone'}: {listed(backbones)}. "
            f"{'Seeds' if len(seeds) > 1 else 'The seed'}: {listed([str(seed) for seed in seeds])}."
        )
    return sentences


def _outcome(methods: list[TrainedMethod]) -> Iterator[str]:
    ranked = sorted(methods, key=lambda method: -method.result["accuracy"]["overall"])
    best = ranked[0]
    yield from _overall(ranked)
    yield from _few_shot(methods)
    others = [
        (accuracy["overall"], f"{method.name}: {way}")
        for method in methods
        for way, accuracy in method.result.get("accuracy_of", {}).items()
    ]
    if others:
        highest, name = max(others)
        if highest > best.result["accuracy"]["overall"] + (standard_error(best.result) or 0):
            yield f"Another way to use a trained model has a higher overall accuracy: {name}, {percent(highest)} %."


def _overall(ranked: list[TrainedMethod]) -> Iterator[str]:
    best, error = ranked[0], standard_error(ranked[0].result)
    samples = best.data.get("samples", "samples")
    accuracy = percent(best.result["accuracy"]["overall"])
    if len(ranked) == 1:
        margin = f" (standard error {100 * error:.1f})" if error is not None else ""
        yield f"{best.name} classifies {accuracy} % of the test {samples} correctly{margin}."
        return
    gaps = [difference(best.result, other.result, same_samples=best.run == other.run) for other in ranked[1:]]
    equal = [
        other.name
        for other, gap in zip(ranked[1:], gaps, strict=True)
        if gap is not None and not gap.is_clear
    ]
    second, gap = ranked[1], gaps[0]
    against = f"{accuracy} % of the test {samples} correctly, {second.name} {percent(second.result['accuracy']['overall'])} %"
    if equal:
        yield f"{listed([best.name, *equal])} do equally well on all test {samples}: their differences are smaller than the standard error. {best.name} classifies {accuracy} % correctly."
    else:
        yield f"{best.name} has the highest overall accuracy: it classifies {against}.{_lead(gap)}"


def _lead(gap: Difference | None) -> str:
    """Return a sentence on a lead that exceeds its standard error."""
    if gap is None:
        return ""
    lead = f" The lead is {100 * gap.value:.1f} points, with a standard error of {100 * gap.error:.1f}"
    return f"{lead}: it may be chance." if abs(gap.value) < 2 * gap.error else f"{lead}."


def _few_shot(methods: list[TrainedMethod]) -> Iterator[str]:
    """Compare methods on few-shot classes, if all have the same classes."""
    groups = [method.group_of_classes for method in methods]
    if len(methods) < 2 or groups[0] is None or any(group != groups[0] for group in groups):
        return
    few = [group == "few" for group in groups[0]]
    scored = [
        (method.result["accuracy"]["few"], method)
        for method in methods
        if method.result["accuracy"]["few"] is not None
    ]
    if len(scored) < 2:
        return
    (highest, best), (second, other) = sorted(scored, key=lambda pair: -pair[0])[:2]
    gap = difference_of_group(best.result, other.result, few)
    most = max(count for count, member in zip(best.result["train_counts"], few, strict=True) if member)
    where = f"On the {counted(sum(few), 'few-shot class', 'few-shot classes')} (at most {counted(most, 'training sample')})"
    numbers = f"{percent(highest)} % against {percent(second)} %"
    if gap is not None and not gap.is_clear:
        yield f"{where} the two best, {best.name} and {other.name}, do equally well: {numbers}."
    else:
        yield f"{where} {best.name} is best: {numbers} of {other.name}.{_lead(gap)}"


def _seeds(methods: list[TrainedMethod]) -> Iterator[str]:
    seeds = {method.data["seed"] for method in methods if "seed" in method.data}
    if len(seeds) == 1:
        yield "All of this is from one seed, which says little. Standard errors cover the choice of test samples, not that of the seed: train with other seeds before you rely on a difference."


def _worries_of_data(methods: list[TrainedMethod]) -> Iterator[str]:
    if any(epoch.get("split") == "test" for method in methods for epoch in method.epochs):
        yield "There is no validation split: the curves show the test samples. Do not choose options or epochs by these numbers. --hold-out 0.1 makes a validation split."
    untested = [method.result["test_counts"].count(0) for method in methods if method.classes]
    if untested and max(untested):
        yield f"{counted(max(untested), 'class has', 'classes have')} no test samples, so nothing is known about them."


def _worries(method: TrainedMethod) -> Iterator[str]:
    """Return the worries about one model."""
    result, name = method.result, method.name
    if groups := method.group_of_classes:
        few = [a for a, g in zip(result["accuracy_per_class"], groups, strict=True) if g == "few"]
        tested = [accuracy for accuracy in few if accuracy is not None]
        if zero := tested.count(0):
            yield f"{name} recognizes no test sample of {zero:,} of {counted(len(tested), 'few-shot class', 'few-shot classes')}."
    unused = [j for j, share in enumerate(result.get("slot_usage", [])) if j and share < UNUSED]
    if unused:
        slots = listed([f"δ{j}" for j in unused])
        yield f"{name} hardly uses {slots}: {'it wins' if len(unused) == 1 else 'each wins'} less than {100 * UNUSED:.0f} % of the test samples."
    analysis = result.get("analysis", {})
    if (common := analysis.get("common_slot")) and common > COMMON:
        yield f"The slots of {name} hardly change its predictions: {100 * common:.0f} % of all classes have the same best slot for a sample."
    if analysis and (error := analysis["calibration"]["error"]) > MISCALIBRATED:
        yield f"The probabilities of {name} are not to be trusted: {_calibration(analysis['calibration']['bins'], error)}."
    if rise := _rise(method):
        yield f"The loss of {name} rose by {100 * rise:.0f} % over the last three epochs."


def _calibration(bins: list[list[float]], error: float) -> str:
    n = sum(count for _, _, count in bins)
    confidence = sum(mean * count for mean, _, count in bins) / n
    accuracy = sum(mean * count for _, mean, count in bins) / n
    return (
        f"its mean confidence is {100 * confidence:.0f} %, its accuracy {100 * accuracy:.0f} % "
        f"(expected calibration error {100 * error:.0f} %)"
    )


def _rise(method: TrainedMethod) -> float:
    """Return by what share the loss rose over the last three epochs of the last stage; 0 if it did not rise at the end."""
    if not method.epochs:
        return 0.0
    stage = method.epochs[-1].get("stage")
    losses = [epoch["loss"] for epoch in method.epochs if epoch.get("stage") == stage][-3:]
    if len(losses) < 3 or losses[0] <= 0 or not losses[0] <= losses[1] <= losses[2]:
        return 0.0
    rise = losses[2] / losses[0] - 1
    return float(rise) if rise > RISE else 0.0
