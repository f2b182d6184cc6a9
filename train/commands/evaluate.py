"""The command `evaluate`: compares a trained model's predictions with the classes of labeled samples."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from .. import load
from ..classifier import Classifier
from ..cli import check_device, parse_command
from ..config import ConfigError, DataConfig, DeviceConfig
from ..console import counted, messages_of, print_json, say
from ..data.errors import DataError
from ..data.labeled import Labeled, Matched, Part, listed, load_labeled, match
from ..data.load import is_list
from ..evaluated import Results, as_dataset
from ..evaluation.priors import NAMED
from ..files import check_writable
from ..methods import TITLES
from ..options import InvalidData
from ..report.evaluation import FILES, metrics, write_files
from ..report.table import print_results
from ..trained import held_out
from .model_file import expect_images, open_model


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Compares the predictions of a trained model with the classes of labeled samples, and prints the results table.

    Classes are matched by what the data and the model call them: by name, or by label where the data have no names.
    """

    #: A trained model, runs/<name>/model-<method>.safetensors.
    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    #: Labeled samples: data as for training, whose test split is evaluated; or data without training samples, all of which
    #: are evaluated: a folder of class folders, a list of labeled images, or a .npz or .safetensors file with the arrays x, y and
    #: optionally classes, the names.
    data: str
    #: Folder that relative paths in lists start from; the folder of the list if not given.
    images: str = ""
    #: OLD=NEW: replace the prefix OLD of paths in lists by NEW.
    path_prefixes: tuple[str, ...] = ()
    #: Evaluate the test samples that training with this --hold-out held out. Without it, all images of a folder of class
    #: folders are evaluated, also those that the model was trained on.
    hold_out: float = 0.0
    #: Seed of --hold-out.
    hold_out_seed: int = 0
    #: Stop at image files and class folders that cannot be read, or skip them with a warning.
    unreadable: Literal["stop", "skip"] = "stop"
    #: Stop at classes that the model does not have, or skip their samples with a warning.
    unknown: Literal["stop", "skip"] = "stop"
    #: Adjust the scores to the class prior of the evaluated samples: uniform, training (the frequencies of the training
    #: samples), or a CSV file with the columns class and count. Adds log(prior) - log(prior that the scores assume) to the
    #: logits (Menon et al., ICLR 2021, with strength 1).
    adjust: str = ""
    #: The prior that the scores assume, for --adjust. If not given, the one that the method's loss implies, such as uniform
    #: for GistNet and training for plain; methods whose scores are no estimates of probabilities have none.
    assumed_prior: Literal["uniform", "training"] | None = None
    #: Average the probabilities of each image and its mirror image, as predict --flips does.
    flips: bool = False
    #: Folder for report.html, classes.csv (the scores of each class), confusion.csv and metrics.json.
    out: Path | None = None
    #: Write one JSON object, the content of metrics.json, to standard output in place of the table.
    json: bool = False
    #: cpu, cuda, or auto: a GPU if there is one.
    device: str = "auto"
    #: Samples per pass. If not given, as many as in the evaluation after training.
    batch_size: int | None = None
    #: Processes that decode images; one per processor if not given.
    workers: int | None = None
    #: Folder of decoded images; ~/.cache/gistops/images if not given.
    cache: str = ""


def evaluate(args: list[str], console: Console) -> int:
    """Evaluate a model, print the results table or JSON, and write the files of --out.

    Raises:
        ConfigError: an option is invalid, or the model and the data do not belong together.
    """
    options = parse_command(args, Evaluate, "evaluate")
    for name in ("batch_size", "workers"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(name, "at least 1", value)
    if options.assumed_prior and not options.adjust:
        raise ConfigError("assumed_prior", f"--adjust {', '.join(NAMED)} or a file beside it", "none")
    messages = messages_of(console, as_json=options.json)
    device = DeviceConfig(device=options.device).resolved_device
    check_device(device)
    classifier = open_model("model", options.model, load).to(device)
    bias = None
    if options.flips:
        expect_images("model", options.model, classifier.trained.model)
    if options.adjust:
        bias = classifier.class_bias(options.adjust, options.assumed_prior)
    if options.out:
        _make_folder(options.out)
    data, matched = load_data(options, classifier)
    about = _describe(options, classifier, data, matched)
    for line in (*data.notes, *about):
        say(messages, line)
    results = _evaluate(classifier, matched, bias, options)
    if options.adjust:
        results.record["title"] = f"{TITLES[classifier.trained.method_name]}, adjusted to {options.adjust}"
    details = _details(options, classifier, data, matched)
    if options.out:  # before the table, whose reader may end early
        samples = as_dataset(classifier.trained, matched.x, matched.y)
        write_files(options.out, classifier.trained, results, details, samples, " ".join(about))
    if options.json:
        print_json(metrics(results, details))
    else:
        counts = classifier.trained.train_counts
        print_results(console, [results.record], counts, classifier.trained.split_rule)
        say(console, f"expected calibration error: {100 * results.calibration['error']:.1f} %")
        if options.out:
            say(console, f"written to {options.out}")
    return 0


def load_data(options: Evaluate, classifier: Classifier) -> tuple[Labeled, Matched]:
    """Load the samples as the model takes them, and number their classes as the model does.

    Raises:
        ConfigError: the data cannot be used with the model.
    """
    size, shape = classifier.trained.image_size, classifier.trained.sample_shape
    if is_list(options.data):
        expect_images("model", options.model, classifier.trained.model)
        if size[0] != size[1]:
            expected = f"arrays of images {shape}, which the model takes: image files are cropped to squares"
            raise ConfigError("data", expected, options.data)
    config = DataConfig(
        data=options.data,
        images=options.images,
        path_prefixes=options.path_prefixes,
        image_size=size[0] if size else 1,
        hold_out=options.hold_out,
        hold_out_seed=options.hold_out_seed,
        unreadable=options.unreadable,
        cache=options.cache,
    )
    try:
        data = load_labeled(config, options.workers)
        matched = match(data, classifier.matcher, skip_unknown=options.unknown == "skip")
    except DataError as error:
        raise InvalidData(error) from None
    _warn_of_training_samples(config, classifier, data.part)
    samples = _with_channels(matched.x, classifier) if is_list(options.data) else matched.x
    got = list(samples.shape[1:])
    if got != shape:
        raise ConfigError("data", f"samples {shape}, which the model takes", f"{got} in {options.data}")
    if skipped := matched.skipped:
        left_out = counted(sum(skipped.values()), "sample")
        classes = counted(len(skipped), "class", "classes")
        warnings.warn(
            f"left out {left_out} of {classes} that the model does not have: {listed(skipped)}",
            RuntimeWarning,
            stacklevel=2,
        )
    return data, Matched(samples, matched.y, matched.skipped)


def _warn_of_training_samples(config: DataConfig, classifier: Classifier, part: Part) -> None:
    """Warn if the samples are of the data of training, and may not be those that training held out."""
    trained, now = classifier.trained.held_out, held_out(config) or [Path(config.data).resolve().name, 0.0, 0]
    if (
        trained
        and trained[0] == now[0]
        and list(trained) != now
        and (part == "all samples" or config.hold_out)
    ):
        name, share, seed = trained
        options = f"--hold-out {share:g}{f' --hold-out-seed {seed}' if seed else ''}"
        warnings.warn(
            f"the model was trained on {name} with {options}: without it, training samples are evaluated too",
            RuntimeWarning,
            stacklevel=2,
        )


def _with_channels(x: Tensor, classifier: Classifier) -> Tensor:
    """Return decoded images with the model's number of channels: in gray for one."""
    if classifier.trained.sample_shape[0] == x.shape[1]:
        return x
    images = [image.permute(1, 2, 0).numpy() for image in x]
    return classifier.pixels(images)


def _evaluate(classifier: Classifier, data: Matched, bias: Tensor | None, options: Evaluate) -> Results:
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("samples", total=len(data.y))
        return classifier.evaluate(
            data.x,
            data.y,
            bias,
            options.batch_size,
            lambda done: progress.advance(task, done),
            flips=options.flips,
        )


def _describe(options: Evaluate, classifier: Classifier, data: Labeled, matched: Matched) -> list[str]:
    """Return sentences on the samples, the classes and the prior."""
    names = classifier.classes
    count = torch.bincount(matched.y, minlength=len(names))
    absent = [names[k] for k in (count == 0).nonzero().flatten().tolist()]
    samples = counted(len(matched.y), "image" if data.is_images else "feature vector")
    lines = [
        f"{options.data}: {data.part}, {samples} of {len(names) - len(absent):,} of the model's "
        f"{counted(len(names), 'class', 'classes')}, evaluated with {options.model}."
    ]
    if absent:
        lines.append(f"Classes without samples: {listed(absent)} ({len(absent):,}).")
    if options.adjust:
        assumed = _assumed(options, classifier)
        lines.append(f"Scores assume the class prior {assumed}, and are adjusted to {options.adjust}.")
    return lines


def _assumed(options: Evaluate, classifier: Classifier) -> str | None:
    """Return the name of the prior that the scores are taken to assume; None without --adjust."""
    if not options.adjust:
        return None
    exponent = classifier.trained.prior_exponent
    named = {0.0: "uniform", 1.0: "training"}
    return options.assumed_prior or named.get(exponent or 0.0, f"training to the power {exponent}")


def _details(options: Evaluate, classifier: Classifier, data: Labeled, matched: Matched) -> dict[str, Any]:
    return {
        "model": str(options.model),
        "data": options.data,
        "part": data.part,
        "adjust": options.adjust or None,
        "flips": options.flips,
        "assumed_prior": _assumed(options, classifier),
        "skipped": matched.skipped,
        "classes": classifier.classes,
    }


def _make_folder(folder: Path) -> None:
    """Make the folder, which must be absent, empty, or one of an earlier evaluation, so that nothing else is overwritten."""
    if not folder.absolute().parent.is_dir():
        raise ConfigError("out", "a folder in an existing folder", str(folder))
    if folder.exists() and not folder.is_dir():
        raise ConfigError("out", "a folder", f"{folder}, which is a file")
    if folder.is_dir():
        others = sorted(entry.name for entry in folder.iterdir() if entry.name not in FILES)
        if others:
            got = f"{folder}, which has other files: {listed(others)}"
            raise ConfigError("out", "a new folder or one of an earlier evaluation", got)
    try:
        folder.mkdir(exist_ok=True)
        check_writable(folder)
    except OSError as error:
        raise ConfigError("out", "a folder that can be written to", f"{folder} ({error.strerror})") from None
