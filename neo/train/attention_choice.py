"""Which attention implementation a run takes: chosen once, for all its layers and phases, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from neo.config import Config
from neo.errors import InputError
from neo.kernels.attention import IMPLEMENTATIONS, Request, resolve
from neo.kernels.attention.selfcheck import verify
from neo.models.decoder import layer_pattern
from neo.parallel import distributed

CHECKED = ("pallas_tpu", "pallas_gpu", "cudnn")   # compiled by the device's own compiler, or not ours


def requests(config: Config, dtype: str, sizes: Mapping[str, int], platform: str, device_kind: str = "") -> list[Request]:
    """What the run will ask of attention: one request for each kind of layer, at its longest sequence.

    Args:
        dtype: of the activations, "bfloat16" or "float32".
        sizes: devices per mesh axis; heads are split over `tensor`, the sequence over `context`.
    """
    model, tensor = config.model, sizes["tensor"]
    longest = max(phase.seq_len for phase in config.phases)
    return [Request(platform=platform, device_kind=device_kind, dtype=dtype, seq_len=longest,
                    num_heads=max(1, model.num_heads // tensor), num_kv_heads=max(1, model.num_kv_heads // tensor),
                    head_size=model.head_size, window=kind.window, softcap=bool(model.attention_softcap),
                    segments=not config.data.cross_document_attention, alibi=kind.position == "alibi",
                    sinks=model.attention_sinks, sequence_shards=sizes["context"])
            for kind in dict.fromkeys(layer_pattern(model))]


def choose(config: Config, asked: Sequence[Request]) -> tuple[str, str]:
    """(name, reason). Raises InputError when the implementation that the config names lacks something."""
    answers = [resolve(config.train.attention, request) for request in asked]
    # Layers of one model share one implementation: what one kind of layer lacks decides for all.
    return next((answer for answer in answers if answer[0] != answers[0][0] and answer[0] == "blockwise"), answers[0])


def needs_check(config: Config, name: str) -> bool:
    """Whether `checked` has anything to do."""
    return name in CHECKED and config.train.check_attention


def checked(config: Config, answer: tuple[str, str], asked: Sequence[Request],
            verify: Callable[[Any, Request], str] = verify) -> tuple[str, str]:
    """`answer` of `choose`, or "blockwise" where the chosen kernel computes something else on this device.

    Compilers have bugs, and the kernels are younger than the chips: before a run trusts one, it is held against the
    plain form on the device it will train on, forward and backward (`neo.kernels.attention.selfcheck`). All processes
    come to the same answer. Raises InputError when the config names the kernel, which then is not replaced.
    """
    name, _ = answer
    if not needs_check(config, name):
        return answer
    wrong = "; ".join(filter(None, (verify(IMPLEMENTATIONS[name], request) for request in asked)))
    if not distributed.any_process(bool(wrong)):
        return name, f"{answer[1]}; agrees with blockwise on this device"
    what = f"attention {name} differs from blockwise on {asked[0].device_kind}: {wrong or 'on another process'}"
    if config.train.attention != "auto":
        raise InputError(f"config.train.attention={name}: {what}; --config.train.attention=blockwise is right everywhere")
    return "blockwise", f"{what}; please report it"
