"""The counter of TPU kernels, on a recorded dump whose counts are known (record_dump.py) and on small texts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import attention_tpu_splash as splash
import pytest
import record_dump
import tpu_hlo

from neo.plan.kernel_dump import Bundle, Dump, kernels, parse, read_bundles
from neo.plan.kernel_scalar import NotKnown, execute

DATA = Path(__file__).resolve().parent / "data"
VISITS = [(i, j) for i in range(record_dump.ROWS) for j in range(record_dump.COLUMNS)
          if record_dump.lowest(i) <= j <= 2 * i + 1]
ROUNDS = sum(i + 2 for i, j in VISITS if j == 2 * i + 1)
UNITS = {"MXU": 4, "XLU": 3, "VALU": 4, "VPOP": 2, "EUP": 1, "VLOAD": 3, "VLOAD:FILL": 3, "VSTORE": 1, "VSTORE:SPILL": 1,
         "SALU": 2}


@pytest.fixture(scope="module")
def staircase():
    (dump,) = kernels(DATA, "staircase")
    return dump


@pytest.fixture(scope="module")
def run(staircase):
    return execute(staircase)


def times(run, bundle):
    return next(cell.times for cell in run.cells if cell.start <= bundle < cell.end)


def test_regions(staircase):
    """The numbers are another counter's, for the same dump."""
    assert len(staircase.bundles) == 245
    found = {(r.kind, r.start, r.end): r for r in staircase.regions()}
    assert set(found) == {("all", 0, 245), ("when", 58, 222), ("when", 70, 87), ("when", 97, 179), ("when", 153, 179),
                          ("when", 158, 179), ("loop", 158, 179), ("when", 185, 209), ("loop", 14, 239)}
    product = found["when", 97, 179]
    assert (product.bundles, product.matmul_bundles, product.mxu_cycles, product.depth) == (82, 19, 32, 3)
    assert found["when", 185, 209].slots["EUP"] == 16   # exp2 of 128 x 128: 16 registers


def test_every_body_runs_as_often_as_the_grid_says(staircase, run):
    steps = record_dump.ROWS * record_dump.COLUMNS
    assert run.steps == steps + 2   # the pipeline's first and last copies
    assert times(run, 60) == steps
    assert times(run, 75) == record_dump.ROWS          # j == 0
    assert times(run, 100) == len(VISITS)
    assert times(run, 160) == ROUNDS                   # a rolled loop with a traced bound
    assert times(run, 190) == record_dump.ROWS         # the last block
    assert run.cycles == sum(cell.times * max(cell.end - cell.start, staircase.busiest_mxu(cell.start, cell.end))
                             for cell in run.cells)


def test_bytes_are_those_of_the_blocks_that_change(run):
    ks = [min(j, 2 * i + 1) for i in range(record_dump.ROWS) for j in range(record_dump.COLUMNS)]
    fetched = 1 + sum(a != b for a, b in zip(ks, ks[1:], strict=False))
    block = record_dump.BLOCK**2
    assert run.bytes_read == 2 * block * (record_dump.ROWS + fetched)
    assert run.bytes_written == 4 * block * record_dump.ROWS


def little(*lines, unit="0 1 0 0 0 0 0 0 0 1"):
    """A dump from instructions, a bundle each."""
    text = "\n".join(f"  {hex(i) if i else '0':>4s}   : {{ {line} }}" for i, line in enumerate(lines))
    table = "MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU\n 4 3 4 2 1 3 3 1 1 2\n"
    return parse("little", text, table + "\n".join([unit] * len(lines)))


def counting_loop(bound):
    return little(
        "%s1_s0 = smov 0", "%s9_s9 = smov 0 } /* Start region 4 */", "%s2_s0 = sphi %s1_s0, %s3_s0",
        "%s3_s0 = sadd.s32 1, %s2_s0", f"%p4_p0 = scmp.lt.s32.totalorder %s3_s0, {bound}",
        "%5 = sbr.rel (%p4_p0) target = $region4", "", "", "", "", "%s6_s1 = smov.u32 1")


def test_a_loop_ends_when_its_counter_says():
    run = execute(counting_loop(7))
    assert run.steps == 7
    assert run.cells[-1].times == 1


def test_a_branch_on_something_unknown_is_an_error():
    with pytest.raises(NotKnown, match="%p4_p0"):
        execute(counting_loop("%s77_s7"))


def test_a_region_costs_at_least_what_its_busiest_mxu_needs():
    names = ("bf16.gmra.mxu0", "bf16.gmra.mxu0", "f32.gmra.mxu1")
    bundles = tuple(Bundle((f"%1 = vmatmul.{name} %v1",), (1,) * len(UNITS), ((int(name[-1]), 16 if "bf16" in name else 8),))
                    for name in names)
    dump = Dump("x", UNITS, bundles, ())
    assert dump.mxu_cycles(0, 3) == 10 and dump.busiest_mxu(0, 3) == 32
    assert dump.cost(0, 3) == 32 and execute(dump).cycles == 32
    wide = dataclasses.replace(dump, units={**UNITS, "MXU": 2})   # v6e: two rows a cycle
    assert wide.busiest_mxu(0, 3) == 16


def test_files_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="1 bundles, but utilization of 2"):
        parse("x", "   0   : { %s1_s0 = smov 0 }", "MXU, VALU\n4 4\n0 0\n0 0")
    with pytest.raises(ValueError, match="region 9, which starts nowhere"):
        read_bundles("   0   : { %1 = sbr.rel target = $region9 }")


def test_comments_may_run_over_lines_and_hold_another():
    text = """  0   : { %1 = vsyncpa [#a], 0 } /* Start region 3 */
 0x1   : > { %2 = shalt.err (!%p1_p0) /* check of copy /*hbm=*/%s4, 64
shape {1}
 */ }
 0x2 PF: >> { %3 = sbr.rel (!%p1_p0) target = $region3  ;;  %4 = dma.x /*hbm=*/%s4_s4 /* base_bounds: (2, 4)
 */ } /* End region 3 */
"""
    bundles, (branch,) = read_bundles(text)
    assert [len(bundle) for bundle in bundles] == [1, 1, 2]
    assert bundles[2][1] == "%4 = dma.x hbm=%s4_s4"
    assert (branch.at, branch.target, branch.predicate, branch.negated, branch.delay) == (2, 0, "p1_p0", True, 4)


HLO = """HloModule m

%fused (p: f32[8]) -> f32[8] {
  ROOT %x = f32[8]{0} add(%p, %p), backend_config={"estimated_cycles":"999"}
}

ENTRY %main (q: bf16[8,128]) -> bf16[8,128] {
  %q = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %scaled = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%q), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"120"}
  %mine.1 = (bf16[8,128]{1,0}, f32[8]{0}) custom-call(%scaled), custom_call_target="tpu_custom_call", frontend_attributes={x={
"a":"{b}"
}}, metadata={op_name="jit(f)/transpose(jvp(g))/pallas_call"}
  %start = (bf16[8,128]{1,0}, bf16[8,128]{1,0}, u32[]) copy-start(%q)
  %odd = f32[256]{0} copy(%mine.1)
  ROOT %out = bf16[8,128]{1,0} fusion(%odd), calls=%fused, backend_config={"estimated_cycles":"9223372036854775807"}
}
"""


def test_what_xla_adds_is_priced_by_its_own_estimate():
    operations = tpu_hlo.entry_operations(HLO)
    assert [(op.name, tpu_hlo.is_backward(op)) for op in operations if tpu_hlo.is_kernel(op)] == [("mine.1", True)]
    total, costs = tpu_hlo.xla_cycles(operations, bytes_per_cycle=64)
    # odd and out have no estimate: written and read once. The copy beside the core and the kernel are not here.
    assert {name: cycles for name, _, cycles in costs} == {"scaled": 120, "odd": 2 * 1024 / 64, "out": 2 * 2048 / 64}
    assert total == 120 + 32 + 64
    with pytest.raises(ValueError, match="while"):
        tpu_hlo.entry_operations(HLO.replace("copy(%mine.1)", "while(%mine.1)"))


@dataclasses.dataclass
class Shape:
    seq_len: int
    window: int | None
    heads: int = 4
    kv_heads: int = 2


@pytest.mark.parametrize("window", [512, 300, None])
@pytest.mark.parametrize("fused", [True, False])
def test_splash_has_as_many_steps_and_tiles_as_we_count(window, fused):
    shape = Shape(2048, window)
    back = {"fused": [512, 256, 256]} if fused else {"dkv": [512, 256, 256], "dq": [128, 256]}
    setting = {"forward": [256, 512, 256], **back}
    _, infos = splash.build(shape, setting)
    assert len(infos) == len(setting)
    for part, info in infos.items():
        steps, tiles, _ = splash.numbers(shape, part, setting[part])
        assert info.block_mask.shape[0] == 1
        assert (info.block_mask.size, int((info.block_mask > 0).sum())) == (steps, tiles)


def test_packed_words_are_read_back_by_the_kernels_own_arithmetic():
    import numpy as np
    for kind, per in ((np.int8, 4), (np.int16, 2), (np.int32, 1)):
        array = np.arange(20 * 130).reshape(1, 20, 130).astype(kind)
        words, bits = splash.pack(array), 32 // per
        for i, j in ((0, 0), (3, 5), (9, 129), (19, 128)):
            # tiles of 8 x 128, two of them across; `per` rows to a word
            word = words[((i >> 3) * 2 + (j >> 7)) * (1024 // per) + ((i & 7) // per) * 128 + (j & 127)]
            value = (word >> (i % per * bits)) & (2**bits - 1)
            assert value == int(array[0, i, j]) & (2**bits - 1)
