"""Tokens per second of neo's loader on one core, beside Hugging Face's IterableDataset and a raw memory map.

    python bench/loader.py            about two minutes; needs `pip install -e '.[bench]'`, 1 GB in the temporary folder

Three sources of random tokens in documents of 1000 tokens on average are mixed 0.60 / 0.15 / 0.25 into batches of
16 x 2048, as numpy arrays of int32.
  neo            TrainData.host_batch: token store, whole permutation, mixture; inputs, targets, segment ids,
                 positions, loss mask and source
  hf_iterable    datasets stored as rows of 2049 tokens, to_iterable_dataset, with_format("numpy"), interleave_datasets,
                 shuffle(buffer_size=1000), iter(batch_size=16): the fastest form found; inputs and targets only
  raw_memmap     random offsets into one flat file, with replacement, as nanoGPT does; inputs and targets only
Contenders take turns in every round; figures are medians over the rounds. Files are in the page cache for all.

With --streaming=PYTHON (an interpreter that has mosaicml-streaming and torch, which need another numpy than the rest)
MosaicML's StreamingDataset takes its turns too: local MDS shards of the same rows, the same proportions, shuffle, torch
DataLoader without workers; inputs and targets only.

Then 291 sources in 28 phases, the mixes of YuLan-Mini (configs/mixes/yulan_mini.csv), all linked to one file of tokens:
batches of 16 x 4096 at random places, the time of a look-up (global index -> source and place), and in a fresh process
the time from opening the store to the first batch at window 1e8, and the process's own memory.

Then, in fresh processes over stores of 1e9 and 1e10 tokens per source (sparse files with a real document index): the
time after the imports to the first batch at index 0 and at index 1e8, and after 300 random batches the memory grown
(the process's own) and mapped (page cache of the files, which the system takes back when it needs it).
Figures go to bench/results/loader.json. Last line: `ratio:`, neo / hf_iterable.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SEQ_LEN, BATCH, VOCAB, EOD = 2048, 16, 64_000, 3
MIXTURE = {"a": 0.60, "b": 0.15, "c": 0.25}
TOKENS_PER_SOURCE = 16_000_000
SHUFFLE_BUFFER = 1000
MANY_SEQ_LEN, MANY_BATCH, MANY_VOCAB = 4096, 16, 99_000
MANY_TOKENS = 32_000_000  # of the one file that all 291 sources are links to
FAR_INDEX = 10**8


def config_for(store: str, tokens: int):
    from neo.config.schema import Config, DataConfig, ModelConfig, PhaseConfig

    phase = PhaseConfig(tokens=tokens, seq_len=SEQ_LEN, global_batch=BATCH, mixture=MIXTURE)
    return Config(name="bench", model=ModelConfig(vocab_size=VOCAB), data=DataConfig(store=store, max_epochs=0.0),
                  phases=(phase,))


def many_config(store: str):
    """YuLan-Mini's 28 mixes as phases of the tokens they have."""
    from neo.config.mixes import read_mix
    from neo.config.schema import Config, DataConfig, ModelConfig, PhaseConfig

    phases = tuple(PhaseConfig(name=f"mix{i:02d}", tokens=round(sum(mix.values())), seq_len=MANY_SEQ_LEN,
                               global_batch=MANY_BATCH, mixture=mix)
                   for i, mix in enumerate(read_mix(ROOT / "configs/mixes/yulan_mini.csv").values(), 1))
    assert len(phases) == 28
    return Config(name="many", model=ModelConfig(vocab_size=MANY_VOCAB), data=DataConfig(store=store, max_epochs=0.0),
                  phases=phases)


def write_many_store(store: str) -> None:
    """291 sources, links to one pair of files: tokens at random, documents of 1000 tokens on average."""
    from neo.data.store_writer import ShardWriter

    one = os.path.join(store, "one")
    os.makedirs(one)
    rng = np.random.default_rng(0)
    writer = ShardWriter(one, "train-00000-of-00001", "uint32")
    while writer.num_tokens < MANY_TOKENS:
        tokens = rng.integers(EOD + 1, MANY_VOCAB, int(rng.exponential(1000)) + 2, dtype=np.uint32)
        tokens[-1] = EOD
        writer.append(tokens, f"d{writer.num_documents}", len(tokens))
    entry = writer.close()
    sources = many_config(store).sources
    assert len(sources) == 291
    for name in sources:
        folder = os.path.join(store, name)
        os.makedirs(folder)
        for file in (entry["tokens"], entry["documents"]):
            os.link(os.path.join(one, file), os.path.join(folder, file))
        finish_source(folder, name, entry, writer.num_tokens, MANY_VOCAB)


def finish_source(folder: str, name: str, entry: dict, num_bytes: int, vocab_size: int = VOCAB) -> None:
    from neo.data.store_writer import split_entry, write_manifest

    write_manifest(folder, source=name, vocab_size=vocab_size, eod_id=EOD, tokenizer_sha256="bench", layout="flat",
                   splits={"train": split_entry([entry], num_bytes), "validation": split_entry([], 0)}, prepare={})


def write_real_store(store: str) -> None:
    """Three sources of random tokens, document lengths exponential with mean 1000."""
    from neo.data.store_writer import ShardWriter

    for seed, name in enumerate(MIXTURE):
        rng = np.random.default_rng(seed)
        folder = os.path.join(store, name)
        os.makedirs(folder)
        writer = ShardWriter(folder, "train-00000-of-00001", "uint16")
        while writer.num_tokens < TOKENS_PER_SOURCE:
            tokens = rng.integers(EOD + 1, VOCAB, int(rng.exponential(1000)) + 2, dtype=np.uint16)
            tokens[-1] = EOD
            writer.append(tokens, f"{name}{writer.num_documents}", len(tokens))
        finish_source(folder, name, writer.close(), writer.num_tokens)


def write_sparse_store(store: str, tokens: int) -> None:
    """Three sources that share one sparse token file (holes read as id 0) and one index with an end every 1000."""
    from neo.data.store import DOCUMENTS_HEADER, DOCUMENTS_MAGIC

    os.makedirs(store)
    files = [os.path.join(store, "tokens"), os.path.join(store, "documents")]
    with open(files[0], "wb") as file:
        file.truncate(2 * tokens)
    count = tokens // 1000
    with open(files[1], "wb") as file:
        file.write(DOCUMENTS_MAGIC + count.to_bytes(8, "little"))
        np.arange(1000, tokens + 1, 1000, dtype="<u8").tofile(file)
        file.truncate(DOCUMENTS_HEADER + 16 * count)  # all ids empty
    for name in MIXTURE:
        folder = os.path.join(store, name)
        os.makedirs(folder)
        names = ["train.tokens", "train.documents"]
        for file, link in zip(files, names, strict=True):
            os.link(file, os.path.join(folder, link))
        entry = {"tokens": names[0], "documents": names[1], "num_tokens": tokens, "num_documents": count,
                 "sha256": dict.fromkeys(names, "0" * 64), "size": {n: os.path.getsize(f) for n, f in zip(
                     names, files, strict=True)}}
        finish_source(folder, name, entry, tokens)


def neo_batches(store: str) -> Iterator[np.ndarray]:
    from neo.data.loader import TrainData, open_sources

    config = config_for(store, 10**12)
    data = TrainData(config, open_sources(config))
    for step in range(data.order.num_steps):
        yield data.host_batch(step)["inputs"]


def memmap_batches(store: str) -> Iterator[np.ndarray]:
    tokens = np.memmap(next(Path(store, "a").glob("*.tokens")), dtype="<u2", mode="r")
    rng = np.random.default_rng(0)
    while True:
        starts = rng.integers(0, len(tokens) - SEQ_LEN - 1, BATCH)
        inputs = np.stack([tokens[s:s + SEQ_LEN].astype(np.int32) for s in starts])
        targets = np.stack([tokens[s + 1:s + 1 + SEQ_LEN].astype(np.int32) for s in starts])
        assert inputs.shape == targets.shape
        yield inputs


def write_hf(store: str, folder: str) -> None:
    import datasets

    features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("uint16"), length=SEQ_LEN + 1)})
    for name in MIXTURE:
        tokens = np.memmap(next(Path(store, name).glob("*.tokens")), dtype="<u2", mode="r")
        count = (len(tokens) - 1) // SEQ_LEN

        def rows(tokens=tokens, count=count):
            for i in range(count):
                yield {"tokens": tokens[i * SEQ_LEN:i * SEQ_LEN + SEQ_LEN + 1]}

        datasets.Dataset.from_generator(rows, features=features, cache_dir=os.path.join(folder, "cache")).save_to_disk(
            os.path.join(folder, name))


def hf_batches(folder: str, skip: int = 0) -> Iterator[np.ndarray]:
    import datasets

    parts = [datasets.load_from_disk(os.path.join(folder, name)).to_iterable_dataset().with_format("numpy").repeat(None)
             for name in MIXTURE]
    mixed = datasets.interleave_datasets(parts, probabilities=list(MIXTURE.values()), seed=0,
                                         stopping_strategy="all_exhausted")
    mixed = mixed.shuffle(seed=0, buffer_size=SHUFFLE_BUFFER).with_format("numpy")
    for batch in (mixed.skip(skip) if skip else mixed).iter(batch_size=BATCH):
        tokens = np.asarray(batch["tokens"])
        inputs, targets = tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32)
        assert inputs.shape == targets.shape
        yield inputs


class Streaming:
    """MosaicML's StreamingDataset in its own interpreter: `turn(seconds)` -> (Mtok per wall second, per CPU second)."""

    def __init__(self, python: str, store: str, folder: str) -> None:
        command = [python, __file__, "--streaming-worker", store, folder]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.version = json.loads(self._child.stdout.readline())["version"]

    def turn(self, seconds: float) -> tuple[float, float]:
        self._child.send_signal(signal.SIGCONT)
        self._child.stdin.write(f"{seconds}\n")
        self._child.stdin.flush()
        answer = tuple(json.loads(self._child.stdout.readline()))
        self._child.send_signal(signal.SIGSTOP)  # its threads would go on in the others' turns
        return answer

    def close(self) -> None:
        self._child.kill()  # it makes batches ahead of files that are about to go
        self._child.wait()


def streaming_worker(store: str, folder: str) -> None:
    """In the other interpreter: write MDS shards, then one turn for every line on stdin."""
    import streaming
    import torch

    reply = os.dup(1)
    os.dup2(2, 1)  # the library prints
    answers = os.fdopen(reply, "w", buffering=1)
    for name in MIXTURE:
        tokens = np.memmap(next(Path(store, name).glob("*.tokens")), dtype="<u2", mode="r")
        with streaming.MDSWriter(out=os.path.join(folder, name), columns={"tokens": f"ndarray:uint16:{SEQ_LEN + 1}"}) as out:
            for i in range((len(tokens) - 1) // SEQ_LEN):
                out.write({"tokens": np.array(tokens[i * SEQ_LEN:i * SEQ_LEN + SEQ_LEN + 1])})
    streams = [streaming.Stream(local=os.path.join(folder, name), proportion=share) for name, share in MIXTURE.items()]
    dataset = streaming.StreamingDataset(streams=streams, shuffle=True, batch_size=BATCH, epoch_size=10**7)

    def collate(rows: list[dict]) -> tuple:
        tokens = torch.from_numpy(np.stack([row["tokens"] for row in rows]).astype(np.int32))
        return tokens[:, :-1], tokens[:, 1:]

    def batches() -> Iterator[np.ndarray]:
        for inputs, targets in torch.utils.data.DataLoader(dataset, batch_size=BATCH, collate_fn=collate, num_workers=0):
            assert inputs.shape == targets.shape
            yield np.asarray(inputs)

    endless = batches()
    print(json.dumps({"version": streaming.__version__}), file=answers)
    for line in sys.stdin:
        print(json.dumps(measure(endless, float(line))), file=answers)


def measure(batches: Iterator[np.ndarray], seconds: float) -> tuple[float, float]:
    """(tokens per wall second, tokens per CPU second) of one turn, in millions."""
    tokens = 0
    wall, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < seconds:
        batch = next(batches)
        tokens += batch.size
    return tokens / (time.perf_counter() - wall) / 1e6, tokens / (time.process_time() - cpu) / 1e6


def probe(store: str, index: int, random_batches: int) -> None:
    """Run in a fresh process: open, make one batch, then random ones; print times and memory as JSON."""
    from neo.data import rows  # noqa: F401  imports grain
    from neo.data.loader import TrainData, open_sources

    anonymous = memory("RssAnon")
    begin = time.perf_counter()
    config = many_config(store) if store.endswith("many") else config_for(store, SEQ_LEN * (FAR_INDEX + 10**7))
    data = TrainData(config, open_sources(config))
    opened = time.perf_counter()
    batch = data.host_batch(data.order.step_of(index))
    assert batch["inputs"].shape in ((BATCH, SEQ_LEN), (MANY_BATCH, MANY_SEQ_LEN))
    first = time.perf_counter()
    choose = random.Random(0)
    for _ in range(random_batches):
        data.host_batch(choose.randrange(data.order.num_steps))
    print(json.dumps({"open_s": opened - begin, "first_batch_s": first - opened, "total_s": first - begin,
                      "grown_MB": memory("RssAnon") - anonymous, "own_MB": memory("RssAnon"), "mapped_MB": memory("RssFile")}))


def memory(what: str) -> float:
    """Resident megabytes of this process: RssAnon (its own) or RssFile (pages of mapped files, dropped when needed)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{what}:"))
    return int(line.split()[1]) / 1024


def run_probe(store: str, index: int, random_batches: int = 0) -> dict[str, float]:
    command = [sys.executable, __file__, "--probe", store, str(index), str(random_batches)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def versions() -> dict[str, str]:
    from importlib.metadata import version

    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.machine())
    return {"python": platform.python_version(), "cpu": cpu, "cores_used": "1",
            **{name: version(name) for name in ("numpy", "grain", "jax", "datasets", "pyarrow")}}


def throughput(folder: str, rounds: int, seconds: float, streaming: str) -> dict:
    """Medians in million tokens per second, wall and CPU, and the median of the rounds' ratios."""
    real, hf = os.path.join(folder, "real"), os.path.join(folder, "hf")
    write_real_store(real)
    write_hf(real, hf)
    contenders = {"neo": neo_batches(real), "hf_iterable": hf_batches(hf), "raw_memmap": memmap_batches(real)}
    take = {name: (lambda seconds, batches=batches: measure(batches, seconds)) for name, batches in contenders.items()}
    found: dict = {}
    if streaming:
        other = Streaming(streaming, real, os.path.join(folder, "mds"))
        take["mosaicml_streaming"] = other.turn
        found["mosaicml_streaming_version"] = other.version
    for turn in take.values():
        turn(seconds / 2)  # warm-up: page cache, buffers, lazy imports
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in take}
    for _ in range(rounds):
        for name, turn in take.items():
            turns[name].append(turn(seconds))
    for i, (what, short) in enumerate((("Mtok_per_s", "ratio"), ("Mtok_per_cpu_s", "ratio_cpu"))):
        found[what] = {name: round(statistics.median(turn[i] for turn in taken), 1) for name, taken in turns.items()}
        for peer, suffix in (("hf_iterable", ""), ("mosaicml_streaming", "_to_streaming")):
            if peer in turns:
                pairs = zip(turns["neo"], turns[peer], strict=True)
                found[short + suffix] = round(statistics.median(ours[i] / theirs[i] for ours, theirs in pairs), 2)
    if streaming:
        other.close()
    begin = time.perf_counter()
    next(hf_batches(hf, skip=20_000))
    found["hf_iterable_first_batch_at_row_20000_s"] = round(time.perf_counter() - begin, 3)
    return found


def many_sources(folder: str, rounds: int, seconds: float) -> dict:
    """291 sources, 28 phases: tokens per second at random places, look-ups, a start at window 1e8, memory."""
    from neo.data.loader import TrainData, open_sources

    store = os.path.join(folder, "many")
    write_many_store(store)
    config = many_config(store)
    data = TrainData(config, open_sources(config))
    choose = random.Random(0)

    def batches() -> Iterator[np.ndarray]:
        while True:
            yield data.host_batch(choose.randrange(data.order.num_steps))["inputs"]

    endless = batches()
    measure(endless, seconds)
    turns = [measure(endless, seconds) for _ in range(rounds)]
    indices = [choose.randrange(data.order.num_sequences) for _ in range(20_000)]
    lookups = []
    for _ in range(rounds):
        begin = time.process_time()
        for index in indices:
            data.order.address(index)
        lookups.append((time.process_time() - begin) / len(indices) * 1e6)
    probes = [run_probe(store, FAR_INDEX, 300) for _ in range(3)]
    middle = lambda key: round(statistics.median(one[key] for one in probes), 3)   # noqa: E731
    return {"sources": len(config.sources), "phases": len(config.phases), "windows": data.order.num_sequences,
            "Mtok_per_s": round(statistics.median(turn[0] for turn in turns), 1),
            "Mtok_per_cpu_s": round(statistics.median(turn[1] for turn in turns), 1),
            "lookup_us": round(statistics.median(lookups), 1), "open_and_first_batch_at_window_1e8_s": middle("total_s"),
            "own_memory_MB": middle("own_MB"), "of_it_grown_since_the_imports_MB": middle("grown_MB")}


def starts(folder: str) -> dict:
    """Seconds to the first batch, and memory, in fresh processes over large stores."""
    stores = {f"{size:.0e}": (size, os.path.join(folder, f"{size:.0e}")) for size in (10**9, 10**10)}
    for size, path in stores.values():
        write_sparse_store(path, size)
    seconds, megabytes = {}, {}
    for index in (0, FAR_INDEX):
        times = [run_probe(stores["1e+10"][1], index)["total_s"] for _ in range(3)]
        seconds[f"index {index}"] = round(statistics.median(times), 3)
    for name, (_, path) in stores.items():
        found = run_probe(path, 0, 300)
        megabytes[f"{name} tokens per source"] = {k: round(found[k], 1) for k in ("grown_MB", "mapped_MB")}
    return {"open_and_first_batch_s": seconds, "memory_after_300_random_batches": megabytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contender (9)")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a turn (1.0)")
    parser.add_argument("--out", default=str(ROOT / "bench/results/loader.json"), help="where the figures go")
    parser.add_argument("--streaming", default="", metavar="PYTHON", help="an interpreter with mosaicml-streaming and torch")
    parser.add_argument("--streaming-worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--probe", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    load = round(os.getloadavg()[0], 1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if args.streaming_worker:
        streaming_worker(*args.streaming_worker)
        return
    if args.probe:
        probe(args.probe[0], int(args.probe[1]), int(args.probe[2]))
        return
    try:
        import datasets
    except ImportError:
        sys.exit("bench/loader.py: Hugging Face datasets is missing: pip install -e '.[bench]'")
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory(prefix="neo-bench-loader-") as folder:
        result = throughput(folder, args.rounds, args.seconds, args.streaming) | starts(folder)
        result["many_sources"] = many_sources(folder, args.rounds, args.seconds)
    command = "python bench/loader.py" + " --streaming=PYTHON" * bool(args.streaming)
    result.update(command=command, rounds=args.rounds, seconds_per_turn=args.seconds,
                  shape=[BATCH, SEQ_LEN], mixture=MIXTURE, versions=versions(), load_average_before=load)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    print(f"ratio: {result['ratio']:.2f}  ours/HF IterableDataset tokens/s (three sources mixed and shuffled, one "
          f"core, datasets {datasets.__version__}), higher is better")


if __name__ == "__main__":
    main()
