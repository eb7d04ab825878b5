"""One suite of rules for every implementation of attention: numbers, hidden keys, determinism, JAX's transformations.

Each rule runs over a table of calls (`CASES`) whose sizes are multiples of the implementation's block, b. A call is
compiled once and shared by the rules. Pallas kernels are interpreted. `-m slow` runs wider sweeps.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.ad_checkpoint import checkpoint_policies
from jax.extend.core import Var
from jax.test_util import check_grads

from neo.kernels.attention import Mask, attention
from neo.kernels.attention.kernel import LSE_NAME, OUT_NAME, Extras, Kernel

from .cases import GRADIENTS, REGIMES, Arrays, Case, draw, judge, seen, windows


def tiles_read(case: Case, arrays: Arrays, b: int) -> np.ndarray:
    """[B, T, S] bool: the keys that may be multiplied with each query by a kernel of b x b tiles that skips what it can:
    tiles without a visible pair by position, those before first_key's, and those whose ranges of ids do not meet."""
    places = seen(case, arrays._replace(segment_ids=None, kv_segment_ids=None, first_key=None))
    read = np.zeros(places.shape, bool)
    for i in range(0, case.T, b):
        for j in range(0, case.S, b):
            tile = np.s_[:, i : i + b, j : j + b]
            read[tile] = places[tile].any((1, 2), keepdims=True) & (j + b > (case.first_key or 0))
            if case.segments:
                mine, other = arrays.segment_ids[:, i : i + b], arrays.kv_segment_ids[:, j : j + b]
                meet = (mine.min(1) <= other.max(1)) & (other.min(1) <= mine.max(1))
                read[tile] &= meet[:, None, None]
    return read


def bands_read(case: Case, arrays: Arrays, b: int) -> np.ndarray:
    """The same for `blockwise`: a block of queries takes the whole band of keys that its window reaches."""
    read = np.zeros((case.B, case.T, case.S), bool)
    reach = case.S if case.window is None or not case.causal else b + -(-(case.window - 1) // b) * b
    for i in range(0, case.T, b):
        end = case.offset + i + b if case.window is not None else case.S
        read[:, i : i + b, max(0, end - reach) : max(end, reach)] = True
    return read


@dataclasses.dataclass(frozen=True)
class Subject:
    """An implementation under test. b: its block here. has: the calls it can do. reads: see `tiles_read`.

    make: its Kernel with blocks of b, or None for what only the entry point gives. quick: which of `cases` are not marked
    slow. regimes: how many kinds of input are tried in each call (the interpreters differ by a factor of 100 in speed).
    bases: see `judge`; with 2 where the queries are rounded with log2(e) in them.
    """

    name: str
    b: int
    make: Callable[[int], Kernel] | None
    interpret: object = False
    has: Callable[[Case], bool] = lambda case: True
    reads: Callable[[Case, Arrays, int], np.ndarray] = tiles_read
    quick: tuple[int, ...] = tuple(range(14))
    regimes: int = len(REGIMES)
    bases: tuple[float, ...] = (np.e,)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")

    def __str__(self) -> str:
        return self.name

    def can(self, case: Case) -> Case:
        """The call in a dtype that this one has."""
        return case if case.dtype in self.dtypes else dataclasses.replace(case, dtype=self.dtypes[0])

    @functools.cached_property
    def kernel(self) -> Kernel:
        return self.make(self.b)

    def attend(self, case: Case) -> Callable[..., tuple[Any, Any]]:
        """(q, k, v, extras) -> (out, lse), differentiable."""
        if self.make is not None:
            plan = case.plan(self.interpret)
            return lambda q, k, v, extras: self.kernel.attend(q, k, v, extras, plan)

        def through_the_entry(q, k, v, extras):
            offset = jnp.full(case.B, case.offset, jnp.int32) if case.offset else None
            return attention(
                q, k, v, mask=Mask(case.causal, case.window), segment_ids=extras.segment_ids, q_offset=offset,
                kv_segment_ids=extras.kv_segment_ids, scale=case.scale, alibi_slopes=extras.slopes, sinks=extras.sinks,
                softcap=case.softcap, implementation=self.name, return_lse=True,
            )  # fmt: skip

        return through_the_entry


def blockwise(b: int) -> Kernel:
    from neo.kernels.attention.blockwise import KERNEL

    return with_options(KERNEL, {"block": b}, {"block": b})


def pallas_tpu(b: int, **backward: Any) -> Kernel:
    from neo.kernels.attention.tpu import KERNEL
    from neo.kernels.attention.tpu.backward import BackwardBlocks
    from neo.kernels.attention.tpu.blocks import ForwardBlocks

    return with_options(KERNEL, {"blocks": ForwardBlocks(b, b, b)}, {"blocks": BackwardBlocks(b, b), **backward})


def pallas_gpu(b: int) -> Kernel:
    from neo.kernels.attention.gpu import KERNEL

    return KERNEL


def with_options(kernel: Kernel, forward: dict[str, Any], backward: dict[str, Any]) -> Kernel:
    """The kernel with its blocks given instead of looked up."""
    return dataclasses.replace(kernel, forward=functools.partial(kernel.forward, **forward),
                               backward=functools.partial(kernel.backward, **backward))  # fmt: skip


SUBJECTS = [
    Subject("dense", 16, None, has=lambda case: case.first_key is None, quick=(1, 2, 4, 6, 8, 9)),
    Subject("blockwise", 16, blockwise, reads=bands_read),
    Subject("pallas_tpu", 128, pallas_tpu, interpret=True, bases=(np.e, 2.0), quick=(2, 3, 4, 6, 7, 8, 9, 12, 14), regimes=3),
]
# The interpreter of JAX 0.10 has no rule for what these kernels do. That of 0.12 blocks one of XLA's threads for each
# warpgroup and copy in flight: with too few (NPROC of them, else one a core) it stops for ever.
GPU_INTERPRETER = hasattr(plgpu, "InterpretGPUParams") and int(os.environ.get("NPROC", 0)) >= 8
if GPU_INTERPRETER:
    plainly = plgpu.InterpretGPUParams(num_tma_threads_per_device=4)
    SUBJECTS.append(Subject("pallas_gpu", 128, pallas_gpu, interpret=plainly, quick=(14,), regimes=1, dtypes=("bfloat16",)))
BY_NAME = {subject.name: subject for subject in SUBJECTS}


def cases(b: int) -> list[Case]:
    """Every option, head count, head size and kind of window at least once, with one another, in few compilations."""
    return [
        Case(2 * b + b // 3, heads=(2, 2), B=2),
        Case(2 * b, 1, heads=(4, 2), h=80),
        Case(b + 5, 2, softcap=2.0, heads=(2, 2), segments="gaps"),
        Case(2 * b, b - 1, heads=(4, 1), segments="packed"),
        Case(2 * b, b, offset=b + b // 2, alibi=True, sinks=True, heads=(4, 2)),
        Case(3 * b - 1, b + 1, h=128, dtype="bfloat16"),
        Case(2 * b + 7, 2 * b, h=192, alibi=True, softcap=5.0, sinks=True, segments="packed", dtype="bfloat16"),
        Case(2 * b, 2 * b - 1, first_key=b + 3, heads=(4, 2), h=96),
        Case(2 * b, 2 * b, h=256, dtype="bfloat16", segments="gaps", sinks=True),
        Case(2 * b - 5, causal=False, keys=2 * b + 9, segments="packed", heads=(4, 2), dtype="bfloat16"),
        Case(b, causal=False, keys=b, offset=2 * b, alibi=True, softcap=3.0, first_key=7, sinks=True, scale=0.2),
        Case(b + 3, offset=2 * b - 1, first_key=b, sinks=True, heads=(4, 2), segments="gaps"),
        Case(5, 9, alibi=True, dtype="bfloat16", B=3),
        Case(1),
        # Everything at once, as small as a kernel that takes seconds a call needs it.
        Case(b + 9, b // 2 + 1, offset=b, segments="gaps", softcap=4.0, alibi=True, sinks=True, first_key=5),
    ]


def each(wanted: Callable[[Case], bool] = lambda case: True) -> Any:
    """Parametrize by subject and case."""
    some = []
    for subject in SUBJECTS:
        for n, case in enumerate(map(subject.can, cases(subject.b))):
            if subject.has(case) and wanted(case):
                marks = [] if n in subject.quick else [pytest.mark.slow]
                some.append(pytest.param(subject, case, id=f"{subject}-{case}", marks=marks))
    return pytest.mark.parametrize(("subject", "case"), some)


def every(fp32: bool = False, slow: Callable[[Subject], bool] = lambda subject: False) -> Any:
    """Parametrize by subject: those that have fp32, and marked slow where `slow` says so."""
    some = [s for s in SUBJECTS if not fp32 or "float32" in s.dtypes]
    return pytest.mark.parametrize(
        "subject", [pytest.param(s, id=s.name, marks=[pytest.mark.slow] if slow(s) else []) for s in some]
    )


def interpreted(subject: Subject) -> bool:
    """Compiling takes seconds."""
    return bool(subject.interpret)


@functools.cache
def compiled(name: str, case: Case) -> Callable[..., dict[str, Any]]:
    attend = BY_NAME[name].attend(case)

    @jax.jit
    def run(q, k, v, extras: Extras, dout, dlse):
        def call(q, k, v, sinks):
            return attend(q, k, v, extras._replace(sinks=sinks))

        (out, lse), pull = jax.vjp(call, q, k, v, extras.sinks)
        return {"out": out, "lse": lse} | dict(zip(GRADIENTS, pull((dout, dlse)), strict=True))

    return run


def run(subject: Subject, case: Case, arrays: Arrays) -> dict[str, np.ndarray]:
    """out, lse, dq, dk, dv, dsinks (None without sinks)."""
    got = compiled(subject.name, case)(arrays.q, arrays.k, arrays.v, arrays.extras, arrays.dout, arrays.dlse)
    assert got["out"].dtype == got["dq"].dtype == got["dk"].dtype == got["dv"].dtype == arrays.q.dtype
    assert got["lse"].dtype == np.float32
    return {name: None if x is None else np.asarray(x) for name, x in got.items()}


@functools.cache
def base(name: str, case: Case) -> tuple[Arrays, dict[str, np.ndarray]]:
    """One draw of inputs and what comes of it; what the rules below change something about."""
    arrays = draw(case, 1)
    return arrays, run(BY_NAME[name], case, arrays)


def differs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Elementwise, to the last bit; 0 and -0 are the same, NaN is equal to nothing."""
    return a != b


def by_row(x: np.ndarray) -> np.ndarray:
    """[B, H, T] as [B, T, H]."""
    return x.swapaxes(1, 2)


def rows_equal(a: dict, b: dict, rows: np.ndarray, what: str) -> None:
    """out, lse and dq are bit for bit the same in these rows [B, T]."""
    for name in ("out", "lse", "dq"):
        x, y = (by_row(z[name]) if name == "lse" else z[name] for z in (a, b))
        bad = differs(x, y).reshape(*rows.shape, -1).any(-1) & rows
        assert not bad.any(), f"{what}: {name} changed in rows {np.argwhere(bad)[:5].tolist()}"


def keys_equal(a: dict, b: dict, keys: np.ndarray, what: str) -> None:
    """dk and dv are bit for bit the same at these keys [B, S]."""
    for name in ("dk", "dv"):
        bad = differs(a[name], b[name]).any((2, 3)) & keys
        assert not bad.any(), f"{what}: {name} changed at keys {np.argwhere(bad)[:5].tolist()}"


@pytest.mark.skipif(not GPU_INTERPRETER, reason="Mosaic GPU's interpreter needs JAX 0.11 and NPROC=8 or more")
def test_gpu_kernels_are_among_these():
    assert "pallas_gpu" in BY_NAME


# ---- numbers


def check_numbers(subject: Subject, case: Case, arrays: Arrays, where: str) -> None:
    options = {"two_sided": True} if subject.make is None else {}
    ratios = judge(case, arrays, run(subject, case, arrays), subject.bases, **options)
    bad = {name: round(ratio, 2) for name, ratio in ratios.items() if not ratio <= 1}
    assert not bad, f"{where}: error / allowed is {bad}"


@each()
def test_error_is_at_most_twice_that_of_the_plain_form(subject, case):
    """FlashAttention's rule against float64: out, lse and all gradients, for random cotangents of out and of lse."""
    turn = sum(map(ord, str(case)))  # a slow interpreter tries another kind of input in each call
    for n in range(subject.regimes):
        spread, kind = REGIMES[(turn + n) % len(REGIMES)]
        check_numbers(subject, case, draw(case, 0, spread, kind), f"logits of {spread}, {kind}")


@st.composite
def calls(draw_: Any, b: int) -> Case:
    """Any call that a kernel may be asked."""
    causal = draw_(st.booleans()) or draw_(st.booleans())
    T = draw_(st.one_of(st.integers(1, 3 * b), st.sampled_from([b - 1, b, b + 1, 2 * b, 3 * b])))
    offset = draw_(st.one_of(st.just(0), st.integers(0, 2 * b)))
    keys = None if causal else draw_(st.integers(1, 3 * b))
    S = offset + T if keys is None else keys
    dtype = draw_(st.sampled_from(["float32", "bfloat16"]))
    return Case(
        T,
        draw_(st.sampled_from(windows(S, b))) if causal else None,
        heads=draw_(st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3), (6, 2), (4, 1), (8, 1)])),
        h=draw_(st.sampled_from([64, 80, 96, 128, 192, 256])),
        B=draw_(st.integers(1, 2)),
        causal=causal,
        offset=offset,
        keys=keys,
        segments=draw_(st.sampled_from(["", "packed", "gaps"])),
        softcap=draw_(st.sampled_from([None, None, 0.7, 30.0])),
        alibi=draw_(st.booleans()),
        sinks=draw_(st.booleans()),
        first_key=draw_(st.one_of(st.none(), st.integers(0, S + 1))),
        dtype=dtype,
        scale=draw_(st.sampled_from([None, None, 0.05])),
    )


def sweep(subject: Subject, examples: int) -> None:
    some = calls(subject.b).map(subject.can).filter(subject.has)

    @given(case=some, seed=st.integers(0, 2**31), regime=st.sampled_from(REGIMES))
    @settings(max_examples=examples, deadline=None, print_blob=False, phases=[Phase.explicit, Phase.generate])
    def check(case, seed, regime):
        check_numbers(subject, case, draw(case, seed, *regime), f"{case}, logits of {regime}, seed {seed}")

    check()


@every(slow=interpreted)
def test_any_call(subject):
    """Few here, the same in each run."""
    sweep(subject, 4)


@pytest.mark.slow
@every()
def test_any_call_of_many(subject):
    sweep(subject, 60)


def equations(jaxpr: Any) -> Iterator[Any]:
    """Those of a jaxpr and of the jaxprs in it, those of Pallas kernels too, that something depends on. (XLA drops the
    others; JAX 0.10 keeps every `pallas_call` in its jaxprs, 0.12 those of Mosaic GPU.)"""
    used, live = {v for v in jaxpr.outvars if isinstance(v, Var)}, []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or not used.isdisjoint(equation.outvars):
            used |= {v for v in equation.invars if isinstance(v, Var)}
            live.append(equation)
    for equation in reversed(live):
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def products(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The matrix products that a call does, as equations."""
    found = equations(jax.make_jaxpr(function)(*arguments).jaxpr)
    return [x for x in found if x.primitive.name in ("dot_general", "wgmma_ref")]


@every(fp32=True)
def test_fp32_products_are_asked_for_in_fp32(subject):
    """By default a TPU rounds the operands of a product to bf16, a GPU to TF32; no test on a CPU would see it."""
    case = Case(subject.b, 5, softcap=2.0, segments="packed", sinks=True)
    arrays, attend = draw(case), subject.attend(case)
    highest = (jax.lax.Precision.HIGHEST,) * 2

    def loss(q, k, v):
        return sum(x.sum() for x in attend(q, k, v, arrays.extras))

    found = products(jax.grad(loss, (0, 1, 2)), *arrays[:3])
    assert len(found) >= 5 and all(x.params["precision"] == highest for x in found)


# ---- what must not be seen


def hidden(case: Case, arrays: Arrays, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Some rows [B, T], half of them in one stretch, and the keys [B, S] that none of these rows sees."""
    rows = rng.random((case.B, case.T)) < 0.1
    start = rng.integers(case.T)
    rows[:, start : start + max(1, case.T // 4)] = True
    return rows, ~(seen(case, arrays) & rows[..., None]).any(1)


@each()
def test_hidden_keys_have_no_gradient(subject, case):
    """The cotangents of some rows alone: dk and dv are exactly 0 at the keys these rows do not see, and only there."""
    arrays, _ = base(subject.name, case)
    rows, unseen = hidden(case, arrays, np.random.default_rng(2))
    only = arrays._replace(dout=np.where(rows[..., None, None], arrays.dout, 0).astype(arrays.dout.dtype),
                           dlse=np.where(rows[:, None], arrays.dlse, 0))  # fmt: skip
    got = run(subject, case, only)
    for name in ("dk", "dv"):
        touched = (got[name] != 0).any((2, 3))
        assert not (touched & unseen).any(), f"{name} of keys {np.argwhere(touched & unseen)[:5].tolist()}"
        assert (touched | unseen).all(), f"{name} is 0 at visible keys {np.argwhere(~touched & ~unseen)[:5].tolist()}"
    empty = ~seen(case, arrays).any(-1)
    assert not got["dq"][~rows | empty].any(), "dq of rows without a cotangent or without keys"


@each()
def test_hidden_keys_change_nothing(subject, case):
    """Other keys and values, a thousand times as large, where some rows do not see them: these rows are bit-identical, and
    so are the gradients of the keys that only such rows see."""
    arrays, before = base(subject.name, case)
    _, unseen = hidden(case, arrays, np.random.default_rng(4))
    other = draw(case, 5)
    k, v = (np.where(unseen[..., None, None], 1000 * y.astype(np.float32), x.astype(np.float32)).astype(x.dtype)
            for x, y in ((arrays.k, other.k), (arrays.v, other.v)))  # fmt: skip
    after = run(subject, case, arrays._replace(k=k, v=v))
    sees = seen(case, arrays)
    touched = (sees & unseen[:, None]).any(-1)
    rows_equal(before, after, ~touched, "changing hidden keys")
    keys_equal(before, after, ~(sees & touched[..., None]).any(1) & ~unseen, "changing hidden keys")
    if touched.any():
        assert differs(before["out"], after["out"])[touched].any()  # the rows that do see them changed


@each()
def test_blocks_out_of_reach_are_never_read(subject, case):
    """NaN in a block of keys and values reaches no query block that sees nothing of it, nor the keys beyond those."""
    if subject.make is None:
        pytest.skip("the dense form reads everything")
    (arrays, clean), b = base(subject.name, case), subject.b
    reads = subject.reads(case, arrays, b)
    tested = 0
    for start in range(0, case.S, b):
        poison = np.zeros((case.B, case.S), bool)
        poison[:, start : start + b] = True
        bad_rows = (reads & poison[:, None]).any(-1)
        bad_keys = poison | (reads & bad_rows[..., None]).any(1)
        if bad_rows.all():
            continue
        tested += 1
        k, v = (np.where(poison[..., None, None], np.nan, x).astype(x.dtype) for x in (arrays.k, arrays.v))
        got = run(subject, case, arrays._replace(k=k, v=v))
        what = f"NaN in keys {start} to {min(start + b, case.S) - 1}"
        rows_equal(clean, got, ~bad_rows, what)
        keys_equal(clean, got, ~bad_keys, what)
        if not bad_rows.any():
            assert not any(got[name][poison].any() for name in ("dk", "dv")), f"{what}: the gradient there is not 0"
            assert got["dsinks"] is None or not differs(got["dsinks"], clean["dsinks"]).any()
    if case.window is not None and case.window + 2 * b - 1 <= case.S and b < case.T:
        assert tested, "this call has blocks that some query block does not reach"


@each()
def test_twice_the_same_bits(subject, case):
    arrays, first = base(subject.name, case)
    second = run(subject, case, arrays)
    for name, x in first.items():
        assert x is None or not differs(x, second[name]).any(), name


@each(lambda case: case.segments == "gaps")
def test_rows_that_see_nothing(subject, case):
    """Zeros, lse -inf, no gradients and never NaN, also when nothing at all is visible; with a sink, lse is the sink."""
    T = case.T
    for strangers in (slice(T // 2, T // 2 + T // 4), slice(None)):
        arrays = draw(case, 8)
        arrays.segment_ids[:, strangers] = 2  # the keys' ids are multiples of 3
        got = run(subject, case, arrays)
        assert not got["out"][:, strangers].any() and not got["dq"][:, strangers].any()
        lse = by_row(got["lse"])[:, strangers]
        np.testing.assert_allclose(lse, np.broadcast_to(arrays.sinks if case.sinks else -np.inf, lse.shape), rtol=1e-5)
        assert max(judge(case, arrays, got, subject.bases).values()) <= 1
        if strangers == slice(None):
            assert not got["dk"].any() and not got["dv"].any()
            if case.sinks:
                np.testing.assert_allclose(got["dsinks"], arrays.dlse.sum((0, 2)), rtol=1e-5)


def test_the_other_interpreter_of_tpu_kernels():
    """Pallas' model of a TPU (memories, copies, two cores) gives the same and sees no race."""
    from jax.experimental.pallas import tpu as pltpu

    subject = BY_NAME["pallas_tpu"]
    model = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    case = Case(subject.b + 9, 40, heads=(4, 2), sinks=True, segments="packed", dtype="bfloat16")
    arrays = draw(case, 17)

    @jax.jit
    def call(q, k, v):
        attend = functools.partial(subject.kernel.attend, extras=arrays.extras, plan=case.plan(model))
        (out, lse), pull = jax.vjp(attend, q, k, v)
        return out, lse, *pull((arrays.dout, arrays.dlse))

    got = dict(zip(("out", "lse", "dq", "dk", "dv"), call(*arrays[:3]), strict=True))
    assert max(judge(case, arrays, got, subject.bases).values()) <= 1
    races = importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call").races
    assert races is None or not races.races_found  # JAX 0.12 also raises


# ---- equal calls


@each(lambda case: case.window == case.T)
def test_a_window_over_everything_is_plain_causal(subject, case):
    """Bit for bit."""
    arrays = draw(case, 9, 3.0)
    want = run(subject, dataclasses.replace(case, window=None), arrays)
    for window in (case.T, *(() if subject.interpret else (case.T + 1, 100 * case.T))):
        got = run(subject, dataclasses.replace(case, window=window), arrays)
        for name in ("out", "lse", "dq", "dk", "dv"):
            assert not differs(got[name], want[name]).any(), f"window {window} of {case.T} keys: {name}"


@every(fp32=True, slow=interpreted)
def test_grouped_heads_equal_repeated_keys(subject):
    case = Case(2 * subject.b, subject.b + 2, heads=(6, 2))
    arrays = draw(case, 10)
    got = run(subject, case, arrays)
    whole = run(subject, dataclasses.replace(case, heads=(6, 6)),
                arrays._replace(k=np.repeat(arrays.k, 3, 2), v=np.repeat(arrays.v, 3, 2)))  # fmt: skip
    for name in ("out", "lse", "dq", "dk", "dv"):
        want = whole[name].reshape(*arrays.k.shape[:3], 3, -1).sum(3) if name in ("dk", "dv") else whole[name]
        np.testing.assert_allclose(got[name], want, rtol=2e-5, atol=2e-5, err_msg=name)


@every(fp32=True, slow=interpreted)
def test_packed_documents_equal_documents_alone(subject):
    b = subject.b
    case = Case(2 * b, b // 2 + 3, heads=(4, 2), segments="packed", alibi=True, sinks=True)
    arrays = draw(case, 11)
    cut = b // 2 + 1
    arrays.segment_ids[:], arrays.kv_segment_ids[:] = (np.where(np.arange(2 * b) < cut, 4, 9) for _ in range(2))
    together = run(subject, case, arrays)
    for part in (slice(0, cut), slice(cut, None)):
        q, k, v, dout = (x[:, part] for x in arrays[:4])
        alone = Arrays(q, k, v, dout, arrays.dlse[..., part], slopes=arrays.slopes, sinks=arrays.sinks)
        got = run(subject, dataclasses.replace(case, T=q.shape[1], segments=""), alone)
        for name in ("out", "dq", "dk", "dv"):
            np.testing.assert_allclose(together[name][:, part], got[name], rtol=2e-5, atol=2e-5, err_msg=name)
        np.testing.assert_allclose(together["lse"][..., part], got["lse"], rtol=2e-5, atol=2e-5)


# ---- JAX


@every(fp32=True)
def test_gradients_equal_finite_differences(subject):
    case = Case(11, 5, heads=(2, 1), h=64, softcap=3.0, alibi=True, sinks=True)
    arrays = draw(case, 12)
    attend = subject.attend(case)
    weights = arrays.dout, arrays.dlse

    @jax.jit
    def loss(q, k, v, sinks):
        out, lse = attend(q, k, v, arrays.extras._replace(sinks=sinks))
        return (out * weights[0]).sum() + (lse * weights[1]).sum()

    check_grads(loss, (arrays.q, arrays.k, arrays.v, arrays.sinks), order=1, modes=["rev"], eps=3e-2, atol=2e-2, rtol=2e-2)


@every(fp32=True)
def test_scan_remat_and_donation_change_nothing(subject):
    """Three layers in a scan under a remat policy that keeps out and lse, with donated inputs, and the same unrolled."""
    case = Case(subject.b + 5, subject.b // 2, heads=(2, 1))
    arrays = draw(case, 13)

    def gradients(attend, several, **options):
        def loss(q, k, v):
            return (several(lambda x: x + attend(x, k, v, Extras())[0], q) * arrays.dout).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2)), **options)

    def scanned(layer, x):
        policy = checkpoint_policies.save_only_these_names(OUT_NAME, LSE_NAME)
        layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
        return jax.lax.scan(lambda x, _: (layer(x), None), x, None, length=3)[0]

    plain = BY_NAME["dense"].attend(case)
    want = gradients(plain, lambda layer, x: layer(layer(layer(x))))(*arrays[:3])
    got = gradients(subject.attend(case), scanned, donate_argnums=(0, 1, 2))(*(jnp.array(x) for x in arrays[:3]))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@every()
def test_remat_policies_find_out_and_lse(subject):
    """With both kept the backward does not run the forward again: it has fewer products by those of one forward."""
    if subject.make is None:
        pytest.skip("the dense form recomputes")
    case = subject.can(Case(2 * subject.b, subject.b, heads=(4, 2)))
    arrays, plan = draw(case, 14), case.plan(False)  # traced only; the GPU interpreter's effects have no remat

    def forward(q, k, v):
        return subject.kernel.attend(q, k, v, Extras(), plan)[0].sum()

    def count(policy):
        gradient = jax.value_and_grad(jax.checkpoint(forward, policy=policy, prevent_cse=False), (0, 1, 2))
        return len(products(gradient, *arrays[:3]))

    kept = count(checkpoint_policies.save_only_these_names(OUT_NAME, LSE_NAME))
    assert count(checkpoint_policies.nothing_saveable) - kept == len(products(forward, *arrays[:3])) > 1


@every(slow=lambda subject: subject.regimes == 1)
def test_under_vmap(subject):
    case = subject.can(Case(subject.b, 7, heads=(2, 1), segments="packed"))
    some = [draw(case, seed) for seed in (15, 16)]
    attend = subject.attend(case)

    def call(q, k, v, mine, other):
        return attend(q, k, v, Extras(mine, other))

    names = ("q", "k", "v", "segment_ids", "kv_segment_ids")
    out, lse = jax.jit(jax.vmap(call))(*(np.stack([getattr(a, name) for a in some]) for name in names))
    for n, arrays in enumerate(some):
        assert max(judge(case, arrays, {"out": out[n], "lse": lse[n]}, subject.bases).values()) <= 1
