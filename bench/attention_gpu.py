"""neo's attention kernel on a GPU beside cuDNN, XLA and PyTorch: is it right, and how many TFLOP/s.

    python bench/attention_gpu.py            every option and shape; half an hour, most of it compiling
    python bench/attention_gpu.py --quick    the shapes that are the aims, within ten minutes

bfloat16, 32,768 tokens a call in rows of T = 2k to 32k, W in {1024, 4096, full causal}, h = 128 (32 query heads on 8
key/value heads) and h = 192 (16 on 16).
  pallas_gpu  neo's kernel          cudnn       neo's cuDNN form, by jax.nn (is_causal=True, window (W - 1, 0))
  blockwise   neo's form for XLA    torch_sdpa  PyTorch's scaled_dot_product_attention, full causal only
                                    torch_flex  PyTorch's flex_attention, compiled, with a block mask
First neo's kernel is held against blockwise with every option and head size (not with --quick). Then every contender is
held against blockwise in float32, forward and backward, on inputs that show one key too many: about twice the error of
blockwise in bfloat16 is allowed (`neo.kernels.attention.selfcheck.difference`). Then they take turns; JAX and PyTorch are
a process each, one works while the other waits. A turn is as many calls as take 30 ms, a figure the median over turns.
TFLOP/s count useful work only: 4 H h pairs forward and 10 H h pairs backward, pairs = T W - W (W - 1) / 2 a sequence.
Backward is the backward alone, from what the forward saved; the forward that is timed saves nothing.
Figures go to bench/results/attention_gpu.json after every shape. Last line: `ratio:`, pallas_gpu / cudnn, the worse of
forward and backward at T=32768 W=4096 h=128. A wrong result of pallas_gpu or no figure for it ends in exit code 1; no GPU in 2.
--dry_run does all of it on shapes of toys, interpreted where it can be, on whatever there is. Its times mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

OURS, RIVAL = "pallas_gpu", "cudnn"
CONTENDERS = {"jax": (OURS, RIVAL, "blockwise"), "torch": ("torch_sdpa", "torch_flex")}
PASSES = ("forward", "backward")
FLOPS = {"forward": 4, "backward": 10}  # a pair, a head, an element of it: 2 products of 2 FLOPs; 5 of them
AIMS = {"forward": 550, "backward": 450}  # TFLOP/s on H200 at the first shape; the first milestone is 400 and 330
TOKENS = 32768
TURN_SECONDS = 0.03
SHARPNESS = 4.0  # see neo/kernels/attention/selfcheck.py


@dataclasses.dataclass(frozen=True)
class Shape:
    """window: visible keys including self, 0 for all. batch rows of length tokens."""

    length: int
    window: int
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    batch: int = 1

    @property
    def pairs(self) -> int:
        W = min(self.window or self.length, self.length)
        return self.batch * (self.length * W - W * (W - 1) // 2)

    def flops(self, which: str) -> int:
        return FLOPS[which] * self.heads * self.pairs * self.head_size

    def __str__(self) -> str:
        return f"T={self.length} W={self.window or 'full'} h={self.head_size} heads {self.heads}/{self.kv_heads} B={self.batch}"


HEADS = {128: (32, 8), 192: (16, 16)}


def shapes(quick: bool, dry: bool) -> tuple[list[Shape], list[Shape]]:
    """(to check, to time), what matters most first: a run that is cut short has it."""
    if dry:
        tiny = [Shape(100, 40, heads=1, kv_heads=1, head_size=64)]  # an interpreted tile takes seconds
        return tiny, tiny

    def shape(length: int, window: int, h: int, batch: int | None = None) -> Shape:
        return Shape(length, window, *HEADS[h], h, batch or TOKENS // length)

    if quick:
        return ([shape(4096, 1024, 128, 1), shape(TOKENS, 4096, 128), shape(4096, 1000, 192, 1)],
                [shape(TOKENS, 4096, 128), shape(8192, 4096, 128), shape(TOKENS, 4096, 192), shape(TOKENS, 1024, 128),
                 shape(TOKENS, 0, 128)])  # fmt: skip
    check = [shape(4096, W, h, 1) for h in HEADS for W in (1024, 1000, 0)] + [shape(TOKENS, 4096, 128)]
    order = [(T, W) for T in (32768, 8192, 16384, 4096, 2048) for W in (4096, 1024, 0) if W < T]
    return check, [shape(T, W, h) for h in HEADS for T, W in order]


OPTIONS = ({}, *({"head_size": h} for h in (64, 80, 96, 192, 256)), {"seq_len": 1001, "window": 0}, {"segments": True},
           {"alibi": True}, {"softcap": True}, {"sinks": True}, {"segments": True, "sinks": True, "window": 0},
           {"sequence_shards": 4, "segments": True}, {"sequence_shards": 4, "window": 0}, {"causal": False, "window": 0})


def requests(quick: bool, dry: bool) -> list[dict]:
    """What `selfcheck.verify` is asked of neo's kernel, as changes of a request with a window of 1,000."""
    return [] if quick or dry else list(OPTIONS)


# ---------------------------------------------------------------------------------------------- the process of JAX


class WithJax:
    """neo's implementations. `calls[contender]` is {pass: function without arguments, which only starts the work}."""

    def __init__(self, dry: bool) -> None:
        import jax

        self.jax, self.dry, self.calls = jax, dry, {}
        self.device = jax.devices()[0]

    def hello(self) -> dict:
        return {"platform": self.device.platform, "device": self.device.device_kind, "versions": jax_versions()}

    def wait(self, result) -> None:
        self.jax.block_until_ready(result)

    def attention(self, contender: str, shape: Shape):
        from neo.kernels.attention import Mask, attention
        from neo.kernels.attention.cudnn import CuDNN
        from neo.kernels.attention.kernel import Extras, Plan

        window = shape.window or None
        if self.dry and contender == RIVAL and self.device.platform != "gpu":
            plan = Plan(scale=shape.head_size**-0.5, window=window)
            return lambda q, k, v: CuDNN(jax_nn="xla").attend(q, k, v, Extras(), plan)[0]
        interpret = self.dry and contender == OURS and self.device.platform != "gpu"
        return functools.partial(attention, mask=Mask(window=window), implementation=contender, interpret=interpret)

    def verify(self, change: dict) -> str:
        """"" if neo's kernel does what blockwise does."""
        from neo.kernels.attention import IMPLEMENTATIONS
        from neo.kernels.attention.kernel import Request
        from neo.kernels.attention.selfcheck import verify

        asked = {"seq_len": 4096, "window": 1000, "head_size": 128} | change
        request = Request(
            platform=self.device.platform, device_kind=self.device.device_kind, dtype="bfloat16", num_heads=8, num_kv_heads=2,
            interpret=self.dry and self.device.platform != "gpu", **(asked | {"window": asked["window"] or None}),
        )  # fmt: skip
        lacks = IMPLEMENTATIONS[OURS].lacks(request)
        return f"it lacks {lacks}" if lacks else verify(IMPLEMENTATIONS[OURS], request)

    def both(self, attend, arrays, dout) -> tuple:
        """out, dq, dk, dv."""
        out, pull = self.jax.vjp(attend, *arrays)
        return (out, *pull(dout))

    def truth(self, shape: Shape, folder: Path) -> None:
        import jax.numpy as jnp

        run = self.jax.jit(functools.partial(self.both, self.attention("blockwise", shape)))
        for name, dtype in (("truth", jnp.float32), ("plain", jnp.bfloat16)):
            q, k, v, dout = (jnp.asarray(x, jnp.bfloat16).astype(dtype) for x in host_inputs(shape))
            with self.jax.default_matmul_precision("highest" if name == "truth" else None):
                save(folder, name, run((q, k, v), dout))

    def results(self, contender: str, shape: Shape):
        import jax.numpy as jnp

        q, k, v, dout = (jnp.asarray(x, jnp.bfloat16) for x in host_inputs(shape))
        return self.jax.jit(functools.partial(self.both, self.attention(contender, shape)))((q, k, v), dout)

    def prepare(self, contender: str, shape: Shape) -> None:
        jax = self.jax
        keys = jax.random.split(jax.random.key(0), 4)
        heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
        q, k, v, dout = (jax.random.normal(key, (shape.batch, shape.length, n, shape.head_size), "bfloat16")
                         for key, n in zip(keys, heads, strict=True))  # fmt: skip
        attend = self.attention(contender, shape)
        forward, backward = jax.jit(attend), jax.jit(lambda pull, dout: pull(dout))
        _, pull = jax.jit(lambda q, k, v: jax.vjp(attend, q, k, v))(q, k, v)
        self.calls[contender] = {"forward": lambda: forward(q, k, v), "backward": lambda: backward(pull, dout)}

    def release(self) -> None:
        self.calls = {}
        self.jax.clear_caches()


def jax_versions() -> dict:
    """What decides how fast the kernels are; what is not there is left out."""
    found = {}
    for cuda in ("13", "12"):
        if importlib.util.find_spec(f"jax_cuda{cuda}_plugin"):
            try:
                found["cudnn"] = importlib.import_module(f"jax_cuda{cuda}_plugin._versions").cudnn_get_version()
            except Exception as error:  # a plugin without its libraries
                found["cudnn"] = f"not found: {error}"
            break
    places = [shutil.which("ptxas"), *sys_path_files("nvidia/*/bin/ptxas"), "/usr/local/cuda/bin/ptxas"]
    for place in filter(None, places):
        if Path(place).exists():
            text = subprocess.run([place, "--version"], capture_output=True, text=True, check=False).stdout
            found["ptxas"] = text.strip().splitlines()[-1] if text.strip() else "?"
            break
    return found


def sys_path_files(pattern: str) -> list[str]:
    return [str(path) for folder in sys.path if folder for path in Path(folder).glob(pattern)]


# ------------------------------------------------------------------------------------------ the process of PyTorch


class WithTorch:
    """PyTorch's own attention, [B, heads, T, h]."""

    def __init__(self, dry: bool) -> None:
        import torch

        self.torch, self.dry, self.calls = torch, dry, {}
        self.place = "cuda" if torch.cuda.is_available() else "cpu"
        if self.place == "cpu" and not dry:
            raise RuntimeError("torch sees no GPU")

    def hello(self) -> dict:
        return {"platform": self.place, "versions": {"torch cuda": self.torch.version.cuda}}

    def wait(self, result) -> None:
        if self.place == "cuda":
            self.torch.cuda.synchronize()

    def attention(self, contender: str, shape: Shape):
        torch = self.torch
        shared = {"enable_gqa": shape.heads != shape.kv_heads}
        if contender == "torch_sdpa":
            if shape.window:
                raise NotImplementedError("it has no window (but by a T x T mask)")
            return functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True, **shared)
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        W = shape.window or shape.length

        def seen(batch, head, i, j):
            return (j <= i) & (i - j < W)

        mask = create_block_mask(seen, None, None, shape.length, shape.length, device=self.place)
        if self.place == "cuda":  # on the CPU compiling takes longer than a dry run should
            torch.compiler.reset()
            flex_attention = torch.compile(flex_attention, dynamic=False)
        return functools.partial(flex_attention, block_mask=mask, **shared)

    def both(self, attend, q, k, v, dout) -> tuple:
        out = attend(q, k, v)
        return (out, *self.torch.autograd.grad(out, (q, k, v), dout))

    def results(self, contender: str, shape: Shape):
        def on_device(x):
            x = self.torch.from_numpy(x).to(self.place, self.torch.bfloat16)
            return x.transpose(1, 2).contiguous().requires_grad_()

        arrays = self.both(self.attention(contender, shape), *map(on_device, host_inputs(shape)))
        return [x.detach().transpose(1, 2).float().cpu().numpy() for x in arrays]

    def prepare(self, contender: str, shape: Shape) -> None:
        torch = self.torch

        def normal(heads):
            size = (shape.batch, heads, shape.length, shape.head_size)
            return torch.randn(size, device=self.place, dtype=torch.bfloat16).requires_grad_()

        q, k, v, dout = map(normal, (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads))
        attend = self.attention(contender, shape)

        def forward():
            with torch.no_grad():
                return attend(q, k, v)

        out = attend(q, k, v)
        self.calls[contender] = {
            "forward": forward,
            "backward": lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True),
        }

    def release(self) -> None:
        self.calls = {}
        if self.place == "cuda":
            self.torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------ what both share

NAMES = ("out", "dq", "dk", "dv")


def host_inputs(shape: Shape):
    """q, k, v and dout as float32 [B, T, heads, h], the same for every contender."""
    import numpy as np

    rng = np.random.default_rng(0)
    for heads, factor in ((shape.heads, SHARPNESS), (shape.kv_heads, 1), (shape.kv_heads, 1), (shape.heads, 1)):
        yield rng.standard_normal((shape.batch, shape.length, heads, shape.head_size), np.float32) * np.float32(factor)


def save(folder: Path, kind: str, arrays) -> None:
    import numpy as np

    for name, array in zip(NAMES, arrays, strict=True):
        np.save(folder / f"{kind}_{name}.npy", np.asarray(array, np.float32))


def compare(arrays, folder: Path) -> dict:
    """{"wrong": "" or what, "errors": {array: [largest error, that of blockwise]}}."""
    import numpy as np

    from neo.kernels.attention.selfcheck import difference

    wrong, errors = [], {}
    for name, array in zip(NAMES, arrays, strict=True):
        ours = np.asarray(array, np.float32)
        truth, plain = (np.load(folder / f"{kind}_{name}.npy") for kind in ("truth", "plain"))
        errors[name] = [float(f"{np.abs(x - truth).max():.3g}") for x in (ours, plain)]
        wrong.append(difference(name, ours, plain, truth, "bfloat16"))
    return {"wrong": ", ".join(filter(None, wrong)), "errors": errors}


def work(library: str, dry: bool) -> None:
    """A process: one line of JSON asks, one line answers; an error is an answer too."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print goes to stderr
    worker = None
    for line in sys.stdin:
        ask = json.loads(line)
        try:
            if worker is None:
                worker = (WithJax if library == "jax" else WithTorch)(dry)
            answer = answer_to(worker, ask)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"}
        print(json.dumps(answer), file=answers, flush=True)


def answer_to(worker, ask: dict) -> dict:
    do, contender = ask["do"], ask.get("contender")
    if do == "hello":
        return worker.hello()
    if do == "release":
        return worker.release() or {}
    if do == "time":
        call, start = worker.calls[contender][ask["which"]], time.perf_counter()
        for _ in range(ask["calls"]):
            result = call()
        worker.wait(result)
        return {"seconds": (time.perf_counter() - start) / ask["calls"]}
    if do == "verify":
        return {"wrong": worker.verify(ask["change"])}
    shape = Shape(**ask["shape"])
    if do == "truth":
        return worker.truth(shape, Path(ask["folder"])) or {}
    if do == "check":
        return compare(worker.results(contender, shape), Path(ask["folder"]))
    worker.prepare(contender, shape)
    seconds = {}
    for which, call in worker.calls[contender].items():
        if not worker.dry:
            worker.wait(call())  # compiles
        start = time.perf_counter()
        worker.wait(call())
        seconds[which] = time.perf_counter() - start
    return {"seconds": seconds}


# ------------------------------------------------------------------------------------------------------ the parent


class Worker:
    """The parent's side of a process. `ask` returns {"error": ...} instead of raising."""

    def __init__(self, library: str, dry: bool) -> None:
        command = [sys.executable, __file__, "--work", library, *(["--dry_run"] if dry else [])]
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}
        if library == "torch":
            environment["JAX_PLATFORMS"] = "cpu"
        if dry:  # each warpgroup of Pallas' interpreter blocks a thread of XLA's pool, which has one a core
            environment.setdefault("NPROC", "16")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def ask(self, do: str, **more) -> dict:
        try:
            self.process.stdin.write(json.dumps({"do": do, **more}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": f"the process ended with {self.process.wait()}"}

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def verify_all(worker: Worker, todo: list[dict]) -> dict[str, str]:
    """What is wrong with neo's kernel, by option; "" for nothing."""
    found = {}
    for change in todo:
        name = ", ".join(f"{key}={value}" for key, value in change.items()) or "a window"
        answer = worker.ask("verify", change=change)
        found[name] = answer.get("error", answer.get("wrong"))
        say(f"verify {OURS} {name}: {found[name] or 'right'}")
    return found


def check_all(workers: dict[str, Worker], todo: list[Shape]) -> list[dict]:
    """Each shape's errors by contender."""
    found = []
    for shape in todo:
        given = dataclasses.asdict(shape)
        with tempfile.TemporaryDirectory() as folder:
            result = {"shape": given}
            truth = workers["jax"].ask("truth", shape=given, folder=folder)
            for library, worker in workers.items():
                for contender in CONTENDERS[library]:
                    answer = truth if "error" in truth else worker.ask("check", contender=contender, shape=given, folder=folder)
                    result[contender] = answer
                    say(f"check {shape} {contender}: {answer.get('error') or answer['wrong'] or 'right'}")
        found.append(result)
    return found


def time_all(workers: dict[str, Worker], shape: Shape, rounds: int) -> dict:
    """{contender: {pass: {"ms", "tflops"}} or {"error"}} of one shape, the contenders taking turns."""
    result, calls = {}, {}
    owner = {contender: worker for library, worker in workers.items() for contender in CONTENDERS[library]}
    for contender, worker in owner.items():
        answer = worker.ask("prepare", contender=contender, shape=dataclasses.asdict(shape))
        if "error" in answer:
            result[contender] = answer
            say(f"{shape} {contender}: {answer['error']}")
        else:
            calls[contender] = {which: min(200, math.ceil(TURN_SECONDS / s)) for which, s in answer["seconds"].items()}
    taken = {contender: {which: [] for which in PASSES} for contender in calls}
    for which in PASSES:
        for _ in range(rounds):
            for contender in [c for c in taken if "error" not in result.get(c, {})]:
                answer = owner[contender].ask("time", contender=contender, which=which, calls=calls[contender][which])
                if "error" in answer:
                    result[contender] = answer
                else:
                    taken[contender][which].append(answer["seconds"])
    for contender, passes in taken.items():
        if contender not in result:
            result[contender] = {which: figures(shape, which, seconds) for which, seconds in passes.items()}
            say(f"{shape} {contender}: " + ", ".join(
                f"{which} {f['ms']:.3f} ms {f['tflops']:.0f} TFLOP/s" for which, f in result[contender].items()))  # fmt: skip
    for worker in workers.values():
        worker.ask("release")
    return result


def figures(shape: Shape, which: str, seconds: list[float]) -> dict:
    median = statistics.median(seconds)
    return {"ms": round(median * 1e3, 4), "ms_best": round(min(seconds) * 1e3, 4),
            "tflops": round(shape.flops(which) / median / 1e12, 1)}  # fmt: skip


def conclude(timed: list[dict]) -> tuple[dict, str]:
    """(what goes to the results, the last line). Without both contenders at the first shape the ratio is None."""
    first = timed[0] if timed else {}
    ours, rival = ({which: first.get(name, {}).get(which, {}).get("tflops") for which in PASSES} for name in (OURS, RIVAL))
    shape = str(Shape(**first["shape"])) if first else "no shape"
    against = {}
    for entry in timed:
        if all("forward" in entry.get(name, {}) for name in (OURS, RIVAL)):
            by_pass = {which: round(entry[RIVAL][which]["ms"] / entry[OURS][which]["ms"], 3) for which in PASSES}
            against[str(Shape(**entry["shape"]))] = by_pass
    result = {
        "ratios": against,
        "aims": {which: {"tflops": ours[which], "aim": AIMS[which]} for which in PASSES},
        "ratio": min(against[shape].values()) if shape in against else None,
    }
    windows = [min(by_pass.values()) for name, by_pass in against.items() if "W=full" not in name]
    if windows:
        result["worst_window_ratio"] = min(windows)
    if result["ratio"] is None:
        missing = next((name for name, f in ((OURS, ours), (RIVAL, rival)) if None in f.values()), OURS)
        return result, f"ratio: none  no figure for {missing} at {shape}: {first.get(missing, {}).get('error', 'not run')}"
    return result, (
        f"ratio: {result['ratio']:.2f}  {OURS}/{RIVAL} TFLOP/s, the worse of forward ({ours['forward']:.0f}, aim "
        f"{AIMS['forward']}) and backward ({ours['backward']:.0f}, aim {AIMS['backward']}) at {shape}, higher is better"
    )


def installed() -> dict:
    names = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "torch",
             "triton")  # fmt: skip
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def card() -> dict:
    """Driver, clock and power of the card now, where nvidia-smi answers."""
    names = ("driver_version", "clocks.sm", "clocks.max.sm", "power.draw", "temperature.gpu")
    try:
        done = subprocess.run(["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"],
                              capture_output=True, text=True, check=True, timeout=60)  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(names, done.stdout.splitlines()[0].split(", "), strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the shapes that are the aims, within ten minutes")
    parser.add_argument("--dry_run", action="store_true", help="toy shapes, on any machine; proves that the script runs")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contender and pass (9)")
    parser.add_argument("--seconds", type=float, help="begin no shape after so many seconds (420 with --quick, else no limit)")
    parser.add_argument("--no_torch", action="store_true", help="leave PyTorch out")
    parser.add_argument("--out", help="where the figures go (bench/results/attention_gpu.json; a dry run writes none)")
    parser.add_argument("--work", choices=tuple(CONTENDERS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work, args.dry_run)
        return
    start = time.monotonic()
    limit = args.seconds or (420 if args.quick else math.inf)
    out = Path(args.out) if args.out else None if args.dry_run else ROOT / "bench/results/attention_gpu.json"
    workers = {"jax": Worker("jax", args.dry_run)}
    hello = workers["jax"].ask("hello")
    if "error" in hello or (hello["platform"] != "gpu" and not args.dry_run):
        workers["jax"].close()
        why = hello.get("error") or f"JAX sees only {hello['device']}"
        print(f"bench/attention_gpu.py needs an NVIDIA GPU: {why}; --dry_run does the same on toy shapes", file=sys.stderr)
        sys.exit(2)
    result = {"command": " ".join(["python bench/attention_gpu.py", *sys.argv[1:]]), "device": hello["device"],
              "versions": installed() | hello["versions"], "card": {"before": card()}, "rounds": args.rounds}  # fmt: skip
    if not args.no_torch and importlib.util.find_spec("torch"):
        workers["torch"] = Worker("torch", args.dry_run)
        answer = workers["torch"].ask("hello")
        result["versions"] |= answer.get("versions", {})
        if "error" in answer:
            say(f"PyTorch left out: {answer['error']}")
            workers.pop("torch").close()

    def write() -> None:
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(result, indent=1) + "\n")

    result["verify"] = verify_all(workers["jax"], requests(args.quick, args.dry_run))
    to_check, to_time = shapes(args.quick, args.dry_run)
    result["check"] = check_all(workers, to_check)
    write()
    result["timed"], result["left_out"] = [], []
    for shape in to_time:
        if result["timed"] and time.monotonic() - start > limit:
            result["left_out"].append(str(shape))
            continue
        result["timed"].append({"shape": dataclasses.asdict(shape)} | time_all(workers, shape, args.rounds))
        more, last = conclude(result["timed"])
        result |= more
        result["card"]["after"] = card()
        write()
    for worker in workers.values():
        worker.close()
    print(json.dumps(result, indent=1))
    wrong = [f"{Shape(**entry['shape'])}: {what}" for entry in result["check"]
             if (what := entry[OURS].get("error") or entry[OURS]["wrong"])]  # fmt: skip
    wrong += [f"{name}: {what}" for name, what in result["verify"].items() if what]
    if args.dry_run:  # where the interpreter is missing, the kernel says so
        wrong = [what for what in wrong if " lacks " not in what]
    if wrong:
        print(f"{OURS} is not right: " + "; ".join(wrong))
    print(last)
    sys.exit(1 if wrong or (result["ratio"] is None and not args.dry_run) else 0)


if __name__ == "__main__":
    main()
