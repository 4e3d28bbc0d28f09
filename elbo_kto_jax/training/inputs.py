"""Digests of what a run's result depends on besides its config, so that a restart goes on with the same or not at all.

    config key          what of it
    config.data.train   examples (their number), ids, labels, texts (as tokens)
    config.data.eval    the same
    config.model.path   each file of config and tokenizer; chat template; weights
    config.reference.path   weights, where they are not those of the model
    config.lora.path    weights, until the first step is saved

Weights are read from their files once a start. Where a run needs them in memory, the digest is made there. A restart
that does not need them reads a converted checkpoint's manifest, which has their digest; of a published folder, whose
files have none, it reads every tensor once, each process the part that it owns, one leaf at a time.
"""

import hashlib

import numpy as np

from elbo_kto_jax.checkpoints.digest import params_digest
from elbo_kto_jax.checkpoints.load import manifest_digest, read_digest, weight_files
from elbo_kto_jax.checkpoints.manifest import Adaptation
from elbo_kto_jax.data.examples import Examples
from elbo_kto_jax.data.prepared import digest_files
from elbo_kto_jax.models.network import Params, abstract_params
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.runtime.workdir import Workdir
from elbo_kto_jax.training.setup import Setup, cache_of, prepare

MODEL = "config.model.path"
REFERENCE = "config.reference.path"
ADAPTERS = "config.lora.path"


def prepare_in(config: Config, folder: Workdir, *, skip_bad: bool) -> Setup:
    """`prepare` for a run in its working folder, which is claimed for it.

    Raises:
      UserError: `prepare`, or the run began with other inputs.
    """
    cache = cache_of(config, folder.path)
    setup = prepare(config, skip_bad=skip_bad, moment=folder.moment, cache=cache, revisions=folder.revisions)
    sets = [data.examples.revisions for data in (setup.data, setup.eval_data) if data is not None]
    revisions = {name: commit for found in sets for name, commit in found.items()}
    folder.claim(of_setup(setup), files_of(setup), revisions)
    if cache is not None:
        cache.remove_others()  # not before: a start that is refused leaves what the run has
    return setup


def of_setup(setup: Setup) -> dict[str, dict[str, str | int]]:
    """The digests of all but the weights, for `Workdir.claim`."""
    found = {"config.data.train": of_examples(setup.data.examples)}
    if setup.eval_data is not None:
        found["config.data.eval"] = of_examples(setup.eval_data.examples)
    model = {name: _digest(content) for name, content in setup.assets.items()}
    return {**found, MODEL: {**model, "chat template": _digest(repr(setup.tokenizer.chat_template).encode())}}


def of_examples(examples: Examples) -> dict[str, str | int]:
    """What training sees of a data set, part by part."""
    texts = (examples.tokens, examples.offsets, examples.prompt_length)
    sizes = {"sizes": ", ".join(map(str, examples.sizes))} if len(examples.sizes) > 1 else {}  # of what is mixed
    return {
        "examples": len(examples),
        "ids": _digest(examples.joined_ids()),
        "labels": _digest(examples.is_desirable.tobytes()),
        "texts": _digest(*(np.ascontiguousarray(array).view(np.uint8) for array in texts)),
        **sizes,
    }


def files_of(setup: Setup) -> dict[str, dict[str, str | int]]:
    """Path -> bytes of every file of data and weights, and its BLAKE2b but for safetensors (`Weights` has theirs)."""
    found: dict[str, dict[str, str | int]] = {}
    for data in (setup.data, setup.eval_data):
        for file in data.examples.files if data is not None else ():
            known = data.examples.digests if data is not None else {}
            size, content = known.get(str(file)) or digest_files([file])[str(file)]
            found[str(file.absolute())] = {"bytes": size, "blake2b": content}
    adapters = (ADAPTERS,) if setup.config.lora.path else ()
    for key in dict.fromkeys((MODEL, reference_key(setup.config), *adapters)):
        for file in weight_files(*_place(setup.config, key)):
            digest = {"blake2b": _digest(file.read_bytes())} if file.suffix == ".json" else {}
            found[str(file)] = {"bytes": file.stat().length, **digest}
    return found


def reference_key(config: Config) -> str:
    """The config key whose weights are the reference."""
    return MODEL if config.reference.path in ("", config.model.path) else REFERENCE


class Weights:
    """A run's weights: they must be those with which it began."""

    def __init__(self, setup: Setup, workdir: Workdir):
        self._setup, self._workdir = setup, workdir
        self._checked: set[str] = set()

    def load(self, key: str) -> Params:
        """The parameters at the config key `key`.

        Raises:
          UserError: they cannot be loaded, or are not those of the start.
        """
        params = self._setup.load_params(*_place(self._setup.config, key))
        self.check(key, params_digest(params))
        return params

    def adapters(self, base: Adaptation) -> Params:
        """The adapters before the first step; where config.lora.path names them, those of the start.

        Raises:
          UserError: they cannot be loaded, belong to another base than `base`, or are not those of the start.
        """
        params = self._setup.init_adapters(base)
        if self._setup.config.lora.path:
            self._workdir.check({ADAPTERS: {"weights": params_digest(params)}})
        return params

    def check(self, key: str, digest: str) -> None:
        """Checks weights that were loaded, by their digest.

        Raises:
          UserError: they are not those of the start.
        """
        stored = manifest_digest(*_place(self._setup.config, key))
        self._workdir.check({key: {"weights": digest, "stored weights": stored}})
        self._checked.add(key)

    def known(self, key: str) -> str | None:
        """The digest of the weights with which the run began, in the config's `param_dtype`; None: not known yet."""
        return self._workdir.inputs.get(key, {}).get("weights")

    def digest(self, key: str) -> str:
        """The digest of weights that are known."""
        digest = self.known(key)
        if digest is None:
            raise ValueError(f"{key}: the weights have not been loaded")
        return digest

    def verify(self, key: str) -> None:
        """Checks weights that are not needed in memory, unless they have been checked since the start.

        Raises:
          UserError: they are not those of the start.
        """
        if key in self._checked:
            return
        path, flag = _place(self._setup.config, key)
        stored = manifest_digest(path, flag)
        if stored:
            self._workdir.check({key: {"stored weights": stored}})
            self._checked.add(key)
        else:
            shardings = self._setup.shardings(abstract_params(self._setup.model))
            self.check(key, read_digest(path, self._setup.config.model.param_dtype, shardings, flag))


def _place(config: Config, key: str) -> tuple[str, str]:
    """The path of the weights at a config key, and the flag that gives it."""
    paths = {MODEL: config.model.path, REFERENCE: config.reference.path, ADAPTERS: config.lora.path}
    return paths[key], f"--{key}"


def _digest(*contents: bytes | memoryview | np.ndarray) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for content in contents:
        digest.update(f"{len(content)};".encode())
        digest.update(content.data if isinstance(content, np.ndarray) else content)
    return digest.hexdigest()
