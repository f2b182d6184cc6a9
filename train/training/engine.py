"""Trains each method of a run, from its first step or from a checkpoint.

From top to bottom: `run` takes the methods one after another, from the end of a first stage that one before had too; `train`
takes one model through its stages and writes down what happens. The same seed gives the same bits on the CPU, whether the run was interrupted or not. All processes
go through the same lines; the first one alone writes.
"""

from __future__ import annotations

import math
import time
from typing import Any

from .. import distributed
from ..config import Config
from ..data.dataset import Dataset
from ..evaluation.analysis import analyze
from ..model.model import save_model
from .first_stages import FirstStages
from .progress import Display
from .run_folder import RunFolder
from .stopping import Stopped, asked
from .trainer import Training

Record = dict[str, Any]


def run(
    config: Config,
    data: Dataset,
    folder: RunFolder,
    first_stages: FirstStages,
    display: Display,
    saved: Record | None,
) -> list[Record]:
    """Train every method that the checkpoint `saved` has not finished; return the results of all methods."""
    records: list[Record] = saved["records"] if saved else []
    folder.restart_metrics(records)
    finished = {record["method"] for record in records if record["event"] == "result"}
    for name in config.method.methods:
        if name in finished:
            continue
        training = Training(name, config, data)
        if saved and saved["training"]["name"] == name:
            training.load_state_dict(saved["training"])
        elif shared := first_stages.load(training):
            for record in shared:
                records.append(record)
                folder.append_metrics(record)
            display.skip(training.images)
        train(training, folder, first_stages, display, records)
        del training  # and with it the data on a GPU, before the next one's is put there
    first_stages.clear()
    return [record for record in records if record["event"] == "result"]


def train(
    training: Training, folder: RunFolder, first_stages: FirstStages, display: Display, records: list[Record]
) -> None:
    """Take a model through what is left of its stages; append to `records`, the result last."""

    saved_at = -math.inf

    def save(within: float = 0.0) -> None:
        """Write a checkpoint, if the last one is so many seconds old."""
        nonlocal saved_at
        # With several processes all have to know, and each has a clock of its own.
        old = (
            distributed.broadcast_from_rank0(lambda: time.monotonic() - saved_at >= within)
            if within
            else True
        )
        if old:
            folder.save_checkpoint({"training": training.state_dict(), "records": records})
            saved_at = time.monotonic()

    def write(record: Record, within: float = 0.0) -> None:
        records.append(record)
        folder.append_metrics(record)
        save(within)

    def stop_if_asked() -> None:
        if asked():
            save()
            raise Stopped(f"stopped in {training.name}, after {training.images:,} images")

    config, stages = training.config, training.method.stages
    while training.stage < len(stages):
        stage = stages[training.stage]
        while training.epoch < stage.epochs:
            where = f"{training.name} {stage.name}".strip() + f" epoch {training.epoch + 1}/{stage.epochs}"
            begin, images_before = time.perf_counter(), training.images
            while training.step_of_epoch < training.steps_per_epoch:
                images, loss = training.images, training.step()
                # Reading a loss from a GPU waits for it, so it is not done at every step there.
                shown = training.device.type == "cpu" or training.step_of_epoch % 20 == 0
                loss_shown = loss.item() if shown and display.shows_steps else None
                display.step(where, training.images - images, loss_shown)
                if config.run.checkpoint_steps and training.step_of_epoch % config.run.checkpoint_steps == 0:
                    save()
                stop_if_asked()
            training.wait()
            speed = speeds(training.images - images_before, time.perf_counter() - begin, training.waited)
            record = training.end_epoch() | speed
            due = training.epoch % config.run.evaluate_every == 0 or training.epoch == stage.epochs
            record |= training.evaluate() if due else training.slot_usage()
            write(record, config.run.checkpoint_seconds)
            display.epoch(where, record)
        if training.stage == 0:
            first_stages.save(training, records)
        training.begin_stage(training.stage + 1)
    stop_if_asked()
    folder.write(
        f"model-{training.name}.safetensors",
        lambda path: save_model(path, training.model, training.data.class_names),
    )
    result = {"event": "result", "method": training.name, "images": training.images}
    result |= training.method.describe(training.model.head) | training.evaluate(final=True)
    write(
        result | {"analysis": analyze(training.model, training.data, config.run.split_rule, config.run.seed)}
    )


def speeds(images: int, seconds: float, waited: float) -> Record:
    """Images per second, and how many there would be if none had been waited for: the model's own rate."""
    own = images / max(seconds - waited, 1e-9)
    rates = {"images_per_second": images / seconds, "model_images_per_second": own}
    return {"seconds": round(seconds, 3)} | {name: round(rate, 1) for name, rate in rates.items()}
