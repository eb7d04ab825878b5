"""Running a GGUF file in llama.cpp, through the prebuilt `xllamacpp` wheel, in a process of its own.

A file that llama.cpp does not like can end the process, and its log goes where it wants: neither may happen to the caller. The
key/value cache is float32 and flash attention is off, so that what differs is the file's own rounding.

    python -m neo.convert.gguf_runtime < request.json      (one JSON object in, one out; not a command for people)
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from neo.errors import InputError
from neo.extras import need

SECONDS = 3600   # ours: longest wait; a 7B model on two cores does the default checks in minutes
FORCED = 1e9     # logit bias: larger than any logit
REFUSED = "it refuses a request: "   # how our own last words begin; the server's threads may log after them


@dataclasses.dataclass(frozen=True)
class Answers:
    """What llama.cpp made of a request.

    Attributes:
        logprobs: [P, V] float64, of the token after each prefix.
        continuations: greedy tokens after each prompt.
        tokens: ids of each text.
    """

    logprobs: np.ndarray
    continuations: tuple[tuple[int, ...], ...]
    tokens: tuple[tuple[int, ...], ...]


def run_llama(path: str | Path, *, vocab_size: int, plain_token: int, prefixes: Sequence[Sequence[int]] = (),
              prompts: Sequence[Sequence[int]] = (), max_new_tokens: int = 0, texts: Sequence[str] = (),
              context: int = 0) -> Answers:
    """Load a GGUF file in llama.cpp and ask it.

    Args:
        vocab_size: V, how many log-probabilities to ask for.
        plain_token: an id whose text is complete by itself: the runtime only reports log-probabilities with such a token.
        prefixes: token ids; the log-probabilities of what follows each are returned.
        prompts: token ids to continue greedily by `max_new_tokens`, past any end-of-text token.
        texts: to be tokenized as prompts are, special tokens in the text left as text.
        context: tokens to make room for; 0 takes what the request needs.

    Raises InputError: xllamacpp is not installed, or llama.cpp cannot load the file (with its last words).
    """
    need("xllamacpp", extra="gguf", why="running GGUF files")
    longest = max([len(one) for one in prefixes] + [len(one) + max_new_tokens for one in prompts] + [1])
    request = {"path": str(path), "context": max(context, longest + 8), "vocab_size": vocab_size, "plain_token": plain_token,
               "prefixes": [list(map(int, one)) for one in prefixes], "prompts": [list(map(int, one)) for one in prompts],
               "max_new_tokens": max_new_tokens, "texts": list(texts)}
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
                   "GGML_NO_BACKTRACE": "1"}
    child = subprocess.run([sys.executable, "-m", "neo.convert.gguf_runtime"], input=json.dumps(request).encode(),
                           capture_output=True, timeout=SECONDS, env=environment)
    if child.returncode or not child.stdout:
        raise InputError(f"llama.cpp cannot run {path}: {_reason(child.stderr.decode(errors='replace'), child.returncode)}")
    answer = json.loads(child.stdout)
    return Answers(np.array(answer["logprobs"], np.float64).reshape(-1, vocab_size),
                   tuple(map(tuple, answer["continuations"])), tuple(map(tuple, answer["tokens"])))


def _reason(log: str, code: int) -> str:
    """Why llama.cpp ended, from what it printed."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for sign in (REFUSED, "error loading model: ", "GGML_ASSERT"):
        for line in lines:
            if sign in line:
                return line.partition("error loading model: ")[2] or line
    return lines[-1] if lines else f"it ended with code {code}"


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """In the child: load the file and answer the request."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = request["path"]
    params.n_ctx = request["context"]
    params.n_parallel, params.n_gpu_layers, params.warmup, params.verbosity = 1, 0, False, 1
    params.fit_params = False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    threads = max(os.cpu_count() or 1, 1) if Path(request["path"]).stat().st_size > 1 << 28 else 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    address = server.listening_address

    def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
        message = urllib.request.Request(address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))   # it is this very process
        try:
            with opener.open(message, timeout=SECONDS) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:   # as for an input longer than the file's context
            print("\n" + REFUSED + error.read().decode(errors="replace")[:300], file=sys.stderr, flush=True)
            os._exit(1)

    greedy = {"temperature": -1.0, "return_tokens": True, "cache_prompt": False}
    logprobs = []
    for prefix in request["prefixes"]:
        found = post("/completion", {**greedy, "prompt": prefix, "n_predict": 1, "n_probs": request["vocab_size"],
                                     "logit_bias": [[request["plain_token"], FORCED]]})
        row = [float("-inf")] * request["vocab_size"]
        for one in found["completion_probabilities"][0]["top_logprobs"]:
            row[one["id"]] = one["logprob"]
        logprobs.append(row)
    continuations = [post("/completion", {**greedy, "prompt": prompt, "n_predict": request["max_new_tokens"],
                                          "ignore_eos": True})["tokens"] for prompt in request["prompts"]]
    tokens = [post("/tokenize", {"content": text, "add_special": True, "parse_special": False})["tokens"]
              for text in request["texts"]]
    return {"logprobs": logprobs, "continuations": continuations, "tokens": tokens}


def main() -> None:
    """Answer stdin on what stdout was; everything llama.cpp prints goes to stderr."""
    reply = os.dup(1)
    os.dup2(2, 1)
    content = json.dumps(answer(json.load(sys.stdin))).encode()
    with os.fdopen(reply, "wb") as file:
        file.write(content)
    os._exit(0)   # the server's threads need not be asked


if __name__ == "__main__":
    main()
