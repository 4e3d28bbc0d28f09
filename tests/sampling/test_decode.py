"""sampling/ against the golden responses, and against the published algorithm written out as plain loops."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elbo_kto_jax.checkpoints.load import load_config
from elbo_kto_jax.checkpoints.tokenizer import build_tokenizer
from elbo_kto_jax.data.special import find_eot_id
from elbo_kto_jax.models import axes
from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.models.network import MaskPredictor, init_params
from elbo_kto_jax.runtime import config as configs
from elbo_kto_jax.runtime.config import Sampler
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.sampling import choice, schedule
from elbo_kto_jax.sampling.denoise import refresh, take_steps
from elbo_kto_jax.sampling.generate import generate
from elbo_kto_jax.sampling.rows import DecodeRows, DecodeState
from elbo_kto_jax.sampling.stops import cut_response, to_text
from elbo_kto_jax.sharding import rules
from tests.share import cases

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
    batch_size=4,
)
TINY = ModelConfig(
    architecture="llada",
    d_model=16,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=4,
    mlp_hidden_size=24,
    embedding_size=20,
    vocab_size=18,
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
    max_sequence_length=128,
    tied_head=False,
    predicts_next=False,
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
    model = MaskPredictor(TINY)
    params = jax.tree.map(lambda leaf: leaf * 6, init_params(model, jax.random.key(8)))
    special = jnp.array([TINY.mask_token_id, TINY.eos_token_id, TINY_EOT])
    boost = jnp.ones(TINY.embedding_size).at[special].set(1.5)
    params["head"]["kernel"] = params["head"]["kernel"] * boost
    return model, params


@pytest.fixture(scope="module")
def tiny_prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 15, size).astype(np.int32) for size in (3, 11, 1, 7, 5)]  # of one bucket


def run(tiny, prompts, sampler, names=None, seed=0, **more):
    model, params = tiny
    names = [f"prompt {i}" for i in range(len(prompts))] if names is None else names
    return generate(model, params, prompts, sampler, seed=seed, prompt_ids=names, eot_id=TINY_EOT, **more)


# Golden responses.


@pytest.mark.parametrize("alone", cases([False], [True]), ids=cases(["among others"], ["alone"]))
def test_golden_responses(golden, tokenizer, monkeypatch, alone):
    described = golden.described["sampling"]
    count = sum(f"sampling.{i}.prompt" in golden.arrays for i in range(100))
    prompts = [golden.arrays[f"sampling.{i}.prompt"] for i in range(count)]
    strangers = [] if alone else [prompt[:: 2 + len(prompt) % 2] for prompt in prompts]
    assert described["configs"]
    for name, config in described["configs"].items():
        names = {"gen": "gen_length", "block": "block_length"}  # as some golden folders call them
        config = {names.get(key, key): value for key, value in config.items()}
        sampler = options(**config, batch_size=1 if alone else 2 * count)
        # Rows wide enough for all prompts, so that they share a batch (and a configuration one program).
        monkeypatch.setattr(schedule, "BUCKET", max(len(prompt) for prompt in prompts) + sampler.gen_length)
        responses = generate(
            MaskPredictor(golden.config),
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


class Kept:
    """Logits with kept keys and values, in numpy and float64: those of the columns that are run replace the kept ones,
    whatever else has changed since (Fast-dLLM, arXiv 2505.22618)."""

    def __init__(self, tiny):
        self.config = tiny[0].config
        self.params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tiny[1])
        self.key_values = {}

    def logits(self, tokens, columns):
        """float64[s, v] of a row of tokens, computed at `columns` only: nothing else of it counts."""
        cfg, p = self.config, self.params
        out, x = np.full((len(tokens), cfg.embedding_size), -np.inf), p["wte"]["embedding"][tokens[columns]]
        for n in range(cfg.n_layers):
            layer = jax.tree.map(lambda leaf: leaf[n], p["blocks"])  # noqa: B023
            h = self.norm(x, layer["attn_norm"]["scale"])
            q, k, v = ((h @ layer[f"{name}_proj"]["kernel"]).reshape(len(columns), -1, cfg.head_dim) for name in "qkv")
            keys, values = self.key_values.setdefault(n, np.zeros((2, len(tokens), *k.shape[1:])))
            keys[columns], values[columns] = self.rotate(k, columns), v
            shared = np.arange(cfg.n_heads) // (cfg.n_heads // cfg.n_kv_heads)
            scores = np.einsum("qhe,the->hqt", self.rotate(q, columns), keys[:, shared])
            weights = np.exp(scores / np.sqrt(cfg.head_dim))
            mixed = np.einsum("hqt,the->qhe", weights / weights.sum(axis=-1, keepdims=True), values[:, shared])
            x = x + mixed.reshape(len(columns), -1) @ layer["attn_out"]["kernel"]
            h = self.norm(x, layer["ff_norm"]["scale"])
            gate = h @ layer["ff_proj"]["kernel"]
            x = x + (gate / (1 + np.exp(-gate)) * (h @ layer["up_proj"]["kernel"])) @ layer["ff_out"]["kernel"]
        out[columns] = self.norm(x, p["ln_f"]["scale"]) @ p["head"]["kernel"]
        return out

    def norm(self, x, scale):
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + self.config.rms_norm_eps) * scale

    def rotate(self, x, columns):
        half = self.config.head_dim // 2
        angle = np.outer(columns, self.config.rope_theta ** (-np.arange(half) / half))[:, None]
        first, second = x[..., :half], x[..., half:]
        return np.concatenate(
            [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], axis=-1
        )


def published(tiny, prompt, sampler, template=None):
    """(response, written_at, steps taken, whether a mask token was ever written) at temperature 0."""
    mask_id, eos = TINY.mask_token_id, TINY.eos_token_id
    start, length = len(prompt), sampler.block_length
    template = np.full(sampler.gen_length, mask_id, np.int32) if template is None else template
    x = np.concatenate([prompt, template])
    written_at = np.full(len(x), -1)
    steps_per_block = sampler.steps // (sampler.gen_length // length)
    taken, wrote_mask = 0, False
    for block in range(-(-len(template) // length)):
        first, end = start + block * length, start + (block + 1) * length
        steps = length if sampler.threshold else steps_per_block
        to_write = int((x[first:end] == mask_id).sum())
        conditional, unconditional = Kept(tiny), Kept(tiny)
        for step in range(steps):
            masked = x == mask_id
            masked[end:] = False
            columns = np.arange(len(x))
            if sampler.cache != "none" and step > 0:
                masked[:first] = False
                columns = np.arange(first, min(end, len(x)) if sampler.cache == "dual" else len(x))
            quota = int(step < to_write) if sampler.threshold else to_write // steps + (step < to_write % steps)
            if not masked.any() or not quota:
                continue
            without = np.where(np.arange(len(x)) < start, mask_id, x)
            if sampler.cache == "none":
                scores, others = logits_everywhere(tiny, x), logits_everywhere(tiny, without)
            else:
                scores, others = conditional.logits(x, columns), unconditional.logits(without, columns)
            if sampler.cfg_scale:
                scores[columns] = others[columns] + (sampler.cfg_scale + 1) * (scores - others)[columns]
            if sampler.logits_eos_inf:
                scores[:, eos] = -np.inf
            token = scores.argmax(axis=1)
            if sampler.confidence_eos_eot_inf:
                scores[:, [eos, TINY_EOT]] = -np.inf
            with np.errstate(invalid="ignore"):
                weights = np.exp(scores - scores.max(axis=1, keepdims=True))
                confidence = weights[np.arange(len(x)), token] / weights.sum(axis=1)
            ranked = np.argsort(np.where(masked, -confidence, np.inf), kind="stable")
            chosen = set(ranked[:quota]) & set(np.flatnonzero(masked))
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
    "prefix": {"cache": "prefix", "gen_length": 12, "steps": 12},
    "dual": {"cache": "dual", "gen_length": 12, "steps": 6},
    "dual, guided": {"cache": "dual", "cfg_scale": 1.3, "confidence_eos_eot_inf": True},
    "prefix, threshold": {"cache": "prefix", "threshold": 0.5},
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


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_reuse_is_exact_where_nothing_is_out_of_date(tiny, tiny_prompts, cache):
    """With one step per block everything is computed afresh, and so the same is written as without reuse."""
    sampler = options(steps=2, temperature=0.7, cfg_scale=0.5)
    plain, reused = run(tiny, tiny_prompts, sampler), run(tiny, tiny_prompts, dataclasses.replace(sampler, cache=cache))
    np.testing.assert_array_equal(reused.tokens, plain.tokens)
    np.testing.assert_array_equal(reused.confidence, plain.confidence)
    assert (reused.forward_passes, reused.forward_tokens) == (plain.forward_passes, plain.forward_tokens)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_reuse_changes_some_responses_of_the_cases(tiny, tiny_prompts, cache):
    """Otherwise the cases above would not show whether anything is reused."""
    sampler = options(cache=cache, gen_length=12, steps=12)
    others = [options(cache=other, gen_length=12, steps=12) for other in ("none", "prefix", "dual") if other != cache]
    for other in others:
        pairs = [(published(tiny, p, sampler)[0], published(tiny, p, other)[0]) for p in tiny_prompts]
        assert any((a != b).any() for a, b in pairs)


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_masked_spans_are_filled_and_nothing_else(tiny, tiny_prompts, cache):
    rng, sampler = np.random.default_rng(1), options(gen_length=12, steps=6, cache=cache)
    templates = [rng.integers(0, 15, size).astype(np.int32) for size in (12, 7, 5, 12, 3)]
    for template, masked in zip(templates, ([0, 1, 9], [2, 3, 4, 6], [4], range(12), []), strict=True):
        template[list(masked)] = TINY.mask_token_id
    responses = run(tiny, tiny_prompts, sampler, templates=templates)
    for i, (prompt, template) in enumerate(zip(tiny_prompts, templates, strict=True)):
        expected, written_at, _, _ = published(tiny, prompt, sampler, template)
        np.testing.assert_array_equal(responses.tokens[i, : len(template)], expected, err_msg=f"prompt {i}")
        np.testing.assert_array_equal(responses.written_at[i, : len(template)], written_at, err_msg=f"prompt {i}")
        assert (responses.tokens[i, len(template) :] == TINY.eos_token_id).all()


STOP = {"gen_length": 16, "steps": 16, "early_stop": True, "temperature": 1.0, "batch_size": 2}


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_early_stop_leaves_the_answer_as_it_is(tiny, tiny_prompts, cache):
    sampler = options(**STOP, cache=cache)
    prompts = tiny_prompts * 3
    whole = run(tiny, prompts, dataclasses.replace(sampler, early_stop=False))
    stopped = run(tiny, prompts, sampler)
    stops, early = [TINY.eos_token_id, TINY_EOT], 0
    for a, b, written_at in zip(whole.tokens, stopped.tokens, stopped.written_at, strict=True):
        np.testing.assert_array_equal(cut_response(b, stops), cut_response(a, stops))
        skipped = (written_at < 0) & (TINY.mask_token_id not in b)  # a mask token is left where nothing was stopped
        assert (b[skipped] == TINY.eos_token_id).all()
        assert (a[~skipped] == b[~skipped]).all()
        early += skipped.any()
    assert 0 < early < len(prompts)
    assert stopped.forward_tokens < whole.forward_tokens


def test_finished_rows_make_room(tiny, tiny_prompts):
    """The cost of a batch of two follows the sum of the blocks that prompts need, not twice the longest."""
    sampler = options(gen_length=16, steps=16, batch_size=2)
    mask, known = np.full(16, TINY.mask_token_id, np.int32), np.zeros(12, np.int32)
    short = np.concatenate([mask[:4], known])
    responses = run(tiny, [tiny_prompts[0]] * 4, sampler, list("abcd"), templates=[mask, short, short, short])
    assert responses.forward_passes == sampler.steps  # 4 blocks beside 3 times one
    np.testing.assert_array_equal(responses.tokens[1], responses.tokens[3])


def test_forward_passes_count_the_steps_that_batches_need(tiny, tiny_prompts):
    sampler = options(**CASES["threshold"])
    steps = [published(tiny, prompt, sampler)[2] for prompt in tiny_prompts]
    assert len(set(steps)) > 1
    # With one block a batch runs as long as its slowest prompt; what fills up the last batch adds nothing.
    rows = sampler.batch_size
    expected = sum(max(steps[at : at + rows]) for at in range(0, len(steps), rows))
    responses = run(tiny, tiny_prompts, sampler)
    assert responses.forward_passes == expected
    assert responses.forward_tokens == expected * rows * schedule.BUCKET
    batches = -(-len(tiny_prompts) // rows)
    assert run(tiny, tiny_prompts, DEFAULT).forward_passes == batches * DEFAULT.steps
    guided = options(**CASES["guided"])
    assert run(tiny, tiny_prompts, guided).forward_passes == 2 * batches * guided.steps


def test_forward_tokens_of_reuse_are_those_of_the_windows(tiny, tiny_prompts):
    """12 tokens in 3 blocks of 4 steps: the first of each block runs the row, three run the window."""
    sampler = options(gen_length=12, steps=12, logits_eos_inf=True)
    windows = {"none": 3 * [schedule.BUCKET], "prefix": [12, 8, 4], "dual": [4, 4, 4]}
    for cache, widths in windows.items():
        responses = run(tiny, tiny_prompts[:4], dataclasses.replace(sampler, cache=cache))
        assert responses.forward_passes == 12
        assert responses.forward_tokens == 4 * (3 * schedule.BUCKET + 3 * sum(widths)), cache


def test_a_watcher_sees_every_step(tiny, tiny_prompts):
    sampler = options(cache="dual")
    seen = {i: [] for i in range(2)}
    responses = run(tiny, tiny_prompts[:2], sampler, watch=lambda i, tokens: seen[i].append(tokens.copy()))
    for i, frames in seen.items():
        assert len(frames) == sampler.steps
        np.testing.assert_array_equal(frames[-1], responses.tokens[i])
        for step, frame in enumerate(frames):
            written = (responses.written_at[i] >= 0) & (responses.written_at[i] <= step)
            np.testing.assert_array_equal(frame[written], responses.tokens[i][written])


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


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_a_prompt_gets_the_same_whatever_runs_beside_it(tiny, tiny_prompts, monkeypatch, cache):
    sampler = options(temperature=0.7, remasking="random", cfg_scale=0.5, cache=cache, gen_length=12, steps=6)
    names = [f"prompt {i}" for i in range(len(tiny_prompts))]
    together = run(tiny, tiny_prompts, sampler, names)
    alone = run(tiny, tiny_prompts[2:3], sampler, names[2:3])
    order = [4, 2, 0, 3, 1]
    monkeypatch.setattr(schedule, "BUCKET", 40)  # other padding as well
    shuffled = run(
        tiny,
        [tiny_prompts[i] for i in order],
        dataclasses.replace(sampler, batch_size=2),
        [names[i] for i in order],
    )
    for traced in ("tokens", "written_at"):
        np.testing.assert_array_equal(getattr(alone, traced)[0], getattr(together, traced)[2])
        np.testing.assert_array_equal(getattr(shuffled, traced), getattr(together, traced)[order])


@pytest.mark.parametrize(("sizes", "cache"), [((8, 1, 1), "none"), ((2, 2, 2), "none"), ((2, 2, 2), "dual")])
def test_a_prompt_gets_the_same_on_any_number_of_devices(tiny, tiny_prompts, cpu_devices, sizes, cache):
    model, params = tiny
    mesh = rules.make_mesh(configs.Mesh(*sizes), cpu_devices)
    sharded = jax.device_put(params, axes.param_shardings(params, mesh, model.config))
    sampler = options(temperature=1.0, remasking="random", cache=cache)
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
    guess = choice._predict([scores], keys, 0, options(temperature=temperature), None)
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
    np.testing.assert_allclose(choice._log_probability(scores, first)[0], expected, rtol=1e-5)
    assert choice._log_probability(scores, first + 1)[0, 3] == -np.inf


# Cost.


def test_one_set_of_programs_per_bucket(tiny, tiny_prompts):
    def programs() -> tuple[int, int]:
        return refresh._cache_size(), take_steps._cache_size()

    sampler = options(gen_length=4, block_length=2, cache="dual")
    first, later = programs()
    run(tiny, tiny_prompts, sampler)
    assert programs() == (first + 1, later + 1)
    run(tiny, [np.arange(size, dtype=np.int32) % 9 for size in range(1, 9)], sampler, seed=5)
    assert programs() == (first + 1, later + 1)
    run(tiny, [np.zeros(schedule.BUCKET, np.int32)] * 4, sampler)
    assert programs() == (first + 2, later + 2)
    run(tiny, tiny_prompts, dataclasses.replace(sampler, cache="none"))
    assert programs() == (first + 2, later + 3)
    # A prefix window has a power of two of blocks: 8, 4, 2 and 1 of them.
    run(tiny, tiny_prompts, dataclasses.replace(sampler, cache="prefix", gen_length=16, steps=16))
    assert programs() == (first + 3, later + 7)


def test_long_rows_have_four_widths_per_octave():
    for tokens, width in {1: 64, 64: 64, 65: 128, 449: 512, 512: 512, 513: 640, 1024: 1024, 1025: 1280}.items():
        assert schedule._width(tokens) == width
    assert len({schedule._width(tokens) for tokens in range(1, 4097)}) == 20


def test_logits_exist_for_one_block_at_a_time(tiny):
    model, params = tiny
    sampler = options(gen_length=64, steps=64, block_length=8)
    ints = lambda *shape: jnp.zeros(shape, jnp.int32)  # noqa: E731
    rows = DecodeRows(ints(3, 64), ints(3), jnp.zeros((3, 2), jnp.uint32), ints(3), ints(3), ints(3))
    state = DecodeState(ints(3, 64), ints(3, 64), jnp.zeros((3, 64)), ints(3), ints())
    static = {"options": sampler, "eot_id": None, "mesh": None}
    traced = take_steps.trace(model, params, rows, state, None, ints(), **static, window=None)
    text = str(traced.jaxpr)
    vocabulary = TINY.embedding_size
    assert f"f32[3,8,{vocabulary}]" in text
    assert f"f32[3,64,{vocabulary}]" not in text
    assert f"f32[3,128,{vocabulary}]" not in text


# Input.


def test_refuses_options_that_exclude_each_other(tiny, tiny_prompts):
    with pytest.raises(UserError, match=r"config\.sampler\.threshold"):
        run(tiny, tiny_prompts, options(threshold=0.9, remasking="random"))


def test_refuses_templates_that_do_not_fit(tiny, tiny_prompts):
    for templates in ([np.zeros(9, np.int32)] * len(tiny_prompts), [np.zeros(8, np.int32)]):
        with pytest.raises(ValueError, match="templates: expected one per prompt, 5, of at most 8 tokens"):
            run(tiny, tiny_prompts, DEFAULT, templates=templates)


def test_refuses_blocks_that_do_not_fit(tiny, tiny_prompts):
    with pytest.raises(ValueError, match="block_length"):
        run(tiny, tiny_prompts, options(block_length=3))
    with pytest.raises(ValueError, match="steps"):
        run(tiny, tiny_prompts, options(steps=3))


def test_refuses_late_end_of_turn_without_its_id(tiny, tiny_prompts):
    model, params = tiny
    with pytest.raises(ValueError, match="eot_id"):
        generate(model, params, tiny_prompts[:1], options(confidence_eos_eot_inf=True), seed=0, prompt_ids=["a"])


def test_text_ends_before_the_first_stop_token(tokenizer):
    words = tokenizer(" the end")["input_ids"]
    eos, eot = tokenizer.eos_token_id, find_eot_id(tokenizer, "policy")
    for stop in (eos, eot):
        response = np.array([*words, stop, *words, eos], np.int32)
        assert to_text(response, tokenizer, [eos, eot]) == " the end"
    assert to_text(np.array(words, np.int32), tokenizer, [eos, eot]) == " the end"
    assert to_text(np.array([eot], np.int32), tokenizer, [eos, eot]) == ""
