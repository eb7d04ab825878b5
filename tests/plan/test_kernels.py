"""Prices of Pallas kernels: what steers them, how they are looked up, and what has none. libtpu itself: test_compile.py."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

import neo.config
from neo.errors import InputError
from neo.models.decoder import Decoder
from neo.plan import kernel_child, kernels, libtpu
from neo.plan.hlo import KernelCall, shapes
from neo.plan.kernel_dump import parse as parse_dump
from neo.plan.kernel_words import one_document
from neo.plan.plan import Compiled, MemoryUse
from neo.plan.topology import parse

SIZES = {"context": 1, "tensor": 1}
CONFIG = {"flag_configs": [], "scoped_memory_configs": [{"memory_space": "1", "offset": "0", "size": "50331648"}],
          "custom_call_config": {"body": "TUzvUg==", "serialization_format": "1", "needs_layout_passes": True,
                                 "debug_locations": "AAAA"}, "used_scoped_memory_configs": []}


def call(name="mine", operands="s32[4], bf16[8,128]", config=CONFIG):
    text = f'custom_call_target="tpu_custom_call", metadata={{op_name="{{b}}"}}, backend_config={json.dumps(config)}, more={{}}'
    return KernelCall(name, "tpu_custom_call", shapes(operands), shapes("f32[8]"), "", f", {text}")


def compiled(hlo="", **facts):
    return Compiled(hlo, MemoryUse(0, 0, 0, 1, "compiler"), 0.0, 0.0, "k", False, facts=facts)


@pytest.mark.parametrize("recipe", ["neo_7b", "moxin_7b", "mpt_7b"])
def test_scalar_operands_of_one_document_leave_no_tile_out(recipe):
    config = neo.config.load(recipe)
    phase = config.phases[0]
    decoder = Decoder(config.model, jnp.bfloat16, "full", "pallas_tpu")
    found = {entry["name"]: entry for entry in one_document(decoder, phase, SIZES, 2, "TPU v5 lite")}
    assert set(found) == {"neo_attention_forward", "neo_attention_backward"}
    for entry in found.values():
        for position, words in entry["words"].items():
            assert entry["operands"][int(position)] == f"s32[{len(words)}]"
            assert set(words) <= {0, 1, max(words)} and words.count(max(words)) != 0
    # Backward: smallest and largest id of each block are all 1; each block may meet all from the first to the last one.
    words = [np.array(words) for _, words in sorted(found["neo_attention_backward"]["words"].items(), key=lambda x: int(x[0]))]
    ids, (q_from, q_to, kv_from, kv_to) = words[:4], words[4:]
    assert all((part == 1).all() for part in ids)
    blocks_q, blocks_kv = len(ids[0]) // 2, len(ids[2]) // 2
    assert (q_from == 0).all() and (kv_from == 0).all()
    assert (q_to == blocks_q - 1).all() and (kv_to == blocks_kv - 1).all()


def test_no_words_where_no_kernel_of_neos_runs():
    config = neo.config.load("neo_7b")
    for attention, sizes in (("blockwise", SIZES), ("pallas_tpu", {"context": 2, "tensor": 1})):
        decoder = Decoder(config.model, jnp.bfloat16, "full", attention)
        assert one_document(decoder, config.phases[0], sizes, 1, "TPU v5") == []


def test_a_kernel_is_taken_out_of_the_program_with_what_the_compiler_needs():
    job = kernels.kernel_job(call(), compiled())
    assert job["config"] == {"custom_call_config": {"body": "TUzvUg==", "serialization_format": "1",
                                                    "needs_layout_passes": True},
                             "scoped_memory_configs": CONFIG["scoped_memory_configs"]}
    assert (job["operands"], job["results"], job["words"]) == (["s32[4]", "bf16[8,128]"], ["f32[8]"], None)
    known = [{"name": "mine", "operands": ["s32[4]", "bf16[9,128]"], "words": {"0": [9]}},
             {"name": "mine", "operands": ["s32[4]", "bf16[8,128]"], "words": {"0": [7]}}]
    assert kernels.kernel_job(call(), compiled(kernel_words=known))["words"] == {"0": [7]}
    for config in ({}, {"custom_call_config": {}}):
        with pytest.raises(InputError, match="kernel mine has no price: the program's text does not hold it"):
            kernels.kernel_job(call(config=config), compiled())


def test_a_price_is_of_one_kernel_shape_chip_and_compiler(monkeypatch):
    monkeypatch.setattr(libtpu, "version", lambda: "1")

    def key(one, topology="v5e:2x2"):
        return kernels.key_of(kernels.kernel_job(one, compiled()), parse(topology))

    base = key(call())
    assert base == key(call()) == key(call(), "v5e:16x16")
    body = {**CONFIG, "custom_call_config": {"body": "AAAA"}}
    assert len({base, key(call(), "v5p:2x2x1"), key(call(operands="s32[4], bf16[16,128]")), key(call(config=body))}) == 4
    monkeypatch.setattr(libtpu, "version", lambda: "2")
    assert key(call()) != base


def test_only_flags_that_reach_a_kernel_are_given_to_it():
    flags = ["--xla_tpu_enable_async_collective_fusion=true", "--xla_tpu_scoped_vmem_limit_kib=49152"]
    assert kernels.kernel_flags(compiled(flags=flags)) == ("--xla_tpu_scoped_vmem_limit_kib=49152",)


def branching():
    """A dump that jumps over five bundles if the first word of operand 0 is not 0."""
    lines = ["%s9_s9 = inlined_call_operand.vmem [shape: s32[4], index: 0, kind: input]",
             "%17 = dma.vmem_to_smem /*vmem=*/%s9_s9, /*size_in_granules=*/16, /*smem=*/[#allocation7]",
             "%s1_s1 = sld [smem:[#allocation7]]", "%p4_p0 = scmp.ne.s32.totalorder %s1_s1, 0",
             "%5 = sbr.rel (%p4_p0) target = $region4", "", "", "", "", "", "", "", "", "",
             "%s6_s2 = smov 1 } /* Start region 4 */"]
    text = "\n".join(f"  {hex(i) if i else '0':>4s}   : {{ {line} }}" for i, line in enumerate(lines))
    table = "MXU, VALU\n 4 4\n" + "\n".join(["0 0"] * len(lines))
    return parse_dump("mine", text, table)


def test_a_kernel_that_branches_on_unknown_words_has_no_price_unless_it_is_neos():
    job = {"name": "mine", "operands": ["s32[4]"], "words": None}
    assert "depends on %p4_p0" in kernel_child.count(job, branching(), 1, 64.0)["error"]
    assert "zeros" in kernel_child.count({**job, "name": "neo_mine"}, branching(), 1, 64.0)["note"]


def test_the_busier_core_or_the_copies_of_all_set_the_price():
    class Run:
        def __init__(self, cycles, read):
            self.cycles, self.bytes_read, self.bytes_written, self.steps = cycles, read, 0, 1
    assert kernels.price_of([Run(100, 0), Run(300, 0)], 2.0)["cycles"] == 300
    assert kernels.price_of([Run(100, 400), Run(300, 400)], 2.0)["cycles"] == 400


def test_a_missing_price_names_the_kernel(tmp_path, monkeypatch):
    monkeypatch.setattr(libtpu, "version", lambda: "1")
    hlo = ('HloModule m, is_scheduled=true\n\nENTRY %main (p: s32[4]) -> f32[8] {\n  %p = s32[4]{0} parameter(0)\n'
           '  ROOT %mine.1 = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call", '
           f'backend_config={json.dumps(CONFIG)}\n}}\n')

    def child(job, flags, what, progress, **options):
        (key, kernel), = job["kernels"].items()
        assert kernel["operands"] == ["s32[4]"] and options["module"] == "neo.plan.kernel_child"
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / f"{key}.json").write_text(json.dumps({"error": "it branches on a vector"}))
        return {"done": 1}, ""

    monkeypatch.setattr(kernels, "run_child", child)
    price = kernels.kernel_prices(compiled(hlo), parse("v5e:2x2"), cache=tmp_path)
    with pytest.raises(InputError, match=r"kernel mine\(s32\[4\]\) has no price: it branches on a vector"):
        price(call(operands="s32[4]"))
    with pytest.raises(InputError, match="kernel other is not one of"):
        price(call("other"))
    path, = (tmp_path / "kernels").iterdir()
    path.write_text(json.dumps({"name": "mine", "cycles": 12.0, "note": "all tiles"}))
    price = kernels.kernel_prices(compiled(hlo), parse("v5e:2x2"), cache=tmp_path)
    assert price(call(operands="s32[4]")) == 12.0 and price.notes == ("mine: all tiles",)
