"""The config of a sweep: a `Config`, and the grid of evaluations that are based on it."""

import dataclasses

from elbo_kto_jax.runtime.config import Config, Count, CountOrZero, Location


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A grid of evaluations; a list is an axis of it, to which values may be added later (growth.py)."""

    checkpoints: list[Location]  # to evaluate
    tasks: list[Location]  # "win_rate", "elbo", and tasks of lm-evaluation-harness
    sampler: list[dict]  # keys of config.sampler that each setting replaces; {} is config.sampler itself
    draws: list[Count]  # K: masks per example or answer, where a likelihood is estimated
    baseline: Location  # win_rate: the checkpoint to compare with
    prompts: Location  # win_rate: JSONL records, as for `evaluate --prompts`
    data: Location  # elbo: records, as for `score --data`
    limit: CountOrZero  # prompts, records or questions of each task, the first ones; 0: all


@dataclasses.dataclass(frozen=True)
class SweepConfig(Config):
    """A `Config`, on which every evaluation of the grid is based, and the grid."""

    sweep: Sweep
