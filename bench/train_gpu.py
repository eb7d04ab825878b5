"""A training step on one GPU: neo beside a torch.compile'd transformers step of the same shape, in the same run.

    python bench/train_gpu.py                1B at 2048, 3B at 4096 and 7B at 4096 tokens; half an hour
    python bench/train_gpu.py --shape=1b     one of them
    python bench/train_gpu.py --dry          toys on the CPU, the same code: proves that the script runs, no speed

Shapes are Llama-3.2-1B and -3B (128,256 tokens, tied) and Mistral-7B without a window, the 7B as deep as the card holds 18
bytes a parameter: float32 parameters, gradients and two moments, and a bfloat16 copy. The same initial weights and batches,
and the same recipe for both: bfloat16 compute over float32 parameters, AdamW (norm gains without decay), gradients
clipped to norm 1.
  ours    neo's step as `neo.train` builds it: kernel chosen and checked on the device, micro-batch from its memory
  torch   LlamaForCausalLM with sdpa attention under autocast, torch.compile, fused AdamW
Each takes the first of its settings that fits: everything kept for the backward pass first, then more recomputed, smaller
micro-batches. Each runs in a process of its own with the card to itself; ours once more after torch, and the slower of
its two figures counts. A figure is the median over rounds. The losses must agree.
MFU counts model FLOPs with causal attention, against the best bfloat16 matrix product measured in the same processes.
Figures go to bench/results/train_gpu.json after every shape. Last line: `ratio:`, ours / torch tokens per second, the
worst of the shapes. Exit code 1: losses differ or a contender did not run; 2: no GPU, or a package is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RATE, DECAY, B1, B2, EPS, CLIP, STD = 3e-4, 0.1, 0.9, 0.95, 1e-8, 1.0, 0.02
WARM = 3                # steps before the clock; their losses are compared
LOSS_GAP = 0.02         # nats, ours: bfloat16 in another order. A wrong step is off by more than 0.1 at these rates
STATE_BYTES = 18        # a parameter, as above
ROOM = 0.75             # ours: share of the card for the state of the deepest 7B; activations take the rest
AIMS = {"ratio": 1.1, "mfu": 0.5}
PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "optax", "torch", "transformers", "triton")


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Llama and its batch: `batch` sequences of `length` tokens a step."""

    name: str
    d: int
    ff: int
    heads: int
    kv_heads: int
    head_size: int
    layers: int
    vocab: int
    tied: bool
    length: int
    batch: int
    mark: int = 0   # tokens/s published for one card at this size and length; issue "Scale", section speed

    def model(self) -> dict[str, Any]:
        """As fields of neo's ModelConfig."""
        return dict(vocab_size=self.vocab, num_layers=self.layers, d_model=self.d, num_heads=self.heads,
                    num_kv_heads=self.kv_heads, head_dim=self.head_size, d_ff=self.ff, max_seq_len=self.length, windows=(0,),
                    tied_embeddings=self.tied)

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.length * self.batch

    def parameters(self, layers: int | None = None) -> int:
        """Without norm gains."""
        block = 2 * self.d * self.head_size * (self.heads + self.kv_heads) + 3 * self.d * self.ff
        return (self.layers if layers is None else layers) * block + self.vocab * self.d * (1 if self.tied else 2)


# config.json of meta-llama/Llama-3.2-1B, -3B and mistralai/Mistral-7B-v0.1; 32,768 tokens a step: ours.
SHAPES = (
    Shape("1b", 2048, 8192, 32, 8, 64, 16, 128256, True, 2048, 16, 45_000),
    Shape("3b", 3072, 8192, 24, 8, 128, 28, 128256, True, 4096, 8, 21_000),
    Shape("7b", 4096, 14336, 32, 8, 128, 32, 32000, False, 4096, 8, 10_600),
)
TOY = Shape("toy", 64, 128, 4, 2, 16, 2, 512, True, 64, 4)


def weights(shape: Shape, path: str, layer: int, size: tuple[int, ...]) -> Any:
    """One matrix as float32, the same in both processes; drawn anew from its name, so that no file is needed."""
    import numpy as np

    rng = np.random.default_rng([zlib.crc32(path.encode()), layer])
    return (rng.random(size, np.float32) - np.float32(0.5)) * np.float32(STD * 12**0.5)


def batches(shape: Shape, start: int, count: int) -> Iterator[Any]:
    """Token rows [B, T + 1] of steps start..: Zipf-like ids, each step's its own."""
    import numpy as np

    for step in range(start, start + count):
        yield np.random.default_rng(step).zipf(1.3, (shape.batch, shape.length + 1)).clip(max=shape.vocab - 1).astype(np.int32)


# ------------------------------------------------------------------------------------------------------------- ours


def our_settings(shape: Shape) -> list[dict[str, Any]]:
    """What the backward pass keeps, most first; the micro-batch is neo's to choose."""
    return [{"remat": policy} for policy in ("none", "minimal", "lean", "attention", "full")]


def ours(shape: Shape, setting: dict[str, Any], dry: bool) -> tuple[Callable[[int, int], list[float]], dict[str, Any]]:
    """((first step, number) -> losses, facts), with the session that `neo.train` would build."""
    from neo.parallel import compiler_flags
    flags = compiler_flags.report(compiler_flags.apply("auto"))   # before JAX starts, as neo.train does

    import jax
    import numpy as np

    from neo.config import load
    from neo.train.progress import Log
    from neo.train.session import build
    from neo.train.workdir import Workdir

    fields = {f"model.{name}": value for name, value in shape.model().items()} | {
        "data.synthetic": True, "train.compute_dtype": "bfloat16", "train.remat": setting["remat"],
        "optimizer.b1": B1, "optimizer.b2": B2, "optimizer.eps": EPS, "optimizer.clip_norm": CLIP,
        "optimizer.weight_decay": DECAY, "init.std": STD, "phases.main.seq_len": shape.length,
        "phases.main.global_batch": shape.batch, "phases.main.tokens": 10**6 * shape.tokens, "phases.main.warmup_tokens": 0,
        "phases.main.peak_lr": RATE, "phases.main.start_lr": RATE, "phases.main.final_lr": RATE,
        "phases.main.lr_shape": "constant", "phases.main.mixture": {"text": 1.0}}
    lines: list[str] = []
    log = Log()
    log.echo = lambda line: (lines.append(line), print(line, file=sys.stderr, flush=True))
    with tempfile.TemporaryDirectory() as folder:
        session = build(load("neo_demo", fields), Workdir(folder), log)

    def drawn(keys: Any, leaf: Any) -> Any:
        path = "/".join(key.key for key in keys)
        if path.endswith("scale"):
            return leaf   # ones
        if path.startswith("layers/"):
            value = np.stack([weights(shape, path, i, leaf.shape[1:]) for i in range(leaf.shape[0])])
        else:
            value = weights(shape, path, 0, leaf.shape)
        return jax.device_put(value, leaf.sharding)

    session.state = {**session.state, "params": jax.tree_util.tree_map_with_path(drawn, session.state["params"])}
    step = session.step_for(session.config.phases[0], shape.batch)
    same = dict(segment_ids=np.ones((shape.batch, shape.length), np.int32),
                loss_mask=np.ones((shape.batch, shape.length), np.float32),
                positions=np.tile(np.arange(shape.length, dtype=np.int32), (shape.batch, 1)),
                source=np.zeros(shape.batch, np.int32))

    def run(start: int, count: int) -> list[float]:
        from neo.data.loader import place

        losses = []
        for i, rows in enumerate(batches(shape, start, count), start):
            batch = place({**same, "inputs": rows[:, :-1], "targets": rows[:, 1:]}, session.batch_sharding)
            session.state, metrics = step(session.state, batch, *session.rates(i))
            losses.append(metrics["loss"])
        return [float(loss) for loss in losses]

    usage = step.memory_analysis()
    facts = {"attention": session.decoder.attention, "micro_batch": session.micro_batches["main"],
             "compiled_gb": None if usage is None else (usage.argument_size_in_bytes + usage.temp_size_in_bytes) / 1e9,
             "compiler_flags": flags, "log": [line.split("] ", 1)[-1] for line in lines]}
    return run, facts


def our_peak(dry: bool) -> float:
    """FLOP/s of a bfloat16 matrix product under XLA."""
    import jax
    import jax.numpy as jnp

    n, times = (256, 2) if dry else (8192, 30)
    x = jnp.ones((n, n), jnp.bfloat16)
    product = jax.jit(lambda a, b: a @ b)
    product(x, x).block_until_ready()
    start = time.perf_counter()
    for _ in range(times):
        out = product(x, x)
    out.block_until_ready()
    return 2 * n**3 * times / (time.perf_counter() - start)


# ------------------------------------------------------------------------------------------------------------ torch


def their_settings(shape: Shape) -> list[dict[str, Any]]:
    """Micro-batches from the whole batch down, first with everything kept, then with each block recomputed."""
    sizes = [shape.batch >> i for i in range(shape.batch.bit_length())]
    return [{"micro_batch": size, "recompute": recompute} for recompute in (False, True) for size in sizes]


def their_bytes(shape: Shape, setting: dict[str, Any]) -> float:
    """A low estimate of what a setting needs, so that hopeless ones are not compiled (ours): the state, 2 bytes for each
    value kept of a block (its inputs, q, k, v, attention, gate, up, product), and logits in bfloat16 and float32."""
    kept = 3 * shape.d + (2 * shape.heads + 2 * shape.kv_heads) * shape.head_size + 3 * shape.ff
    kept = shape.d if setting["recompute"] else kept
    return 16 * shape.parameters() + setting["micro_batch"] * shape.length * (2 * kept * shape.layers + 6 * shape.vocab)


def theirs(shape: Shape, setting: dict[str, Any], dry: bool) -> tuple[Callable[[int, int], list[float]], dict[str, Any]]:
    """The same with transformers and torch."""
    import torch
    import transformers

    place = "cpu" if dry else "cuda"
    torch.set_float32_matmul_precision("high")
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.d, intermediate_size=shape.ff, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_size,
        max_position_embeddings=shape.length, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=shape.tied,
        attn_implementation="sdpa", use_cache=False)
    with torch.device(place):
        model = transformers.LlamaForCausalLM(config)
    fill(shape, model)
    model.train()
    if setting["recompute"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    gains = [p for p in model.parameters() if p.ndim == 1]
    others = [p for p in model.parameters() if p.ndim > 1]
    optimizer = torch.optim.AdamW([dict(params=others, weight_decay=DECAY), dict(params=gains, weight_decay=0.0)],
                                  lr=RATE, betas=(B1, B2), eps=EPS, fused=True)

    def loss_of(inputs: Any, targets: Any) -> Any:
        with torch.autocast(place, torch.bfloat16):
            logits = model(inputs).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    # In a dry run nothing is generated: the C++ compiler would take minutes, and prove nothing about CUDA.
    compiled = torch.compile(loss_of, dynamic=False, backend="eager" if dry else "inductor")
    micro = setting["micro_batch"]

    def run(start: int, count: int) -> list[float]:
        losses = []
        for rows in batches(shape, start, count):
            rows = torch.from_numpy(rows).to(place, torch.int64, non_blocking=True)
            total = 0.0
            for part in rows.split(micro):
                loss = compiled(part[:, :-1].contiguous(), part[:, 1:].contiguous()) * (micro / shape.batch)
                loss.backward()
                total = total + loss.detach()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(total)
        return [float(loss) for loss in losses]

    return run, {"attention": "sdpa", "micro_batch": micro, "parameters": sum(p.numel() for p in model.parameters())}


def fill(shape: Shape, model: Any) -> None:
    """Put the weights that neo has into a model of transformers."""
    import torch

    def put(parameter: Any, path: str, layer: int, size: tuple[int, ...], into: tuple[int, int]) -> None:
        value = weights(shape, path, layer, size).reshape(into)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(value if path == "embed/table" else value.T))

    d, h = shape.d, shape.head_size
    put(model.model.embed_tokens.weight, "embed/table", 0, (shape.vocab, d), (shape.vocab, d))
    if not shape.tied:
        put(model.lm_head.weight, "head/kernel", 0, (d, shape.vocab), (d, shape.vocab))
    for i, block in enumerate(model.model.layers):
        attention = block.self_attn
        for one, name, heads in ((attention.q_proj, "query", shape.heads), (attention.k_proj, "key", shape.kv_heads),
                                 (attention.v_proj, "value", shape.kv_heads)):
            put(one.weight, f"layers/attention/{name}", i, (d, heads, h), (d, heads * h))
        put(attention.o_proj.weight, "layers/attention/output", i, (shape.heads, h, d), (shape.heads * h, d))
        for one, name in ((block.mlp.gate_proj, "gate"), (block.mlp.up_proj, "up")):
            put(one.weight, f"layers/mlp/{name}", i, (d, shape.ff), (d, shape.ff))
        put(block.mlp.down_proj.weight, "layers/mlp/down", i, (shape.ff, d), (shape.ff, d))


def their_peak(dry: bool) -> float:
    """FLOP/s of a bfloat16 matrix product under torch."""
    import torch

    n, times = (256, 2) if dry else (8192, 30)
    x = torch.ones((n, n), dtype=torch.bfloat16, device="cpu" if dry else "cuda")
    wait = (lambda: None) if dry else torch.cuda.synchronize
    x @ x
    wait()
    start = time.perf_counter()
    for _ in range(times):
        x @ x
    wait()
    return 2 * n**3 * times / (time.perf_counter() - start)


# -------------------------------------------------------------------------------------------------- one process, one try

CONTENDERS = {"ours": (ours, our_settings, our_peak), "torch": (theirs, their_settings, their_peak)}


def work(contender: str, shape: Shape, setting: dict[str, Any], rounds: int, seconds: float, dry: bool) -> dict[str, Any]:
    """Losses of the first steps, and seconds per step of each round of `seconds`; out of memory is an answer too."""
    prepare, _, peak = CONTENDERS[contender]
    try:
        begun = time.perf_counter()
        run, facts = prepare(shape, setting, dry)
        losses = run(0, WARM)
        ready = time.perf_counter() - begun
        begun = time.perf_counter()
        run(WARM, 1)
        done, steps = WARM + 1, max(1, round(seconds / (time.perf_counter() - begun)))
        taken = []
        for _ in range(rounds):
            begun = time.perf_counter()
            run(done, steps)   # its last loss is read: all of it has run
            taken.append((time.perf_counter() - begun) / steps)
            done += steps
    except Exception as error:
        # Torch's words, XLA's, and those of neo's own estimate.
        if any(words in str(error) for words in ("out of memory", "RESOURCE_EXHAUSTED", " per device, which has ")):
            return {"out_of_memory": str(error).splitlines()[0][:200]}
        raise
    return {"setting": setting, "losses": losses, "step_s": statistics.median(taken), "rounds_s": taken, "ready_s": ready,
            "peak_flops": peak(dry), **facts}


def attempt(contender: str, shape: Shape, setting: dict[str, Any], args: argparse.Namespace, cache: str) -> dict[str, Any]:
    """`work` in a process of its own, which has the card to itself."""
    asked = json.dumps(dict(contender=contender, shape=dataclasses.asdict(shape), setting=setting, rounds=args.rounds,
                            seconds=args.seconds, dry=args.dry))
    environment = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", "JAX_COMPILATION_CACHE_DIR": cache,
                                "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if args.dry or contender == "torch":
        environment["JAX_PLATFORMS"] = "cpu"
    done = subprocess.run([sys.executable, __file__, "--work", asked], stdout=subprocess.PIPE, text=True, env=environment,
                          check=False)
    if done.returncode != 0 or not done.stdout.strip():
        return {"error": f"{contender} {shape.name} {setting}: the process ended with {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def first_that_fits(contender: str, shape: Shape, args: argparse.Namespace, cache: str, memory: float) -> dict[str, Any]:
    """The result of the first setting that runs, else {"error": ...}."""
    tried = []
    for setting in CONTENDERS[contender][1](shape):
        if contender == "torch" and their_bytes(shape, setting) > memory:
            continue
        result = attempt(contender, shape, setting, args, cache)
        if "out_of_memory" not in result:
            return result
        tried.append(f"{setting}: {result['out_of_memory']}")
        print(f"{contender} {shape.name} {tried[-1]}", file=sys.stderr, flush=True)
    return {"error": f"{contender} {shape.name}: no setting fits ({'; '.join(tried) or 'not even by the estimate'})"}


# --------------------------------------------------------------------------------------------------------- the parent


def as_deep_as_fits(shape: Shape, memory: float) -> Shape:
    """With as many of its layers as the card holds the state of."""
    ends, block = shape.parameters(0), shape.parameters(1) - shape.parameters(0)
    layers = int((memory * ROOM / STATE_BYTES - ends) // block)
    return dataclasses.replace(shape, layers=max(1, min(shape.layers, layers)))


def figures(shape: Shape, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Tokens/s, MFU and ratio of one shape; `results` has ours, torch and again (ours, after torch)."""
    from neo.config.schema import ModelConfig
    from neo.models.flops import train_flops_per_token

    flops = train_flops_per_token(ModelConfig(**shape.model()), shape.length)
    peak = max(result["peak_flops"] for result in results.values())
    speed = {name: shape.tokens / result["step_s"] for name, result in results.items()}
    our_speed = min(speed["ours"], speed["again"])
    gap = max(abs(a - b) for a, b in zip(results["ours"]["losses"], results["torch"]["losses"], strict=True))
    return {"shape": dataclasses.asdict(shape), "parameters": shape.parameters(), "tokens_per_s": speed,
            "ratio": our_speed / speed["torch"], "peak_flops": peak, "mark": shape.mark or None,
            "mfu": {name: one * flops.causal / peak for name, one in speed.items()},
            "mfu_full": {name: one * flops.full / peak for name, one in speed.items()},
            "loss_gap": gap, "results": results}


def card() -> dict[str, str]:
    """Name, driver, memory, clocks and power of the card now; empty without nvidia-smi."""
    names = ("name", "driver_version", "memory.total", "clocks.sm", "clocks.max.sm", "power.draw", "power.limit")
    try:
        done = subprocess.run(["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"],
                              capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(names, done.stdout.splitlines()[0].split(", "), strict=False))


def installed() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def compare(shape: Shape, args: argparse.Namespace, cache: str, memory: float) -> dict[str, Any]:
    """Both contenders on one shape; {"error": ...} when one did not run."""
    results = {}
    for name in ("ours", "torch"):
        results[name] = first_that_fits(name, shape, args, cache, memory)
        if "error" in results[name]:
            return {"shape": dataclasses.asdict(shape), **results[name]}
    results["again"] = attempt("ours", shape, results["ours"]["setting"], args, cache)
    if "step_s" not in results["again"]:
        return {"shape": dataclasses.asdict(shape), "error": f"ours did not run a second time: {results['again']}"}
    return figures(shape, results)


def told(one: dict[str, Any]) -> str:
    """One shape, as a person reads it."""
    shape = one["shape"]
    if "error" in one:
        return f"{shape['name']}: {one['error']}"
    speed, mfu, results = one["tokens_per_s"], one["mfu"], one["results"]
    mark = f", published for one card {one['mark']:,}" if one["mark"] else ""
    lines = [f"{shape['name']}: {one['parameters'] / 1e9:.2f}B parameters in {shape['layers']} layers, {shape['batch']} x "
             f"{shape['length']} tokens a step{mark}"]
    for name in speed:
        result = results[name]
        lines.append(f"  {name:6s} {speed[name]:10,.0f} tokens/s   MFU {100 * mfu[name]:5.1f} % causal, "
                     f"{100 * one['mfu_full'][name]:5.1f} % full   {result['step_s'] * 1e3:9.1f} ms a step   "
                     f"{result['attention']}, micro-batch {result['micro_batch']}, {result['setting']}")
    return "\n".join([*lines, f"  ratio {one['ratio']:.2f}; losses agree to {one['loss_gap']:.1e}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[shape.name for shape in SHAPES], help="only this one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of a round")
    parser.add_argument("--out", type=Path, help="result file (bench/results/train_gpu.json; none with --dry)")
    parser.add_argument("--dry", action="store_true", help="toys on the CPU; its times mean nothing")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        asked = json.loads(args.work)
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)   # what the libraries print goes to stderr
        print(json.dumps(work(**asked | {"shape": Shape(**asked["shape"])})), file=answers, flush=True)
        return
    here = card()
    if not here and not args.dry:
        print("bench/train_gpu.py needs an NVIDIA GPU: nvidia-smi finds none; --dry runs the same code on toys",
              file=sys.stderr)
        sys.exit(2)
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            print(f"bench/train_gpu.py needs the package {package}: pip install -e '.[bench]'", file=sys.stderr)
            sys.exit(2)
    memory = 8e9 if args.dry else float(here["memory.total"]) * 2**20 * 0.92
    if args.dry:
        args.rounds, args.seconds = 1, 0.0
    out = args.out or (None if args.dry else ROOT / "bench" / "results" / "train_gpu.json")
    result: dict[str, Any] = {"command": " ".join(["python bench/train_gpu.py", *sys.argv[1:]]), "card": here,
                              "versions": installed(), "aims": AIMS, "shapes": []}
    chosen = (TOY,) if args.dry else tuple(s for s in SHAPES if args.shape in (None, s.name))
    with tempfile.TemporaryDirectory() as cache:
        for shape in chosen:
            one = compare(as_deep_as_fits(shape, memory), args, cache, memory)
            result["shapes"].append(one)
            print(told(one), flush=True)
            if out:
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(conclude(result["shapes"]))


def conclude(shapes: list[dict[str, Any]]) -> int:
    """Print the last line; the exit code."""
    failed = [one["error"] for one in shapes if "error" in one]
    failed += [f"{one['shape']['name']}: losses differ by {one['loss_gap']:.3f}: the contenders do not compute the same"
               for one in shapes if one.get("loss_gap", 0) > LOSS_GAP]
    for line in failed:
        print(f"failed: {line}")
    good = [one for one in shapes if "ratio" in one]
    if good:
        worst = min(good, key=lambda one: one["ratio"])
        mfu = min(min(one["mfu"]["ours"], one["mfu"]["again"]) for one in good)
        names = ", ".join(one["shape"]["name"] for one in good)
        print(f"ratio: {worst['ratio']:.2f}  ours/torch.compile'd transformers tokens per second at {worst['shape']['name']}, "
              f"the worst of {names} (aim {AIMS['ratio']}); lowest MFU of ours {100 * mfu:.1f} % of the measured matmul peak "
              f"(aim {100 * AIMS['mfu']:.0f} %); higher is better")
    else:
        print("ratio: none")
    return 1 if failed or not good else 0


if __name__ == "__main__":
    main()
