"""sampling/decode.py against the golden responses, and against the published algorithm written out as plain loops."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elbo_kto_jax import config as configs
from elbo_kto_jax.checkpoint.store import build_tokenizer, load_config
from elbo_kto_jax.config import Sampler
from elbo_kto_jax.errors import UserError
from elbo_kto_jax.model.config import ModelConfig
from elbo_kto_jax.model.llada import LLaDA, init_params
from elbo_kto_jax.sampling import decode
from elbo_kto_jax.sharding import rules
from elbo_kto_jax.text.chat import find_eot_id

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
    batch_size=4,
)
TINY = ModelConfig(
    d_model=16,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    mlp_hidden_size=24,
    embedding_size=20,
    vocab_size=18,
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
    max_sequence_length=128,
    mask_token_id=15,
    eos_token_id=16,
    pad_token_id=16,
)
TINY_EOT = 17


def options(**changes) -> Sampler:
    return dataclasses.replace(DEFAULT, **changes)


@pytest.fixture(scope="module")
def tokenizer(golden):
    return build_tokenizer(load_config(golden.folder / "policy")[1], "policy")


@pytest.fixture(scope="module")
def tiny():
    """A model and parameters that predict many tokens, the mask token and both stop tokens among them, and whose
    responses every option changes (tested below)."""
    model = LLaDA(TINY)
    params = jax.tree.map(lambda leaf: leaf * 6, init_params(model, jax.random.key(8)))
    special = jnp.array([TINY.mask_token_id, TINY.eos_token_id, TINY_EOT])
    boost = jnp.ones(TINY.embedding_size).at[special].set(1.5)
    params["head"]["kernel"] = params["head"]["kernel"] * boost
    return model, params


@pytest.fixture(scope="module")
def tiny_prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 15, size).astype(np.int32) for size in (3, 11, 1, 7, 5)]  # of one bucket


def run(tiny, prompts, sampler, names=None, seed=0, mesh=None):
    model, params = tiny
    names = [f"prompt {i}" for i in range(len(prompts))] if names is None else names
    return decode.generate(model, params, prompts, sampler, seed=seed, prompt_ids=names, eot_id=TINY_EOT, mesh=mesh)


# Golden responses.


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "among others"])
def test_golden_responses(golden, tokenizer, monkeypatch, alone):
    described = golden.described["sampling"]
    count = len(described["prompts"])
    prompts = [golden.arrays[f"sampling.{i}.prompt"] for i in range(count)]
    strangers = [] if alone else [prompt[:: 2 + len(prompt) % 2] for prompt in prompts]
    assert described["configs"]
    for name, config in described["configs"].items():
        sampler = options(**config, batch_size=1 if alone else 2 * count)
        # Rows wide enough for all prompts, so that they share a batch (and a configuration one program).
        monkeypatch.setattr(decode, "BUCKET", max(len(prompt) for prompt in prompts) + sampler.gen_length)
        responses = decode.generate(
            LLaDA(golden.config),
            golden.policy,
            prompts + strangers,
            sampler,
            seed=0,
            prompt_ids=[str(i) for i in range(len(prompts + strangers))],
            eot_id=find_eot_id(tokenizer, "policy"),
        )
        for i, prompt in enumerate(prompts):
            expected = golden.arrays[f"sampling.{i}.{name}"][len(prompt) :]
            np.testing.assert_array_equal(responses.tokens[i], expected, err_msg=f"{name}, prompt {i}")


# The published algorithm, one prompt at a time, with logits everywhere and no cleverness.


@functools.partial(jax.jit, static_argnums=0)
def padded_logits(model, params, tokens, length):
    segment_ids = (jnp.arange(tokens.shape[1]) < length)[None].astype(jnp.int32)
    return model.apply({"params": params}, tokens, None, segment_ids, method="logits")


def logits_everywhere(tiny, tokens):
    """float64[s, v], computed in a row of 32 that is padded on the right: one program for all lengths."""
    padded = jnp.zeros((1, 32), jnp.int32).at[0, : len(tokens)].set(tokens)
    return np.asarray(padded_logits(*tiny, padded, len(tokens))[0, : len(tokens)], np.float64)


def published(tiny, prompt, sampler):
    """(response, written_at, steps taken, whether a mask token was ever written) at temperature 0."""
    mask_id, eos = TINY.mask_token_id, TINY.eos_token_id
    start, length = len(prompt), sampler.block_length
    x = np.concatenate([prompt, np.full(sampler.gen_length, mask_id, np.int32)])
    written_at = np.full(len(x), -1)
    steps_per_block = sampler.steps // (sampler.gen_length // length)
    taken, wrote_mask = 0, False
    for block in range(sampler.gen_length // length):
        end = start + (block + 1) * length
        steps = length if sampler.threshold else steps_per_block
        for step in range(steps):
            masked = x == mask_id
            masked[end:] = False
            quota = 1 if sampler.threshold else length // steps + (step < length % steps)
            if not masked.any() or not quota:
                continue
            scores = logits_everywhere(tiny, x)
            if sampler.cfg_scale:
                without = x.copy()
                without[:start] = mask_id
                unconditional = logits_everywhere(tiny, without)
                scores = unconditional + (sampler.cfg_scale + 1) * (scores - unconditional)
            if sampler.logits_eos_inf:
                scores[:, eos] = -np.inf
            token = scores.argmax(axis=1)
            if sampler.confidence_eos_eot_inf:
                scores[:, [eos, TINY_EOT]] = -np.inf
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            confidence = weights[np.arange(len(x)), token] / weights.sum(axis=1)
            ranked = np.argsort(np.where(masked, -confidence, np.inf), kind="stable")
            chosen = set(ranked[:quota])
            if sampler.threshold:
                chosen |= set(np.flatnonzero(masked & (confidence > sampler.threshold)))
            for i in chosen:
                x[i], written_at[i] = token[i], taken
                wrote_mask |= bool(token[i] == mask_id)
            taken += 1
    return x[start:], written_at[start:], taken, wrote_mask


CASES = {
    "blocks": {},
    "uneven": {"gen_length": 14, "block_length": 7, "steps": 6},
    "more steps than positions": {"steps": 24, "logits_eos_inf": True},
    "late end of text": {"confidence_eos_eot_inf": True},
    "guided": {"cfg_scale": 1.3, "confidence_eos_eot_inf": True, "block_length": 8},
    "threshold": {"threshold": 0.5, "block_length": 8},
    "threshold that is never reached": {"threshold": 1.0, "steps": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_published_algorithm(tiny, tiny_prompts, case):
    sampler = options(**CASES[case])
    responses = run(tiny, tiny_prompts, sampler)
    for i, prompt in enumerate(tiny_prompts):
        tokens, written_at, _, _ = published(tiny, prompt, sampler)
        np.testing.assert_array_equal(responses.tokens[i], tokens, err_msg=f"prompt {i}")
        np.testing.assert_array_equal(responses.written_at[i], written_at, err_msg=f"prompt {i}")


def test_the_cases_contain_what_they_are_about(tiny, tiny_prompts):
    """Some prompt has a mask token written and taken up again; every option changes some response."""
    plain = [published(tiny, prompt, DEFAULT) for prompt in tiny_prompts]
    assert any(wrote_mask for *_, wrote_mask in plain)
    for case in ("more steps than positions", "late end of text", "guided", "threshold"):
        changed = [published(tiny, prompt, options(**CASES[case])) for prompt in tiny_prompts]
        assert any((a[1] != b[1]).any() for a, b in zip(plain, changed, strict=True)), case


def test_forward_passes_count_the_steps_that_batches_need(tiny, tiny_prompts):
    sampler = options(**CASES["threshold"])
    steps = [published(tiny, prompt, sampler)[2] for prompt in tiny_prompts]
    assert len(set(steps)) > 1
    # With one block a batch runs as long as its slowest prompt; what fills up the last batch adds nothing.
    rows = sampler.batch_size
    expected = sum(max(steps[at : at + rows]) for at in range(0, len(steps), rows))
    assert run(tiny, tiny_prompts, sampler).forward_passes == expected
    batches = -(-len(tiny_prompts) // rows)
    assert run(tiny, tiny_prompts, DEFAULT).forward_passes == batches * DEFAULT.steps
    guided = options(**CASES["guided"])
    assert run(tiny, tiny_prompts, guided).forward_passes == 2 * batches * guided.steps


def test_confidence_is_the_probability_of_the_token_when_it_was_written(tiny, tiny_prompts):
    responses = run(tiny, tiny_prompts, options(temperature=4.0))
    for prompt, tokens, written_at, confidence in zip(tiny_prompts, *responses[:3], strict=True):
        for i in np.flatnonzero(written_at >= 0):
            # A position that held the mask token for a while was masked until its last writing all the same.
            before = np.where(written_at < written_at[i], tokens, TINY.mask_token_id)
            logits = logits_everywhere(tiny, np.concatenate([prompt, before]))[len(prompt) + i]
            np.testing.assert_allclose(
                confidence[i], np.exp(logits - np.logaddexp.reduce(logits))[tokens[i]], rtol=1e-4
            )


# Randomness and independence.


def test_a_prompt_gets_the_same_whatever_runs_beside_it(tiny, tiny_prompts, monkeypatch):
    sampler = options(temperature=0.7, remasking="random", cfg_scale=0.5)
    names = [f"prompt {i}" for i in range(len(tiny_prompts))]
    together = run(tiny, tiny_prompts, sampler, names)
    alone = run(tiny, tiny_prompts[2:3], sampler, names[2:3])
    order = [4, 2, 0, 3, 1]
    monkeypatch.setattr(decode, "BUCKET", 40)  # other padding as well
    shuffled = run(
        tiny,
        [tiny_prompts[i] for i in order],
        dataclasses.replace(sampler, batch_size=3),
        [names[i] for i in order],
    )
    for traced in ("tokens", "written_at"):
        np.testing.assert_array_equal(getattr(alone, traced)[0], getattr(together, traced)[2])
        np.testing.assert_array_equal(getattr(shuffled, traced), getattr(together, traced)[order])


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_a_prompt_gets_the_same_on_any_number_of_devices(tiny, tiny_prompts, cpu_devices, sizes):
    model, params = tiny
    mesh = rules.make_mesh(configs.Mesh(*sizes), cpu_devices)
    sharded = jax.device_put(params, rules.param_shardings(params, mesh))
    sampler = options(temperature=1.0, remasking="random")
    one, many = run(tiny, tiny_prompts, sampler), run((model, sharded), tiny_prompts, sampler, mesh=mesh)
    np.testing.assert_array_equal(many.tokens, one.tokens)
    np.testing.assert_array_equal(many.written_at, one.written_at)
    np.testing.assert_allclose(many.confidence, one.confidence, rtol=1e-4)


def test_seed_and_name_change_the_draws(tiny, tiny_prompts):
    sampler = options(temperature=4.0)
    prompt = [tiny_prompts[1]] * 4
    first = run(tiny, prompt, sampler, list("aabc"))
    assert (first.tokens[0] == first.tokens[1]).all()
    assert (first.tokens[0] != first.tokens[2]).any()
    assert (first.tokens[2] != first.tokens[3]).any()
    assert (run(tiny, prompt, sampler, list("aabc"), seed=1).tokens != first.tokens).any()


def test_random_remasking_ignores_the_confidence(tiny, tiny_prompts):
    """The order in which positions are written is uniform: over many names each position comes first equally often."""
    names = [str(i) for i in range(400)]
    sampler = options(remasking="random", gen_length=4, steps=4, batch_size=400)
    order = run(tiny, [tiny_prompts[0]] * len(names), sampler, names).written_at
    firsts = np.array([(row == row[row >= 0].min()).argmax() for row in order])
    counts = np.bincount(firsts, minlength=4)
    assert ((counts - 100) ** 2 / 100).sum() < 16.3  # chi-square, 3 degrees of freedom, p = 0.001


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_tokens_are_drawn_from_the_tempered_softmax(temperature):
    logits = np.array([1000.0, 1001.0, 999.0, 1000.5, -np.inf], np.float32)  # far outside the range of exp in float32
    draws = 4000
    keys = jax.random.split(jax.random.key(3), (1, draws))
    scores = jnp.broadcast_to(logits, (1, draws, 5))
    guess = decode._predict([scores], keys, 0, options(temperature=temperature), None)
    expected = np.asarray(jax.nn.softmax(logits / temperature)) * draws
    counts = np.bincount(np.asarray(guess.token)[0], minlength=5)
    assert counts[4] == 0
    assert ((counts - expected)[:4] ** 2 / expected[:4]).sum() < 16.3  # chi-square, 3 degrees of freedom, p = 0.001
    # The confidence stays that of the untempered softmax.
    np.testing.assert_allclose(guess.log_confidence, jax.nn.log_softmax(logits)[guess.token], rtol=1e-5)


def test_confidences_near_one_stay_apart():
    """Where float32 probabilities, and differences of logits and their logsumexp, would all be 1."""
    others = np.array([-20.0, -19.0, -25.0, -np.inf], np.float32)
    scores = jnp.array([[0.0, other, -30.0] for other in others])[None]
    first = jnp.zeros((1, len(others)), jnp.int32)
    expected = -np.log1p(np.exp(others.astype(np.float64)) + np.exp(-30.0))
    np.testing.assert_allclose(decode._log_probability(scores, first)[0], expected, rtol=1e-5)
    assert decode._log_probability(scores, first + 1)[0, 3] == -np.inf


# Cost.


def test_one_program_per_bucket(tiny, tiny_prompts):
    sampler = options(gen_length=4, steps=2)
    before = decode._denoise._cache_size()
    run(tiny, tiny_prompts, sampler)
    assert decode._denoise._cache_size() == before + 1
    run(tiny, [np.arange(size, dtype=np.int32) % 9 for size in range(1, 9)], sampler, seed=5)
    assert decode._denoise._cache_size() == before + 1
    run(tiny, [np.zeros(decode.BUCKET, np.int32)] * 4, sampler)
    assert decode._denoise._cache_size() == before + 2


def test_logits_exist_for_one_block_at_a_time(tiny):
    model, params = tiny
    sampler = options(gen_length=64, steps=64, block_length=8)
    arguments = jnp.zeros((3, 64), jnp.int32), jnp.full(3, 9), jnp.zeros((3, 2), jnp.uint32)
    traced = decode._denoise.trace(model, params, *arguments, options=sampler, eot_id=None, mesh=None)
    text = str(traced.jaxpr)
    vocabulary = TINY.embedding_size
    assert f"f32[3,8,{vocabulary}]" in text
    assert f"f32[3,64,{vocabulary}]" not in text
    assert f"f32[3,128,{vocabulary}]" not in text


# Input.


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"cache": "prefix"}, "cache"), ({"threshold": 0.9, "remasking": "random"}, "threshold")],
)
def test_refuses_options_that_it_cannot_follow(tiny, tiny_prompts, changes, word):
    with pytest.raises(UserError, match=f"config.sampler.{word}"):
        run(tiny, tiny_prompts, options(**changes))


def test_refuses_blocks_that_do_not_fit(tiny, tiny_prompts):
    with pytest.raises(ValueError, match="block_length"):
        run(tiny, tiny_prompts, options(block_length=3))
    with pytest.raises(ValueError, match="steps"):
        run(tiny, tiny_prompts, options(steps=3))


def test_refuses_late_end_of_turn_without_its_id(tiny, tiny_prompts):
    model, params = tiny
    with pytest.raises(ValueError, match="eot_id"):
        decode.generate(model, params, tiny_prompts[:1], options(confidence_eos_eot_inf=True), seed=0, prompt_ids=["a"])


def test_text_ends_before_the_first_stop_token(tokenizer):
    words = tokenizer(" the end")["input_ids"]
    eos, eot = tokenizer.eos_token_id, find_eot_id(tokenizer, "policy")
    for stop in (eos, eot):
        response = np.array([*words, stop, *words, eos], np.int32)
        assert decode.to_text(response, tokenizer, [eos, eot]) == " the end"
    assert decode.to_text(np.array(words, np.int32), tokenizer, [eos, eot]) == " the end"
    assert decode.to_text(np.array([eot], np.int32), tokenizer, [eos, eot]) == ""
