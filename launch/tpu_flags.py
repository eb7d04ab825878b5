"""Print the compiler flags of a chip: one line for LIBTPU_INIT_ARGS (or XLA_FLAGS on GPUs), or a table of the reasons.

    export LIBTPU_INIT_ARGS="$(python launch/tpu_flags.py v5p)"
    python launch/tpu_flags.py v5p --why

neo.train sets them by itself (config.train.compiler_flags); this is for other programs. The data are in
neo/parallel/compiler_flags.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from neo.parallel.compiler_flags import FLAGS as _FLAGS

FLAGS: dict[str, tuple[str, ...]] = {chip: tuple(flag.text for flag in flags) for chip, flags in _FLAGS.items()}


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--why"]
    if len(words) != 1 or words[0] not in _FLAGS:
        print(f"usage: python launch/tpu_flags.py CHIP [--why]; chips: {', '.join(_FLAGS)}", file=sys.stderr)
        sys.exit(2)
    if "--why" in sys.argv:
        for flag in _FLAGS[words[0]]:
            print(f"{flag.text}\n    why: {flag.why}\n    effect: {flag.effect}" + ("; slow to compile" if flag.slow else ""))
    else:
        print(" ".join(FLAGS[words[0]]))
