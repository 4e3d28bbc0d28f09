"""MLflow: a server or a local store, as MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME say."""

import importlib
import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from elbo_kto_jax.runtime.extras import import_extra
from elbo_kto_jax.runtime.metric_names import tag
from elbo_kto_jax.trackers.protocol import KEY, PROJECT, Run

_ALWAYS = tag("examples")  # a metric that every step has
_PARAMS = 100  # that one request may have
_LONGEST = 500  # characters of a parameter that every server takes; config.json has all of it


def check() -> None:
    """Raises UserError where it is not installed."""
    import_extra("mlflow", f"{KEY}: 'mlflow'", "MLflow", "mlflow")


def begin(run: Run) -> "MLflow":
    return MLflow(run)


class MLflow:
    """A run in MLflow. Not through its global functions: a program that trains may have a run of its own."""

    def __init__(self, run: Run):
        self._mlflow = importlib.import_module("mlflow")
        self._client = self._mlflow.MlflowClient()
        self.sent = run.sent
        if run.key:
            self.key = run.key
            self._client.update_run(self.key, status="RUNNING")
            logged = [metric.step for metric in self._client.get_metric_history(self.key, _ALWAYS)]
            self.sent = max(logged, default=-1)
        else:
            self.key = self._client.create_run(self._experiment(), run_name=run.name).info.run_id
            params = [self._mlflow.entities.Param(key, value[:_LONGEST]) for key, value in _flat(run.config)]
            for start in range(0, len(params), _PARAMS):
                self._client.log_batch(self.key, params=params[start : start + _PARAMS])
        self._client.log_dict(self.key, dict(run.config), "config.json")

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        now, metric = int(time.time() * 1000), self._mlflow.entities.Metric
        self._client.log_batch(self.key, metrics=[metric(name, value, now, step) for name, value in values.items()])

    def samples(self, step: int, when: str, samples: Sequence[Mapping[str, str]]) -> None:
        self._client.log_text(self.key, json.dumps(list(map(dict, samples)), indent=1), "samples.json")

    def report(self, step: int, file: Path) -> None:
        self._client.log_text(self.key, file.read_text(encoding="utf-8"), file.name)  # which may be in a bucket

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self.key, "FINISHED" if finished else "KILLED")

    def _experiment(self) -> str:
        """The id of the experiment that the environment names, or of the project's, which is made where it is not."""
        if found := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return found
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        return experiment.experiment_id if experiment else self._client.create_experiment(name)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every key of a nested mapping with its value as text."""
    return itertools.chain.from_iterable(
        _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", str(value))]
        for key, value in config.items()
    )
