"""Which implementation runs: by name, or by the device, once, with the reason."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from neo.errors import InputError, nearest
from neo.kernels.attention.kernel import Request

# At or below this length "auto" takes the dense implementation; above, another one. Ours, measured on 2 CPU cores,
# forward and backward, 8 heads of 32 or 64: dense is 1.3x faster at 32 tokens, level at 64 and 128, 1.6x slower at 256,
# 2x at 512. Inferred for other platforms.
DENSE_MAX_LENGTH = 128


class _Dense:
    """The readable form. It differentiates itself and takes what no kernel takes, so `api.attention` calls it directly."""

    name = "dense"

    @staticmethod
    def lacks(request: Request) -> str:
        if request.sequence_shards > 1:
            return f"a sequence split {request.sequence_shards} ways (mesh axis context); implementation='blockwise' has it"
        return ""


class _Lazy(Mapping[str, Any]):
    """name -> implementation, imported when first used: a CPU run never loads Pallas."""

    homes = {
        "dense": "",
        "blockwise": "neo.kernels.attention.blockwise",
        "pallas_tpu": "neo.kernels.attention.tpu",
        "pallas_gpu": "neo.kernels.attention.gpu",
        "cudnn": "neo.kernels.attention.cudnn",
    }

    def __getitem__(self, name: str) -> Any:
        home = self.homes[name]
        return importlib.import_module(home).KERNEL if home else _Dense

    def __iter__(self) -> Iterator[str]:
        return iter(self.homes)

    def __len__(self) -> int:
        return len(self.homes)


IMPLEMENTATIONS = _Lazy()

# What "auto" tries, in this order, on each platform, for sequences longer than DENSE_MAX_LENGTH.
PREFERRED = {"tpu": ("pallas_tpu",), "gpu": ("pallas_gpu",)}


def resolve(implementation: str, request: Request) -> tuple[str, str]:
    """Turn "auto" into the name of one implementation, and say why; call it once at start-up and log the reason.

    Errors: `InputError` for an unknown name, and for a named one that lacks what `request` asks for.
    """
    if implementation in IMPLEMENTATIONS:
        what = IMPLEMENTATIONS[implementation].lacks(request)
        if not what and implementation != "dense":
            what = _dense_only(request)
        if what:
            raise InputError(f"attention {implementation!r} lacks {what}")
        return implementation, "asked for by name"
    if implementation != "auto":
        known = ("auto", *IMPLEMENTATIONS)
        raise InputError(
            f"unknown attention implementation {implementation!r}{nearest(implementation, known)}; "
            f"known: {', '.join(known)}"
        )
    return _automatic(request)


def _dense_only(request: Request) -> str:
    """What no kernel has, because only decoding and bidirectional models ask for it."""
    keys, what = request.kv_len or request.seq_len, ""
    if request.q_offset:
        what = "q_offset (queries that stand elsewhere in each row, as in decoding)"
    elif request.causal and keys != request.seq_len:
        what = f"{keys} keys for {request.seq_len} queries (it needs one key per query)"
    elif not request.causal and request.alibi:
        what = "alibi_slopes with causal=False"
    return what and f"{what}; implementation='dense' has it"


def _automatic(request: Request) -> tuple[str, str]:
    where = request.device_kind or request.platform
    whole = request.sequence_shards == 1
    if whole and _dense_only(request):
        return "dense", "the kernels lack " + _dense_only(request).partition(";")[0]
    if whole and request.seq_len <= DENSE_MAX_LENGTH and request.platform == "cpu":
        return (
            "dense",
            f"{request.seq_len} tokens on {where}: up to {DENSE_MAX_LENGTH} the dense form is as fast and simpler",
        )
    missing = []
    # A GPU of unknown kind may be any: the kernels for Hopper run on nothing else. TPU kernels run on all of them.
    known = bool(request.device_kind) or request.platform != "gpu"
    for name in PREFERRED.get(request.platform, ()) if known else ():
        what = IMPLEMENTATIONS[name].lacks(request)
        if not what:
            return name, f"neo's own kernel for {where}"
        missing.append(f"; {name} lacks {what}")
    return (
        "blockwise",
        f"{request.seq_len} tokens on {where}: time and memory grow with the window, not with the square of the length"
        + "".join(missing),
    )
