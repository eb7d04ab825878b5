"""How long until something happens: `import neo`, `--help`, and the first step of the demo's model.

    python bench/startup.py

Imports are timed as whole processes, interleaved with a bare interpreter and with `import jax`, medians of
ROUNDS. The first step is that of `neo_demo` on synthetic data in an empty workdir, compilation included.
The last line is the time of `import jax` over that of `import neo`.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 7
COMMANDS = {
    "bare interpreter": ["-c", "pass"],
    "import neo": ["-c", "import neo"],
    "import jax": ["-c", "import jax"],
    "neo.train --help": ["-m", "neo.train", "--help"],
}


def seconds(arguments: list[str], environment: dict[str, str]) -> float:
    """Wall time of one interpreter."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=environment, cwd=ROOT)
    return time.perf_counter() - begun


def first_step(environment: dict[str, str]) -> float:
    """Seconds from start to the first record of a step, as the log says."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "neo.train", "--config=neo_demo", "--config.data.synthetic=True",
                   "--config.train.steps=1", "--config.log.every_steps=1", "--config.log.progress=plain",
                   f"--workdir={folder}/run"]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=ROOT)
    return float(re.search(r"\[\s*([\d.]+) s\] step 1/1", done.stderr).group(1))


def main() -> None:
    """Measure, print, and write bench/results/startup.json."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):
        for name, arguments in COMMANDS.items():
            times[name].append(seconds(arguments, environment))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, value in medians.items():
        print(f"{name:<20} {value:6.3f} s")
    step = first_step(environment)
    print(f"first step of the demo's model: {step:.1f} s after start, compilation included")
    ratio = medians["import jax"] / medians["import neo"]
    result = {"command": "python bench/startup.py", "median_seconds": medians, "first_step_seconds": step, "ratio": ratio,
              "rounds": ROUNDS, "load": os.getloadavg(), "python": platform.python_version(), "cores": os.cpu_count(),
              "versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "orbax-checkpoint")}}
    (ROOT / "bench/results/startup.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"ratio: {ratio:.2f}  import jax / import neo, whole processes, higher is better")


if __name__ == "__main__":
    main()
