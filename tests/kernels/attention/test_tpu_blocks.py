"""The table of tile sizes and how a shape finds its row."""

from __future__ import annotations

import pytest

from neo.errors import InputError
from neo.kernels.attention.kernel import Request
from neo.kernels.attention.tpu import KERNEL, blocks


def test_table_is_usable_as_it_is():
    """Every row parses into blocks that the kernels accept, for a chip that is known, once."""
    rows = blocks.table()
    assert rows and len({(r.chip, r.seq_len, r.window, r.head, r.stack, r.direction) for r in rows}) == len(rows)
    for row in rows:
        assert row.chip in blocks.VMEM
        with blocks.for_chip(row.chip):
            if row.direction == "forward":
                found = blocks.forward_blocks(row.seq_len, row.window, row.head, row.stack)
                assert found.block_q % found.block_kv == 0 and found.block_q % found.chunk(row.stack, edge=True)[1] == 0
            else:
                found = blocks.backward_blocks(row.seq_len, row.window, row.head, row.stack)
                assert found.block_kv % found.block_q == 0
        assert found.block_q % 128 == 0 and found.block_kv % 128 == 0
        for word in row.blocks.split():  # nothing of a row's own is changed on the way, `vmem` apart
            name, value = word.split("=")
            assert int(getattr(found, name)) == int(value)
        assert found.vmem <= 0.8 * blocks.VMEM[row.chip]


@pytest.fixture
def rows(monkeypatch):
    def row(chip, T, W, h, G, b):
        return blocks.Row(chip, T, W, h, G, "forward", f"block_q={b} block_kv=256 newton=1")

    few = (row("v5e", 8192, 4096, 128, 4, 256), row("v5e", 8192, None, 256, 4, 512), row("v6e", 8192, 4096, 128, 4, 1024))
    monkeypatch.setattr(blocks, "table", lambda: few)


@pytest.mark.parametrize(
    "chip, shape, block_q",
    [
        ("v5e", (8192, 4096, 128, 4), 256),
        ("v5e", (32768, 4096, 80, 4), 256),  # 80 fills one register as 128 does
        ("v5e", (32768, 4096, 192, 4), 512),  # 192 takes two, as 256
        ("v6e", (8192, 4096, 256, 4), 1024),  # a chip's own rows come before the head size
        ("tpu7x", (8192, 4096, 128, 4), 1024),  # no rows: those of the chip with the same matrix units
        ("v5p", (8192, 4096, 128, 4), 256),
        ("v5e", (8192, 4096, 128, 1), 1024),  # as many rows of queries in a tile
        ("v5e", (8192, 4096, 128, 32), 128),
        ("v6e", (200, None, 128, 4), 256),  # no larger than the sequence
    ],
)
def test_nearest_row(rows, chip, shape, block_q):
    with blocks.for_chip(chip):
        found = blocks.forward_blocks(*shape)
    assert found.block_q == block_q and found.newton is True


def test_wide_operands_take_half_tiles(rows):
    with blocks.for_chip("v6e"):
        assert blocks.forward_blocks(8192, 4096, 128, 4, wide=True).block_q == 512


def test_default_chip_and_unknown_names():
    assert blocks.chip() in blocks.VMEM
    for kind, name in {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}.items():
        assert blocks.chip(kind) == name
    assert blocks.chip("cpu") == blocks.chip()
    with_turned = [blocks.backward_blocks(8192, 4096, 128, 4, device_kind=kind).turned for kind in ("TPU v5", "TPU v6 lite")]
    assert with_turned == [False, True]
    with blocks.for_chip("v6e"):
        assert blocks.chip() == "v6e"
    with pytest.raises(InputError, match="unknown TPU 'v6'.*known: v5e"), blocks.for_chip("v6"):
        pass
    assert {blocks.CHIPS[kind] for kind in ("v5 lite", "v5p", "v6 lite", "7x")} == set(blocks.VMEM)


def test_what_is_lacking():
    good = Request("tpu", "bfloat16", 8192, 32, 8, 128)
    assert KERNEL.lacks(good) == ""
    for change, text in (
        ({"platform": "cpu"}, "a TPU: it is to run on cpu"),
        ({"dtype": "float16"}, "dtype float16"),
        ({"head_size": 72}, "head size 72"),
        ({"num_heads": 6, "num_kv_heads": 4}, "6 query heads over 4"),
        ({"kv_len": 100}, "8192 queries, 100 keys"),
        ({"window": 5, "causal": False}, "a window without causal"),
    ):
        assert text in KERNEL.lacks(good.__class__(**{**good.__dict__, **change}))
    assert KERNEL.lacks(good.__class__(**{**good.__dict__, "platform": "cpu", "interpret": True})) == ""
