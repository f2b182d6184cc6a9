"""The summary of a page in words: what was trained, which method is best and by how much, and what to worry about."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from ..console import counted
from .differences import Difference, difference, difference_of_group, standard_error
from .table import percent
from .trained import Record, TrainedMethod

UNUSED = 0.01  # share of samples below which a slot counts as unused
COMMON = 0.95  # share of classes with one best slot above which slots hardly change the predictions
MISCALIBRATED = 0.1  # expected calibration error
MIN_SAMPLES = 100  # test samples below which shares of them prove little
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
    return Summary(list(_trained(methods)), [*_outcome(methods), *_seeds(methods)], worries)


def listed(names: list[str]) -> str:
    """Return names as in a sentence: "a", "a and b", "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _trained(methods: list[TrainedMethod]) -> Iterator[str]:
    yield from dict.fromkeys(
        _sentence_on_data(method.data, method.result["train_counts"]) for method in methods if method.data
    )
    facts = []
    for key in ("backbone", "seed"):
        values = sorted({method.data[key] for method in methods if key in method.data} - {"none"})
        if values:
            facts.append(f"{key}{'s' if len(values) > 1 else ''} {listed([str(value) for value in values])}")
    if facts:
        text = ", ".join(facts)
        yield f"{text[0].upper()}{text[1:]}."


def _sentence_on_data(data: Record, counts: list[int]) -> str:
    kind, classes = data["samples"], counted(len(counts), "class", "classes")
    sizes = f"{max(counts):,} training samples in the largest class and {min(counts):,} in the smallest"
    if not data["train"]:  # a trained model was evaluated
        return (
            f"Evaluated on {data['data']}, {data['test']:,} {kind}. The model knows {classes}, with {sizes}."
        )
    validation = f"{data['validation']:,}" if data["validation"] else "none"
    return (
        f"Trained on {data['data']}: {data['train']:,} {kind} of {classes}, with {sizes}. "
        f"{data['test']:,} {kind} are for testing, {validation} for validation."
    )


def _outcome(methods: list[TrainedMethod]) -> Iterator[str]:
    """Compare the methods with the same test set, and these alone."""
    sets: dict[Hashable, list[TrainedMethod]] = {}
    for method in methods:
        sets.setdefault(_test_set(method), []).append(method)
    if len(sets) > 1:
        yield "The test data of these runs differ. Accuracies on different test data do not compare, so each has its own best method."
    for same in sets.values():
        ranked = sorted(same, key=lambda method: -method.result["accuracy"]["overall"])
        yield _overall(ranked)
        yield from _few_shot(same)
        yield from _other_uses(same, ranked[0].result)


def _test_set(method: TrainedMethod) -> Hashable:
    """Return a value that differs between test sets; early records know the number of classes alone."""
    classes = method.classes
    return (
        len(method.result.get("accuracy_per_class", ()))
        if classes is None
        else (*classes[0], sum(classes[2]))
    )


def _other_uses(methods: list[TrainedMethod], best: Record) -> Iterator[str]:
    others = [
        (accuracy["overall"], f"{method.name}: {way}")
        for method in methods
        for way, accuracy in method.result.get("accuracy_of", {}).items()
    ]
    highest, name = max(others, default=(0, ""))
    if highest > best["accuracy"]["overall"] + (standard_error(best) or 0):
        yield f"Another use of a trained model has a higher overall accuracy: {name}, {percent(highest)} %."


def _overall(ranked: list[TrainedMethod]) -> str:
    best = ranked[0]
    samples = best.data.get("samples", "samples")
    accuracies = [f"{percent(method.result['accuracy']['overall'])} %" for method in ranked]
    if len(ranked) == 1:
        error = standard_error(best.result)
        margin = f" (standard error {100 * error:.1f})" if error is not None else ""
        return f"{best.name} classifies {accuracies[0]} of the test {samples} correctly{margin}."
    gaps = [difference(best.result, other.result, best.run == other.run) for other in ranked[1:]]
    # The best method itself, and those that are not clearly worse.
    equal = [(best, accuracies[0])]
    equal += [
        (method, accuracy)
        for method, accuracy, gap in zip(ranked[1:], accuracies[1:], gaps, strict=True)
        if not _is_clear(gap, accuracy != accuracies[0])
    ]
    if len(equal) > 1:
        names = listed([f"{method.name} ({accuracy})" for method, accuracy in equal])
        return f"No method is clearly best overall: the shares of correct test {samples} of {names} differ by less than the standard error."
    return (
        f"Best overall: {best.name}. It classifies {accuracies[0]} of the test {samples} correctly, "
        f"{ranked[1].name} {accuracies[1]}.{_lead(gaps[0])}"
    )


def _is_clear(gap: Difference | None, differs: bool) -> bool:
    return differs if gap is None else gap.is_clear


def _lead(gap: Difference | None) -> str:
    """Return a sentence on a lead that exceeds its standard error."""
    if gap is None:
        return ""
    lead = f" The lead is {100 * gap.value:.1f} points, with a standard error of {100 * gap.error:.1f}"
    return f"{lead}: it may be chance." if abs(gap.value) < 2 * gap.error else f"{lead}."


def _few_shot(methods: list[TrainedMethod]) -> Iterator[str]:
    """Compare methods on few-shot classes, if all have the same classes and some of these were tested."""
    groups = [method.group_of_classes for method in methods]
    scored = [(method.result["accuracy"]["few"], method) for method in methods]
    if len(methods) < 2 or groups[0] is None or any(group != groups[0] for group in groups):
        return
    if any(accuracy is None for accuracy, _ in scored):
        return
    few = [group == "few" for group in groups[0]]
    (highest, best), (second, other) = sorted(scored, key=lambda pair: -pair[0])[:2]
    gap = difference_of_group(best.result, other.result, few)
    most = max(count for count, member in zip(best.result["train_counts"], few, strict=True) if member)
    count = counted(sum(few), "few-shot class", "few-shot classes")
    where = f"the {count} (at most {counted(most, 'training sample')})"
    if _is_clear(gap, highest > second):
        chance = _lead(gap) if gap else " Only one of these classes has test samples, which says little."
        yield f"Best on {where}: {best.name}, with {percent(highest)} % against {percent(second)} % of {other.name}.{chance}"
    else:
        yield f"No method is clearly best on {where}: {best.name} has {percent(highest)} %, {other.name} {percent(second)} %."


def _seeds(methods: list[TrainedMethod]) -> Iterator[str]:
    seeds = {method.data.get("seed") for method in methods} - {None}
    if len(seeds) == 1:
        yield "All models are from one seed (one random start), which says little: standard errors cover the choice of test samples, not that of the seed. Train with other seeds before you rely on a difference."
    elif seeds:
        yield f"These runs have {len(seeds)} seeds (random starts). The best of several runs looks better than a new run will: compare the rows of each method in the table."


def _worries_of_data(methods: list[TrainedMethod]) -> Iterator[str]:
    if any(epoch.get("split") == "test" for method in methods for epoch in method.epochs):
        yield "There is no validation split, so the curves show the test samples. Do not choose options or epochs by these numbers. --hold-out-val 0.1 makes a validation split."
    tested = min(
        (sum(method.result["test_counts"]) for method in methods if method.classes), default=MIN_SAMPLES
    )
    if tested < MIN_SAMPLES:
        yield f"There are only {counted(tested, 'test sample')}, so that all accuracies are uncertain."
    untested = max((method.result["test_counts"].count(0) for method in methods if method.classes), default=0)
    if untested:
        yield f"{counted(untested, 'class has', 'classes have')} no test samples: nothing is known about them."


def _worries(method: TrainedMethod) -> Iterator[str]:
    """Return the worries about one model."""
    result, name = method.result, method.name
    if rise := _rise(method):
        yield f"{name}: the training loss rose by {100 * rise:.0f} % over the last three epochs."
    if groups := method.group_of_classes:
        few = [a for a, g in zip(result["accuracy_per_class"], groups, strict=True) if g == "few"]
        tested = [accuracy for accuracy in few if accuracy is not None]
        if zero := tested.count(0):
            of = counted(len(tested), "few-shot class", "few-shot classes")
            yield f"{name}: in {zero:,} of {of} not one test sample is classified correctly."
    analysis = result.get("analysis", {})
    if analysis and sum(count for _, _, count in analysis["calibration"]["bins"]) < MIN_SAMPLES:
        return
    unused = [f"δ{j}" for j, share in enumerate(result.get("slot_usage", [])) if j and share < UNUSED]
    if unused:
        slots = f"slot {unused[0]} is" if len(unused) == 1 else f"slots {listed(unused)} are"
        yield f"{name}: {slots} hardly used, for less than {100 * UNUSED:.0f} % of the test samples."
    if (common := analysis.get("common_slot", 0)) > COMMON:
        yield f"{name}: the slots hardly change the predictions, because {100 * common:.0f} % of the classes have the same best slot for a sample."
    if analysis and (error := analysis["calibration"]["error"]) > MISCALIBRATED:
        yield f"{name}: do not trust the probabilities. {_calibration(analysis['calibration']['bins'], error)}"


def _calibration(bins: list[list[float]], error: float) -> str:
    n = sum(count for _, _, count in bins)
    confidence = sum(mean * count for mean, _, count in bins) / n
    accuracy = sum(mean * count for _, mean, count in bins) / n
    return (
        f"Their mean is {100 * confidence:.0f} %, while {100 * accuracy:.0f} % of the predictions are correct "
        f"(expected calibration error {100 * error:.0f} %)."
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
