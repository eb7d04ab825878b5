"""Tokens per second of one training step beside Hugging Face transformers + torch, on the CPU.

    python bench/train_cpu.py        three minutes on a quiet machine

The same Llama (4 layers, d=256, ff=688, 8 heads, 4 kv heads, V=4096; 5.0M parameters), the same initial weights and
batches (4 x 512 tokens), float32, 2 threads, and the same recipe for both: AdamW (norm gains without decay), gradients
clipped to norm 1.
  ours     neo's jitted training step as `neo.train` runs it, with its guard against NaN and its sums per source
  torch    LlamaForCausalLM with sdpa attention, torch's fused AdamW, eager
Each contender is a process of its own; they take turns, one works while the other waits. Figures are medians over rounds
of wall-clock and of process time (all threads), which a busy machine disturbs less. The losses must agree.
Figures go to bench/results/train_cpu.json. Last line: `ratio:`, ours / torch, the worse of wall and process time.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SHAPE = dict(vocab_size=4096, num_layers=4, d_model=256, d_ff=688, num_heads=8, num_kv_heads=4, max_seq_len=512)
BATCH, LENGTH, THREADS = 4, 512, 2
RATE, DECAY, B1, B2, EPS, CLIP = 1e-3, 0.1, 0.9, 0.95, 1e-8, 1.0
PACKAGES = {"ours": ("jax", "jaxlib", "flax", "optax"), "torch": ("torch", "transformers")}


def batches(start: int, count: int):
    """Token rows [B, S + 1] of steps start..: Zipf-like ids, each step's its own."""
    import numpy as np

    for step in range(start, start + count):
        rng = np.random.default_rng(step)
        yield rng.zipf(1.3, (BATCH, LENGTH + 1)).clip(max=SHAPE["vocab_size"] - 1).astype(np.int32)


def weights(path: Path) -> None:
    """Write initial parameters as flat float32 arrays, named by their path."""
    import jax
    import numpy as np

    from neo.config.schema import ModelConfig
    from neo.models.decoder import Decoder

    params = Decoder(ModelConfig(**SHAPE)).init(jax.random.key(0), 0.02)
    flat = jax.tree_util.tree_leaves_with_path(params)
    np.savez(path, **{"/".join(key.key for key in keys): np.asarray(value) for keys, value in flat})


def ours(path: Path):
    """(start step, number of steps) -> losses, with neo's own step."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from neo.config.schema import ModelConfig, OptimizerConfig
    from neo.models.decoder import Decoder
    from neo.train.optimizer import Optimizer
    from neo.train.step import StepOptions, make_step

    params: dict = {}
    for name, value in np.load(path).items():
        *parents, last = name.split("/")
        node = params
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = jnp.asarray(value)
    decoder = Decoder(ModelConfig(**SHAPE), attention="auto")
    optimizer = Optimizer(OptimizerConfig(b1=B1, b2=B2, eps=EPS), decoder.axes())
    step = make_step(decoder, optimizer, StepOptions(num_sources=1, clip_norm=CLIP))
    state = {"params": params, "opt": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}
    same = dict(segment_ids=np.ones((BATCH, LENGTH), np.int32), loss_mask=np.ones((BATCH, LENGTH), np.float32),
                positions=np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1)), source=np.zeros(BATCH, np.int32))
    rate, decay = np.float32(RATE), np.float32(DECAY)

    def run(start: int, count: int) -> list[float]:
        nonlocal state
        losses = []
        for rows in batches(start, count):
            state, metrics = step(state, {**same, "inputs": rows[:, :-1], "targets": rows[:, 1:]}, rate, decay)
            losses.append(metrics["loss"])
        return [float(x) for x in losses]

    del jax
    return run


def theirs(path: Path):
    """The same with transformers and torch."""
    import numpy as np
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    transformers.utils.logging.disable_progress_bar()
    config = transformers.LlamaConfig(
        vocab_size=SHAPE["vocab_size"], hidden_size=SHAPE["d_model"], intermediate_size=SHAPE["d_ff"],
        num_hidden_layers=SHAPE["num_layers"], num_attention_heads=SHAPE["num_heads"],
        num_key_value_heads=SHAPE["num_kv_heads"], max_position_embeddings=SHAPE["max_seq_len"], rms_norm_eps=1e-5,
        rope_theta=10000.0, tie_word_embeddings=False, attn_implementation="sdpa")
    model = transformers.LlamaForCausalLM(config)
    stored, d = np.load(path), SHAPE["d_model"]
    state = {"model.embed_tokens.weight": stored["embed/table"], "model.norm.weight": stored["final_norm/scale"],
             "lm_head.weight": stored["head/kernel"].T}
    for i in range(SHAPE["num_layers"]):
        layer = lambda name, i=i: stored[f"layers/{name}"][i]   # noqa: E731
        at = f"model.layers.{i}."
        state[at + "input_layernorm.weight"] = layer("attention_norm/scale")
        state[at + "post_attention_layernorm.weight"] = layer("mlp_norm/scale")
        for short, name in (("q", "query"), ("k", "key"), ("v", "value")):
            state[at + f"self_attn.{short}_proj.weight"] = layer(f"attention/{name}").reshape(d, -1).T
        state[at + "self_attn.o_proj.weight"] = layer("attention/output").reshape(-1, d).T
        for name in ("gate", "up", "down"):
            state[at + f"mlp.{name}_proj.weight"] = layer(f"mlp/{name}").T
    model.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in state.items()})
    model.train()
    gains = [p for p in model.parameters() if p.ndim == 1]
    others = [p for p in model.parameters() if p.ndim > 1]
    optimizer = torch.optim.AdamW([dict(params=others, weight_decay=DECAY), dict(params=gains, weight_decay=0.0)],
                                  lr=RATE, betas=(B1, B2), eps=EPS, fused=True)

    def run(start: int, count: int) -> list[float]:
        losses = []
        for rows in batches(start, count):
            rows = torch.from_numpy(rows)
            logits = model(rows[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.reshape(-1, SHAPE["vocab_size"]), rows[:, 1:].reshape(-1).long())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        return [float(x) for x in losses]

    return run


def work(contender: str, path: Path) -> None:
    """A contender's process: reads `start count` per line, answers with one line of JSON."""
    cores = sorted(os.sched_getaffinity(0))[:THREADS]
    os.sched_setaffinity(0, cores)
    run = {"ours": ours, "torch": theirs}[contender](path)
    for line in sys.stdin:
        start, count = (int(word) for word in line.split())
        wall, cpu = time.perf_counter(), time.process_time()
        losses = run(start, count)
        print(json.dumps(dict(wall=(time.perf_counter() - wall) / count, cpu=(time.process_time() - cpu) / count,
                              losses=losses)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6, help="steps a round")
    parser.add_argument("--only", choices=PACKAGES, help="one contender, without result file (for profiling)")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker[0], Path(args.worker[1]))

    # Waiting threads must not spin: they would take time from whoever is at work.
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(THREADS), "OMP_WAIT_POLICY": "PASSIVE",
           "GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    names = [args.only] if args.only else list(PACKAGES)
    records: dict[str, list[dict]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.npz"
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        weights(path)
        workers = {name: subprocess.Popen([sys.executable, __file__, "--worker", name, str(path)], env=env, text=True,
                                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) for name in names}
        for i in range(args.rounds + 1):                      # round 0 compiles and warms up
            for name in names if i % 2 else names[::-1]:
                worker = workers[name]
                worker.stdin.write(f"{i * args.steps} {args.steps}\n")
                worker.stdin.flush()
                answer = worker.stdout.readline()
                if not answer:
                    sys.exit(f"{name} failed")
                records[name].append(json.loads(answer))
                print(f"round {i} {name:6s} wall {records[name][-1]['wall'] * 1e3:7.1f} ms/step  "
                      f"process {records[name][-1]['cpu'] * 1e3:7.1f} ms/step  loss {records[name][-1]['losses'][-1]:.5f}",
                      file=sys.stderr, flush=True)
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()

    tokens = BATCH * LENGTH
    figures = {name: {clock: tokens / statistics.median(r[clock] for r in some[1:]) for clock in ("wall", "cpu")}
               for name, some in records.items()}
    for name, some in figures.items():
        print(f"{name:6s} {some['wall']:8.0f} tokens/s   {some['cpu']:8.0f} tokens per second of process time")
    if args.only:
        return None
    gap = max(abs(a - b) for r, s in zip(*records.values(), strict=True) for a, b in zip(r["losses"], s["losses"], strict=True))
    if gap > 2e-3:   # float32 in another order, over all steps; a wrong step is off by more than 0.1
        sys.exit(f"losses differ by {gap}: the contenders do not compute the same")
    ratio = {clock: figures["ours"][clock] / figures["torch"][clock] for clock in ("wall", "cpu")}
    result = {
        "shape": SHAPE, "batch": [BATCH, LENGTH], "threads": THREADS, "rounds": args.rounds, "steps_per_round": args.steps,
        "tokens_per_s": figures, "ratio": ratio, "largest_loss_difference": gap, "last_loss": records["ours"][-1]["losses"][-1],
        "load_average": os.getloadavg(), "python": platform.python_version(), "machine": platform.machine(),
        "cpus": os.cpu_count(), "command": "python bench/train_cpu.py",
        "versions": {p: importlib.metadata.version(p) for some in PACKAGES.values() for p in some},
        "rounds_ms": {name: {c: [round(r[c] * 1e3, 1) for r in some[1:]] for c in ("wall", "cpu")}
                      for name, some in records.items()}}
    out = ROOT / "bench" / "results" / "train_cpu.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {out.relative_to(ROOT)}; losses agree to {gap:.1e} over {(args.rounds + 1) * args.steps} steps; "
          f"wall {ratio['wall']:.2f}, process time {ratio['cpu']:.2f}")
    print(f"ratio: {min(ratio.values()):.2f}  ours/transformers+torch tokens per second "
          f"(training step, float32, {THREADS} threads, worse of wall and process time), higher is better")
    return None


if __name__ == "__main__":
    main()
