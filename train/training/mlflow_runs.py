"""MLflow, by its library and its environment variables, such as MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

from .trackers import RunTracker

MAX_PARAMS = 100  # of a request
MAX_LENGTH = 500  # characters of a value that every server takes


class MlflowRuns(RunTracker):
    """Stores each method of a run as a run of MLflow, with the options as its parameters."""

    FILE = "mlflow.json"

    def __init__(self, folder: Path, name: str, options: dict[str, Any]) -> None:
        super().__init__(folder, name, options)
        self._client: Any = None
        self._run = ""  # id of the open run

    def _open(self, method: str, run: str) -> str:
        from mlflow import MlflowClient  # takes a second, and may not be installed
        from mlflow.entities import Param

        self._client = MlflowClient()
        if run:
            self._client.update_run(run, status="RUNNING")
            self._run = run
            return run
        created = self._client.create_run(self._experiment(), run_name=f"{self._name}/{method}")
        self._run = created.info.run_id
        options = {name: value for name, value in self._options.items() if value is not None}
        params = [Param(k, str(v)[:MAX_LENGTH]) for k, v in (options | {"method": method}).items()]
        for first in range(0, len(params), MAX_PARAMS):
            self._client.log_batch(self._run, params=params[first : first + MAX_PARAMS])
        return self._run

    def _experiment(self) -> str:
        """Return the id of the experiment that the environment names, or of MLflow's default one."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME")
        if not name:
            return os.environ.get("MLFLOW_EXPERIMENT_ID") or "0"
        experiment = self._client.get_experiment_by_name(name)
        return str(experiment.experiment_id if experiment else self._client.create_experiment(name))

    def _log(self, values: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(
            self._run, metrics=[Metric(valid(tag), value, now, step) for tag, value in values.items()]
        )

    def _finish(self, complete: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if complete else "KILLED")


def valid(tag: str) -> str:
    """Return the name of a metric for MLflow, which refuses most characters, such as commas."""
    return re.sub(r"[^A-Za-z0-9_\-. /]", "_", tag)
