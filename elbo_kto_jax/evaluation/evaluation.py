"""One evaluation: the win rate of a checkpoint against another, benchmarks, or both; the same request goes on."""

import dataclasses
from pathlib import Path
from typing import Any

from elbo_kto_jax.evaluation import benchmarks, comparison, judges, kept, results
from elbo_kto_jax.evaluation.prompts import Prompts, read_prompts
from elbo_kto_jax.runtime import lock
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.flags import refuse_existing

WIN_RATE = "win_rate"


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of `evaluate` beside the config.

    Attributes:
      checkpoint: model A, which is evaluated.
      out: folder of the results.
      baseline: model B, for the win rate; "": none.
      prompts: JSONL records with what the judge needs; given with `baseline`.
      allow_code: whether benchmarks may execute what the model writes.
      overwrite: whether earlier results in `out` are replaced.
    """

    checkpoint: str
    out: Path
    baseline: str = ""
    prompts: str = ""
    allow_code: bool = False
    overwrite: bool = False


def evaluate(request: Request, config: Config) -> dict[str, Any]:
    """The win rate under config.judge and the metrics of config.tasks, written into `request.out`; the summary.

    Raises:
      UserError: nothing is asked for, or something about models, prompts, judge or tasks has to be mended.
    """
    if bool(request.baseline) != bool(request.prompts):
        raise UserError("--baseline and --prompts: the win rate needs both, the checkpoint to compare with and prompts")
    if not benchmarks.split_tasks(config.tasks) and not request.prompts:
        raise UserError("nothing to evaluate: pass --baseline and --prompts (win rate), --config.tasks=..., or both")
    with lock.inside(request.out, "--out"):
        return _Evaluation(request, config).run()


class _Evaluation:
    """Checks what is asked for, cheapest first, and then does what of it is not done."""

    def __init__(self, request: Request, config: Config):
        self._request, self._config, self._out = request, config, request.out
        tasks = benchmarks.split_tasks(config.tasks)
        self._planned = [self._out / comparison.COMPARISONS, self._out / comparison.REPORT] if request.prompts else []
        for file in [*self._planned, *(benchmarks.task_file(self._out, task) for task in tasks)]:
            refuse_existing(file, request.overwrite or kept.is_unfinished(self._out))
        if not kept.is_of_evaluation(self._out):  # or results.json is kept, and what is new is added
            refuse_existing(self._out / results.RESULTS, request.overwrite)
        self._benchmarks = benchmarks.load(tasks, config, allow_code=request.allow_code, flag="--config.tasks")
        self._prompts = self._judge = None
        if request.prompts:
            self._prompts = read_prompts(request.prompts)
            self._judge = judges.make(config.judge, self._prompts, self._out / "judge")
        self._models = [kept.pin(request.checkpoint, "--checkpoint")]
        self._models += [kept.pin(request.baseline, "--baseline")] if request.prompts else []
        self._progress = kept.Progress(self._out, self._parts(self._prompts), request.overwrite)

    def run(self) -> dict[str, Any]:
        """Does what is left, and returns the summary of all."""
        return self._win_rate() | self._tasks()

    def _win_rate(self) -> dict[str, Any]:
        if self._prompts is None or self._judge is None:
            return {}
        file, report = self._planned
        if WIN_RATE not in self._progress.done:
            answers = comparison.answered(self._prompts, self._models, self._config, self._out)
            result = comparison.compare(answers, self._judge, self._out)
            results.write_win_rate(self._out, self._sources() | result | self._asked())
            self._progress.finish(WIN_RATE)
        result = comparison.result_of(comparison.read_rows(file))
        return {**result, "comparisons_file": str(file), "report": str(report)} | self._results_file()

    def _tasks(self) -> dict[str, Any]:
        if not self._benchmarks:
            return {}
        metrics = {}
        checkpoint = self._models[0].load(self._config)
        for benchmark in self._benchmarks:
            file, name = benchmarks.task_file(self._out, benchmark.name), _part_name(benchmark)
            if name not in self._progress.done:
                benchmarks.run(benchmark, checkpoint, self._config, allow_code=self._request.allow_code, out=file)
            metrics[benchmark.name] = benchmarks.import_harness("tasks").read_metrics(file, benchmark.name)
            if name not in self._progress.done:
                settings = {**self._settings(), **self._settings_of(benchmark)}
                model = {"checkpoint": self._models[0].source, "digest": self._models[0].content}
                found = {"metrics": metrics[benchmark.name], **model, "settings": settings}
                results.write_task(self._out, benchmark.name, found)
                self._progress.finish(name)
        files = {name: str(benchmarks.task_file(self._out, name)) for name in metrics}
        return {"tasks": metrics, "results": files} | self._results_file()

    def _sources(self) -> dict[str, Any]:
        """Which models are compared, for results.json."""
        names = ("checkpoint", "baseline")
        named = {name: model.source for name, model in zip(names, self._models, strict=True)}
        return {**named, "digests": {name: model.content for name, model in zip(names, self._models, strict=True)}}

    def _asked(self) -> dict[str, Any]:
        """How the models were asked and judged, for results.json."""
        judge = {"name": self._config.judge.name, **judges.describe(self._config.judge)}
        return {"prompts_file": self._request.prompts, "judge": judge, "settings": self._settings()}

    def _settings(self) -> dict[str, Any]:
        """The keys of the config on which every result depends."""
        tree = self._config.to_dict()
        return {key: tree[key] for key in ("seed", "model", "sampler")}

    def _settings_of(self, benchmark: Any) -> dict[str, Any]:
        return {**benchmarks.settings_of(benchmark), "limit": self._config.benchmarks.limit}

    def _results_file(self) -> dict[str, str]:
        return {"results_file": str(self._out / results.RESULTS)}

    def _parts(self, prompts: Prompts | None) -> dict[str, kept.Part]:
        """The results that are asked for, by name, with all that they depend on."""
        base = {"checkpoint": self._models[0].content, **self._settings()}
        parts = {}
        if prompts:
            judge = judges.describe(self._config.judge)
            settings: dict[str, Any] = {"baseline": self._models[1].content, "prompts": prompts.digest, "judge": judge}
            parts[WIN_RATE] = kept.Part(self._planned, {**base, **settings})
        for benchmark in self._benchmarks:
            files = [benchmarks.task_file(self._out, benchmark.name)]
            parts[_part_name(benchmark)] = kept.Part(files, {**base, **self._settings_of(benchmark)})
        return parts


def _part_name(benchmark: Any) -> str:
    return f"tasks/{benchmark.name}"
