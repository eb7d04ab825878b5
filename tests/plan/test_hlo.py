"""Reading compiled programs: text to operations, loops, matrix products, replica groups."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from neo.errors import InputError
from neo.plan import checks
from neo.plan.collectives import axes_of, device_count, groups_of
from neo.plan.flops import matmul_flops
from neo.plan.hlo import Op, Shape, kernel_calls, parse, shapes
from neo.plan.loops import turns

DATA = Path(__file__).parent / "data"


def compiled(name):
    """A program that libtpu compiled (data/make.py)."""
    return parse(gzip.decompress((DATA / f"{name}.hlo.gz").read_bytes()).decode())


SMALL = (DATA / "small.hlo").read_text()


def test_operations_and_what_they_carry():
    program = parse(SMALL)
    assert program.entry == "main.1" and program.scheduled and device_count(program) == 8
    assert [op.kind for op in program.computations["main.1"]] == ["parameter"] * 3 + ["fusion", "copy", "call", "tuple"]
    fusion = program.operation("main.1", "fusion.12")
    assert fusion.results == (Shape("f32", (8, 16)), Shape("s4", (6,)), Shape("u32", ()))
    assert [shape.bytes for shape in fusion.results] == [512, 3, 4]
    assert (fusion.operands, fusion.cycles, fusion.called("calls"), fusion.stem) == (("a", "b"), 123, "inner", "fusion")
    assert program.operation("main.1", "copy.1").cycles is None          # the compiler's "not estimated"
    assert program.operation("main.1", "tuple.1").root and not fusion.root


def test_a_kernel_whose_metadata_has_lines_and_braces():
    program = parse(SMALL)
    calls = kernel_calls(program)
    assert [call.name for call in calls] == ["kernel"]                   # once, through the call; fusions are not entered
    assert calls[0].operands == (Shape("f32", (8, 16)), Shape("s32", (2,)))
    assert calls[0].source == "jit(step)/neo_kernel" and '"block": 512' in calls[0].text


def test_lines_of_the_model_without_the_machine():
    program = parse(SMALL)
    assert program.line_of(program.operation("inner", "kernel.3.remat")) == "neo/models/mlp.py:46 MLP.__call__.gate"
    assert program.lines[5].startswith("optax/_src/base.py:7")
    inline = Op("x", "add", "f32[]", "", ', metadata={op_name="a" source_file="/x/neo/a.py" source_line=3}')
    assert program.line_of(inline) == "neo/a.py:3"


def test_donated_arguments():
    program = parse(SMALL)
    assert checks.arguments(program) == (Shape("f32", (8, 16)), Shape("bf16", (4,)), Shape("f32", (16,)))
    assert checks.aliased(program) == {0, 2}
    assert checks.kept_twice(program, 3) == 8 and checks.kept_twice(program, 1) == 0


@pytest.mark.parametrize("text", ["", "not a program", SMALL[:SMALL.index("ENTRY")], SMALL[:-40]])
def test_what_is_no_program_is_said_so(text):
    with pytest.raises(InputError, match="no HLO program"):
        parse(text)


@pytest.mark.parametrize("dtype, size", [("pred", 1), ("bf16", 2), ("f8e4m3fn", 1), ("f8e5m2", 1), ("s4", 0.5), ("u2", 0.25),
                                         ("c64", 8), ("f64", 8), ("s32", 4)])
def test_bytes_of_elements(dtype, size):
    assert shapes(f"{dtype}[3,2]{{1,0:T(8,128)(2,1)}}")[0].bytes == 6 * size
    assert shapes("(token[], opaque[])") == ()


LOOP = '''HloModule m, is_scheduled=true

%cond (s: (s32[], f32[])) -> pred[] {
  %s = (s32[], f32[]) parameter(0)
  %n = s32[] constant(BOUND)
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %lt = pred[] COMPARE, direction=DIRECTION
}

%body (s: (s32[], f32[])) -> (s32[], f32[]) {
  %s = (s32[], f32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[] get-tuple-element(%s), index=1
  %by = s32[] constant(STEP)
  %next = s32[] CHANGE(%i, %by)
  %moved = s32[] copy(%next)
  ROOT %t = (s32[], f32[]) tuple(%moved, %x)
}

ENTRY %main (x: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %first = s32[] constant(FIRST)
  %start = s32[] copy(%first)
  %t = (s32[], f32[]) tuple(%start, %x)
  %while.1 = (s32[], f32[]) while(%t), condition=%cond, body=%body
  ROOT %out = f32[] get-tuple-element(%while.1), index=1
}
'''


def loop(first=0, bound=8, step=1, direction="LT", compare="compare(%i, %n)", change="add"):
    text = LOOP
    for name, value in dict(FIRST=first, BOUND=bound, STEP=step, DIRECTION=direction, COMPARE=compare, CHANGE=change).items():
        text = text.replace(name, str(value))
    program = parse(text)
    return turns(program, "main", program.operation("main", "while.1"))


@pytest.mark.parametrize("expected, how", [
    (8, {}), (9, {"direction": "LE"}), (7, {"first": 1}), (8, {"compare": "compare(%n, %i)", "direction": "GT"}),
    (4, {"step": 2}), (5, {"bound": 9, "step": 2}),
    (8, {"first": 8, "bound": 0, "step": 1, "change": "subtract", "direction": "GT"}),
    (9, {"first": 8, "bound": 0, "step": -1, "direction": "GE"}), (8, {"direction": "NE"}), (0, {"first": 9}),
])
def test_turns_of_a_loop(expected, how):
    assert loop(**how) == expected


def test_turns_by_a_fused_comparison_and_by_the_compilers_word():
    fused = LOOP.replace("ROOT %lt = pred[] COMPARE, direction=DIRECTION",
                         "ROOT %f = pred[] fusion(%i, %n), kind=kLoop, calls=%inside")
    inside = """%inside (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %c = pred[] compare(%a, %b), direction=LT
}

%body ("""
    fused = fused.replace("%body (", inside)
    for name, value in dict(FIRST=2, BOUND=8, STEP=1, CHANGE="add").items():
        fused = fused.replace(name, str(value))
    program = parse(fused)
    assert turns(program, "main", program.operation("main", "while.1")) == 6
    known = Op("w", "while", "s32[]", "%t", ', condition=%c, body=%b, backend_config={"known_trip_count":{"n":"17"}}')
    assert turns(program, "main", known) == 17


def test_a_loop_without_a_constant_bound_is_named():
    with pytest.raises(InputError, match="while.1 .* no constant number of turns"):
        loop(compare="compare(%i, %i)")


def product(text, left, right, kind):
    program = parse(f'''HloModule m

ENTRY %main (a: bf16[1], b: bf16[1]) -> bf16[1] {{
  %a = {left} parameter(0)
  %b = {right} parameter(1)
  ROOT %r = {text}
}}
''')
    op = program.operation("main", "r")
    assert op.kind == kind
    return matmul_flops(program, "main", op)


def test_flops_of_matrix_products():
    assert product("f32[4,6]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
                   "f32[4,5]{1,0}", "f32[5,6]{1,0}", "dot") == 2 * 4 * 5 * 6
    # How a TPU writes [4, 5] x [5, 6].
    assert product("bf16[4,6]{1,0} convolution(%a, %b), dim_labels=bf_io->bf", "bf16[4,5]{1,0}", "bf16[5,6]{1,0}",
                   "convolution") == 2 * 4 * 5 * 6
    # A batch of 3 products: a window over the batch that only meets itself.
    assert product("bf16[3,4,6]{2,1,0} convolution(%a, %b), window={size=3 stride=2 pad=2_2 lhs_dilate=3}, "
                   "dim_labels=0bf_0io->0bf", "bf16[3,4,5]{2,1,0}", "bf16[3,5,6]{2,1,0}", "convolution") == 3 * 2 * 4 * 5 * 6
    # A contraction over two dimensions: [4, 3, 5] x [3, 5, 6].
    assert product("bf16[1,4,6]{2,1,0} convolution(%a, %b), window={size=3}, dim_labels=b0f_0io->0bf",
                   "bf16[4,3,5]{2,1,0}", "bf16[3,5,6]{2,1,0}", "convolution") == 2 * 4 * 3 * 5 * 6


def members(text, devices=8):
    return groups_of(Op("x", "all-gather", "f32[1]", "", f", channel_id=1, {text}, dimensions={{0}}"), devices).members


@pytest.mark.parametrize("text, expected", [
    ("replica_groups={{0,1,2,3},{4,5,6,7}}", ((0, 1, 2, 3), (4, 5, 6, 7))),
    ("replica_groups=[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
    ("replica_groups={}", (tuple(range(8)),)),
    ("dimensions_only=1", (tuple(range(8)),)),
    ("replica_groups=mesh['replica'=1,'fsdp'=4,'tensor'=2] {'fsdp'}", ((0, 2, 4, 6), (1, 3, 5, 7))),
    ("replica_groups=mesh['fsdp'=4,'tensor'=2] {'fsdp','tensor'}", (tuple(range(8)),)),
    ("replica_groups=mesh['axis_0'=8] {'axis_0':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
    ("replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'b'}", ((3, 2), (1, 0))),
    ("source_target_pairs={{0,1},{1,0},{2,3}}", ((0, 1), (2, 3))),
])
def test_replica_groups(text, expected):
    assert members(text) == expected


def test_replica_groups_of_an_unknown_form_are_named():
    with pytest.raises(InputError, match="unknown form in all-gather x"):
        members("replica_groups=<some>")


@pytest.mark.parametrize("text, devices, expected", [
    ("replica_groups=[2,4]<=[8]", 8, ("fsdp",)),                         # mesh below: replica 2, fsdp 2, tensor 2
    ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", 8, ("tensor",)),
    ("replica_groups={{0,2},{1,3},{4,6},{5,7}}", 8, ("fsdp",)),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", 8, ("replica",)),
    ("replica_groups=mesh['axis_0'=8] {'axis_0'}", 8, ("replica", "fsdp", "tensor")),
    ("replica_groups={{0,3},{1,2},{4,7},{5,6}}", 8, ()),                 # no axis runs like that
    ("source_target_pairs={{0,2},{2,0},{1,3}}", 8, ("fsdp",)),
    ("replica_groups={{0,1},{2,3}}", 4, ("tensor",)),                    # one of two slices: `replica` lies between them
])
def test_axes_by_comparing_groups_with_the_mesh(text, devices, expected):
    mesh = {"replica": 2, "fsdp": 2, "tensor": 2}
    if expected == ("fsdp",) and "[2,4]" in text:
        mesh = {"replica": 2, "fsdp": 4, "tensor": 1}
    op = Op("x", "all-gather", "f32[1]", "", f", {text}")
    assert axes_of(groups_of(op, devices), mesh, devices) == expected


@pytest.mark.parametrize("name, devices, loops", [
    # The last turn of the gradient's loop stands before it; XLA's loops of products with a moving operand count by two.
    ("two_slices_v5e", 4, [3, 4]), ("windowed_v5e", 16, [4] * 7), ("tensor_v5e", 16, [4, 4]), ("offload_v5p", 64, [3, 3]),
    ("sparsecore_v5p", 64, [4, 4]),
])
def test_real_programs(name, devices, loops):
    program = compiled(name)
    found = [turns(program, where, op) for where, op in program.reached() if op.kind == "while"]
    assert (device_count(program), sorted(found)) == (devices, loops)
    assert checks.aliased(program) == {0, 1} and checks.kept_twice(program, 2) == 0
