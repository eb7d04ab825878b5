"""YuLan-Mini: 2.234B parameters tied in training (2.424B as released, untied); WeSaR gains, muP multipliers, QKV bias.

    python -m neo.data.inspect --config=configs/yulan_mini.py    # the plan: 27 phases, 291 sources
    python -m neo.train --config=configs/yulan_mini.py
    python -m neo.convert to-hf runs/yulan_mini exports/yulan-mini                      # Granite class: multipliers kept
    python -m neo.convert to-hf runs/yulan_mini exports/yulan-llama --model_type=llama  # folded, as the authors released it

Cost: 38,720 A800-hours for the stable stage [Y].
Expected: GSM8K 66.65, HumanEval 61.60, MMLU 51.79, LAMBADA 64.72 after annealing (4K) [Y]; the loss is not published.
This configuration has not been trained with neo.

Sources: [H-yul] config.json of yulan-team/YuLan-Mini and YuLan-Mini-Before-Annealing on Hugging Face; [Y]
RUC-GSAI/YuLan-Mini, pretrain/ (modeling_yulanmini.py, configuration_yulanmini.py, train.sh, train_utils.py, phase26.sh,
datasets/data_mix); [R] tables of the paper, arXiv:2412.17743, as quoted by third parties.

Mixes: configs/mixes/yulan_mini.csv [Y]. data.source_tokens are the tokens used: the sources hold at least those, and no token
file was read twice (derived) [Y]. Rate: the authors' matrices learn at 0.01 * 256/1920, everything else at 0.01; neo has one
rate, the matrices'. Their annealing is 1 - sqrt(t / 19000) from step 243198, held from 262000 on; here it is straight between
its values at the phases' borders, up to 0.18 of the peak above it (ours). Warm-up of about 10B tokens is from memory.
Data: one folder per source under data/yulan_mini with the yulan-team/YuLan-Mini tokenizer (99,000 pieces).
"""

from math import sqrt

from neo.config import new, phase
from neo.config.mixes import read_mix, total

MATRIX_LR = 0.01 * 256 / 1920   # [Y], [R]: muP, base width 256
STABLE = dict(seq_len=4096, global_batch=1008, peak_lr=MATRIX_LR, final_lr=MATRIX_LR, lr_shape="constant")   # [Y] train.sh
LONG = dict(seq_len=28672, global_batch=144, rope_base=490000.0, lr_shape="linear")                         # [Y], [R], [H-yul]


def rate(step):
    return MATRIX_LR * (1 - sqrt((min(step, 262000) - 243198) / 19000))   # [Y] train_utils.py


def get_config():
    c = new()
    c.model.update(
        vocab_size=99000, num_layers=56, d_model=1920, num_heads=30, num_kv_heads=6, head_dim=64, d_ff=4800,   # [H-yul]
        max_seq_len=28672, rope_base=10000.0, norm_eps=1e-6, qkv_bias=True, tied_embeddings=True,              # [H-yul], [Y]
        wesar=True, embedding_multiplier=10.0, residual_multiplier=1.4 / sqrt(56), logit_multiplier=1.0)       # [H-yul]
    mixes = read_mix("yulan_mini")
    del mixes["26_20241127_205447"]   # phase 26 at 4K, which was not the one used [Y]
    c.phases = [phase(f"mix_{name[:2]}", mixture=mix, mixture_unit="tokens", **(STABLE if name < "26" else LONG))   # [Y]
                for name, mix in mixes.items()]
    c.phases[0].warmup_tokens = 10e9                                                                        # from memory
    c.phases[25].update(peak_lr=MATRIX_LR, final_lr=rate(253006))                                           # [Y]: steps
    c.phases[26].update(peak_lr=rate(253006), final_lr=rate(262772))
    c.data.source_tokens = total(mixes.values())
    c.optimizer.update(b1=0.9, b2=0.95, eps=1e-15, weight_decay=0.1, clip_norm=1.0, z_loss=1e-4)   # [Y] phase25.sh
    c.init.update(std=5e-5, gain_width=256)                                                        # [H-yul]
    c.checkpoint.update(every_steps=500, permanent_every_steps=9728)                               # ours: one per mix
    return c
