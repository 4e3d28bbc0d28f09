"""Stand-ins for the packages of trackers: they do what the trackers count on, and keep what they were told."""

import json
import types
from typing import Any


class _Config(dict):
    def update(self, values: dict, allow_val_change: bool) -> None:
        super().update(values)


class WandB(types.ModuleType):
    """Runs by id, as a server would have them; `online`: it answers what it has."""

    def __init__(self, online: bool):
        super().__init__("wandb")
        self.online, self.logged_in, self.calls, self.runs = online, True, [], {}

    def setup(self):
        return types.SimpleNamespace(settings=types.SimpleNamespace(mode="online" if self.online else "offline"))

    def login(self, *, prompt: bool, verify: bool) -> bool:
        assert not prompt
        assert not verify
        return self.logged_in

    def Settings(self, **options: Any) -> dict[str, Any]:
        return options

    def Table(self, columns: list[str], data: list[list]) -> list[dict]:
        return [dict(zip(columns, row, strict=True)) for row in data]

    def Html(self, text: str, inject: bool) -> str:
        return text

    def init(self, **options: Any) -> Any:
        self.calls.append(options)
        key = options.get("id", f"id{len(self.runs)}")
        resumed = self.online and "resume" in options and key in self.runs
        logged = self.runs.setdefault(key, [])
        here: list[int] = [max(step for step, _ in logged) + 1 if resumed else 0]
        exits: list[int] = []

        class Run:
            id = key
            offline = not self.online

            @property
            def step(self) -> int:
                return max(here)

            def log(self, values: dict, step: int) -> None:
                assert step >= max(here), "W&B drops it"
                here.append(step)
                logged.append((step, values))

            def finish(self, exit_code: int) -> None:
                exits.append(exit_code)

        run = Run()
        run.config, run.resumed, run.exits = _Config(), resumed, exits
        self.last = run
        return run


class Trackio(types.ModuleType):
    def __init__(self):
        super().__init__("trackio")
        self.calls, self.runs = [], {}

    def Table(self, data: list[dict]) -> list[dict]:
        return data

    def Html(self, text: str) -> str:
        return text

    def init(self, **options: Any) -> Any:
        self.calls.append(options)
        assert options["resume"] == ("allow" if options["name"] in self.runs else "never")
        logged = self.runs.setdefault(options["name"], [])
        vars(self).get("print", print)("* a line of trackio's")

        class Run:
            _next_step = max((step for step, _ in logged), default=-1) + 1

            def log(self, values: dict, step: int) -> None:
                logged.append((step, values))

            def finish(self) -> None:
                pass

        return Run()


class MLflow(types.ModuleType):
    def __init__(self):
        super().__init__("mlflow")
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, types.SimpleNamespace] = {}
        self.entities = types.SimpleNamespace(
            Param=lambda key, value: (key, value),
            Metric=lambda key, value, timestamp, step: types.SimpleNamespace(key=key, value=value, step=step),
        )

    def MlflowClient(self):
        return self

    def get_experiment_by_name(self, name: str):
        return types.SimpleNamespace(experiment_id=self.experiments[name]) if name in self.experiments else None

    def create_experiment(self, name: str) -> str:
        self.experiments[name] = f"experiment {len(self.experiments)}"
        return self.experiments[name]

    def create_run(self, experiment: str, run_name: str):
        key = f"run {len(self.runs)}"
        self.runs[key] = types.SimpleNamespace(
            experiment=experiment, name=run_name, params={}, metrics=[], files={}, status="RUNNING"
        )
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=key))

    def update_run(self, key: str, status: str) -> None:
        self.runs[key].status = status

    def set_terminated(self, key: str, status: str) -> None:
        self.runs[key].status = status

    def get_metric_history(self, key: str, name: str) -> list:
        return [metric for metric in self.runs[key].metrics if metric.key == name]

    def log_batch(self, key: str, metrics=(), params=()) -> None:
        assert len(params) <= 100
        self.runs[key].metrics += metrics
        self.runs[key].params |= dict(params)

    def log_dict(self, key: str, content: dict, file: str) -> None:
        self.runs[key].files[file] = json.dumps(content)

    def log_text(self, key: str, text: str, file: str) -> None:
        self.runs[key].files[file] = text
