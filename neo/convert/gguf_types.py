"""Number types of a GGUF file: which tensor is stored in which, and turning rows of float32 into them.

The `gguf` package writes the plain types. K-quants need ggml's own C code: it is called, a block of rows at a time, in
whichever libggml is installed (the `xllamacpp` wheel or llama-cpp-python), so no second, unquantised file is ever written.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from neo.errors import InputError
from neo.extras import install_line, need

# Types as a user names them -> (ggml's type of most matrices, llama.cpp's number for the whole: llama_ftype in llama.h).
TYPES = {
    "f32": ("F32", 0), "f16": ("F16", 1), "bf16": ("BF16", 32), "q8_0": ("Q8_0", 7), "q4_0": ("Q4_0", 2), "q4_1": ("Q4_1", 3),
    "q5_0": ("Q5_0", 8), "q5_1": ("Q5_1", 9), "tq1_0": ("TQ1_0", 36), "tq2_0": ("TQ2_0", 37),
    "q2_k": ("Q2_K", 10), "q3_k_s": ("Q3_K", 11), "q3_k_m": ("Q3_K", 12), "q3_k_l": ("Q3_K", 13), "q4_k_s": ("Q4_K", 14),
    "q4_k_m": ("Q4_K", 15), "q5_k_s": ("Q5_K", 16), "q5_k_m": ("Q5_K", 17), "q6_k": ("Q6_K", 18),
    "iq4_nl": ("IQ4_NL", 25), "iq4_xs": ("IQ4_XS", 30),
}
# What a row whose length is no multiple of the type's block becomes instead (llama.cpp, tensor_type_fallback); else F16.
_SHORTER_BLOCKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0", "IQ4_XS": "IQ4_NL", "Q4_K": "Q5_0",
                   "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_ELEMENTS_AT_ONCE = 1 << 22   # ours: 16 MB of float32 per thread


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a matrix stands in the model: what the choice of its type may depend on."""

    role: str            # "output", "embedding", "value", "fused" (queries, keys, values), "down", "attention_output", "other"
    layer: int = 0
    num_layers: int = 1
    group: int = 1       # G, query heads per key/value head


def tensor_type(asked: str, place: Place, row: int) -> str:
    """ggml's name of the type for a matrix with rows of `row` numbers in a file of type `asked`.

    K-quants give more bits to the matrices where they matter most, as llama.cpp does (src/llama-quant.cpp,
    llama_tensor_get_type; for fused queries, keys and values as when the files of MPT that people use were made): sizes are
    those of its files. In the older 4- and 5-bit types the output matrix takes Q8_0.
    """
    kind = TYPES[asked][0]
    if place.role == "output" and kind not in ("F32", "F16", "BF16", "Q8_0"):
        kind = "Q8_0" if asked in ("q4_0", "q4_1", "q5_0", "q5_1", "tq1_0", "tq2_0") or row % 256 else "Q6_K"
    elif place.role == "embedding" and asked in ("tq1_0", "tq2_0"):
        kind = "Q8_0"
    elif asked in _MIXTURES:
        kind = _MIXTURES[asked](place) or kind
    return _fitting(kind, row)


def _fitting(kind: str, row: int) -> str:
    sizes = need("gguf", extra="gguf").GGML_QUANT_SIZES
    block = {one.name: size for one, (size, _) in sizes.items()}
    if row % block[kind]:
        kind = _SHORTER_BLOCKS.get(kind, "F16")
    return "F16" if row % block[kind] else kind


def _more_bits(place: Place) -> bool:
    """The first and last eighth of the layers, and every third one between."""
    first = place.num_layers // 8
    return place.layer < first or place.layer >= 7 * place.num_layers // 8 or (place.layer - first) % 3 == 2


def _early(place: Place, share: int) -> bool:
    return place.layer < place.num_layers // share


_MIXTURES: dict[str, Callable[[Place], str | None]] = {
    "q2_k": lambda p: {"value": "Q4_K" if p.group >= 4 else "Q3_K", "down": "Q3_K", "attention_output": "Q3_K"}.get(p.role),
    "q3_k_m": lambda p: {"value": "Q5_K" if p.layer < 2 else "Q4_K", "down": "Q5_K" if _early(p, 16) else "Q4_K",
                         "attention_output": "Q4_K", "fused": "Q4_K"}.get(p.role),
    "q3_k_l": lambda p: {"value": "Q5_K", "down": "Q5_K", "attention_output": "Q5_K", "fused": "Q4_K"}.get(p.role),
    "q4_k_s": lambda p: "Q5_K" if (p.role == "value" and p.layer < 4) or (p.role == "down" and _early(p, 8)) else None,
    "q4_k_m": lambda p: "Q5_K" if p.role == "fused" else "Q6_K" if p.role in ("value", "down") and _more_bits(p) else None,
    "q5_k_m": lambda p: "Q6_K" if p.role == "fused" or (p.role in ("value", "down") and _more_bits(p)) else None,
    "iq4_nl": lambda p: "Q5_K" if (p.role == "value" and p.group >= 4) or (p.role == "down" and _early(p, 8)) else None,
    "iq4_xs": lambda p: "Q5_K" if (p.role == "value" and p.group >= 4) or (p.role == "down" and _early(p, 8)) else None,
}


def check_type(asked: str) -> None:
    """InputError: no such type, or one that needs a library which is not installed."""
    if asked not in TYPES:
        raise InputError(f"--type: {asked!r} is none of {', '.join(TYPES)}")
    need("gguf", extra="gguf")
    if _needs_ggml(TYPES[asked][0]) and libggml() is None:
        raise InputError(f"--type={asked}: K-quants are made by ggml's own code, and no libggml is installed: "
                         f"{install_line('gguf')}, or write q8_0 here and use llama.cpp's llama-quantize; "
                         f"without it there are {', '.join(n for n, (kind, _) in TYPES.items() if not _needs_ggml(kind))}")


def _needs_ggml(kind: str) -> bool:
    return kind.endswith("_K") or kind.startswith("IQ")


@functools.cache
def libggml() -> Any:
    """ggml's quantisation as a loaded library, or None: of xllamacpp, else of llama-cpp-python."""
    for path in _candidates():
        try:
            library = ctypes.CDLL(str(path))
            function = library.ggml_quantize_chunk
        except (OSError, AttributeError):
            continue
        # size_t (type, const float * from, void * to, int64 first, int64 rows, int64 row, const float * importance), ggml.h
        function.restype = ctypes.c_size_t
        function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64,
                             ctypes.c_void_p]
        return library
    return None


def _candidates() -> Iterator[Path]:
    for package, patterns in (("xllamacpp", ("*.so", "*.pyd", "*.dylib")),
                              ("llama_cpp", ("lib/*ggml-base*", "lib/*ggml.*", "lib/*llama*"))):
        found = importlib.util.find_spec(package)   # found, not imported: only its machine code is wanted
        if found is not None and found.origin:
            for pattern in patterns:
                yield from sorted(Path(found.origin).parent.glob(pattern))


def encoded_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    """Shape in bytes of an array stored as `kind`."""
    gguf = need("gguf", extra="gguf")
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return (*shape[:-1], shape[-1] // block * size)


def encode(array: np.ndarray, kind: str, name: str) -> np.ndarray:
    """Rows of numbers as `kind`: uint8 of `encoded_shape`. Needs, beside both arrays, a few blocks of rows in float32.

    Raises InputError naming the tensor when it holds what is not a number, or a number too large for float16.
    """
    rows = array.reshape(-1, array.shape[-1])
    out = np.empty(encoded_shape(rows.shape, kind), np.uint8)
    step = max(_ELEMENTS_AT_ONCE // rows.shape[1], 1)

    def convert(start: int) -> None:
        part = np.ascontiguousarray(rows[start:start + step], np.float32)
        if not np.isfinite(part).all():
            raise InputError(f"tensor {name} holds NaN or infinity: the model is broken")
        out[start:start + step] = _encode_block(part, kind, name)

    starts = range(0, len(rows), step)
    if len(starts) == 1:
        convert(0)
    else:
        with ThreadPoolExecutor(min(len(starts), os.cpu_count() or 1, 16)) as pool:
            list(pool.map(convert, starts))
    return out.reshape(encoded_shape(array.shape, kind))


def _encode_block(part: np.ndarray, kind: str, name: str) -> np.ndarray:
    gguf = need("gguf", extra="gguf")
    quantisation = gguf.GGMLQuantizationType[kind]
    if kind == "F32":
        return part.view(np.uint8)
    if kind == "F16":
        with np.errstate(over="ignore"):
            half = part.astype(np.float16)
        if not np.isfinite(half).all():
            raise InputError(f"tensor {name} has values up to {np.abs(part).max():.3g}, float16 ends at 65504: "
                             "use --type=bf16 or f32")
        return half.view(np.uint8)
    if kind == "BF16":
        return part.astype(ml_dtypes.bfloat16).view(np.uint8)
    library = libggml()
    if library is None:
        return gguf.quants.quantize(part, quantisation).view(np.uint8)
    out = np.empty(encoded_shape(part.shape, kind), np.uint8)
    written = library.ggml_quantize_chunk(int(quantisation), part.ctypes.data, out.ctypes.data, 0, *part.shape, None)
    if written != out.nbytes:
        raise RuntimeError(f"ggml wrote {written} bytes of {name} as {kind} where {out.nbytes} were expected")
    return out
