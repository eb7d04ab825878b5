"""A trained model for use from Python: what `neo.load` returns."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from neo.config import Config
from neo.config.checks import check_on_mesh
from neo.config.schema import MeshConfig, ModelConfig
from neo.errors import InputError
from neo.infer.generate import bucket, generate
from neo.models.decoder import Decoder, Params
from neo.models.flops import parameter_count
from neo.parallel import devices
from neo.parallel.mesh import BATCH_AXES, make_mesh
from neo.parallel.rules import Layout, rules_for
from neo.train.checkpoint_format import Checkpoint, resolve
from neo.train.checkpoint_hf import HFCheckpoint
from neo.train.initial import load_parameters
from neo.train.optimizer import decays

if TYPE_CHECKING:
    from neo.data.tokenizer import Tokenizer

SMALLEST_LENGTH = 32      # ours: of the lengths that `logits` compiles for
TOKENS_AT_ONCE = 8192     # ours: rows of `logits` run together up to so many tokens


@dataclasses.dataclass(frozen=True)
class Continuation:
    """What a model made of one prompt."""

    prompt: str
    continuation: str     # the new text alone
    prompt_tokens: int
    new_tokens: int
    ended: bool           # the model ended the document, rather than running out of max_new_tokens

    @property
    def text(self) -> str:
        """Prompt and continuation."""
        return self.prompt + self.continuation


@dataclasses.dataclass(frozen=True)
class Model:
    """A checkpoint's parameters on the devices, with its tokenizer and config.

    Matrices are in the compute dtype (bfloat16 where the device has it, else float32), norm scales, biases and scalar
    gains in float32.
    """

    checkpoint: Checkpoint | HFCheckpoint
    config: Config
    decoder: Decoder
    params: Params = dataclasses.field(repr=False)
    rope_base: float      # of the phase the checkpoint is from; 0 = the model's

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer it was trained with. InputError when the checkpoint has none, saying why."""
        from neo.data.tokenizer import load_tokenizer
        files = self.checkpoint.tokenizer_files()
        if not files:
            why = ("its folder holds none" if self.checkpoint.kind == "hf" else "it was trained on synthetic data"
                   if self.checkpoint.data().get("synthetic") else "its tokenizer/ folder is missing")
            raise InputError(f"checkpoint {self.checkpoint.path} has no tokenizer, because {why}: "
                             "text can neither be read nor written, model.logits(tokens) works")
        tokenizer = load_tokenizer(files, str(self.checkpoint.path / ("tokenizer" if self.checkpoint.kind == "neo" else "")))
        if tokenizer.vocab_size > self.config.model.vocab_size:
            raise InputError(f"the tokenizer of checkpoint {self.checkpoint.path} has {tokenizer.vocab_size} ids, "
                             f"model.vocab_size is {self.config.model.vocab_size}: it is another model's")
        return tokenizer

    def logits(self, tokens: Int[Any, "B T"]) -> Float[np.ndarray, "B T V"]:
        """Scores of the next token at every position, float32.

        Args:
            tokens: whole numbers from 0 to V-1, anything numpy can make an array of; T at most model.max_seq_len.

        Raises InputError saying what is wrong with the tokens.
        """
        tokens = _check_tokens(tokens, self.config.model)
        count, length = tokens.shape
        layout = self.decoder.layout
        ways = int(np.prod([layout.size(axis) for axis in BATCH_AXES]))
        # The padding stands on the right, where causal attention does not look.
        parts = 2 * layout.split("sequence")   # a split sequence has two chunks a device
        padded = min(bucket(length, SMALLEST_LENGTH), self.config.model.max_seq_len)
        padded = padded if parts == 2 else -(-padded // parts) * parts
        rows = max(TOKENS_AT_ONCE // padded // ways, 1) * ways
        rows = min(rows, ways * bucket(-(-count // ways), 1))
        result = np.empty((count, length, self.config.model.vocab_size), np.float32)
        for start in range(0, count, rows):
            part = tokens[start:start + rows]
            batch = np.zeros((rows, padded), np.int32)
            batch[:len(part), :length] = part
            placed = batch if layout.mesh is None else jax.device_put(batch, layout.sharding("batch", "sequence"))
            out = _forward(self.params, placed, decoder=self.decoder, rope_base=self.rope_base)
            result[start:start + rows] = np.asarray(out)[:len(part), :length]
        return result

    @overload
    def generate(self, prompt: str, **settings: Any) -> str: ...

    @overload
    def generate(self, prompt: Sequence[str], **settings: Any) -> list[str]: ...

    def generate(self, prompt: str | Sequence[str], max_new_tokens: int = 128, temperature: float = 0.8, top_k: int = 0,
                 top_p: float = 1.0, seed: int = 0) -> str | list[str]:
        """The text that follows a prompt, or each of a list of prompts; without the prompt itself.

        Ends where the model ends the document, or after `max_new_tokens`. The settings are those of
        `neo.infer.sampling.Sampling`. Prompt number i of a list draws with a key of (seed, i): its text does not
        depend on the other prompts, and the same prompt twice gives two samples.

        Raises InputError: no tokenizer, a prompt too long for the model, a setting out of range.
        """
        single = isinstance(prompt, str)
        found = self.continuations([prompt] if single else list(prompt), max_new_tokens=max_new_tokens,
                                   temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        texts = [one.continuation for one in found]
        return texts[0] if single else texts

    def continuations(self, prompts: Sequence[str], *, first_index: int = 0, max_new_tokens: int = 128,
                      **settings: Any) -> list[Continuation]:
        """Like `generate`, with more about each prompt; `first_index` is the index of the first one."""
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise InputError(f"a prompt is text, not {type(prompt).__name__}: {str(prompt)[:40]!r}")
        tokenizer = self.tokenizer
        encoded = [tokenizer.encode_prompt(prompt) for prompt in prompts]
        found = generate(self.decoder, self.params, encoded, max_new_tokens=max_new_tokens, eod_id=tokenizer.eod_id,
                         stop_ids=tokenizer.eos_ids, vocab_size=tokenizer.vocab_size, rope_base=self.rope_base,
                         first_index=first_index, **{"temperature": 0.8, **settings})
        return [Continuation(prompt, continuation(tokenizer, ids, new), len(ids), len(new), len(new) < max_new_tokens)
                for prompt, ids, new in zip(prompts, encoded, found, strict=True)]


def load(checkpoint: str, mesh: jax.sharding.Mesh | None = None) -> Model:
    """See `neo.load`."""
    found = resolve(checkpoint)
    config = found.config()
    first = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    dtype = jnp.bfloat16 if devices.has_bfloat16(first) else jnp.float32
    if mesh is None:
        mesh = spread_over(config.model, jnp.dtype(dtype).itemsize, jax.devices(), devices.memory_bytes(first))
    if mesh is None:
        layout = Layout()
    else:
        check_on_mesh(dataclasses.replace(config, phases=()), mesh.shape)
        layout = Layout(mesh, rules_for(config.model.num_kv_heads, mesh.shape["tensor"]))
    decoder = Decoder(config.model, dtype, layout=layout)
    params = load_parameters(found, _abstract(decoder))
    phase = found.data().get("phase")
    base = next((p.rope_base for p in config.phases if p.name == phase), 0.0)
    return Model(found, config, decoder, params, base)


def spread_over(model: ModelConfig, bytes_each: int, found: Sequence[jax.Device],
                capacity: int | None) -> jax.sharding.Mesh | None:
    """None when the weights fit on one device, else a mesh of all. InputError, with both numbers, if that is too small.

    Args:
        bytes_each: bytes of a parameter.
        capacity: bytes of one device; None if unknown.
    """
    need = parameter_count(model)["total"] * bytes_each
    if capacity is None or need <= capacity:
        return None
    count = len(found)
    if count > 1 and model.d_model % count == 0 and need // count <= capacity:
        return make_mesh(MeshConfig(fsdp=-1), found)
    raise InputError(f"the weights need {need / 1e9:.1f} GB, {count} x {found[0].device_kind} "
                     f"has {capacity / 1e9:.1f} GB each: use more or larger devices")


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], new: Sequence[int]) -> str:
    """Text of the new tokens as it reads behind the prompt's.

    SentencePiece drops a leading space, so the new tokens alone would lose the one between the two.
    """
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *new])
    return whole[len(before):] if whole.startswith(before) else tokenizer.decode(new)


def _abstract(decoder: Decoder) -> Params:
    """What to load: matrices in the compute dtype, as the forward pass would cast them anyway; the rest as it is."""
    one = None if decoder.layout.mesh is not None else jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def kept(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        dtype = decoder.compute_dtype if decays(path[-1].key) else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=one or leaf.sharding)

    return jax.tree_util.tree_map_with_path(kept, decoder.abstract_params())


def _check_tokens(tokens: Any, model: ModelConfig) -> Int[np.ndarray, "B T"]:
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise InputError(f"tokens of shape {list(tokens.shape)} and type {tokens.dtype}: whole numbers of shape [B, T] "
                         "are needed, as in [[5, 17, 3]]")
    if tokens.min() < 0 or tokens.max() >= model.vocab_size:
        wrong = tokens.min() if tokens.min() < 0 else tokens.max()
        raise InputError(f"token {wrong} is outside the model's vocabulary, 0 to {model.vocab_size - 1}")
    if tokens.shape[1] > model.max_seq_len:
        raise InputError(f"{tokens.shape[1]} tokens are more than model.max_seq_len={model.max_seq_len}")
    return tokens


@functools.partial(jax.jit, static_argnames=("decoder", "rope_base"))
def _forward(params: Params, tokens: Int[Array, "B T"], *, decoder: Decoder, rope_base: float) -> Float[Array, "B T V"]:
    return decoder.apply(params, tokens, rope_base=rope_base)
