"""Benchmarks of lm-evaluation-harness on a masked diffusion model (docs/method.md 8): extra `eval`, imported by need.

The harness builds prompts and metrics, `DiffusionLM` answers: written answers by the sampler (docs/method.md 6),
likelihoods by the Monte-Carlo estimate over masks (docs/method.md 7). Each task runs with its row of configs/tasks.py.
"""

import collections
import dataclasses
import difflib
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from elbo_kto_jax.data import chat
from elbo_kto_jax.data.packing import Layout
from elbo_kto_jax.data.records import Record
from elbo_kto_jax.runtime import paths
from elbo_kto_jax.runtime.config import Config, Task
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.files import atomic_write
from elbo_kto_jax.runtime.messages import one_line, shown
from elbo_kto_jax.sampling.respond import Checkpoint, respond
from elbo_kto_jax.scoring.layout import layout_of
from elbo_kto_jax.scoring.likelihood import log_likelihoods

log = logging.getLogger(__name__)

# A task that has no row in the table: what its own file says, and the masks of docs/method.md 7.
_UNLISTED = Task(num_fewshot=-1, chat_template=True, sampler={}, draws=128, executes_code=False)


class Benchmark(NamedTuple):
    """A task (or group, or tag) that is ready to run, and how."""

    name: str
    settings: Task
    loaded: list[Any]  # lm_eval's Task and Group objects
    generates: bool  # whether it has answers written
    compares: bool  # whether it has likelihoods of answers estimated
    content: str  # digest of what it asks: its documents, and how they become questions and are rated


def load_benchmarks(names: Sequence[str], table: dict[str, Task], *, allow_code: bool, flag: str) -> list[Benchmark]:
    """The tasks `names` with their data: names that lm_eval knows, or YAML files of tasks.

    Args:
      names: of tasks, groups or tags; see `lm_eval ls tasks`.
      table: the rows of configs/tasks.py.
      allow_code: whether tasks may execute what the model writes.
      flag: the flag or config key that named them, for messages.

    Raises:
      UserError: a task is unknown, executes code without `allow_code`, or its data cannot be loaded.
    """
    rows = [table.get(paths.here(name, flag).stem, _UNLISTED) for name in names]
    if allow_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    for name, row in zip(names, rows, strict=True):
        _check_code(name, row.executes_code, allow_code, flag)
    # Reading the index of all tasks takes seconds, and a YAML file does not need it.
    manager = TaskManager(include_defaults=not all(_is_file(name) for name in names))
    for name in names:
        if not _is_file(name) and name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"did you mean {close[0]}?" if close else "`lm_eval ls tasks` lists them"
            raise UserError(f"{flag}: lm-evaluation-harness has no task {shown(name)}; {hint}")
    benchmarks = []
    for name, row in zip(names, rows, strict=True):
        try:
            found = manager.load([name])
        except Exception as error:  # whatever its file or the data set's host raises
            raise UserError(
                f"{flag}: task {shown(name)} cannot be loaded ({_first_line(error)});\n"
                "its data set is fetched from the Hugging Face Hub once, and kept in HF_HOME"
            ) from error
        _check_code(
            name, any(getattr(task, "UNSAFE_CODE", False) for task in found["tasks"].values()), allow_code, flag
        )
        inside = {child for children in found["group_map"].values() for child in children}
        tops = {**found["groups"], **found["tasks"]}
        loaded = [top for top_name, top in tops.items() if top_name not in inside]
        kinds = {task.OUTPUT_TYPE == "generate_until" for task in found["tasks"].values()}
        content = _content(found["tasks"], row.num_fewshot)
        benchmarks.append(Benchmark(Path(name).stem, row, loaded, True in kinds, False in kinds, content))
    return benchmarks


def _content(tasks: dict[str, Any], num_fewshot: int) -> str:
    """A digest of tasks: a name or a data set's revision would not show that a file or the hub's data changed."""
    digest = hashlib.blake2b(digest_size=16)
    for name, task in sorted(tasks.items()):
        described = json.dumps(task.dump_config(), sort_keys=True, default=str)
        digest.update(f"{name} {re.sub(' at 0x[0-9a-f]+', '', described)}\n".encode(errors="surrogatepass"))
        shots = task.config.num_fewshot or 0 if num_fewshot < 0 else num_fewshot
        for documents in (task.eval_docs, task.fewshot_docs() if shots else []):
            for document in documents or []:
                line = json.dumps(document, sort_keys=True, default=str)
                digest.update(f"{line}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()


def run(
    benchmark: Benchmark, checkpoint: Checkpoint, config: Config, *, limit: int, allow_code: bool, out: Path
) -> dict[str, float]:
    """Runs a task and writes `out`: lm_eval's own JSON, as `lm_eval --output_path` writes it; returns its metrics.

    Beside it, `out` with the ending .samples.jsonl: every question with its answers and metrics, as lm_eval logs them.

    Args:
      benchmark: what to run.
      checkpoint: the model.
      config: the sampler, where the task's row does not set it; seed, draws at once and devices.
      limit: examples per task; 0: all.
      allow_code: see `load_benchmarks`.
      out: a JSON file, written when the task is complete.

    Returns:
      lm_eval's "METRIC,FILTER" and "METRIC_stderr,FILTER" of the task; of a tag, those of its tasks, "TASK: METRIC".
    """
    settings = benchmark.settings
    config = config.with_sampler(settings.sampler, f"task {benchmark.name}")
    model = DiffusionLM(checkpoint, config, settings.draws)
    with tempfile.TemporaryDirectory(prefix="elbo_kto_jax_task_") as scratch:
        tracker = EvaluationTracker(output_path=scratch)
        results = simple_evaluate(
            model=model,
            model_args={"path": checkpoint.source, "draws": settings.draws, **config.to_dict()["sampler"]},
            tasks=benchmark.loaded,
            task_manager=TaskManager(include_defaults=False),  # nothing is looked up: the tasks are loaded
            num_fewshot=None if settings.num_fewshot < 0 else settings.num_fewshot,
            limit=limit or None,
            apply_chat_template=settings.chat_template and checkpoint.tokenizer.chat_template is not None,
            fewshot_as_multiturn=False,
            evaluation_tracker=tracker,
            random_seed=config.seed,
            numpy_random_seed=config.seed,
            torch_random_seed=config.seed,
            fewshot_random_seed=config.seed,
            confirm_run_unsafe_code=allow_code,
        )
        samples = results.pop("samples")
        tracker.save_results_aggregated(results=results, samples=samples)
        (written,) = Path(scratch).rglob("results_*.json")
        rows = [{"task": task, **row} for task, of_task in samples.items() for row in of_task]
        lines = (json.dumps(row, default=str, ensure_ascii=False) for row in rows)
        atomic_write(out.with_suffix(".samples.jsonl"), "".join(f"{line}\n" for line in lines))
        atomic_write(out, written.read_bytes())
    return _metrics(results, benchmark.name)


def read_metrics(out: Path, name: str) -> dict[str, float]:
    """What `run` returned for the task `name`, from the JSON file that it wrote."""
    return _metrics(json.loads(out.read_text(encoding="utf-8")), name)


def describe(settings: Task) -> str:
    """How a task is run, for people."""
    shots = "its own number of examples" if settings.num_fewshot < 0 else f"{settings.num_fewshot} examples"
    keys = ", ".join(f"{key}={value}" for key, value in settings.sampler.items()) or "config.sampler"
    return f"{shots}, {keys}, {settings.draws} masks where it compares likelihoods"


class DiffusionLM(LM):
    """What lm_eval asks of a model, answered by a mask predictor.

    Of a request to generate, the stop strings count; how many tokens are written, and how, is `config.sampler`'s.
    """

    def __init__(self, checkpoint: Checkpoint, config: Config, draws: int):
        super().__init__()
        self._checkpoint = checkpoint
        self._config = config
        self._draws = draws

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The responses to the contexts, each cut at its first stop string."""
        copies: collections.Counter[str] = collections.Counter()
        records = []
        for request in requests:
            context = request.args[0]
            copies[context] += 1  # a task that asks several times gets several random answers
            name = f"{_hash(context)}#{copies[context]}"
            records.append(Record(name, context, None, None, _where(request)))
        longest = self._checkpoint.model.config.max_sequence_length - self._config.sampler.gen_length
        if longest < 1:
            raise UserError(
                f"{_where(requests[0])}: sampler.gen_length {self._config.sampler.gen_length} leaves no room for the "
                f"question in the {self._checkpoint.model.config.max_sequence_length} tokens that the model takes;\n"
                "lower it in the task's row of --task-table, or in config.sampler where that row does not set it"
            )
        texts = respond(self._checkpoint, records, self._config, cut_prompts=True).texts
        return [cut_at(text, _stops(request)) for text, request in zip(texts, requests, strict=True)]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, False) of each continuation given its context.

        The likelihood is the estimate of docs/method.md 7, all draws of an answer stratified together. Whether greedy
        decoding would give the answer is reported as False throughout: it takes a decoding of its own for each answer,
        and no metric of the published evaluations reads it.
        """
        layout = self._layout()
        encoded = self._cut([self._encode_pair(*request.args) for request in requests], requests, layout.length)
        with tqdm(total=len(requests), desc="likelihood", unit="answer") as bar:
            values = log_likelihoods(
                self._checkpoint.model,
                self._checkpoint.params,
                [np.array(context, np.int32) for context, _ in encoded],
                [np.array(answer, np.int32) for _, answer in encoded],
                draws=self._draws,
                batch=self._draws,
                seed=self._config.seed,
                layout=layout,
                mesh=self._checkpoint.mesh,
                progress=bar.update,
            )
        return [(float(value), False) for value in values]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Refused: windows that move over a text have no meaning for a model that sees both sides."""
        raise UserError(
            f"{_where(requests[0])}: asks for the perplexity of whole texts (loglikelihood_rolling), which a masked "
            "diffusion model does not define; leave the task out"
        )

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; without the generation prompt, the last message is left open to go on."""
        return chat.render(self._checkpoint.tokenizer, chat_history, is_open=not add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._checkpoint.tokenizer.chat_template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        return self._checkpoint.source.replace("/", "__")

    def _encode_pair(self, context: str, answer: str) -> tuple[list[int], list[int]]:
        """Tokens of both, the two tokenised as one text; white space between them belongs to the answer."""
        stripped = context.rstrip()
        answer = context[len(stripped) :] + answer
        (whole,) = chat.tokenise(self._checkpoint.tokenizer, [stripped + answer])
        (prefix,) = chat.tokenise(self._checkpoint.tokenizer, [stripped])
        return whole[: len(prefix)], whole[len(prefix) :]

    def _cut(
        self, pairs: list[tuple[list[int], list[int]]], requests: list[Instance], longest: int
    ) -> list[tuple[list[int], list[int]]]:
        """The pairs of (context, answer), contexts that leave too little room cut from the left, as the harness does.

        Raises:
          UserError: an answer alone is longer than the model takes.
        """
        for (_, answer), request in zip(pairs, requests, strict=True):
            if len(answer) > longest:
                raise UserError(
                    f"{_where(request)}: an answer of {len(answer)} tokens, but the model takes {longest}; "
                    "leave the task out"
                )
        excess = [len(context) + len(answer) - longest for context, answer in pairs]
        if max(excess, default=0) > 0:
            log.warning(
                "task %s: %d of %d contexts are longer than the model takes, %d tokens with the answer: cut from the "
                "left, by up to %d tokens; fewer examples (num_fewshot in --task-table) make them shorter",
                *(requests[0].task_name, sum(tokens > 0 for tokens in excess), len(pairs), longest, max(excess)),
            )
        return [(context[max(0, tokens) :], answer) for (context, answer), tokens in zip(pairs, excess, strict=True)]

    def _layout(self) -> Layout:
        """Packed rows as long as the model takes them, whatever the config's data has."""
        model = self._checkpoint.model.config
        data = dataclasses.replace(self._config.data, max_length=model.max_sequence_length, packing=True)
        return layout_of(dataclasses.replace(self._config, data=data), model, self._checkpoint.mesh)


def cut_at(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first of the stop strings, without it."""
    return text[: min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=len(text))]


def _stops(request: Instance) -> list[str]:
    until = request.args[1].get("until") or []
    return [until] if isinstance(until, str) else list(until)


def _metrics(results: dict[str, Any], name: str) -> dict[str, float]:
    found = {**results["results"], **results.get("groups", {})}
    of_tasks = {"": found[name]} if name in found else {f"{task}: ": row for task, row in found.items()}
    return {
        f"{prefix}{metric}": float(value)
        for prefix, row in of_tasks.items()
        for metric, value in row.items()
        if "," in metric and isinstance(value, (int, float))  # a standard error that there is none of is "N/A"
    }


def _check_code(name: str, executes_code: bool, allowed: bool, flag: str) -> None:
    if executes_code and not allowed:
        raise UserError(
            f"{flag}: task {name} executes the code that the model writes, on this machine and with your rights; "
            "pass --confirm-run-unsafe-code to allow it"
        )


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _where(request: Instance) -> str:
    return f"task {request.task_name}, document {request.doc_id}"


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def _first_line(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}", 200)
