"""Megabytes of text per second that neo.data.prepare turns into a token store, beside Hugging Face datasets.

    python bench/prepare.py           about two minutes on two cores; needs `pip install -e '.[bench]'`

The text is gathered from this machine and kept in a cache folder: 100 MB of documents, a quarter each of the
interpreter's standard library, of other installed Python packages, of /usr/share/doc and of the manual pages (many
languages), filled up from the others where one has less. Its sha256 is printed: two runs with the same one measured
the same text. A tokenizer of 64,000 pieces (neo's own settings) is trained on a sample of it, once.
  neo            python -m neo.data.prepare: .jsonl to a finished store: read, tokenized, held out, shuffled, hashed
  hf_datasets    load_dataset("json"), map(batched, num_proc) with the package tokenizers and a tokenizer.json of the
                 same vocabulary (neo.data.tokenizer_export), to a finished Arrow data set: read and tokenized only
Both use as many processes as there are cores to use. Contenders take turns, every turn in a new process with an empty
output folder; the time runs from the end of the imports to the finished output. Memory is the largest sum over a
contender's processes of what each has to itself and its part of what they share (PSS). Figures are medians over the
rounds, and go to bench/results/prepare.json. Last line: `ratio:`, neo / hf_datasets.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

VOCAB, SAMPLE_BYTES = 64_000, 20_000_000
LARGEST, SMALLEST = 1_000_000, 200  # bytes of a file that is taken
FOLDERS = {  # what is taken of each: endings of names, empty for all
    "standard library": (sysconfig.get_paths()["stdlib"], (".py", ".rst", ".txt", ".md")),
    "python packages": (sysconfig.get_paths()["purelib"], (".py", ".pyi", ".rst", ".txt", ".md")),
    "/usr/share/doc": ("/usr/share/doc", ()),
    "/usr/share/man": ("/usr/share/man", ()),
}


def documents(folder: str, endings: tuple[str, ...], seen: set[bytes]) -> Iterator[tuple[str, str]]:
    """(name, text) of the UTF-8 text files under a folder, in the order of their names, no content twice."""
    for base, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in ("site-packages", "__pycache__"))
        for name in sorted(names):
            path = os.path.join(base, name)
            if endings and not name.endswith(endings) or os.path.islink(path):
                continue
            try:
                raw = Path(path).read_bytes()
                raw = gzip.decompress(raw) if name.endswith(".gz") else raw
                text = raw.decode("utf-8")
            except (OSError, EOFError, ValueError):
                continue  # not there, not gzip, not UTF-8
            digest = hashlib.sha256(raw).digest()
            if SMALLEST <= len(raw) <= LARGEST and "\x00" not in text and digest not in seen:
                seen.add(digest)
                yield os.path.relpath(path, folder), text


def gather(path: Path, size: int) -> None:
    """Write `size` bytes of text (and a document's rest) as JSON lines, and beside them what came from where."""
    seen: set[bytes] = set()
    readers = {name: documents(*place, seen) for name, place in FOLDERS.items()}
    taken = dict.fromkeys(readers, 0)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        for share in (size // len(readers), size):  # an equal part of each, then whatever there is
            for name, reader in readers.items():
                goal = taken[name] + min(share - taken[name], size - sum(taken.values()))
                while taken[name] < goal and (found := next(reader, None)):
                    json.dump({"id": f"{name}/{found[0]}", "text": found[1]}, file, ensure_ascii=False)
                    file.write("\n")
                    taken[name] += len(found[1].encode())
    if sum(taken.values()) < size:
        sys.exit(f"bench/prepare.py: only {sum(taken.values()) / 1e6:.1f} MB of text on this machine: use a smaller "
                 "--megabytes")
    path.with_suffix(".parts").write_text(json.dumps(taken))
    temporary.rename(path)


def train_tokenizer(text: Path, folder: Path) -> None:
    """The tokenizer of all contenders, and its tokenizer.json; left alone where it is there already."""
    from neo.data.tokenizer_commands import train_into
    from neo.data.tokenizer_export import tokenizer_json
    from neo.data.tokenizer_training import Corpus

    corpus = Corpus((str(text),), sample_bytes=SAMPLE_BYTES)
    tokenizer, *_ = train_into(str(folder / "tokenizer"), corpus, VOCAB, "default", overwrite=True)
    (folder / "tokenizer.json").write_bytes(tokenizer_json(tokenizer))


def turn_neo(text: str, folder: Path, out: str, workers: int) -> dict:
    """One turn, in a process of its own."""
    from neo.data import preparation
    from neo.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(str(folder / "tokenizer"))
    begin = time.perf_counter()
    request = preparation.Request((text,), out, "text", tokenizer, preparation.ReadOptions(id_field="id"), workers=workers)
    manifest, _ = preparation.prepare(request)
    seconds = time.perf_counter() - begin
    splits = manifest["splits"].values()
    return {"seconds": seconds, "documents": sum(split["documents"] for split in splits),
            "tokens": sum(split["tokens"] - split["documents"] for split in splits)}  # without ends of documents


def turn_hf_datasets(text: str, folder: Path, out: str, workers: int) -> dict:
    """One turn, in a process of its own."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes instead, as for neo
    import datasets
    import tokenizers

    datasets.disable_progress_bars()
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def tokenize(batch):
        found = tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"input_ids": [one.ids for one in found]}

    begin = time.perf_counter()
    features = datasets.Features({"id": datasets.Value("string"), "input_ids": datasets.Sequence(datasets.Value("uint16"))})
    data = datasets.load_dataset("json", data_files=text, split="train", cache_dir=os.path.join(out, "cache"))
    data = data.map(tokenize, batched=True, batch_size=100, num_proc=workers, remove_columns=["text"], features=features)
    seconds = time.perf_counter() - begin
    import pyarrow.compute
    return {"seconds": seconds, "documents": len(data),
            "tokens": sum(pyarrow.compute.sum(pyarrow.compute.list_value_length(chunk)).as_py()
                          for chunk in data.data.column("input_ids").chunks)}


TURNS = {"neo": turn_neo, "hf_datasets": turn_hf_datasets}


def same_ids(text: Path, folder: Path, count: int) -> float:
    """Share of the first `count` documents that both tokenizers give the same ids."""
    import tokenizers

    from neo.data.tokenizer import Tokenizer
    ours, theirs = Tokenizer.load(str(folder / "tokenizer")), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    with open(text, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for _, line in zip(range(count), file, strict=False)]
    return sum(ours.encode(one) == theirs.encode(one, add_special_tokens=False).ids for one in texts) / len(texts)


def family(root: int) -> list[int]:
    """A process and all that come from it."""
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                parent = int(Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
            parents.setdefault(parent, []).append(int(entry))
    found = [root]
    for process in found:
        found += parents.get(process, [])
    return found


def memory(root: int) -> int:
    """Bytes of the process and all that come from it, shared pages divided among those that share them."""
    total = 0
    for process in family(root):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue  # gone in the meantime
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def run_turn(name: str, text: Path, folder: Path, workers: int) -> dict:
    """A contender's turn in a new process: what it reports, its processor seconds, and its memory in MB."""
    with tempfile.TemporaryDirectory(prefix="neo-bench-prepare-", dir=folder) as out:
        command = [sys.executable, __file__, "--turn", name, str(text), str(folder), out, str(workers)]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "HF_HOME": out}
        before = os.times()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        peak, over = [0], threading.Event()

        def watch() -> None:
            while not over.wait(0.1):
                peak[0] = max(peak[0], memory(process.pid))

        watching = threading.Thread(target=watch)
        watching.start()
        output, errors = process.communicate()
        over.set()
        watching.join()
        after = os.times()
        if process.returncode:
            sys.exit(f"bench/prepare.py: {name} failed:\n{errors[-3000:]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {**json.loads(output.splitlines()[-1]), "cpu_seconds": cpu, "memory_MB": peak[0] / 1e6}


def versions(names: list[str]) -> dict[str, str]:
    from importlib.metadata import version

    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.machine())
    return {"python": platform.python_version(), "cpu": cpu, **{name: version(name) for name in names}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=100, help="text to prepare (100)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender (3)")
    parser.add_argument("--workers", type=int, default=2, help="processes of each contender (2)")
    parser.add_argument("--cache", default=os.path.join(tempfile.gettempdir(), "neo-bench-prepare"), help="text, tokenizer")
    parser.add_argument("--out", default=str(ROOT / "bench/results/prepare.json"), help="where the figures go")
    parser.add_argument("--turn", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.turn:
        name, text, folder, out, workers = args.turn
        print(json.dumps(TURNS[name](text, Path(folder), out, int(workers))))
        return
    load = round(os.getloadavg()[0], 1)
    if hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))[:args.workers]
        os.sched_setaffinity(0, cores)
    try:
        import datasets
        import tokenizers  # noqa: F401
        missing = ""
    except ImportError as error:
        missing = f"{error.name} is missing: pip install -e '.[bench]'"
    folder = Path(args.cache, str(args.megabytes))
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text.jsonl"
    if not text.exists():
        gather(text, args.megabytes * 10**6)
    parts = json.loads(text.with_suffix(".parts").read_text())
    size = sum(parts.values())
    with open(text, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    print(f"text: {text}, {size / 1e6:.1f} MB, sha256 {digest}", file=sys.stderr)
    train_tokenizer(text, folder)
    names = list(TURNS)[:1] if missing else list(TURNS)
    turns: dict[str, list[dict]] = {name: [] for name in names}
    for number in range(args.rounds):
        for name in names:
            turns[name].append(turn := run_turn(name, text, folder, args.workers))
            print(f"round {number + 1}: {name} {size / 1e6 / turn['seconds']:.1f} MB/s", file=sys.stderr)
    result: dict = {"MB_per_s": {}, "MB_per_cpu_s": {}, "memory_MB": {}, "tokens": {}}
    for name, taken in turns.items():
        result["MB_per_s"][name] = round(statistics.median(size / 1e6 / turn["seconds"] for turn in taken), 1)
        result["MB_per_cpu_s"][name] = round(statistics.median(size / 1e6 / turn["cpu_seconds"] for turn in taken), 2)
        result["memory_MB"][name] = round(max(turn["memory_MB"] for turn in taken))
        result["tokens"][name] = taken[0]["tokens"]
    if not missing:
        pairs = zip(turns["neo"], turns["hf_datasets"], strict=True)
        result["ratio"] = round(statistics.median(theirs["seconds"] / ours["seconds"] for ours, theirs in pairs), 2)
        result["documents_with_the_same_ids"] = same_ids(text, folder, 500)
    result |= {"text": {"bytes": size, "documents": turns["neo"][0]["documents"], "sha256": digest, "parts": parts},
               "vocab_size": VOCAB, "workers": args.workers, "command": "python bench/prepare.py", "rounds": args.rounds,
               "versions": versions(["numpy", "sentencepiece", *([] if missing else ["datasets", "tokenizers", "pyarrow"])]),
               "load_average_before": load}
    print(json.dumps(result, indent=1))
    if missing:
        sys.exit(f"bench/prepare.py: no comparison, nothing written: {missing}")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    print(f"ratio: {result['ratio']:.2f}  ours/Hugging Face datasets MB/s ({args.megabytes} MB of text, {args.workers} "
          f"processes, the same ids, datasets {datasets.__version__}), higher is better")


if __name__ == "__main__":
    main()
