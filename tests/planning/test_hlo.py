"""planning/hlo.py: FLOPs, trip counts and collectives of small modules, each figure worked out by hand."""

import pytest

from elbo_kto_jax.planning import hlo

# A loop of 7 trips: a matrix product of [8, 16] x [16, 32], and one all-gather for which it waits.
MODULE = """HloModule jit_f, is_scheduled=true

%body.1 (arg.1: (s32[], bf16[8,16], bf16[4,32])) -> (s32[], bf16[8,16], bf16[4,32]) {
  %arg.1 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}, /*index=2*/bf16[4,32]{1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %x.1 = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%arg.1), index=1
  %w.1 = bf16[4,32]{1,0} get-tuple-element(%arg.1), index=2
  %all-gather.1 = bf16[16,32]{1,0} all-gather(%w.1), channel_id=1, replica_groups=GROUPS, dimensions={0}
  %y.1 = f32[8,32]{1,0} convolution(%x.1, %all-gather.1), window={size=32 pad=31_31}, dim_labels=bf_io->bf
  ROOT %out.1 = (s32[]{:T(128)}, bf16[8,16]{1,0}, bf16[4,32]{1,0}) tuple(%i.1, %x.1, %w.1)
}

%cond.1 (arg.2: (s32[], bf16[8,16], bf16[4,32])) -> pred[] {
  %limit.1 = s32[]{:T(128)} LIMIT
  %arg.2 = (s32[]{:T(128)}, bf16[8,16]{1,0}, bf16[4,32]{1,0}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%arg.2), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%i.2, %limit.1), direction=LT, metadata={op_name="jit(f)/while/cond/lt"}
}

ENTRY %main.1 (p.1: (s32[], bf16[8,16], bf16[4,32])) -> (s32[], bf16[8,16], bf16[4,32]) {
  %p.1 = (s32[]{:T(128)}, bf16[8,16]{1,0}, bf16[4,32]{1,0}) parameter(0)
  %kernel.1 = f32[8,16]{1,0} custom-call(%p.1), custom_call_target="tpu_custom_call"
  ROOT %while.1 = (s32[]{:T(128)}, bf16[8,16]{1,0}, bf16[4,32]{1,0}) while(%p.1), condition=%cond.1, body=%body.1
}
"""
PRODUCT = 2 * 8 * 16 * 32
GATHERED = 3 * 4 * 32 * 2  # bytes: three more parts of 4 x 32 bfloat16 pass through a chip's hands


def cost(
    limit="constant(7)", groups="{{0,1,2,3},{4,5,6,7}}", kernels=(("kernel", 100.0),), module=MODULE, per_byte=1.0
):
    text = module.replace("LIMIT", limit).replace("GROUPS", groups)
    return hlo.program_cost(
        text, kernels=dict(kernels), dynamic_trips=3, chips=8, flops_per_byte=lambda group: per_byte
    )


@pytest.mark.parametrize(
    ("attributes", "group", "expected"),
    [
        ("source_target_pairs={{0,1},{1,0},{2,3},{3,2}}", 2, {"minor"}),
        ("source_target_pairs={{0,2},{2,0},{1,3},{3,1}}", 2, {"major"}),
        ("source_target_pairs={{0,1},{1,3},{3,2},{2,0}}", 4, hlo.BOTH),
        ("replica_groups={{0,1},{2,3}}", 2, hlo.BOTH),  # not known: at worst
    ],
)
def test_sends_along_one_axis_use_the_links_of_that_axis(attributes, group, expected):
    assert hlo.axes_of(attributes, group, chips=4) == expected


def test_sends_along_two_axes_are_under_way_at_once():
    def hidden(*axes):
        under_way = hlo._UnderWay(lambda group: 1.0)
        names = [f"{index}" for index, _ in enumerate(axes)]
        for name, along in zip(names, axes, strict=True):
            under_way.begin(name, [hlo.Collective("collective-permute", 8.0, 2, True, 1.0, frozenset(along))])
        under_way.compute(8.0)
        return sum(c.bytes for c in under_way.rest() if c.overlapped)

    assert hidden({"major"}, {"minor"}) == 16
    assert hidden({"major"}, {"major"}) == hidden(hlo.BOTH, {"minor"}) == 8


def test_a_loop_counts_as_often_as_it_runs():
    found = cost()
    assert found.flops == pytest.approx(7 * PRODUCT + 100)
    assert found.sent(["all-gather"]) == 7 * GATHERED
    assert found.sent(overlapped=False) == found.sent()


def test_a_loop_without_a_constant_runs_as_often_as_the_caller_says():
    assert cost(limit="copy(%arg.2)").flops == pytest.approx(3 * PRODUCT + 100)


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[4,2]T(1,0)", 2),
        ("mesh['x'=4,'y'=2] {'x'}", 4),
        ("mesh['x'=4,'y'=2] {'x','y'}", 8),
        ("{}", 8),
    ],
)
def test_replica_groups(groups, size):
    assert hlo.group_size(f", channel_id=1, replica_groups={groups}, dimensions={{0}}", 8) == size


@pytest.mark.parametrize(
    ("instruction", "kind", "sent"),
    [
        ("all-reduce(%w.1)", "all-reduce", 2 * 256 * 3 / 4),
        ("reduce-scatter(%w.1)", "reduce-scatter", 256 * 3 / 4),
        ("all-to-all(%w.1)", "all-to-all", 256 * 3 / 4),
        ("collective-permute(%w.1)", "collective-permute", 256),
    ],
)
def test_bytes_of_each_kind(instruction, kind, sent):
    found = cost(module=MODULE.replace("all-gather(%w.1)", instruction), limit="constant(1)")
    assert found.sent([kind]) == found.sent() == sent


BESIDE = "  %z.N = f32[8,32]{1,0} convolution(%x.1, %v.1), dim_labels=bf_io->bf\n"  # of as many FLOPs as PRODUCT


def split(starts: int, between: str) -> str:
    """The module with the all-gather begun `starts` times over, and `between` that and its end."""
    begin = "  %s.N = (bf16[4,32]{1,0}, bf16[16,32]{1,0}) all-gather-start(%w.1), replica_groups=GROUPS\n"
    end = "  %all-gather.N = bf16[16,32]{1,0} all-gather-done(%s.N)"
    numbers = [str(i + 1) for i in range(starts)]
    text = "".join(begin.replace("N", n) for n in numbers) + between + "\n".join(end.replace("N", n) for n in numbers)
    found = MODULE.replace(
        "  %all-gather.1 = bf16[16,32]{1,0} all-gather(%w.1), channel_id=1, replica_groups=GROUPS, dimensions={0}", text
    )
    return found.replace("  %w.1 =", "  %v.1 = bf16[16,32]{1,0} constant({...})\n  %w.1 =")


@pytest.mark.parametrize(
    ("starts", "products", "per_byte", "hidden"),
    [
        (1, 0, 1.0, 0.0),  # it is waited for at once
        (1, 1, 1.0, 1.0),
        (1, 1, 4 * PRODUCT / GATHERED, 1 / 4),
        (1, 2, 4 * PRODUCT / GATHERED, 1 / 2),
        (2, 1, PRODUCT / GATHERED, 1 / 2),  # one after the other: the second begins when the product ends
    ],
)
def test_start_and_done_hide_what_the_products_between_them_cover(starts, products, per_byte, hidden):
    found = cost(module=split(starts, "".join(BESIDE.replace("N", str(i)) for i in range(products))), per_byte=per_byte)
    assert found.sent(["all-gather"]) == pytest.approx(starts * 7 * GATHERED)
    assert found.sent(["all-gather"], overlapped=True) == pytest.approx(hidden * starts * 7 * GATHERED)


def test_a_collective_on_sparse_cores_is_hidden_by_what_stands_between():
    module = MODULE.replace(
        "%body.1 (arg.1",
        """%called.1 (a.1: bf16[4,32]) -> bf16[16,32] {
  %a.1 = bf16[4,32]{1,0} parameter(0)
  ROOT %g.1 = bf16[16,32]{1,0} all-gather(%a.1), channel_id=1, replica_groups=GROUPS, dimensions={0}
}

%body.1 (arg.1""",
    ).replace(
        "  %all-gather.1 = bf16[16,32]{1,0} all-gather(%w.1), channel_id=1, replica_groups=GROUPS, dimensions={0}",
        "  %v.1 = bf16[16,32]{1,0} constant({...})\n"
        "  %s.1 = ((bf16[4,32]), bf16[16,32]) call-start(%w.1), to_apply=%called.1\n"
        + BESIDE.replace("N", "1")
        + "  %all-gather.1 = bf16[16,32]{1,0} call-done(%s.1)",
    )
    found = cost(module=module, per_byte=4 * PRODUCT / GATHERED)
    assert found.sent(["all-gather"]) == pytest.approx(7 * GATHERED)
    assert found.sent(["all-gather"], overlapped=True) == pytest.approx(7 * GATHERED / 4)


def test_a_collective_that_nothing_ends_is_not_hidden_by_what_comes_later():
    module = split(1, "").replace("all-gather-done(%s.1)", "copy(%w.1)")
    found = cost(module=module, per_byte=2 * PRODUCT / GATHERED)
    assert found.sent(overlapped=True) == found.sent(overlapped=False) == pytest.approx(7 * GATHERED / 2)


@pytest.mark.parametrize(
    ("pairs", "size"), [("{{0,1},{1,0},{2,3},{3,2}}", 2), ("{{0,2},{2,4},{4,6},{1,3},{3,5},{5,7}}", 4)]
)
def test_a_permutation_is_of_the_chips_that_it_leads_through(pairs, size):
    assert hlo.group_size(f", channel_id=1, source_target_pairs={pairs}", 8) == size


def test_the_fusions_that_carry_a_collective_on_do_not_count_again():
    module = MODULE.replace(
        "%body.1 (arg.1",
        """%begin.1 (a.1: bf16[4,32]) -> bf16[16,32] {
  %a.1 = bf16[4,32]{1,0} parameter(0)
  %g.1 = bf16[16,32]{1,0} all-gather(%a.1), channel_id=1, replica_groups=GROUPS, dimensions={0}
  ROOT %c.1 = bf16[16,32]{1,0} custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (a.2: bf16[16,32], b.2: bf16[8,16]) -> bf16[16,32] {
  %a.2 = bf16[16,32]{1,0} parameter(0)
  %b.2 = bf16[8,16]{1,0} parameter(1)
  %y.2 = f32[8,32]{1,0} convolution(%b.2, %a.2), dim_labels=bf_io->bf
  ROOT %g.2 = bf16[16,32]{1,0} all-gather(%a.2), channel_id=1, replica_groups=GROUPS, dimensions={0}
}

%end.1 (a.3: bf16[4,32]) -> bf16[16,32] {
  %a.3 = bf16[4,32]{1,0} parameter(0)
  %g.3 = bf16[16,32]{1,0} all-gather(%a.3), channel_id=1, replica_groups=GROUPS, dimensions={0}
  ROOT %c.3 = bf16[16,32]{1,0} custom-call(%g.3), custom_call_target="AsyncCollectiveDone"
}

%body.1 (arg.1""",
    ).replace(
        "  %all-gather.1 = bf16[16,32]{1,0} all-gather(%w.1), channel_id=1, replica_groups=GROUPS, dimensions={0}",
        """  %f.1 = bf16[16,32]{1,0} fusion(%w.1), kind=kCustom, calls=%begin.1
  %f.2 = bf16[16,32]{1,0} fusion(%f.1, %x.1), kind=kOutput, calls=%async_collective_fusion.1
  %all-gather.1 = bf16[16,32]{1,0} fusion(%f.2), kind=kCustom, calls=%end.1""",
    )
    found = cost(module=module)
    assert found.sent(["all-gather"], overlapped=True) == found.sent() == 7 * GATHERED


def test_the_fusion_that_keeps_a_part_of_a_sum_is_a_reduce_scatter():
    module = MODULE.replace(
        "%body.1 (arg.1",
        """%all-reduce-scatter.1 (a.1: bf16[4,32]) -> bf16[1,32] {
  %a.1 = bf16[4,32]{1,0} parameter(0)
  %r.1 = bf16[4,32]{1,0} all-reduce(%a.1), replica_groups=GROUPS, to_apply=%add.1
  ROOT %d.1 = bf16[1,32]{1,0} slice(%r.1), slice={[0:1], [0:32]}
}

%body.1 (arg.1""",
    ).replace("all-gather(%w.1), channel_id=1", "fusion(%w.1), kind=kCustom, calls=%all-reduce-scatter.1, channel_id=1")
    assert cost(module=module).sent(["reduce-scatter"]) == 7 * 256 * 3 / 4


def test_a_kernel_in_a_loop_over_rows_is_called_by_its_metadata():
    """As libtpu prints it: the attributes of the call have line breaks, and its name is that of the loop's body."""
    call = '%kernel.1 = f32[8,16]{1,0} custom-call(%p.1), custom_call_target="tpu_custom_call"'
    told = ', frontend_attributes={kernel_metadata={\n"block": "512"\n}}, metadata={op_name="jit(f)/kernel_fwd/while"}'
    module = MODULE.replace(call, call.replace("%kernel.1", "%closed_call.1") + told)
    assert module != MODULE
    assert cost(module=module, kernels=(("other", 1.0), ("kernel", 100.0))) == cost()


def test_an_unknown_kernel_is_an_error():
    with pytest.raises(ValueError, match=r"kernel\.1"):
        cost(kernels=())


def test_text_without_a_program_is_an_error():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.program_cost("", kernels={}, dynamic_trips=1, chips=1, flops_per_byte=float)


@pytest.mark.parametrize(
    ("shape", "size"), [("bf16[4,32]{1,0:T(8,128)(2,1)}", 256), ("(f32[3]{0}, s8[5], pred[])", 18)]
)
def test_array_bytes(shape, size):
    assert hlo.array_bytes(shape) == size
