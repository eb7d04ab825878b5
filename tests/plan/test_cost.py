"""What a schedule costs: replayed by hand for small ones, and for programs that libtpu compiled."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from neo.errors import InputError
from neo.plan import checks
from neo.plan.chips import BY_NAME
from neo.plan.collectives import HOST_BANDWIDTH, links_share
from neo.plan.cost import cost
from neo.plan.hlo import parse

DATA = Path(__file__).parent / "data"
V5P, V5E = BY_NAME["v5p"], BY_NAME["v5e"]
MILLISECOND = int(V5P.clock / 1000)          # cycles
MESH = {"replica": 1, "fsdp": 8, "tensor": 1}
# 1 ms of all links: what a device receives of it is 7/8 of an array over 8 devices.
ELEMENTS = int(V5P.ici_bandwidth / 1000 * 8 / 7 / 2)
BODIES = '''%sum (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[] parameter(0)
  %y = bf16[] parameter(1)
  ROOT %s = bf16[] add(%x, %y)
}

'''
GROUPS = "replica_groups=mesh['replica'=1,'fsdp'=8,'tensor'=1] {'fsdp'}"


def work(name, milliseconds, source="jit(step)/jvp()/mul"):
    """An operation of XLA's own, by its estimate."""
    return (f'%{name} = bf16[8]{{0}} fusion(%a), kind=kLoop, calls=%sum, metadata={{op_name="{source}"}}, '
            f'backend_config={{"estimated_cycles":"{int(milliseconds * MILLISECOND)}"}}')


def gather(name, milliseconds=1.0, kind="all-gather"):
    return f"%{name} = bf16[{int(milliseconds * ELEMENTS)}]{{0}} {kind}(%a), channel_id=1, {GROUPS}, dimensions={{0}}"


def gather_start(name, milliseconds=1.0):
    size = int(milliseconds * ELEMENTS)
    return (f"%{name} = (bf16[{size // 8}]{{0}}, bf16[{size}]{{0}}) all-gather-start(%a), channel_id=1, {GROUPS}, "
            f"dimensions={{0}}")


def gather_done(name):
    return f"%{name}-done = bf16[{ELEMENTS}]{{0}} all-gather-done(%{name})"


def program(*lines, bodies="", scheduled=True):
    text = "HloModule m, is_scheduled=true, num_partitions=8\n\n" if scheduled else "HloModule m, num_partitions=8\n\n"
    lines = "".join(f"  {line}\n" for line in lines)
    return (f"{text}{BODIES}{bodies}ENTRY %main (a: bf16[8]) -> bf16[8] {{\n  %a = bf16[8]{{0}} parameter(0)\n{lines}"
            "  ROOT %end = bf16[8]{0} bitcast(%a)\n}\n")


def unpriced(call):
    raise KeyError(call.name)


def price(*lines, bodies="", chip=V5P, kernels=unpriced, **more):
    return cost(program(*lines, bodies=bodies), chip, kernels, mesh=MESH, **more)


def times(found):
    """(full overlap, as scheduled, no overlap) in ms."""
    return tuple(round(1e3 * seconds, 3) for seconds in (found.full_overlap, found.scheduled, found.no_overlap))


def test_a_synchronous_collective_stops_the_core():
    found = price(work("f", 3), gather("g"), work("h", 2))
    assert times(found) == (5, 6, 6)
    assert round(1e3 * found.other, 3) == 5 and found.matmul == found.kernels == 0
    row, = found.collectives
    assert (row.kind, row.mode, row.axes, row.group, row.loop, row.dtype, row.times, row.network) == (
        "all-gather", "sync", ("fsdp",), 8, "entry", "bf16", 1, "ici")
    assert row.bytes == 2 * ELEMENTS and row.wire_bytes == row.bytes * 7 / 8
    assert row.seconds == pytest.approx(row.wire_bytes / V5P.ici_bandwidth)


@pytest.mark.parametrize("before, between, expected", [(1, 3, 4), (1, 0.4, 2), (0, 1, 1)])
def test_an_asynchronous_one_is_hidden_by_what_stands_between(before, between, expected):
    found = price(work("f", before), gather_start("g"), work("h", between), gather_done("g"))
    assert times(found) == (max(1, before + between), expected, before + between + 1)
    assert found.collectives[0].mode == "async" and found.collectives[0].bytes == pytest.approx(2 * ELEMENTS, rel=1e-4)


def test_the_links_carry_one_thing_after_another():
    # Two under way, then one that the core waits for: it comes last.
    found = price(gather_start("g"), gather_start("h"), work("f", 0.5), gather("s"), gather_done("g"), gather_done("h"))
    assert times(found) == (3, 3, 3.5)


def test_what_nobody_waits_for_ends_with_the_step():
    assert times(price(work("f", 1), gather_start("g", 2))) == (2, 3, 3)


@pytest.mark.parametrize("kind, more, seconds, wire", [
    ("all-gather", "", 1, 7 / 8), ("all-reduce", "", 2, 7 / 4), ("reduce-scatter", "", 8, 7), ("all-to-all", "", 1, 7 / 8)])
def test_wire_bytes_of_each_kind(kind, more, seconds, wire):
    # A reduce-scatter's result is a device's share.
    row, = price(gather("g", kind=kind)).collectives
    assert 1e3 * row.seconds == pytest.approx(seconds) and row.wire_bytes == pytest.approx(wire * 2 * ELEMENTS)


def test_a_permute_uses_one_link():
    row, = price(f"%p = (bf16[{ELEMENTS}], bf16[{ELEMENTS}], u32[], u32[]) collective-permute-start(%a), "
                 "source_target_pairs={{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7},{7,0}}").collectives
    assert row.wire_bytes == row.bytes == 2 * ELEMENTS and row.seconds == row.bytes / V5P.link
    assert (row.group, row.axes) == (8, ("fsdp",))


@pytest.mark.parametrize("chip, torus, size, share", [
    (V5E, (16, 16), 256, 1), (V5E, (16, 16), 16, 1 / 2), (V5E, (16, 16), 4, 1 / 2), (V5E, (16, 16), 64, 1),
    (V5P, (4, 4, 4), 64, 1), (V5P, (4, 4, 4), 16, 2 / 3), (V5P, (4, 4, 4), 4, 1 / 3), (V5P, (), 4, 1),
    (BY_NAME["tpu7x"], (4, 4, 4), 8, 1 / 3), (BY_NAME["tpu7x"], (4, 4, 4), 128, 1), (V5P, (1, 1, 1), 1, 1)])
@pytest.mark.parametrize("ring", [True, False])
def test_links_of_groups_that_span_a_part_of_the_torus(chip, torus, size, share, ring):
    torus = [(side, ring) for side in torus]
    share *= 1 if ring or size == 1 or not torus else 1 / 2
    assert links_share(size, chip, torus) == share
    assert links_share(4, V5P, [(2, False), (2, False), (1, False)]) == 1 / 3
    line = f"%g = bf16[{ELEMENTS}] all-gather(%a), replica_groups=[1,{size}]<=[{size}]"
    row, = cost(program(line), chip, unpriced, torus=torus).collectives
    assert row.seconds == pytest.approx(row.wire_bytes / chip.ici_bandwidth / share)


def test_an_all_to_all_over_many_devices_pays_for_the_bisection():
    wide = f"%t = bf16[{ELEMENTS}] all-to-all(%a), replica_groups=[1,256]<=[256]"
    seconds = [cost(program(wide), chip, unpriced).collectives[0].seconds for chip in (V5E,)]
    assert seconds[0] == pytest.approx(2 * ELEMENTS * 255 / 256 / V5E.ici_bandwidth * 16 / 8 * 2)


LOOP = '''%cond (s: (s32[], bf16[8])) -> pred[] {
  %s = (s32[], bf16[8]) parameter(0)
  %n = s32[] constant(4)
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (s: (s32[], bf16[8])) -> (s32[], bf16[8]) {
  %a = (s32[], bf16[8]) parameter(0)
INSIDE
}

'''


def looped(*lines, around=()):
    inside = "\n".join(f"  {line}" for line in lines)
    enter = ["%zero = s32[] constant(0)", "%t = (s32[], bf16[8]) tuple(%zero, %a)",
             "%while.3 = (s32[], bf16[8]) while(%t), condition=%cond, body=%body"]
    return price(*around, *enter, bodies=LOOP.replace("INSIDE", inside))


def test_loops_turn():
    found = looped(work("f", 2), gather("g"))
    assert times(found) == (8, 12, 12)
    assert found.loops == (("while.3", 4),)
    assert [(row.loop, row.times) for row in found.collectives] == [("x4", 4)]
    assert [(group.name, group.times, round(1e3 * group.seconds, 3)) for group in found.operations] == [("forward: mul", 4, 8)]


def test_a_loop_that_moves_waits_for_what_is_under_way():
    assert times(looped(work("f", 1), gather("g"), around=[gather_start("h", 3)])) == (7, 11, 11)
    assert times(looped(work("f", 1), around=[gather_start("h", 3)])) == (4, 4, 7)


def test_of_branches_the_dearest_counts_alone():
    branch = "%{0} (b: bf16[8]) -> bf16[8] {{\n  %a = bf16[8]{{0}} parameter(0)\n  {1}\n}}\n\n"
    bodies = "".join(branch.format(name, line) for name, line in (
        ("cheap", work("c", 1)), ("dear", work("d", 2)), ("moves", gather("g", 0.5))))
    found = price("%if = bf16[8] conditional(%a, %a, %a, %a), branch_computations={%cheap, %dear, %moves}", bodies=bodies)
    assert times(found) == (2, 2, 2) and found.collectives == ()


def fused(name, inside, target=""):
    last = f'custom-call(%g), custom_call_target="{target}"' if target else "bitcast(%g)"
    return f"%{name} (b: bf16[8]) -> bf16[8] {{\n  %a = bf16[8] parameter(0)\n  {inside}\n  ROOT %e = bf16[8] {last}\n}}\n\n"


def test_collectives_inside_fusions():
    bodies = (fused("begin", gather("g"), "AsyncCollectiveStart") + fused("finish", gather("g"), "AsyncCollectiveDone")
              + fused("async_collective_fusion.1", gather("g")))
    call = '%{0} = bf16[8] fusion(%a), kind=kCustom, calls=%{1}, backend_config={{"estimated_cycles":"{2}"}}'
    found = price(call.format("s", "begin", 0), call.format("w", "async_collective_fusion.1", int(0.6 * MILLISECOND)),
                  call.format("d", "finish", 0), bodies=bodies)
    assert times(found) == (1, 1, 1.6)
    assert [(row.mode, row.times) for row in found.collectives] == [("async fusion", 1)]


def test_an_all_reduce_that_is_sliced_in_its_fusion_is_a_reduce_scatter():
    bodies = fused("all-reduce-scatter.1", gather("g", kind="all-reduce"))
    found = price("%s = bf16[8] fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1", bodies=bodies)
    row, = found.collectives
    assert found.notes == ()   # the collective is its price
    assert (row.kind, row.mode) == ("reduce-scatter", "sync") and 1e3 * row.seconds == pytest.approx(1)


def kernel(name="neo_attention.3", target="tpu_custom_call"):
    return (f'%{name} = bf16[8] custom-call(%a), custom_call_target="{target}", operand_layout_constraints={{bf16[8]{{0}}}}, '
            'metadata={op_name="jit(step)/attention"}')


def test_kernels_cost_the_cycles_they_are_given():
    found = price(kernel(), kernel("neo_attention.4"), work("f", 1), kernels=lambda call: 2.0 * MILLISECOND)
    assert times(found) == (5, 5, 5) and round(1e3 * found.kernels, 3) == 4
    use, = found.kernel_uses
    assert (use.name, use.times, use.cycles) == ("neo_attention", 2, 4.0 * MILLISECOND)


@pytest.mark.parametrize("line, kernels", [(kernel(), unpriced), (kernel(), lambda call: None),
                                           (kernel("x.1", "SomethingNew"), lambda call: 1.0)])
def test_a_custom_call_without_a_price_is_an_error_that_names_it(line, kernels):
    named = r"(tpu_custom_call|SomethingNew) \((neo_attention.3|x.1), from jit\(step\)/attention\)"
    with pytest.raises(InputError, match=named):
        price(line, kernels=kernels)


def test_free_and_estimated_custom_calls():
    estimated = kernel("top.1", "TopK") + f', backend_config={{"estimated_cycles":"{MILLISECOND}"}}'
    assert times(price(kernel("b", "AllocateBuffer"), estimated)) == (1, 1, 1)


def test_what_has_no_estimate_is_told():
    note, = price("%copy.5 = bf16[8]{0} copy(%a)", "%copy.6 = bf16[8]{0} copy(%a)").notes
    assert "copy x2" in note
    assert price(work("f", 1)).notes == ()


def test_a_program_that_is_not_scheduled_is_refused():
    with pytest.raises(InputError, match="not scheduled"):
        cost(program(work("f", 1), scheduled=False), V5P, unpriced)


def test_groups_between_nodes_use_the_network():
    network_of = checks.network_by_side([range(4), range(4, 8)])
    across = f"%g = bf16[{ELEMENTS}] all-gather(%a), replica_groups=[4,2]<=[2,4]T(1,0)"
    inside = f"%h = bf16[{ELEMENTS}] all-gather(%a), replica_groups=[2,4]<=[8]"
    found = price(across, inside, network_of=network_of)
    assert {row.group: row.network for row in found.collectives} == {2: "dcn", 4: "ici"}
    assert found.collectives[0].seconds == pytest.approx(ELEMENTS / V5P.dcn_bandwidth)
    assert [move.transfer.name for move in checks.crossing(parse(program(across, inside)), [range(4), range(4, 8)])] == ["g"]


# --- programs that libtpu compiled (data/make.py): four layers of two products of [2 x 512, 1024] with [1024, 4096] ---

PRODUCT = 2 * 2 * 512 * 1024 * 4096     # FLOPs on one device


def compiled(name):
    return parse(gzip.decompress((DATA / f"{name}.hlo.gz").read_bytes()).decode())


def real(name, mesh):
    program = compiled(name)
    chip = BY_NAME[name.rsplit("_", 1)[1]]
    return program, cost(program, chip, unpriced, mesh=dict(zip(("replica", "fsdp", "tensor"), mesh, strict=True)))


@pytest.mark.parametrize("name, mesh, products", [
    # A layer: 2 forward, 1 again, 4 backward. With its hidden values kept on the host, 2 and 4, and none for the first
    # layer's input. However a program is partitioned, a device does the same share.
    ("two_slices_v5e", (2, 4, 1), 28), ("windowed_v5e", (1, 16, 1), 28), ("tensor_v5e", (1, 4, 4), 28),
    ("sparsecore_v5p", (1, 64, 1), 28), ("offload_v5p", (1, 64, 1), 23)])
def test_flops_of_real_programs(name, mesh, products):
    assert real(name, mesh)[1].matmul_flops == pytest.approx(products * PRODUCT, rel=1e-3)


@pytest.mark.parametrize("name, mesh, expected", [
    # Full overlap, as scheduled, no overlap in ms, by an independent counter with the same conventions.
    ("tensor_v5e", (1, 4, 4), (2.8155, 3.4506, 4.1903)), ("sparsecore_v5p", (1, 64, 1), (0.8402, 0.9194, 1.2072))])
def test_times_of_real_programs(name, mesh, expected):
    found = real(name, mesh)[1]
    assert times(found) == pytest.approx(expected, rel=0.001)


def test_collectives_given_to_the_sparse_core():
    program, found = real("sparsecore_v5p", (1, 64, 1))
    assert {(row.kind, row.mode, row.axes, row.dtype) for row in found.collectives} == {
        ("all-gather", "async sparsecore", ("fsdp",), "bf16"), ("reduce-scatter", "async sparsecore", ("fsdp",), "bf16"),
        ("all-reduce", "sync", ("fsdp",), "f32")}
    weights = 1024 * 4096
    assert checks.all_reduces(program, weights) == ()
    assert checks.gathers(program, [weights]) == {weights: {"bf16": 16}}        # each of 2 x 4, forward and backward
    assert checks.synchronous(program, 1000) == ()
    assert checks.largest_array(program)[0].elements == 4 * 2 * 512 * 1024      # what the layers save


def test_programs_that_are_worse_are_seen_to_be():
    program = compiled("tensor_v5e")
    assert sum(move.times for move in checks.all_reduces(program, 1024 * 1024)) == 8
    (move, size), *_ = checks.synchronous(program, 1e6)
    assert move.kind == "all-reduce" and size == pytest.approx(4 * 2 * 4 * 2 * 512 * 1024)


def test_axes_of_a_mesh_with_two_sides():
    _, found = real("tensor_v5e", (1, 4, 4))
    assert {(row.kind, row.axes) for row in found.collectives} == {
        ("collective-permute", ("fsdp",)), ("all-reduce", ("tensor",)), ("all-gather", ("fsdp",)), ("all-reduce", ("fsdp",))}


def test_between_slices():
    program, found = real("two_slices_v5e", (2, 4, 1))
    rows = [row for row in found.collectives if row.network == "dcn"]
    assert {(row.kind, row.mode, row.group, row.axes) for row in rows} == {("all-reduce", "async", 2, ("replica",))}
    # Both gradients of four layers, a quarter of each in bfloat16, and the loss as [1, 1, 128].
    assert sum(row.bytes for row in rows) == 8 * 1024 * 4096 / 4 * 2 + 512
    assert all(row.axes == ("fsdp",) for row in found.collectives if row.network == "ici")
    assert found.scheduled > found.full_overlap == pytest.approx(sum(row.seconds for row in rows))
    assert {move.transfer.network for move in checks.crossing(program)} == {"dcn"}


def test_arrays_kept_in_the_hosts_memory():
    _, found = real("offload_v5p", (1, 64, 1))
    rows = {network: [row for row in found.collectives if row.network == network] for network in ("to host", "from host")}
    for network in rows:
        assert sum(row.times for row in rows[network]) == 4
        assert sum(row.bytes for row in rows[network]) == 4 * 2 * 512 * 4096 * 2
        assert sum(row.seconds for row in rows[network]) == pytest.approx(4 * 2 * 512 * 4096 * 2 / HOST_BANDWIDTH["any"])
