"""A config.json read key by key, so that nothing in it that matters goes unnoticed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

# Keys that say nothing about the function: bookkeeping, generation, initialisation, dropout, ways to run.
HARMLESS = frozenset(re.findall(r"\w+", """
    architectures model_type transformers_version torch_dtype dtype auto_map name_or_path _name_or_path tokenizer_class
    tokenizer_name _commit_hash bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id
    decoder_start_token_id forced_bos_token_id forced_eos_token_id use_cache output_attentions output_hidden_states
    return_dict return_dict_in_generate output_scores is_decoder is_encoder_decoder id2label label2id num_labels
    problem_type finetuning_task task_specific_params prefix pruned_heads tie_encoder_decoder torchscript use_bfloat16
    chunk_size_feed_forward tf_legacy_loss remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens bad_words_ids max_length min_length max_new_tokens do_sample temperature top_k top_p typical_p
    num_beams num_beam_groups num_return_sequences repetition_penalty length_penalty diversity_penalty early_stopping
    encoder_no_repeat_ngram_size no_repeat_ngram_size cache_implementation gradient_checkpointing use_flash_attention
    use_flash_attn _attn_implementation attn_implementation _attn_implementation_autoset _attn_implementation_internal
    initializer_range init_config init_device init_std embedding_fraction verbose pretraining_tp attention_dropout attn_pdrop
    resid_pdrop emb_pdrop hidden_dropout use_liger _sliding_window_pattern unsloth_version unsloth_fixed
    is_llama_config model_name num_parameters
"""))
# Keys whose listed values change nothing; any other value is refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,), "partial_rotary_factor": (1.0,), "rope_interleaved": (False,),
    "tie_last_hidden_states": (False, True), "use_bidirectional_attention": (False,), "use_mrope": (False,),
    "use_sliding_window": (False,),
}


class Keys:
    """One dictionary of a config, read key by key: what nobody asks for, and what is asked for and wrong, is collected."""

    def __init__(self, table: Mapping[str, Any], defaults: Mapping[str, Any], at: str = ""):
        self.table, self.defaults, self.at = table, defaults, at
        self.seen: set[str] = set()
        self.problems: list[str] = []

    def get(self, key: str) -> Any:
        """The value; the class's default (None without one) when the key is missing."""
        self.seen.add(key)
        return self.table[key] if key in self.table else self.defaults.get(key)

    def number(self, key: str, instead: float | None = None) -> float:
        """A number above 0; `instead` where it is missing or null."""
        value = self.get(key)
        if value is None:
            value = instead
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            self.refuse(key, value, "a number above 0 is needed" if value is not None else "")
            return 1.0
        return value

    def whole(self, key: str, instead: int | None = None, most: int = 1 << 31) -> int:
        """A whole number above 0; one that is larger than any model's is refused before anything is made of it."""
        value = self.number(key, instead)
        if value != int(value) or value > most:
            self.refuse(key, value, f"a whole number of at most {most} is needed")
            return 1
        return int(value)

    def positive(self, key: str) -> float:
        """A number above 0, or 0 where it is missing, null or 0: something that can be switched off."""
        return float(self.number(key)) if self.get(key) else 0.0

    def flag(self, key: str) -> bool:
        """True or false; null is false."""
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            self.refuse(key, value, "true or false is needed")
        return value is True

    def only(self, key: str, *allowed: Any, why: str = "") -> None:
        """Refuse any value but null and those allowed."""
        value = self.get(key)
        if value is not None and value not in allowed:
            self.refuse(key, value, why)

    def name(self, key: str, known: Iterable[str]) -> str | None:
        """One of the names `known`; None, noted, for anything else."""
        value = self.get(key)
        if isinstance(value, str) and value in known:
            return value
        self.refuse(key, value, f"neo has {', '.join(known)}")
        return None

    def items(self, key: str, length: int) -> list | None:
        """A list of one entry per layer; None where there is none."""
        value = self.get(key)
        if value is not None and (not isinstance(value, (list, tuple)) or len(value) != length):
            self.refuse(key, value, f"a list of {length} is needed")
            return None
        return value if value is None else list(value)

    def inner(self, key: str, defaults: Mapping[str, Any] | None = None) -> Keys:
        """A dictionary within this one, empty where there is none."""
        value = self.get(key)
        if value is not None and not isinstance(value, Mapping):
            self.refuse(key, value, "a dictionary is needed")
        return Keys(value if isinstance(value, Mapping) else {}, defaults or {}, f"{self.at}{key}.")

    def refuse(self, key: str, value: Any, why: str = "") -> None:
        """Note one key and what is wrong with it."""
        said = "is missing" if value is None else f"= {_short(value)}"
        self.problems.append(f"{self.at}{key} {said}" + (f" ({why})" if why else ""))

    def rest(self) -> list[str]:
        """All problems, with those of the keys nobody has asked for."""
        for key, value in self.table.items():
            if key not in self.seen and key not in HARMLESS and value is not None and value not in NEUTRAL.get(key, ()):
                self.refuse(key, value)
        return self.problems


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
