"""The precomputed reference: B_ref of every draw of every step, computed once and kept (docs/method.md 2).

    workdir/reference/KEY/fingerprint.json             everything that B_ref depends on; KEY is its hash
    workdir/reference/KEY/steps-FIRST-LAST-SUM.npy     float32 [steps, b * K], nats

A cache of another model, tokenizer, template, data set, seed, K, scheme or layout has another key, so it is never read;
one that is incomplete is completed. Parts are renamed into place when they are whole; SUM is a hash of KEY, steps and
values, so that a part that was damaged or came from elsewhere is never used.
"""

import hashlib
import io
import json
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float32
from tqdm import tqdm

from elbo_kto_jax.runtime import processes
from elbo_kto_jax.runtime.config import differences
from elbo_kto_jax.runtime.errors import Interrupted, UserError
from elbo_kto_jax.runtime.files import atomic_write
from elbo_kto_jax.scoring.scorer import Scorer, Weights
from elbo_kto_jax.training.data import TrainingData

log = logging.getLogger(__name__)
_SAVE_EVERY = 30.0  # seconds between parts


class ReferenceCache:
    """B_ref of the first `steps` steps of a run, as far as it is known."""

    def __init__(self, folder: Path, fingerprint: dict, data: TrainingData, steps: int):
        """Opens the cache of `fingerprint` below `folder`, and names the caches there that belong to something else.

        Raises:
          UserError: a part of the cache is damaged.
        """
        text = json.dumps(fingerprint, sort_keys=True, indent=1)
        self.path = folder / hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        self.data = data
        try:
            self.elbo_ref = np.zeros((steps, data.batch_size * data.estimator.draws), np.float32)
            self.known = np.zeros(steps, bool)
        except MemoryError:
            raise UserError(
                f"config.train: the reference's estimates for {steps} steps do not fit in memory; train for fewer, or "
                "set config.reference.mode=online"
            ) from None
        for other in sorted(folder.glob("*/fingerprint.json")):
            if other.parent != self.path:
                try:
                    changes = "; ".join(differences(dict(json.loads(other.read_bytes())), fingerprint, "reference"))
                except (OSError, ValueError, TypeError):
                    changes = "its description is damaged"
                log.info("not used: the reference cache %s is of something else (%s)", other.parent, changes)
        processes.first(self._read_parts)
        self.elbo_ref, self.known = processes.of_first((self.elbo_ref, self.known))
        self._fingerprint = text

    def complete(self, scorer: Scorer, reference: Weights, stop_requested: Callable[[], bool] = lambda: False) -> int:
        """Scores every step that is not known yet under the parameters `reference`, and returns how many those were.

        Raises:
          Interrupted: `stop_requested` became true; what was scored is saved.
          UserError: the reference gives an estimate that is not finite.
        """
        missing = np.flatnonzero(~self.known)
        if not len(missing):
            return 0
        processes.first(lambda: atomic_write(self.path / "fingerprint.json", self._fingerprint))
        pending: list[tuple[int, jax.Array]] = []
        first, saved_at = int(missing[0]), time.monotonic()
        steps = range(first, int(missing[-1]) + 1)
        bar = tqdm(steps, desc="reference", unit="step")
        for step, batch in zip(bar, self.data.batches(steps.start, steps.stop), strict=True):
            if not self.known[step]:
                pending.append((step, scorer(reference, batch.micro_batches)))
            stopping = stop_requested()
            if stopping or time.monotonic() - saved_at > _SAVE_EVERY:
                self._write(pending)
                pending, saved_at = [], time.monotonic()
                if stopping:
                    raise Interrupted(f"the reference pass is saved up to step {step + 1} of {len(self.known)}")
            elif len(pending) > 1:
                pending[-2][1].block_until_ready()  # keeps the host from running ahead of the device without end
        self._write(pending)
        return len(missing)

    def _write(self, pending: list[tuple[int, jax.Array]]) -> None:
        """Stores the scored steps, in memory and in one part per run of consecutive steps."""
        runs: list[list[int]] = []
        for step, estimates in pending:
            self.elbo_ref[step] = np.asarray(estimates)
            self._check_finite(step)
            self.known[step] = True
            if runs and runs[-1][-1] == step - 1:
                runs[-1].append(step)
            else:
                runs.append([step])
        if processes.is_first():
            for run in runs:
                buffer, name = io.BytesIO(), f"steps-{run[0]:08d}-{run[-1]:08d}"
                values = self.elbo_ref[run[0] : run[-1] + 1]
                np.save(buffer, values)
                atomic_write(self.path / f"{name}-{self._sum(name, values)}.npy", buffer.getvalue())

    def _sum(self, name: str, values: Float32[np.ndarray, "steps bk"]) -> str:
        content = f"{self.path.name} {name} {values.shape};".encode() + values.tobytes()
        return hashlib.blake2b(content, digest_size=8).hexdigest()

    def _check_finite(self, step: int) -> None:
        bad = np.flatnonzero(~np.isfinite(self.elbo_ref[step]))
        if len(bad):
            example = self.data.indices(step)[bad[0] // self.data.estimator.draws]
            raise UserError(
                f"the reference gives ELBO {self.elbo_ref[step, bad[0]]} nats for example "
                f"{self.data.examples.ids[example]!r}; check the checkpoint in --config.reference.path"
            )

    def _read_parts(self) -> None:
        for part in sorted(self.path.glob("steps-*.npy")):
            self._read(part)

    def _read(self, part: Path) -> None:
        match = re.fullmatch(r"(steps-(\d+)-(\d+))-(\w+)\.npy", part.name)
        try:
            if match is None:
                raise ValueError("its name is not one of these")
            values: Float32[np.ndarray, "steps bk"] = np.load(io.BytesIO(part.read_bytes()), allow_pickle=False)
            first, last = int(match[2]), int(match[3])
            if values.shape != (last - first + 1, self.elbo_ref.shape[1]) or values.dtype != np.float32:
                raise ValueError(f"shape {values.shape}")
            if self._sum(match[1], values) != match[4]:
                raise ValueError("its values are not those that were written")
        except (OSError, ValueError, TypeError, EOFError) as error:
            raise UserError(f"{part}: damaged part of the reference cache ({error}); delete this file") from None
        stop = min(last + 1, len(self.known))
        if first < stop:
            self.elbo_ref[first:stop] = values[: stop - first]
            self.known[first:stop] = True
