"""Repeated draws of the estimator on real records: the raw measurements behind `diagnose` (docs/estimators.md).

Masks are a pure function of (seed, example id, epoch, draw), so repetition j of a setting (scheme, K) is epoch j. The
value pass scores every distinct mask once, whichever settings and repetitions drew it: a short response has few masks,
and draws of uniform and bernoulli do not depend on K. The gradient pass takes, for every record (or pair of records
that an objective contrasts), the gradients of two repetitions by themselves, since the masks of different examples are
independent: half their squared distance is an unbiased estimate of the variance of that unit's gradient, and their
inner product one of its squared length.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Float64, Int64
from tqdm import tqdm

from elbo_kto_jax.data.draws import segment_of
from elbo_kto_jax.data.packing import Segment, pack
from elbo_kto_jax.diffusion.masks import SCHEMES, Draws, draw_masks
from elbo_kto_jax.models.network import Params
from elbo_kto_jax.scoring.scorer import Scorer
from elbo_kto_jax.sharding import rules
from elbo_kto_jax.training.setup import Setup
from elbo_kto_jax.training.state import zeros_like_params
from elbo_kto_jax.training.step import gradient_programs

_SCORED_AT_ONCE = 256  # masks per call of the scoring programs


class Setting(NamedTuple):
    """A way to estimate: which masks, and how many."""

    scheme: str
    draws: int  # K


@dataclasses.dataclass(frozen=True)
class Values:
    """What the value pass found, for n records and R repetitions.

    Attributes:
      policy: B_hat under the policy of each setting, nats.
      reference: the same masks under the reference.
      record: record of every draw of the settings that hide a fixed number of tokens.
      count: l, how many tokens that draw hid.
      policy_draw: (L / l) * sum of log p under the policy, whatever weight the scheme gave the draw.
      reference_draw: the same under the reference.
      hidden: mean number of hidden tokens of a draw of each setting and record.
      masks: number of distinct (record, mask), each scored once under both models.
    """

    policy: dict[Setting, Float64[np.ndarray, "n r"]]
    reference: dict[Setting, Float64[np.ndarray, "n r"]]
    record: Int64[np.ndarray, " d"]
    count: Int64[np.ndarray, " d"]
    policy_draw: Float64[np.ndarray, " d"]
    reference_draw: Float64[np.ndarray, " d"]
    hidden: dict[Setting, Float64[np.ndarray, " n"]]
    masks: int


@dataclasses.dataclass(frozen=True)
class Gradients:
    """Of two repetitions j, j' of every unit, in the groups of parameters `groups` (one per kind of matrix).

    A unit is a record, or the records that an objective contrasts; its gradient is that of contrast . B_hat.

    Attributes:
      groups: names.
      first: squared length of a unit's gradient with the masks of repetition j.
      second: the same of j'.
      product: inner product of the two.
      seconds: for one forward and backward pass over the K draws of a record of the unit, mean of the two.
      single_record: record of every draw of a setting with K = 1 that hides a fixed number of tokens, where units are
        records.
      single_count: l of that draw.
      single_square: squared length of the gradient of (L / l) * sum of log p, whatever weight the scheme gave it.
    """

    groups: list[str]
    first: dict[Setting, Float64[np.ndarray, "u g"]]
    second: dict[Setting, Float64[np.ndarray, "u g"]]
    product: dict[Setting, Float64[np.ndarray, "u g"]]
    seconds: dict[Setting, Float64[np.ndarray, " u"]]
    single_record: Int64[np.ndarray, " d"]
    single_count: Int64[np.ndarray, " d"]
    single_square: Float64[np.ndarray, " d"]


class Measurement:
    """The estimator on the examples `records` of a run's data, under the policy's and the reference's parameters.

    The records of a unit are neighbours; `contrast` are their factors.
    """

    def __init__(
        self,
        setup: Setup,
        records: Int64[np.ndarray, " n"],
        settings: Sequence[Setting],
        contrast: Sequence[float] = (1.0,),
    ):
        self.setup, self.records, self.settings, self.contrast = setup, records, settings, contrast
        self.units = len(records) // len(contrast)
        self.size = max(_SCORED_AT_ONCE, *(setting.draws * len(contrast) for setting in settings))
        self.scorer = Scorer(setup.model, setup.mesh, size=self.size)
        # A draw is an "example" of its own here: the program takes one cotangent per draw.
        self._grad = jax.jit(gradient_programs(self.scorer, draws=1)[0], donate_argnums=(1, 2))

    def masks(self, setting: Setting, n: int, repetition: int) -> Draws:
        """The masks of record n in one repetition."""
        examples, i = self.setup.data.examples, self.records[n]
        return draw_masks(
            setting.scheme,
            seed=self.setup.config.seed,
            id_words=examples.id_words[i],
            epoch=repetition,
            draws=setting.draws,
            length=int(examples.completion_length[i]),
        )

    def values(self, policy: Params, reference: Params, repeats: int) -> Values:
        """B_hat of every record and setting in `repeats` repetitions, policy and reference on the same masks."""
        index: dict[tuple[int, bytes], int] = {}
        masks: list[tuple[int, np.ndarray]] = []
        wanted = {setting: np.empty((len(self.records), repeats, setting.draws), int) for setting in self.settings}
        weights = {setting: np.empty(chosen.shape) for setting, chosen in wanted.items()}
        for setting, chosen in wanted.items():
            for n, j in np.ndindex(chosen.shape[:2]):
                draws = self.masks(setting, n, j)
                weights[setting][n, j] = draws.weight
                for k, mask in enumerate(draws.mask):
                    key = (n, mask.tobytes())
                    if key not in index:
                        index[key] = len(masks)
                        masks.append((n, mask))
                    chosen[n, j, k] = index[key]
        sums = [self._log_probs(params, masks, name) for params, name in ((policy, "policy"), (reference, "reference"))]
        counts = np.array([mask.sum() for _, mask in masks])
        means = [{s: np.mean(weights[s] * of_mask[wanted[s]], axis=2) for s in self.settings} for of_mask in sums]
        fixed = np.concatenate([wanted[s].ravel() for s in self.settings if SCHEMES[s.scheme].fixes_count])
        record = np.array([n for n, _ in masks])[fixed]
        canonical = self.setup.data.examples.completion_length[self.records][record] / counts[fixed]
        return Values(
            policy=means[0],
            reference=means[1],
            record=record,
            count=counts[fixed],
            policy_draw=canonical * sums[0][fixed],
            reference_draw=canonical * sums[1][fixed],
            hidden={s: np.mean(counts[wanted[s]], axis=(1, 2)) for s in self.settings},
            masks=len(masks),
        )

    def _log_probs(self, params: Params, masks: list[tuple[int, np.ndarray]], name: str) -> Float64[np.ndarray, " m"]:
        """The sum of log p at the hidden tokens of each (record, mask)."""
        found = np.empty(len(masks))
        with tqdm(total=len(masks), desc=f"values ({name})", unit="mask") as bar:
            for start in range(0, len(masks), self.size):
                part = masks[start : start + self.size]
                segments = [self._segment(n, mask, 1.0, at) for at, (n, mask) in enumerate(part)]
                scores = self.scorer(params, pack(segments, self.setup.data.layout))
                found[start : start + len(part)] = np.asarray(scores)[: len(part)]
                bar.update(len(part))
        return found

    def gradients(self, policy: Params) -> Gradients:
        """The gradients in repetitions 0 and 1 of every unit and setting, by `Gradients`."""
        groups = group_names(policy)
        found = [{s: np.empty((self.units, len(groups))) for s in self.settings} for _ in range(3)]
        seconds = {s: np.empty(self.units) for s in self.settings}
        single: list[tuple[int, int, float]] = []
        self._gradient(policy, self.settings[0], 0, 0)  # compiles
        with tqdm(total=len(self.settings) * self.units, desc="gradients", unit="unit") as bar:
            for setting in self.settings:
                for n in range(self.units):
                    began = time.monotonic()
                    pair = [jax.block_until_ready(self._gradient(policy, setting, n, j)) for j in (0, 1)]
                    seconds[setting][n] = (time.monotonic() - began) / 2 / len(self.contrast)
                    for to, of_groups in zip(found, np.asarray(_products(*pair), np.float64), strict=True):
                        to[setting][n] = of_groups
                    if len(self.contrast) == setting.draws == 1 and SCHEMES[setting.scheme].fixes_count:
                        for j in (0, 1):
                            (mask,), (weight,) = self.masks(setting, n, j)
                            count = int(mask.sum())
                            square = found[j][setting][n].sum() * (len(mask) / count / weight) ** 2
                            single.append((n, count, square))
                    bar.update()
        first, second, product = found
        records, counts, squares = zip(*single, strict=True) if single else ((), (), ())
        return Gradients(
            groups=groups,
            first=first,
            second=second,
            product=product,
            seconds=seconds,
            single_record=np.array(records, int),
            single_count=np.array(counts, int),
            single_square=np.array(squares, float),
        )

    def _gradient(self, policy: Params, setting: Setting, unit: int, repetition: int) -> Params:
        segments: list[Segment] = []
        share = np.zeros(self.size, np.float32)
        for i, factor in enumerate(self.contrast):
            n = unit * len(self.contrast) + i
            for mask, weight in zip(*self.masks(setting, n, repetition), strict=True):
                share[len(segments)] = factor / setting.draws
                segments.append(self._segment(n, mask, float(weight), len(segments)))
        # As few rows at once as the devices allow, since K draws of one example are few; of one length, since a
        # compilation would count as time of an example.
        layout = self.setup.data.layout._replace(rows=rules.row_shards(self.setup.mesh), shorter=())
        cotangent = self.scorer.place_everywhere(share)
        grads, estimates = zeros_like_params(policy), self.scorer.no_estimates()
        for rows in self.scorer.place(pack(segments, layout)):
            grads, estimates = self.scorer.pace(self._grad(policy, grads, estimates, rows, cotangent))
        return grads

    def _segment(self, n: int, mask: np.ndarray, weight: float, index: int) -> Segment:
        return segment_of(self.setup.data.examples, int(self.records[n]), mask, weight, index)


def group_names(params: Params) -> list[str]:
    """The kinds of matrices in a tree of parameters, sorted: q_proj, wte ..., over all layers."""
    return sorted(_groups(params))


def _groups(params: Params) -> dict[str, list[Array]]:
    found: dict[str, list[Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        found.setdefault(path[-2].key, []).append(leaf)
    return found


@jax.jit
def _products(a: Params, b: Params) -> Float32[Array, "3 g"]:
    """|a|^2, |b|^2 and <a, b> of each group."""
    a, b = _groups(a), _groups(b)

    def product(x, y):
        return jnp.stack([sum(jnp.vdot(u, v) for u, v in zip(x[g], y[g], strict=True)) for g in sorted(x)])

    return jnp.stack([product(a, a), product(b, b), product(a, b)])
