"""The command `export`: writes a trained model for other programs, and checks the written file by running it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from torch import Tensor, nn

from gistops.export import decompositions
from gistops.nn import ConstellationClassifier

from ..cli import parse_command
from ..config import ConfigError
from ..console import messages_of, print_json, say
from ..files import write_atomically
from ..model.memory_head import MemoryHead
from ..model.model import Model, Normalize, load_model, network_of, read_model_file
from ..model.prototypes import prototypes
from ..trained import load_trained
from .model_file import check_out, open_model

BATCHES = (2, 5)  # samples in the two checks: the size of the batch is free


@dataclass(frozen=True, kw_only=True)
class Export:
    """Writes a trained model for other programs, with its description as metadata, and runs the file."""

    #: A trained model, runs/<name>/model-<method>.safetensors.
    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    #: onnx; torch-export: a program of torch.export; or safetensors: weights for inference in plain PyTorch.
    format: Literal["onnx", "torch-export", "safetensors"] = "onnx"
    #: The file to write.
    out: Path
    #: Write one JSON object to standard output: the file, its format, the shape of a sample and the metadata.
    json: bool = False


def export(args: list[str], console: Console) -> int:
    """Write a model for other programs, and compare the logits that the file gives with those of the model.

    Raises:
        ConfigError: an option is invalid, a package is missing, or the written file gives other logits. Then no file is left.
    """
    options = parse_command(args, Export, "export")
    messages = messages_of(console, as_json=options.json)
    check_out(options.out, options.model)
    model, _ = open_model("model", options.model, load_model)
    shape = open_model("model", options.model, load_trained).sample_shape
    description, _ = read_model_file(options.model)
    metadata = description | {"preprocessing": _preprocessing(model, shape, options.format)}
    samples = [_random(batch, shape) for batch in BATCHES]
    write = WRITERS[options.format]
    write_atomically(options.out, lambda path: write(path, model, samples, metadata))
    if options.json:
        print_json(
            {
                "file": str(options.out),
                "format": options.format,
                "sample_shape": shape,
                "metadata": metadata,
            }
        )
    say(messages, f"written to {options.out}, which gives the model's logits: checked for batches of 2 and 5")
    return 0


def _preprocessing(model: Model, shape: list[int], file_format: str) -> dict[str, Any] | None:
    """Return how images are prepared, in plain types; None for a model of features. Mean and standard deviation are those of
    pixels from 0 to 1, and a crop size of 0 is no crop. A file with the whole network crops and normalizes by itself."""
    normalize = model.normalize
    if not isinstance(normalize, Normalize):
        return None
    mean, std = (tensor.flatten().tolist() for tensor in (normalize.mean, normalize.std))
    return {
        "image_size": shape[1:],
        "resize": "shorter side to image_size, bilinear, then the center",
        "channels": "RGB" if shape[0] == 3 else shape[0],
        "pixels": "0 to 255, uint8",
        "crop_size": normalize.crop_size,
        "mean": mean,
        "std": std,
        "crops_and_normalizes_itself": file_format != "safetensors",
    }


def _random(batch: int, shape: list[int]) -> Tensor:
    if len(shape) == 1:
        return torch.randn(batch, *shape)
    return torch.randint(256, (batch, *shape), dtype=torch.uint8)


def _compare(found: Tensor, expected: Tensor) -> None:
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3):
        largest = float((found - expected).abs().max())
        raise ConfigError("format", "a file that gives the model's logits", f"a difference of {largest}")


@torch.no_grad()
def _write_onnx(path: Path, model: Model, samples: list[Tensor], metadata: dict[str, Any]) -> None:
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
    onnx.helper.set_model_props(proto, {"train": json.dumps(metadata)})
    path.write_bytes(proto.SerializeToString())
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for x in samples:
        (found,) = session.run(None, {"samples": x.numpy()})
        _compare(torch.from_numpy(np.asarray(found)), model(x))


@torch.no_grad()
def _write_program(path: Path, model: Model, samples: list[Tensor], metadata: dict[str, Any]) -> None:
    free = ({0: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(model, (samples[0],), dynamic_shapes=free)
    with open(path, "wb") as file:
        torch.export.save(
            exported.run_decompositions(decompositions()), file, extra_files={"train": json.dumps(metadata)}
        )
    with open(path, "rb") as file:
        loaded = torch.export.load(file).module()
    for x in samples:
        _compare(loaded(x), model(x))


@torch.no_grad()
def _write_weights(path: Path, model: Model, samples: list[Tensor], metadata: dict[str, Any]) -> None:
    state, head = model.state_dict(), model.head
    if isinstance(head, ConstellationClassifier):
        state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
        state |= {"head.prototypes": prototypes(head), "head.tau": head.tau.detach()}
    contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
    text = json.dumps(metadata | {"exported": "safetensors"})
    safetensors.torch.save_file(contiguous, path, {"train": text})
    loaded = safetensors.torch.load_file(path)
    head_state = {name.removeprefix("head."): x for name, x in loaded.items() if name.startswith("head.")}
    network = Model(*network_of(metadata, loaded), nn.Identity(), model.backbone_name).eval()
    network.load_state_dict({name: x for name, x in loaded.items() if not name.startswith("head.")})
    for x in samples:
        _compare(_plain_logits(network(x), head_state), model(x))


def _plain_logits(features: Tensor, head: dict[str, Tensor]) -> Tensor:
    """Return the logits of a file of weights in plain PyTorch, as docs/training.md says."""
    if "prototypes" in head:
        cosines = F.normalize(features, dim=1) @ head["prototypes"].flatten(0, 1).T
        best: Tensor = cosines.unflatten(1, head["prototypes"].shape[:2]).amax(2)
        return head["tau"] * best
    if "centroids" in head:
        num_classes, in_features = head["centroids"].shape
        memory = MemoryHead(in_features, num_classes)
        memory.load_state_dict(head)
        logits: Tensor = memory(features)
        return logits
    return F.linear(features, head["weight"], head["bias"])


WRITERS = {"onnx": _write_onnx, "torch-export": _write_program, "safetensors": _write_weights}
