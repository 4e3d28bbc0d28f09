"""The resolved configuration: frozen dataclasses, and the only code that reads a config mapping.

A recipe (configs/*.py) states every key, or takes it from the recipe that it builds on. `from_mapping` refuses what it
does not know, what is missing, and every value of the wrong type or out of range, by the key's name, before anything is
loaded. There are no defaults here; but a config that was written before a key was there means what it meant then
(older_configs.py).
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from elbo_kto_jax.runtime import paths
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.older_configs import GONE, with_later_keys

_LARGEST = 2**31 - 1  # what an int32 holds; arrays are no longer, and runs neither


@dataclasses.dataclass(frozen=True)
class Range:
    """Closed interval of allowed finite values; `open_low` excludes the lower end."""

    low: float = float("-inf")
    high: float = float("inf")
    open_low: bool = False

    def __contains__(self, value: float) -> bool:
        above = self.low < value if self.open_low else self.low <= value
        return above and value <= self.high and value != float("inf")

    def __str__(self) -> str:
        if self.high >= _LARGEST:
            return f"{'more than' if self.open_low else 'at least'} {self.low:g}"
        return f"in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}]"


Count = Annotated[int, Range(1, _LARGEST)]
CountOrZero = Annotated[int, Range(0, _LARGEST)]
AxisSize = Annotated[int, Range(-1, _LARGEST)]
Seed = Annotated[int, Range(0, 2**63 - 1)]
Fraction = Annotated[float, Range(0, 1)]
NonNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, open_low=True)]
Dtype = Literal["float32", "bfloat16"]
Remat = Literal["full", "attention", "most", "dots", "none"]
Residuals = Literal["auto", "recompute", "device", "host"]
Location = Annotated[str, paths.resolve]  # of files; a hub id, too
Sources = Annotated[str | list[str], paths.resolve_sources]  # one or several such


@dataclasses.dataclass(frozen=True)
class Model:
    path: Location  # Hugging Face folder, hub id, converted checkpoint or PEFT's adapters
    dtype: Dtype  # of the activations and matrix products
    param_dtype: Dtype  # of the stored parameters; bfloat16 ones are rounded stochastically
    mask_token_id: Annotated[int, Range(-1, _LARGEST)]  # -1: what config.json, the tokenizer or the authors say
    remat: Remat  # what the backward pass computes again; full: all but each layer's input


@dataclasses.dataclass(frozen=True)
class Data:
    train: Sources  # JSONL or Parquet file, folder of such, or hub data set id; or a list, which is mixed
    weights: list[Positive]  # of the data sets of a list, in an epoch; []: each record once
    eval: Location  # the same, held out; "" for none
    max_length: Count  # tokens; longer examples are cut, and no packed row is longer
    packing: bool  # False: the authors' padding, one example a row, end-of-text padding visible
    append_eot: bool  # append the end-of-turn token to each completion
    desirable_fraction: Fraction  # n_D: part of the desirable examples that is kept
    undesirable_fraction: Fraction  # n_U: the same of the undesirable ones
    cache: Location  # folder for what large data sets are prepared to; "": beside the working folder


@dataclasses.dataclass(frozen=True)
class Objective:
    name: str  # elbo_kto, elbo_dpo (pairs), sft, or of another file of objectives/
    beta: NonNegative  # 1/nats; how strongly a reward counts
    desirable_weight: NonNegative  # lambda_D: of the loss of desirable examples
    undesirable_weight: NonNegative  # lambda_U: the same of undesirable ones
    reference_point: Literal["global_mean", "zero"]  # z0: the mean reward of the batch, or 0
    label_smoothing: Annotated[float, Range(0, 0.4999)]  # share of pairs that are taken for labelled the wrong way


@dataclasses.dataclass(frozen=True)
class Estimator:
    draws: Count  # K, masks per example
    scheme: str  # uniform, bernoulli, stratified, complementary, balanced or importance: diffusion/masks.py


@dataclasses.dataclass(frozen=True)
class Reference:
    mode: Literal["precomputed", "online"]  # the reference is scored once before training, or in every step
    path: Location  # the reference's model; "": model.path


@dataclasses.dataclass(frozen=True)
class Optimizer:
    learning_rate: NonNegative  # peak of the schedule
    schedule: Literal["cosine", "linear", "constant"]  # of the rate after the warm-up: down to 0, or as it is
    warmup_fraction: Fraction  # of all steps, in which the rate rises from 0
    b1: Annotated[float, Range(0, 0.999999)]  # Adam's decay of the mean of gradients
    b2: Annotated[float, Range(0, 0.999999)]  # Adam's decay of the mean of their squares
    weight_decay: NonNegative  # AdamW's
    clip_norm: Positive  # largest global norm of a gradient; a longer one is scaled down
    moments_dtype: Dtype  # of Adam's moments as they are stored; it computes in float32


@dataclasses.dataclass(frozen=True)
class Train:
    epochs: CountOrZero  # passes over the examples; 0: train.steps counts instead
    steps: CountOrZero  # optimizer steps; 0: train.epochs counts instead
    global_batch_size: Count  # examples per optimizer step
    microbatch_tokens: Count  # tokens that go through the model at once, per data-parallel shard
    residuals: Residuals  # what the backward pass needs of the forward pass: computed again, or kept in which memory
    checkpoint_every: Count  # steps between checkpoints; the last step is always saved
    keep_checkpoints: CountOrZero  # the latest so many stay; 0: all
    keep_best: str  # a held-out metric of metrics.jsonl: its best checkpoint stays, too; "": none
    patience: CountOrZero  # evaluations in a row that are not better by keep_best, after which the run ends; 0: never
    eval_every: CountOrZero  # steps between evaluations on data.eval; 0: never
    log_every: Count  # steps between lines of metrics.jsonl; evaluations have theirs in any case
    samples: CountOrZero  # prompts answered before and after training, for report.html
    on_bad_numbers: Literal["stop", "skip"]  # a loss or gradient that is not finite: stop, or leave the step out


@dataclasses.dataclass(frozen=True)
class Mesh:
    data: AxisSize  # devices with a copy each, for other rows; -1 in one place: the rest of the devices
    fsdp: AxisSize  # devices over which rows and parameters are split
    tensor: AxisSize  # devices over which the heads and widths of each layer are split


@dataclasses.dataclass(frozen=True)
class Lora:
    rank: CountOrZero  # 0: full fine-tuning
    alpha: Positive  # the adapters' product is scaled by alpha / rank
    base_quantization: Literal["none", "int8"]  # of the frozen weights under adapters
    targets: list[str]  # matrices of a layer that get adapters, such as q_proj; []: all
    path: Location  # adapters to start from: PEFT's folder, hub id, checkpoint or run; "": new ones


@dataclasses.dataclass(frozen=True)
class Sampler:
    gen_length: Count  # tokens of a response
    steps: Count  # denoising steps in all, spread evenly over the blocks
    block_length: Count  # tokens that are unmasked together, from left to right; gen_length is pure diffusion
    temperature: NonNegative  # 0: the likeliest token
    cfg_scale: NonNegative  # of classifier-free guidance; 0: none
    remasking: Literal["low_confidence", "random"]  # which positions wait: the least sure ones, or random ones
    logits_eos_inf: bool  # never write an end of text
    confidence_eos_eot_inf: bool  # write ends of text and of turns last
    threshold: Fraction  # 0: off; otherwise fill every position whose confidence exceeds it
    cache: Literal["none", "prefix", "dual"]  # reuse of keys and values within a block
    early_stop: bool  # end a response once nothing before its first end-of-text or end-of-turn token is masked
    batch_size: Count  # prompts decoded at once


@dataclasses.dataclass(frozen=True)
class Judge:
    name: str  # verifiable, chat, or of another file of evaluation/judges/
    model: str  # chat: the judge's model; "": JUDGE_MODEL of the environment
    prompt: Location  # chat: a text file, what to ask; "": the one of this project
    temperature: NonNegative | None  # chat; None: none is sent
    parallel: Count  # chat: requests at once
    requests_per_minute: NonNegative  # chat; 0: no limit of our own
    timeout: Annotated[float, Range(0.01)]  # chat: seconds of one attempt, from the connection to the last byte
    retries: CountOrZero  # chat: of a failed request


@dataclasses.dataclass(frozen=True)
class Benchmarks:
    table: Location  # how tasks of lm-evaluation-harness are run, as configs/tasks.py; "": that
    limit: CountOrZero  # examples per task; 0: all


@dataclasses.dataclass(frozen=True)
class Config:
    """One run. Unit and meaning of every key stand beside it."""

    seed: Seed  # of masks, order, subsets, adapters and answers
    model: Model
    data: Data
    objective: Objective
    estimator: Estimator
    reference: Reference
    optimizer: Optimizer
    train: Train
    mesh: Mesh
    lora: Lora
    sampler: Sampler
    tasks: Annotated[str, paths.resolve_all]  # lm-evaluation-harness tasks for `evaluate`, with commas; "": none
    benchmarks: Benchmarks
    judge: Judge
    trackers: list[str]  # beside metrics.jsonl: tensorboard, wandb, trackio, mlflow or of another file of trackers/

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> "Config":
        """The configuration that `mapping` (nested, as ml_collections.ConfigDict.to_dict() gives it) states.

        Raises:
          UserError: a key is unknown or missing, or a value has the wrong type, is out of range or at odds with others.
        """
        config = _build(cls, with_later_keys(mapping) if isinstance(mapping, Mapping) else mapping, "config")
        _check_together(config)
        return config

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def with_sampler(self, overrides: Mapping[str, Any], where: str) -> "Config":
        """This configuration with some keys of `sampler` replaced, as `where` says.

        Raises:
          UserError: a key or value that the sampler does not have.
        """
        tree = self.to_dict()
        try:
            return type(self).from_mapping({**tree, "sampler": {**tree["sampler"], **overrides}})
        except UserError as error:
            raise UserError(f"{where}: {error}") from None


@dataclasses.dataclass(frozen=True)
class Task:
    """How a task of lm-evaluation-harness is run: a row of configs/tasks.py."""

    num_fewshot: Annotated[int, Range(-1)]  # examples before the question; -1: as many as the task says
    chat_template: bool  # the question, examples included, is one message of the user
    sampler: dict  # keys of config.sampler that it sets; for tasks that generate
    draws: Count  # masks per answer (mc_num, docs/method.md 7); for tasks that compare likelihoods
    executes_code: bool  # runs what the model wrote

    @classmethod
    def table(cls, mapping: Mapping[str, Any], where: str) -> dict[str, "Task"]:
        """The rows of the table `mapping`, by the task's name.

        Raises:
          UserError: a row has unknown or missing keys, or values of the wrong type.
        """
        return {name: _build(cls, row, f"{where}: {name}") for name, row in mapping.items()}


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "config") -> list[str]:
    """One "key: old -> new" line for each leaf in which two nested mappings differ."""
    lines = []
    for key in sorted({*old, *new}):
        a, b, name = old.get(key), new.get(key), f"{prefix}.{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, name)
        elif a != b:
            lines.append(f"{name}: {a!r} -> {b!r}")
    return lines


def _build(cls, mapping: Any, path: str):
    if not isinstance(mapping, Mapping):
        raise UserError(f"{path}: expected a group of keys, got {_show(mapping)}")
    hints = typing.get_type_hints(cls, include_extras=True)
    for key in mapping:
        if f"{path}.{key}" in GONE:
            raise UserError(f"config key `{path}.{key}` is gone; {GONE[f'{path}.{key}']}")
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"did you mean `{path}.{close[0]}`?" if close else f"known keys: {', '.join(hints)}"
            raise UserError(f"unknown config key `{path}.{key}`; {hint}")
    for key in hints:
        if key not in mapping:
            raise UserError(f"config key `{path}.{key}` is missing; state it in the config file")
    return cls(**{key: _value(hint, mapping[key], f"{path}.{key}") for key, hint in hints.items()})


def _value(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, path)
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise UserError(f"{path}: expected one of {', '.join(map(repr, choices))}, got {_show(value)}")
        return value
    if typing.get_origin(hint) is list:
        (kind,) = typing.get_args(hint)
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{path}: expected a list, got {_show(value)}")
        return [_value(kind, item, f"{path}[{i}]") for i, item in enumerate(value)]
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:  # a value, or None
        hint, _ = typing.get_args(hint)
        if value in (None, "none"):
            return None
    allowed = None
    if typing.get_origin(hint) is Annotated:
        hint, allowed = typing.get_args(hint)
    if allowed is paths.resolve_sources:
        for text in [value] if isinstance(value, str) else value if isinstance(value, (list, tuple)) else []:
            _check_text(str(text), path)
        return allowed(value, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1023 else float("inf")
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{path}: expected {hint.__name__}, got {_show(value)}")
    if hint is str:
        _check_text(value, path)
        return value if allowed is None else allowed(value, path)
    if allowed is not None and value not in allowed:  # also refuses NaN
        bound = f"at most {allowed.high}" if value > allowed.high >= _LARGEST else allowed
        raise UserError(f"{path}: expected a number {bound}, got {_show(value)}")
    return value


def _check_text(value: str, path: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{path}: not UTF-8 text: {value}") from None


def _show(value: Any) -> str:
    """A value on one line, short enough for a message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, say
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= 100 else f"{text[:97]}..."


def _check_weights(data: Data) -> None:
    """Raises UserError where there are weights, and not one for each of several data sets."""
    count = len(data.train) if isinstance(data.train, list) else 1
    if data.weights and (count == 1 or len(data.weights) != count):
        sets = f"{count} data sets" if count > 1 else "one data set, which needs none"
        raise UserError(f"config.data.weights: {len(data.weights)} weights for {sets} in config.data.train")


def _check_together(config: Config) -> None:
    train, sampler, mesh = config.train, config.sampler, config.mesh
    if bool(train.epochs) == bool(train.steps):
        raise UserError("config.train: set one of `epochs` and `steps`, and the other to 0")
    _check_weights(config.data)
    sizes = dataclasses.asdict(mesh)
    if sum(size == -1 for size in sizes.values()) > 1 or 0 in sizes.values():
        raise UserError(f"config.mesh: expected positive sizes and -1 at most once, got {sizes}")
    if sampler.gen_length % sampler.block_length:
        raise UserError(
            f"config.sampler.block_length: {sampler.block_length} does not divide gen_length {sampler.gen_length}"
        )
    blocks = sampler.gen_length // sampler.block_length
    if sampler.steps % blocks:
        raise UserError(f"config.sampler.steps: {sampler.steps} steps cannot be spread evenly over {blocks} blocks")
    if config.lora.base_quantization != "none" and not config.lora.rank:
        raise UserError(
            f"config.lora.base_quantization: {config.lora.base_quantization!r} weights cannot be trained; "
            "set config.lora.rank to train adapters on them, or 'none'"
        )
    if config.lora.targets and not config.lora.rank:
        raise UserError(f"config.lora.targets: {config.lora.targets} are for adapters; set config.lora.rank")
    if config.lora.path and not config.lora.rank:
        raise UserError(
            f"config.lora.path: {config.lora.path}: adapters to train; set config.lora.rank and alpha to theirs, or "
            "name them as config.model.path to train the whole model that they and their base make"
        )
    if config.lora.rank and config.reference.path not in ("", config.model.path):
        raise UserError(
            f"config.reference.path: {config.reference.path}: with adapters (config.lora.rank) the reference is their "
            "base, config.model.path; leave it empty"
        )
