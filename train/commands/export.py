"""The command `export`: writes a trained model for other programs, and checks the written file by running it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from torch import Tensor

from gistops.export import decompositions

from ..cli import parse_command
from ..config import ConfigError
from ..console import messages_of, print_json, say
from ..files import write_atomically
from ..model.model import Model, load_model, read_model_file
from ..trained import load_trained
from .model_file import open_model

BATCHES = (2, 5)  # samples in the two checks: the size of the batch is free


@dataclass(frozen=True, kw_only=True)
class Export:
    """Writes a trained model for other programs, with its description as metadata, and runs the file."""

    #: A trained model, runs/<name>/model-<method>.safetensors.
    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    #: onnx, or torch-export: a program of torch.export.
    format: Literal["onnx", "torch-export"] = "onnx"
    #: The file to write.
    out: Path
    #: Write one JSON object to standard output: the file, its format, the shape of a sample and the metadata.
    json: bool = False


def export(args: list[str], console: Console) -> int:
    """Write a model as ONNX or as a program of torch.export, and compare its logits with those of the model.

    Raises:
        ConfigError: an option is invalid, a package is missing, or the written file gives other logits. Then no file is left.
    """
    options = parse_command(args, Export, "export")
    messages = messages_of(console, as_json=options.json)
    if not options.out.absolute().parent.is_dir():
        raise ConfigError("out", "a file in an existing folder", str(options.out))
    model, _ = open_model("model", options.model, load_model)
    shape = open_model("model", options.model, load_trained).sample_shape
    description, _ = read_model_file(options.model)
    samples = [_random(batch, shape) for batch in BATCHES]
    write = _write_onnx if options.format == "onnx" else _write_program
    write_atomically(options.out, lambda path: write(path, model, samples, json.dumps(description)))
    if options.json:
        print_json(
            {
                "file": str(options.out),
                "format": options.format,
                "sample_shape": shape,
                "metadata": description,
            }
        )
    say(messages, f"written to {options.out}, whose logits are those of the model for {BATCHES} samples")
    return 0


def _random(batch: int, shape: list[int]) -> Tensor:
    if len(shape) == 1:
        return torch.randn(batch, *shape)
    return torch.randint(256, (batch, *shape), dtype=torch.uint8)


def _compare(found: Tensor, expected: Tensor) -> None:
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3):
        largest = float((found - expected).abs().max())
        raise ConfigError("format", "a file that gives the model's logits", f"a difference of {largest}")


@torch.no_grad()
def _write_onnx(path: Path, model: Model, samples: list[Tensor], description: str) -> None:
    try:
        import onnx
        import onnxruntime  # type: ignore[import-untyped,unused-ignore]
        import onnxscript  # noqa: F401  # torch.onnx needs it
    except ImportError as error:
        expected = "the packages onnx, onnxscript and onnxruntime"
        raise ConfigError("format", expected, f"no {error.name}") from None
    exported = torch.onnx.export(
        model, (samples[0],), dynamic_shapes=({0: "batch"},), input_names=["samples"], output_names=["logits"]
    )
    assert exported is not None
    proto = exported.model_proto
    onnx.helper.set_model_props(proto, {"train": description})
    path.write_bytes(proto.SerializeToString())
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for x in samples:
        (found,) = session.run(None, {"samples": x.numpy()})
        _compare(torch.from_numpy(np.asarray(found)), model(x))


@torch.no_grad()
def _write_program(path: Path, model: Model, samples: list[Tensor], description: str) -> None:
    free = ({0: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(model, (samples[0],), dynamic_shapes=free)
    with open(path, "wb") as file:
        torch.export.save(
            exported.run_decompositions(decompositions()), file, extra_files={"train": description}
        )
    with open(path, "rb") as file:
        loaded = torch.export.load(file).module()
    for x in samples:
        _compare(loaded(x), model(x))
