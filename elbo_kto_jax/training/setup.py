"""From a config to everything that a run over a data set needs, cheapest checks first."""

import dataclasses
import datetime
import functools
import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import jax
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from elbo_kto_jax import objectives
from elbo_kto_jax.checkpoints.adapters import load_base, load_start, open_start
from elbo_kto_jax.checkpoints.manifest import Adaptation, unsaid_mask
from elbo_kto_jax.data.examples import load_examples
from elbo_kto_jax.data.packing import Layout
from elbo_kto_jax.data.prepared import Cache
from elbo_kto_jax.data.special import find_eot_id
from elbo_kto_jax.diffusion import masks
from elbo_kto_jax.models import axes, lora
from elbo_kto_jax.models.network import MaskPredictor, Params
from elbo_kto_jax.objectives.protocol import Objective
from elbo_kto_jax.runtime import paths
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.sampling.generate import check_options
from elbo_kto_jax.scoring.layout import layout_of
from elbo_kto_jax.scoring.opened import Opened, open_model
from elbo_kto_jax.scoring.scorer import Kept, Scorer
from elbo_kto_jax.sharding import rules
from elbo_kto_jax.training import state as train_state
from elbo_kto_jax.training.data import TrainingData
from elbo_kto_jax.training.residuals import memory_of, shards_of, where_to_keep

log = logging.getLogger(__name__)
_ADAPTERS = "--config.lora.path"
_MOST_STEPS = 100_000_000  # of a run; years of training, and what is kept of each step still fits in memory


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run's model (without weights), devices and data."""

    config: Config
    model: MaskPredictor
    assets: Mapping[str, bytes]
    tokenizer: PreTrainedTokenizerBase
    mesh: Mesh
    objective: Objective
    data: TrainingData
    eval_data: TrainingData | None
    residuals: Kept  # as config.train.residuals says, or as fits

    @property
    def total_steps(self) -> int:
        return self.config.train.steps or self.config.train.epochs * self.data.steps_per_epoch

    def scorer(self) -> Scorer:
        """What scores the batches of the run, policy and reference."""
        return Scorer(
            self.model,
            self.mesh,
            size=self.data.batch_size * self.config.estimator.draws,
            residuals=self.residuals,
        )

    def shardings(self, params: Params) -> Params:
        """Where each parameter of a tree of the model's, or of its adapters', lies."""
        return axes.param_shardings(params, self.mesh, self.model.config)

    def load_params(self, path: str, flag: str) -> Params:
        """The parameters of the model at `path`, sharded over the mesh in the config's `param_dtype`."""
        return Opened(self.model, self.assets, self.tokenizer, self.mesh).load_params(path, flag)

    def load_base(self) -> tuple[lora.Base, Adaptation] | tuple[None, None]:
        """What the run's adapters are trained on, and how their checkpoints name it; None without adapters."""
        config, options = self.config, self.config.lora
        if not options.rank:
            return None, None
        abstract = train_state.abstract_base(self.model, options)
        log.info("loading %s as the base of adapters of rank %d", config.model.path, options.rank)
        params, path, digest = load_base(
            config.model.path, abstract, self.shardings(abstract), flag="--config.model.path"
        )
        base = lora.Base(params, options.alpha / options.rank)
        targets = tuple(sorted(options.targets))
        return base, Adaptation(options.rank, options.alpha, path, digest, options.base_quantization, targets)

    def init_adapters(self, base: Adaptation) -> Params:
        """The adapters before the first step: new ones, or those of config.lora.path.

        Raises:
          UserError: those cannot be used, or were trained on another base than `base`.
        """
        abstract = train_state.abstract_trained(self.model, self.config.lora)
        shardings, path = self.shardings(abstract), self.config.lora.path
        if not path:
            return lora.init_adapters(abstract, shardings, self.config.seed)
        log.info("starting from the adapters at %s; the reference is their base without them", path)
        return load_start(open_start(path, _ADAPTERS, self.config.lora, abstract), base, abstract, shardings)

    def fingerprint(self, reference: str, data: TrainingData) -> dict:
        """Everything that the reference's estimates on `data` depend on; `reference`: the digest of its parameters."""
        config, layout = self.config, data.layout
        mask = unsaid_mask(self.model.config, self.assets)
        return {
            "model": reference,
            "dtype": config.model.dtype,
            "tokenizer": tokenizer_digest(self.assets),
            "data": data.examples.digest(),
            "max_length": layout.length,
            "packing": layout.packed,
            "seed": config.seed,
            "draws": config.estimator.draws,
            "scheme": config.estimator.scheme,
            "lora_rank": config.lora.rank,  # another program: it may round differently
            "global_batch_size": data.batch_size,
            "microbatch_tokens": config.train.microbatch_tokens,
            "residuals": self.residuals,  # which program scores a row
            "platform": jax.default_backend(),
            "jax": jax.__version__,
            "format": 3,  # of the cache; in the second all rows were of one length, in the first parts had no checksum
            **({"rows": layout.rows} if layout.shorter else {}),  # how many there are at once says how long they are
            **({} if config.lora.base_quantization == "none" else {"base": config.lora.base_quantization}),
            **({"lora_targets": sorted(config.lora.targets)} if config.lora.targets else {}),  # as for the rank
            **({"group": data.group} if data.group > 1 else {}),  # examples that are shuffled together
            **self._mixture(data),
            **({} if mask is None else {"mask_token_id": mask}),  # which the user, the tokenizer or the authors say
        }

    def _mixture(self, data: TrainingData) -> dict:
        """What else says which examples a step has."""
        if not data.is_weighted:
            return {}
        return {"weights": list(self.config.data.weights), "sizes": list(data.examples.sizes)}


def tokenizer_digest(assets: Mapping[str, bytes]) -> str:
    """A hash (hex) of the tokenizer's files, the chat template among them."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(assets):
        if name != "config.json":
            digest.update(f"{name} {len(assets[name])};".encode())
            digest.update(assets[name])
    return digest.hexdigest()


def cache_of(config: Config, workdir: Path) -> Cache | None:
    """Where a run in `workdir` keeps what its data are prepared to: on this machine, which maps it into memory.

    Raises:
      UserError: the config names a bucket.
    """
    if config.data.cache:
        return Cache(paths.here(config.data.cache, "config.data.cache"), is_shared=True)
    if paths.is_remote(workdir):
        return None
    beside = workdir.absolute()
    return Cache(beside.with_name(f"{beside.name}.data"), is_shared=False)


def check_held_out(config: Config) -> None:
    """Raises UserError where a run is to be evaluated on held-out data and there are none, or to stop by no metric."""
    if config.train.patience and not (config.train.eval_every and config.train.keep_best):
        missing = "eval_every is 0" if not config.train.eval_every else "keep_best is ''"
        raise UserError(
            f"config.train.patience: {config.train.patience}, but config.train.{missing}, so that nothing is compared; "
            "set data.eval, train.eval_every and train.keep_best, or patience to 0"
        )
    if config.train.eval_every and not config.data.eval:
        raise UserError(
            f"config.train.eval_every: {config.train.eval_every}, but config.data.eval names no held-out records; "
            "name some, or set eval_every to 0"
        )


def prepare(
    config: Config,
    *,
    skip_bad: bool,
    flags: tuple[str, str] = ("--config.model.path", "--config.data.train"),
    moment: datetime.datetime | None = None,
    cache: Cache | None = None,
    revisions: Mapping[str, str] = MappingProxyType({}),
) -> Setup:
    """Reads the model's config.json and tokenizer and the whole data set, and checks that they fit together.

    `flags` are the names under which the user gave the model and the data, for messages. `moment`: see `open_model`;
    `cache` and `revisions`: see `load_examples`.

    Raises:
      UserError: anything about them that the user has to mend.
    """
    model_flag, data_flag = flags
    opened = open_model(config, model_flag, moment)
    model, mesh = opened.model, opened.mesh
    check_options(config.sampler)
    objective = objectives.build(config.objective)
    masks.check_scheme(config.estimator.scheme)
    _check_pairs(config, objective)
    _check_best(config.train.keep_best, objective)
    if config.sampler.confidence_eos_eot_inf:
        find_eot_id(opened.tokenizer, "config.sampler.confidence_eos_eot_inf")
    trained = train_state.abstract_trained(model, config.lora)
    axes.param_shardings(trained, mesh, model.config)
    if config.lora.path:
        open_start(config.lora.path, _ADAPTERS, config.lora, trained)  # before minutes of reading
    layout = layout_of(config, model.config, mesh)

    read = functools.partial(_read, config, opened, objective, layout, skip_bad, cache, revisions)
    fractions = config.data.desirable_fraction, config.data.undesirable_fraction
    data = read(config.data.train, data_flag, *fractions, weights=config.data.weights)
    eval_data = read(config.data.eval, "--config.data.eval", 1.0, 1.0) if config.data.eval else None
    residuals = _residuals(config, model, mesh, objective, data)
    setup = Setup(config, model, opened.assets, opened.tokenizer, mesh, objective, data, eval_data, residuals)
    if setup.total_steps > _MOST_STEPS:
        key = "steps" if config.train.steps else "epochs"
        raise UserError(
            f"config.train.{key}: {getattr(config.train, key)} is {setup.total_steps} steps; "
            f"expected at most {_MOST_STEPS} steps"
        )
    return setup


def _read(
    config: Config,
    opened: Opened,
    objective: Objective,
    layout: Layout,
    skip_bad: bool,
    cache: Cache | None,
    revisions: Mapping[str, str],
    path: str | list[str],
    flag: str,
    desirable_fraction: float,
    undesirable_fraction: float,
    weights: Sequence[float] = (),
) -> TrainingData:
    """The data at `path`, which `flag` named, for an objective."""
    examples = load_examples(
        path,
        opened.tokenizer,
        max_length=config.data.max_length,
        exact_window=config.data.packing,
        append_eot=config.data.append_eot,
        desirable_fraction=desirable_fraction,
        undesirable_fraction=undesirable_fraction,
        seed=config.seed,
        needs_label=objective.needs.labels,
        needs_pairs=objective.needs.pairs,
        skip_bad=skip_bad,
        progress=True,
        flag=flag,
        prompts=config.train.samples,
        weights=weights,
        cache=cache,
        revisions=revisions,
    )
    name = path if isinstance(path, str) else ", ".join(path)
    log.info("%s: %s", name, examples.report)
    if loss := examples.counts.warning(config.data.max_length):
        log.warning("%s: %s", name, loss)
    return TrainingData(
        examples,
        layout,
        estimator=config.estimator,
        batch_size=config.train.global_batch_size,
        seed=config.seed,
        own=rules.own_rows(opened.mesh, layout.rows),
        group=_group(objective),
        weights=weights,
    )


def _residuals(config: Config, model: MaskPredictor, mesh: Mesh, objective: Objective, data: TrainingData) -> Kept:
    """Where the run keeps its residuals."""
    memory = memory_of(mesh.local_devices)
    micro_batches = data.most_micro_batches() if config.train.residuals == "auto" else 0  # which takes a while
    return where_to_keep(config, model.config, shards_of(mesh), memory, objective.needs, micro_batches)


def _group(objective: Objective) -> int:
    """How many neighbours in the data belong together."""
    return 2 if objective.needs.pairs else 1


def _check_best(metric: str, objective: Objective) -> None:
    """Raises UserError where there is no held-out metric of that name."""
    found = objective.held_out(np.zeros(2, np.float32), np.array([True, False]))
    known = ["eval_loss", *(f"eval_{name}" for name in found)]
    if metric and metric not in known:
        raise UserError(
            f"config.train.keep_best: expected one of {', '.join(map(repr, known))}, or '' for none; got {metric!r}"
        )


def _check_pairs(config: Config, objective: Objective) -> None:
    """Raises UserError where pairs, which the objective needs whole, would be cut apart."""
    if not objective.needs.pairs:
        return
    if config.train.global_batch_size % 2:
        raise UserError(
            f"config.train.global_batch_size: {config.train.global_batch_size} completions are no whole pairs, which "
            f"{config.objective.name} needs; choose an even number"
        )
    if config.data.desirable_fraction != config.data.undesirable_fraction:
        raise UserError(
            f"config.data.desirable_fraction: {config.data.desirable_fraction} is not undesirable_fraction "
            f"{config.data.undesirable_fraction}; pairs stay whole for {config.objective.name}, so set both alike"
        )
