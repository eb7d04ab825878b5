"""The tables of docs/kernels.md say what the code says."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

from neo.errors import InputError
from neo.kernels.attention import IMPLEMENTATIONS, resolve
from neo.kernels.attention.kernel import Request

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/kernels.md").read_text()

HOME = {"pallas_tpu": ("tpu", "TPU v5 lite"), "pallas_gpu": ("gpu", "NVIDIA H200"), "cudnn": ("gpu", "NVIDIA H200")}

# What each row of the table asks for; a cell is "yes" if the implementation takes all of it.
ASKED = {
    "full causal, window": ({}, dict(window=1), dict(window=512)),
    "MQA, GQA, MHA": tuple(dict(num_kv_heads=n) for n in (1, 2, 8)),
    "any T": tuple(dict(seq_len=T, kv_len=T) for T in (1, 129, 1001, 32768)),
    "segment ids": (dict(segments=True),),
    "ALiBi": (dict(alibi=True),),
    "soft-cap": (dict(softcap=True),),
    "sinks": (dict(sinks=True),),
    "log-sum-exp": (dict(lse=True),),
    "causal=False": (dict(causal=False), dict(causal=False, kv_len=512)),
    "queries elsewhere among the keys (decoding)": (dict(q_offset=True, seq_len=1),),
    "sequence split over devices": (dict(sequence_shards=4), dict(sequence_shards=4, window=512)),
    "bfloat16": ({},),
    "float32": (dict(dtype="float32"),),
    "head size 64, 80, 96, 128": tuple(dict(head_size=h) for h in (64, 80, 96, 128)),
    "head size 192, 256": (dict(head_size=192), dict(head_size=256)),
    "any head size": (dict(head_size=20), dict(head_size=320)),
}


def table_after(mark: str) -> list[list[str]]:
    """The cells of the first table behind a comment."""
    text = PAGE[PAGE.index(mark):]
    lines = re.search(r"(^\|.*\n)+", text, re.MULTILINE).group(0).splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def takes(name: str, change: dict) -> bool:
    platform, device_kind = HOME.get(name, ("cpu", "cpu"))
    request = Request(platform=platform, device_kind=device_kind, dtype="bfloat16", seq_len=2048, kv_len=2048, num_heads=8,
                      num_kv_heads=2, head_size=128)  # fmt: skip
    try:
        resolve(name, dataclasses.replace(request, **change))
    except InputError:
        return False
    return True


def test_every_implementation_has_a_column():
    (header, *_) = table_after("asks the code for every cell")
    assert header[1:] == list(IMPLEMENTATIONS)


@pytest.mark.parametrize("row", ASKED)
def test_table_of_implementations(row):
    header, _, *rows = table_after("asks the code for every cell")
    cells = {cells[0]: cells[1:] for cells in rows}
    assert set(cells) == set(ASKED) | {"runs on", "time and memory"}
    code = ["yes" if all(takes(name, change) for change in ASKED[row]) else "-" for name in header[1:]]
    assert cells[row] == code, f"docs/kernels.md: | {row} | {' | '.join(code)} |"


def test_homes():
    """"runs on": nothing but a TPU, a Hopper GPU, an NVIDIA GPU of Ampere or later."""
    devices = {"cpu": "cpu", "TPU v6 lite": "tpu", "NVIDIA H100 80GB HBM3": "gpu", "NVIDIA A100-SXM4-40GB": "gpu",
               "Tesla T4": "gpu"}  # fmt: skip
    runs = {}
    for name in IMPLEMENTATIONS:
        request = Request(platform="", dtype="bfloat16", seq_len=2048, num_heads=8, num_kv_heads=2, head_size=128)
        runs[name] = [kind for kind, platform in devices.items() if not IMPLEMENTATIONS[name].lacks(
            dataclasses.replace(request, platform=platform, device_kind=kind))]  # fmt: skip
    cpu, tpu, hopper, ampere, turing = devices
    assert runs == {"dense": [*devices], "blockwise": [*devices], "pallas_tpu": [tpu], "pallas_gpu": [hopper],
                    "cudnn": [hopper, ampere]}  # fmt: skip


def test_floors():
    """pairs, FLOPs and bytes from the definitions, times from the peaks that the table gives."""
    T, W, H, K, h = 32768, 4096, 32, 8, 128
    pairs = T * W - W * (W - 1) // 2
    q, k, row = 2 * T * H * h, 2 * T * K * h, 4 * T * H  # bytes: a tensor like q, one like k, a float32 a row
    flops = (4 * H * h * pairs, 10 * H * h * pairs)
    moved = (2 * q + 2 * k + row, 4 * q + 4 * k + 2 * row)
    _, _, *rows = table_after("computes the times from peak and bandwidth")
    assert len(rows) >= 5
    for name, peak, bandwidth, *times in rows:
        expected = [x for f, m in zip(flops, moved, strict=True) for x in (f / float(peak) / 1e9, m / float(bandwidth) / 1e9)]
        assert times == [f"{x:.2f}" for x in expected], f"{name}: {' | '.join(f'{x:.2f}' for x in expected)}"
    share = 100 * pairs / (T * (T + 1) / 2)
    for said in (f"{pairs / 1e6:.1f} million", f"{flops[0] / 1e12:.2f} TFLOP", f"{flops[1] / 1e12:.2f} TFLOP",
                 f"{moved[0] / 1e6:.0f} MB", f"{moved[1] / 1e6:,.0f} MB", f"{share:.0f} %"):  # fmt: skip
        assert re.search(re.escape(said).replace(r"\ ", r"\s+"), PAGE), said


def test_names_on_the_page_exist():
    """Files that the page points at in backticks."""
    for name in set(re.findall(r"`(?:python )?((?:neo|tests|bench|docs)/[\w/.]+)[ `]", PAGE)):
        assert (ROOT / name).exists(), name


def test_pictures_can_be_drawn(tmp_path):
    spec = importlib.util.spec_from_file_location("draw_band_grid", ROOT / "docs/draw_band_grid.py")
    drawing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawing)
    drawing.draw_band(tmp_path / "band.png")
    drawing.draw_ring(tmp_path / "ring.png")
    assert min(path.stat().st_size for path in tmp_path.iterdir()) > 10_000
    # What the picture of the ring says of the code: whose chunks are whose, and that zigzag is even.
    devices = [[device for row in drawing.visits(zigzag=True) for device, hop in row if hop == at] for at in range(4)]
    assert [[at.count(d) for d in range(4)] for at in devices] == [[3] * 4, [2] * 4, [2] * 4, [2] * 4]
