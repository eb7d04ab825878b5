"""A Hugging Face folder against its checkpoint, computed by transformers on torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from etils import epath

from neo.convert.source import Source, open_source
from neo.convert.verify import (
    FLOAT32,
    NEW_TOKENS,
    ROUNDING,
    Ours,
    Report,
    compare,
    difference,
    fixed_prompts,
    judge_greedy,
    judge_texts,
    largest,
)
from neo.data.progress import Waiting
from neo.errors import InputError, StoppedForPerson
from neo.extras import need
from neo.train.checkpoint_hf import is_hf_folder

FOLDED = 1.37   # ours, no power of two: weights that were multiplied by something before they were rounded, round otherwise
WHY = "verifying a Hugging Face folder"


def verify_hf(source: Source, export: str) -> Report:
    """Compare transformers' results for the folder with neo's for the folder, and with neo's for the checkpoint.

    The first comparison has the same weights on both sides, so only the order of float32 sums may differ. The second also
    holds what the export's type has rounded off; its tolerance is measured, by rounding the checkpoint's own parameters.

    Raises InputError: transformers or torch is missing, the folder is none or damaged, the models have other shapes.
    """
    torch, transformers = (need(name, extra="parity", why=WHY) for name in ("torch", "transformers"))
    if not is_hf_folder(epath.Path(export)):
        raise InputError(f"{export} is neither a Hugging Face folder nor a *.gguf file, which is what is verified")
    copy = open_source(export)
    _same_shape(source, copy)
    vocab = source.tokenizer.vocab_size if source.tokenizer is not None else 0
    prompts = fixed_prompts(source.model, vocab)
    starts = [prompt for prompt in prompts if len(prompt) + NEW_TOKENS <= source.model.max_seq_len]
    with Waiting(f"neo on {source.path}"):
        checkpoint, dtype = Ours(source.weights).logits(prompts), copy.weights.dtype("embed/table")
        folded = source.model != copy.model
        rounded = 0.0
        if dtype.itemsize < 4 and (folded or source.weights.dtype("embed/table") != dtype):
            rounded = difference(checkpoint, Ours(source.weights, dtype, FOLDED if folded else 1.0).logits(prompts))
    with Waiting(f"neo on {export}"):
        exported = Ours(copy.weights).logits(prompts)
    with Waiting(f"transformers on {export}"):
        model, problems = _load(torch, transformers, export)
        theirs = [_logits(torch, model, prompt) for prompt in prompts]
        their_text = [_greedy(torch, transformers, model, prompt) for prompt in starts]
        del model   # a large model need not be in memory twice
    floor = FLOAT32 * largest(checkpoint)
    same = compare("the same weights", exported, theirs, floor,
                   f"{FLOAT32:g} of the largest logit, for float32 sums in another order")
    reason = "as above" if not rounded else (
        f"as above, and {ROUNDING:g} times what rounding the checkpoint's own parameters to {dtype.name} does ({rounded:.2e})")
    whole = compare("the checkpoint", checkpoint, theirs, floor + ROUNDING * rounded, reason)
    greedy, found = "not compared, as the logits differ", ()
    if same.passed and whole.passed:
        with Waiting(f"greedy text of neo on {export}"):
            ours = Ours(copy.weights)
            greedy, found = judge_greedy(ours.greedy(starts), their_text, lambda prompt: ours.logits([prompt])[0], starts,
                                         2 * floor)
    tokenizer, others = _tokenizers(transformers, source, export)
    library = f"transformers {transformers.__version__}, torch {torch.__version__}, float32"
    return Report(library, (same, whole), greedy, tokenizer, (*problems, *found, *others))


def _same_shape(source: Source, copy: Source) -> None:
    for name in ("vocab_size", "num_layers", "d_model", "d_ff"):
        ours, theirs = getattr(source.model, name), getattr(copy.model, name)
        if ours != theirs:
            raise InputError(f"{copy.path} is of another model: its {name} is {theirs}, that of {source.path} {ours}")


def _load(torch: Any, transformers: Any, export: str) -> tuple[Any, list[str]]:
    """The model in float32, and what transformers found missing or too much."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            export, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, local_files_only=True)
    except Exception as error:   # neo has read the folder whole: whatever transformers raises here is a finding
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise StoppedForPerson(f"transformers {transformers.__version__} cannot load {export}: {reason[:200]}") from None
    problems = [f"transformers says {name.replace('_', ' ')}: {', '.join(sorted(map(str, info[name]))[:4])}"
                for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(name)]
    return model.eval(), problems


def _logits(torch: Any, model: Any, prompt: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([prompt]), use_cache=False).logits[0].float().numpy()


def _greedy(torch: Any, transformers: Any, model: Any, prompt: list[int]) -> list[int]:
    # Assigned, not passed: what is passed as None would be filled up from the folder's generation_config.json.
    model.generation_config = transformers.GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
    with torch.no_grad():
        out = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long))
    return out[0, len(prompt):].tolist()


def _tokenizers(transformers: Any, source: Source, export: str) -> tuple[str, tuple[str, ...]]:
    if source.tokenizer is None:
        return "the checkpoint has none", ()
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(export, local_files_only=True)
    except Exception as error:   # whatever transformers raises here, the folder's tokenizer is what is wrong
        return "cannot be loaded", (f"transformers cannot load the tokenizer ({str(error).splitlines()[0][:160]})",)
    return judge_texts(source.tokenizer, lambda text: theirs(text)["input_ids"])
