"""sampling/ for the architectures beside LLaDA, against the published algorithm as plain loops.

Dream's logits are shifted by one: with key/value reuse the first token of a window comes from the column before it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elbo_kto_jax.models import axes
from elbo_kto_jax.models.network import MaskPredictor
from elbo_kto_jax.runtime import config as configs
from elbo_kto_jax.runtime.config import Sampler
from elbo_kto_jax.sampling import schedule
from elbo_kto_jax.sampling.generate import generate
from elbo_kto_jax.sharding import rules
from tests import families, tiny
from tests.families import FAMILIES, Plain

DEFAULT = Sampler(
    gen_length=8,
    steps=8,
    block_length=4,
    temperature=0.0,
    cfg_scale=0.0,
    remasking="low_confidence",
    logits_eos_inf=False,
    confidence_eos_eot_inf=False,
    threshold=0.0,
    cache="none",
    early_stop=False,
    batch_size=8,
)
LENGTHS = (3, 11, 7, 1, 6, 2, 4, 5)
NO_PROMPT = np.zeros(0, np.int32)  # masked tokens alone are all alike: which comes first is chance
PROMPTS = [np.random.default_rng(size).integers(0, 36, size).astype(np.int32) for size in LENGTHS]


@pytest.fixture(scope="module", params=FAMILIES)
def model_and_params(request):
    return _model_and_params(request.param)


@pytest.fixture(scope="module")
def dream():
    return _model_and_params("dream")


def _model_and_params(family):
    """Of a model that is not sure of anything: a mask token that stands there is not predicted by a tied head."""
    config = families.config(family)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "MODEL", config)
        params = tiny.params(0)
    embedding = params["wte"]["embedding"]
    params["wte"]["embedding"] = embedding.at[config.mask_token_id].multiply(0.1)
    return MaskPredictor(config), params


def run(model_and_params, sampler, prompts=PROMPTS, **more):
    names = [f"prompt {i}" for i in range(len(prompts))]
    return generate(*model_and_params, prompts, sampler, seed=0, prompt_ids=names, **more)


def published(model_and_params, prompt, sampler, template=None):
    """(response, written_at) of docs/method.md 6 at temperature 0."""
    model, params = model_and_params
    mask_id, start, length = model.config.mask_token_id, len(prompt), sampler.block_length
    template = np.full(sampler.gen_length, mask_id, np.int32) if template is None else template
    x, taken = np.concatenate([prompt, template]), 0
    written_at = np.full(len(x), -1)
    steps = sampler.steps * length // sampler.gen_length
    for first in range(start, len(x), length):
        end = min(first + length, len(x))
        to_write = int((x[first:end] == mask_id).sum())
        networks = Plain(model.config, params), Plain(model.config, params)  # the prompt's, and the masked prompt's
        for step in range(steps):
            renewed, masked = np.arange(len(x)), (x == mask_id) & (np.arange(len(x)) < end)
            masked[:start] = False
            if sampler.cache != "none" and step > 0:
                masked[:first] = False
                renewed = np.arange(first, end if sampler.cache == "dual" else len(x))
            quota = to_write // steps + (step < to_write % steps)
            if not masked.any() or not quota:
                continue
            without = np.where(np.arange(len(x)) < start, mask_id, x)
            scores = networks[0].logits(x, renewed)[masked]
            if sampler.cfg_scale:
                others = networks[1].logits(without, renewed)[masked]
                scores = others + (sampler.cfg_scale + 1) * (scores - others)
            others = np.where(scores == scores.max(axis=1, keepdims=True), -np.inf, scores)
            confidence = -np.exp(others - scores.max(axis=1, keepdims=True)).sum(axis=1)  # falls with the odds against
            for i in np.argsort(-confidence, kind="stable")[:quota]:
                column = np.flatnonzero(masked)[i]
                x[column], written_at[column] = scores[i].argmax(), taken
            taken += 1
    return x[start:], written_at[start:]


CASES = {
    "blocks": {},
    "guided": {"cfg_scale": 1.3},
    "prefix": {"cache": "prefix"},
    "dual": {"cache": "dual"},
    "prefix, guided": {"cache": "prefix", "cfg_scale": 1.3},
    "dual, guided": {"cache": "dual", "cfg_scale": 1.3, "steps": 4},
}


def assert_published(model_and_params, sampler, prompts=PROMPTS, templates=None):
    responses = run(model_and_params, sampler, prompts, templates=templates)
    for i, prompt in enumerate(prompts):
        template = None if templates is None else templates[i]
        tokens, written_at = published(model_and_params, prompt, sampler, template)
        np.testing.assert_array_equal(responses.tokens[i, : len(tokens)], tokens, err_msg=f"prompt {i}")
        np.testing.assert_array_equal(responses.written_at[i, : len(tokens)], written_at, err_msg=f"prompt {i}")


@pytest.mark.parametrize("case", ["blocks", "dual"])
def test_equals_the_published_algorithm(model_and_params, case):
    assert_published(model_and_params, dataclasses.replace(DEFAULT, **CASES[case]))


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("blocks", "dual")])
def test_shifted_logits_with_guidance_and_reuse(dream, case):
    assert_published(dream, dataclasses.replace(DEFAULT, **CASES[case]))


def test_reuse_and_the_shift_change_some_responses(dream):
    """Otherwise the cases would not show whether anything is reused, or shifted."""
    of = lambda model_and_params, **changes: [  # noqa: E731
        published(model_and_params, prompt, dataclasses.replace(DEFAULT, **changes))[0].tolist() for prompt in PROMPTS
    ]
    unshifted = MaskPredictor(dataclasses.replace(dream[0].config, predicts_next=False)), dream[1]
    found = [of(dream, cache=cache) for cache in ("none", "prefix", "dual")] + [of(unshifted), of(dream, cfg_scale=1.3)]
    assert all(a != b for i, a in enumerate(found) for b in found[:i])


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_round_of_one_step_is_the_same_without_reuse(dream, cache):
    sampler = dataclasses.replace(DEFAULT, steps=2, temperature=0.7, cfg_scale=0.5)
    plain, reused = run(dream, sampler), run(dream, dataclasses.replace(sampler, cache=cache))
    np.testing.assert_array_equal(reused.tokens, plain.tokens)
    np.testing.assert_array_equal(reused.confidence, plain.confidence)
    assert (reused.forward_passes, reused.forward_tokens) == (plain.forward_passes, plain.forward_tokens)


@pytest.mark.parametrize("cache", ["none", "dual", "prefix"])
def test_masked_spans_are_filled_and_nothing_else(dream, cache):
    """The first and the last token of a block, one alone after a known one, and templates that end within a block."""
    rng = np.random.default_rng(1)
    templates = [rng.integers(0, 36, size).astype(np.int32) for size in (8, 7, 5, 8, 3)]
    for template, masked in zip(templates, ([0, 1, 4, 6], [2, 3, 4, 6], [0, 4], range(7), []), strict=True):
        template[list(masked)] = dream[0].config.mask_token_id
    prompts = [NO_PROMPT, *PROMPTS[:2], NO_PROMPT, PROMPTS[3]]
    assert_published(dream, dataclasses.replace(DEFAULT, cache=cache), prompts, templates)


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_no_prompt_and_no_room_beside_the_response(dream, monkeypatch, cache):
    """The response's first token has no column before it, not even one of padding."""
    monkeypatch.setattr(schedule, "BUCKET", 8)
    assert schedule._width(8) == 8
    template = np.full(8, dream[0].config.mask_token_id, np.int32)
    template[5] = 7
    assert_published(dream, dataclasses.replace(DEFAULT, cache=cache), [NO_PROMPT], [template])


def test_a_prompt_gets_the_same_whatever_runs_beside_it(dream, monkeypatch):
    sampler = dataclasses.replace(DEFAULT, temperature=0.7, remasking="random", cache="dual")
    together = run(dream, sampler)
    monkeypatch.setattr(schedule, "BUCKET", 40)  # other padding as well
    alone = run(dream, dataclasses.replace(sampler, batch_size=1), PROMPTS[:2])
    for traced in ("tokens", "written_at"):
        np.testing.assert_array_equal(getattr(alone, traced), getattr(together, traced)[:2])


def test_forward_tokens_count_the_column_before_a_window(dream):
    """8 tokens in 2 blocks of 4 steps: the first of each block runs the row, three run the window and one column."""
    responses = run(dream, dataclasses.replace(DEFAULT, cache="dual"))
    assert responses.forward_passes == 8
    assert responses.forward_tokens == len(PROMPTS) * (2 * schedule.BUCKET + 6 * 5)


@pytest.mark.parametrize("family", ["dream", "a2d_qwen3"])
def test_on_eight_devices_as_on_one(family, cpu_devices):
    """With a tied head, or one of its own, whose vocabulary is split, and biases and norms of split heads."""
    model, params = model_and_params = _model_and_params(family)
    mesh = rules.make_mesh(configs.Mesh(2, 2, 2), cpu_devices)
    sharded = jax.device_put(params, axes.param_shardings(params, mesh, model.config))
    sampler = dataclasses.replace(DEFAULT, temperature=1.0, cache="dual")
    one, many = run(model_and_params, sampler), run((model, sharded), sampler, mesh=mesh)
    np.testing.assert_array_equal(many.tokens, one.tokens)
    np.testing.assert_array_equal(many.written_at, one.written_at)
    np.testing.assert_allclose(many.confidence, one.confidence, rtol=1e-4)
    assert jnp.isfinite(many.confidence).all()
