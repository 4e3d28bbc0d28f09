"""planning/plan.py: the arithmetic of the bounds, worked out by hand, and the order of a search."""

import dataclasses
import itertools
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.experimental import topologies

from elbo_kto_jax.data.packing import Segment, pack
from elbo_kto_jax.models import memory, registry
from elbo_kto_jax.models.flops import forward_flops
from elbo_kto_jax.models.network import MaskPredictor
from elbo_kto_jax.planning import estimate, hlo, plan, search, workload
from elbo_kto_jax.planning.chips import parse_topology
from elbo_kto_jax.planning.programs import Compiled, DoesNotFit, topology_devices, with_some_tokens
from elbo_kto_jax.reports.plan import as_text, write_plan_report
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.flags import load_config_file
from elbo_kto_jax.scoring.layout import layout_of
from elbo_kto_jax.sharding import rules
from elbo_kto_jax.training import state as train_state
from tests import runs

LLADA_8B = registry.architectures()["llada"].sizes["8b"]
TOPOLOGY = parse_topology("v5e:8x8")
KTO_MIX = runs.CONFIG.with_name("kto_mix.py")


@pytest.fixture
def config() -> Config:
    return Config.from_mapping(load_config_file(str(KTO_MIX)).to_dict())


def program(name, flops=0.0, collectives=(), hbm=0.0, size=2**30, length=4096) -> Compiled:
    cost = hlo.Cost(flops, tuple(collectives))
    return Compiled(name, size, 10, 10, 5, 0, 0, 7, hbm, cost, 2.0, 0 if name == "update" else length)


@pytest.mark.parametrize(
    ("architecture", "size", "weights"),
    [("llada", "8b", 8.02e9), ("illada", "8b", 7.62e9), ("dream", "7b", 7.62e9), ("a2d_qwen3", "0.6b", 0.596e9)],
)
def test_a_published_model_has_as_many_weights_as_its_authors_say(architecture, size, weights):
    assert memory.parameters(registry.architectures()[architecture].sizes[size]) == pytest.approx(weights, rel=1e-3)


@pytest.mark.parametrize("architecture", registry.architectures())
def test_a_published_model_is_laid_out_though_nobody_says_its_tokens(config, architecture):
    """A2D-Qwen3's mask token stands in its tokenizer alone, which a plan by its name does not have."""
    published = next(iter(registry.architectures()[architecture].sizes.values()))
    layout = layout_of(config, with_some_tokens(published), rules.make_mesh(config.mesh, jax.devices()[:1]))
    (rows,) = pack([Segment(np.zeros(1, np.int32), 0, np.ones(1, bool), 1.0, 0)], layout)
    assert rows.num_targets.sum() == 1


def test_model_flops_are_those_of_the_design():
    """128 rows of 4096 tokens on 64 chips, scored and learnt from: 545 TFLOP per chip."""
    assert 4 * 2 * estimate.row_flops(LLADA_8B, 4096) == pytest.approx(545e12, rel=1e-3)


def test_workload_counts_rows_and_steps(config):
    work = workload.workload(config, shards=8, examples=100, mean_tokens=500)
    assert work.steps == 4  # ceil(100 / 32), one epoch
    assert work.tokens == pytest.approx(32 * 8 * 500, rel=1e-3)
    assert work.rows == 32  # ceil(128000 / 4096)
    assert (work.rows_at_once, work.micro_batches) == (8, 4)
    assert work.row_fill == work.tokens / (32 * 4096)


@pytest.mark.parametrize(("examples", "mean"), [(1, 500), (5, 500), (32, 700), (32, 1960), (7, 4096), (3, 9000)])
def test_the_lengths_of_a_typical_batch(examples, mean):
    """Of the mean that was asked for, as uneven as those of kto-mix, and none above the longest row."""
    lengths = workload.spread_lengths(examples, mean, 4096)
    assert lengths.mean() == pytest.approx(min(mean, 4096), rel=1e-3)
    assert lengths.max() <= 4096
    if (examples, mean) == (32, 700):
        assert lengths.std() / 700 == pytest.approx(0.85, abs=0.05)


def test_a_plan_takes_rows_as_short_as_training_would(config):
    """44 rows of 4,096 tokens hold a batch; on 64 chips each takes a row of 3,072."""
    found = [workload.workload(config, shards, examples=14000, mean_tokens=700) for shards in (64, 4)]
    assert [(work.rows_at_once, work.rows, work.micro_batches) for work in found] == [(64, 64, 1), (4, 44, 11)]
    assert found[0].row_lengths == (3072,)
    assert found[0].row_fill == pytest.approx(700 / 768, rel=1e-3)
    assert set(found[1].row_lengths) == {4096}


@pytest.mark.parametrize(
    ("residuals", "one_pass", "waiting"),
    [("auto", False, 0), ("recompute", False, 0), ("device", True, 4), ("host", True, 0)],
)
def test_residuals_wait_where_the_config_says(config, residuals, one_pass, waiting):
    work = workload.workload(keeping(config, residuals), shards=8, examples=100, mean_tokens=500)
    assert (work.one_pass, work.waiting) == (one_pass, waiting)


def keeping(config: Config, residuals: str) -> Config:
    """The config that keeps them there."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, residuals=residuals))


def test_padded_rows_hold_one_segment_each(config):
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, packing=False))
    assert workload.workload(config, shards=8, examples=100, mean_tokens=500).rows == 32 * 8


def test_the_blocks_that_attention_visits():
    """Of 8 x 8 blocks of 512 tokens: all; those of one segment each; and those that their borders cut, two more."""
    assert workload.visited_fraction([4096], 4096) == workload.visited_fraction([], 4096) == 1
    assert workload.visited_fraction([512] * 8, 4096) == 8 / 64
    assert workload.visited_fraction([500] * 8, 4096) == (8 + 2 * 7) / 64
    assert workload.visited_fraction([512, 1024], 2048) == (1 + 4 + 1) / 16
    assert workload.visited_fraction([1000], 1000) == 1  # 1,024 positions


def test_the_blocks_of_a_step_are_those_of_its_micro_batches(config):
    work = workload.workload(config, shards=4, examples=14000, mean_tokens=700)
    of_two = dataclasses.replace(work, row_lengths=(4096, 1024), visited=((4096, 0.25), (1024, 0.5)))
    assert of_two.visited_blocks == (64 * 0.25 + 4 * 0.5) / 68
    assert dataclasses.replace(of_two, visited=()).visited_blocks == 1  # padded rows
    # 1,490 records of kto-mix with their lengths scaled to that mean: 48% (batches of 32, 8 draws).
    assert work.visited_blocks == pytest.approx(0.48, abs=0.06)


@pytest.mark.parametrize(
    ("flops", "hbm", "overlapped", "exposed", "expected"),
    [
        (197e12, 0, 0, 0, 1.0),
        (197e12, 2 * 819e9, 0, 0, 2.0),
        (197e12, 0, 3 * 100e9, 0, 3.0),
        (197e12, 0, 0.5 * 100e9, 0.25 * 100e9, 1.25),
    ],
)
def test_what_overlaps_is_hidden_and_what_does_not_adds_up(flops, hbm, overlapped, exposed, expected):
    collectives = [
        hlo.Collective("all-gather", overlapped / 2, 64, True, 2),
        hlo.Collective("all-reduce", exposed, 64, False, 1),
    ]
    found = plan.program_seconds(program("grad", flops, collectives, hbm), TOPOLOGY, hlo.Cost(0.0, ()))
    assert found.total == pytest.approx(expected)


def test_a_program_that_was_not_printed_is_estimated():
    unknown = dataclasses.replace(program("grad"), cost=None)
    assert plan.program_seconds(unknown, TOPOLOGY, hlo.Cost(197e12, ())).total == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("mode", "one_pass", "passes"),
    [("precomputed", True, 3), ("precomputed", False, 4), ("online", True, 4), ("online", False, 5)],
)
def test_model_passes(config, mode, one_pass, passes):
    config = dataclasses.replace(config, reference=dataclasses.replace(config.reference, mode=mode))
    assert plan.model_passes(config, one_pass) == passes
    sft = dataclasses.replace(config, objective=dataclasses.replace(config.objective, name="sft"))
    assert plan.model_passes(sft, one_pass) == 3
    adapted = dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=8))
    assert plan.model_passes(adapted, one_pass) == passes - 1  # no gradient of the base


def test_adapters_are_counted(config):
    options = dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=8))
    abstract = train_state.abstract_trained(MaskPredictor(LLADA_8B), options.lora)
    assert memory.adapters(LLADA_8B, 8) == sum(x.size for x in jax.tree.leaves(abstract))
    mesh = {"data": 1, "fsdp": 1, "tensor": 1}
    by_dtype = {
        name: memory.step_bytes(
            dataclasses.replace(options, lora=dataclasses.replace(options.lora, base_quantization=name)),
            LLADA_8B,
            mesh,
            waiting=0,
        )
        for name in ("none", "int8")
    }
    assert by_dtype["none"] - by_dtype["int8"] == memory.parameters(LLADA_8B)
    assert by_dtype["none"] < memory.step_bytes(config, LLADA_8B, mesh, waiting=0) / 3


def test_an_online_reference_is_counted(config):
    mesh = {"data": 1, "fsdp": 4, "tensor": 1}
    online = dataclasses.replace(config, reference=dataclasses.replace(config.reference, mode="online"))
    sft = dataclasses.replace(online, objective=dataclasses.replace(config.objective, name="sft"))
    of = {name: memory.step_bytes(c, LLADA_8B, mesh, 0) for name, c in (("no", config), ("yes", online), ("sft", sft))}
    assert of["yes"] - of["no"] == pytest.approx(4 * memory.parameters(LLADA_8B) / 4)  # float32, over four devices
    assert of["sft"] == of["no"]


def test_one_pass_keeps_what_every_micro_batch_hands_out(config):
    """By estimate: full rematerialisation keeps a layer's input; an accumulator is needed from two micro-batches on."""
    mesh = {"data": 1, "fsdp": 64, "tensor": 1}
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="full"))
    single, several, two_passes = (memory.step_bytes(config, LLADA_8B, mesh, waiting) for waiting in (1, 3, 0))
    accumulator = 4 * memory.parameters(LLADA_8B) / 64
    assert two_passes - single == pytest.approx(accumulator)
    kept = 4096 * LLADA_8B.d_model * LLADA_8B.n_layers * 2  # bfloat16
    assert several - single == pytest.approx(accumulator + 2 * kept)


def two_pass_result(config, sizes=(1, 1, 1)):
    config = keeping(config, "recompute")
    work = workload.workload(config, shards=64, examples=6400, mean_tokens=1960)  # 124 rows: two micro-batches of 64
    assert work.row_lengths == (4096, 4096)
    flops = estimate.row_flops(LLADA_8B, 4096)
    compiled = [
        program("score", flops, size=sizes[0]),
        program("grad", 4 * flops, size=sizes[1]),
        program("update", size=sizes[2]),
    ]
    return plan.result(config, LLADA_8B, TOPOLOGY, work, compiled, 6400, 1960)


def test_the_bound_of_a_step(config):
    found = two_pass_result(config)
    seconds = estimate.row_flops(LLADA_8B, 4096) / 197e12
    assert found["step"]["seconds"] == pytest.approx(2 * 5 * seconds)
    assert found["mfu_bound"] == pytest.approx(4 / 5)
    assert found["tokens_per_second_bound"] == pytest.approx(32 * 8 * 1960 / (10 * seconds), rel=1e-3)
    # Of 128 rows; the sequences are shorter, so their attention is less of their work.
    assert found["text_mfu_bound"] / found["mfu_bound"] == pytest.approx(32 * 8 * 1960 / (128 * 4096), abs=0.07)
    text = estimate.text_flops(LLADA_8B, workload.workload(config, 64, 6400, 1960).lengths)
    assert found["text_mfu_bound"] == pytest.approx(4 * text / 64 / 197e12 / (10 * seconds))
    # 200 steps, and the reference pass scores every row of them once
    assert found["chip_hours_bound"] == pytest.approx(200 * 64 * (10 + 2) * seconds / 3600)
    assert found["compile_seconds"] == 6.0


def test_the_bound_of_a_step_in_one_pass(config):
    config = keeping(config, "device")
    work = workload.workload(config, shards=64, examples=6400, mean_tokens=1960)
    flops = estimate.row_flops(LLADA_8B, 4096)
    compiled = [program("forward", flops), program("backward", 3 * flops), program("update")]
    found = plan.result(config, LLADA_8B, TOPOLOGY, work, compiled, 6400, 1960)
    assert (found["step"]["one_pass"], found["step"]["micro_batches"]) == (True, 2)
    assert found["step"]["seconds"] == pytest.approx(2 * 4 * flops / 197e12)
    assert found["mfu_bound"] == pytest.approx(3 / 4)


def test_each_micro_batch_takes_the_time_of_its_rows(config):
    """Two micro-batches of a step, the last of shorter rows; the longest rows that a run may meet cost memory alone."""
    work = dataclasses.replace(workload.workload(config, 64, 6400, 1960), row_lengths=(3072, 1024))
    compiled = [
        program(name, factor * estimate.row_flops(LLADA_8B, length), size=size, length=length)
        for length, size in ((4096, 3 * 2**30), (3072, 2**30), (1024, 2**30))
        for name, factor in (("score", 1), ("grad", 4))
    ]
    found = plan.result(config, LLADA_8B, TOPOLOGY, work, [*compiled, program("update")], 6400, 1960)
    of_rows = sum(estimate.row_flops(LLADA_8B, length) for length in (3072, 1024))
    assert found["step"]["seconds"] == pytest.approx(5 * of_rows / 197e12)
    assert found["mfu_bound"] == pytest.approx(4 / 5)
    assert found["bytes_per_chip"] == 3 * 2**30 + 5 + 7
    assert list(found["programs"])[:4] == ["score", "grad", "score, rows of 3072", "grad, rows of 3072"]
    assert "64 rows of 3072, in the last of 1024 tokens" in as_text(found | {"tried": []})


def test_the_largest_program_decides_whether_it_fits(config):
    usable = int(TOPOLOGY.chip.usable_bytes)
    assert two_pass_result(config)["fits"]
    found = two_pass_result(config, sizes=(1, usable, 1))
    assert not found["fits"]
    assert found["tallest"] == "grad"
    assert found["bytes_per_chip"] == usable + 5 + 7  # temporaries, and what lies beside the program


@pytest.mark.parametrize(("name", "hosts"), [("v5e:1x1", {"chips_per_host_bounds": (1, 1, 1)}), ("v5e:2x2", {})])
def test_a_slice_of_one_chip_has_a_host_of_one_chip(monkeypatch, name, hosts):
    asked = {}

    def describe(**arguments):
        asked.update(arguments)
        return SimpleNamespace(devices=jax.devices())

    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    assert topology_devices(parse_topology(name)) == jax.devices()
    assert asked == {"platform": "tpu", "topology_name": name, **hosts}


def test_recomputation():
    """Full: all but the last product of each layer; a forward pass over a row has the head besides."""
    d, f, n, s = LLADA_8B.d_model, LLADA_8B.mlp_hidden_size, LLADA_8B.n_layers, 4096
    forward = forward_flops(LLADA_8B, np.array([s]), np.array([s / 2]))
    head = 2 * d * LLADA_8B.embedding_size * s / 2
    kept = 2 * n * s * d * f
    attention = 4 * n * s * s * d
    assert estimate.recomputed(LLADA_8B, "full", s) == pytest.approx((forward - head - kept) / forward)
    assert estimate.recomputed(LLADA_8B, "attention", s) == pytest.approx((forward - head - kept - attention) / forward)
    assert estimate.recomputed(LLADA_8B, "dots", s) == 0
    assert estimate.recomputed(LLADA_8B, "most", s) == pytest.approx(kept / forward)


def test_a_search_starts_with_float32_and_the_fastest(config):
    topology = parse_topology("v6e:2x4")
    found = list(search.candidates(config, LLADA_8B, topology, 14000, 700))
    stored = [(option.model.param_dtype, option.optimizer.moments_dtype) for option in found]
    order = [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]
    assert stored == sorted(stored, key=order.index)
    assert found[0].model.param_dtype == "float32"

    def seconds(option):
        mesh = workload.mesh_sizes(option, 8)
        work = workload.workload(option, mesh["data"] * mesh["fsdp"], 14000, 700)
        return estimate.estimated_step(option, LLADA_8B, topology, work, mesh)

    first = [seconds(option) for option in found if option.model.param_dtype == "float32"]
    assert first == sorted(first)


def test_a_search_takes_the_fastest_that_the_compiler_accepts(config, monkeypatch):
    """The first candidate is refused, the third is the fastest; refusals do not count."""
    asked = []

    def compile_programs(option, model, topology, devices, work, *, sampler):
        asked.append(option)
        if len(asked) == 1:
            raise DoesNotFit("grad: needs 20G of 15.75G HBM")
        seconds = {2: 2.0, 3: 1.0, 4: 3.0}[len(asked)]
        names = ("forward", "backward") if option.train.residuals != "recompute" else ("score", "grad")
        of_rows = [
            [program(names[0], length=n), program(names[1], 197e12 * seconds, length=n)]
            for n in {4096, *work.row_lengths}
        ]
        return [*itertools.chain(*of_rows), program("update")]

    monkeypatch.setattr(search, "topology_devices", lambda topology: [None] * topology.devices)
    monkeypatch.setattr(search, "compile_programs", compile_programs)
    topology = parse_topology("v6e:2x4")
    found, chosen, tried = search.search(config, LLADA_8B, topology, 14000, 700, most=3)
    rates = [attempt.get("tokens_per_second_bound", 0.0) for attempt in tried]
    assert [attempt["fits"] for attempt in tried] == [False, True, True, True]
    assert tried[0]["why"].startswith("grad")
    assert chosen == asked[rates.index(max(rates))]
    assert found["tokens_per_second_bound"] == max(rates)


def test_the_flags_of_a_candidate_lead_to_it(config):
    option = search.with_settings(config, (2, 4, 1), 8192, "dots", ("bfloat16", "bfloat16"))
    assert search.changes(config, config) == []
    assert search.changes(config, option) == [
        "--config.mesh.data=2",
        "--config.mesh.fsdp=4",
        "--config.train.microbatch_tokens=8192",
        "--config.model.remat=dots",
        "--config.model.param_dtype=bfloat16",
        "--config.optimizer.moments_dtype=bfloat16",
    ]


def test_what_would_fit_is_named(config):
    words = search.would_fit(config, LLADA_8B, parse_topology("v5e:2x2"), 14000, 700)
    assert "--topology=v5e:4x4" in words


def test_advice_needs_less_than_what_the_compiler_refused(config):
    """The estimate takes iLLaDA-8B for small enough as the recipe asks, and with three rows at once as well."""
    illada = next(iter(registry.architectures()["illada"].sizes.values()))
    words = search.would_fit(config, illada, parse_topology("v5e:4x4"), 14000, 700)
    flags = dict(re.findall(r"--config\.(\S+)=(\S+)", words))
    tokens, remat = config.train.microbatch_tokens, config.model.remat
    asked = search.with_settings(keeping(config, "recompute"), (1, 16, 1), tokens, remat, ("float32", "float32"))
    advised = search.with_settings(
        asked,
        (int(flags.pop("mesh.data", 1)), int(flags.pop("mesh.fsdp", 16)), int(flags.pop("mesh.tensor", 1))),
        int(flags.pop("train.microbatch_tokens", tokens)),
        flags.pop("model.remat", remat),
        ("float32", "float32"),
    )
    assert flags == {}
    needed = [memory.step_bytes(option, illada, workload.mesh_sizes(option, 16), 0) for option in (asked, advised)]
    assert needed[1] < needed[0] < parse_topology("v5e:4x4").chip.usable_bytes


def test_a_mesh_that_does_not_use_the_slice_is_refused(config):
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=3))
    with pytest.raises(UserError, match=r"config\.mesh.*64 devices"):
        workload.mesh_sizes(config, 64)


def test_report(config, tmp_path):
    found = two_pass_result(config) | {
        "tried": [{"flags": [], "fits": False, "why": "too large"}],
        "model": dataclasses.asdict(LLADA_8B),
        "cost_bound": 12.0,
    }
    write_plan_report(tmp_path / "report.html", found)
    html, text = (tmp_path / "report.html").read_text(), as_text(found)
    made_by = f"Compiled by jax {jax.__version__} and libtpu "
    for words in ("≤ 0.80", "bound, not measured", "v5e:8x8", "at least 12 at the given price", "Text MFU", made_by):
        assert words in html
    for words in ("80% of peak, 74% in text", "not measured", "score", "grad", "update", made_by):
        assert words in text
