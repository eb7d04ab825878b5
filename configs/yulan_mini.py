"""YuLan-Mini: 2.234B parameters tied in training (2.424B as released, untied); WeSaR gains, muP multipliers, QKV bias.

    python -m neo.train --config=configs/yulan_mini.py
    python -m neo.convert to-hf runs/yulan_mini exports/yulan-mini                      # Granite class: multipliers kept
    python -m neo.convert to-hf runs/yulan_mini exports/yulan-llama --model_type=llama  # folded, as the authors released it

Cost: 38,720 A800-hours for the stable stage [Y].
Expected: GSM8K 66.65, HumanEval 61.60, MMLU 51.79, LAMBADA 64.72 after annealing (4K) [Y]; the loss is not published.
This configuration has not been trained with neo.

Sources: [H-yul] config.json of yulan-team/YuLan-Mini and YuLan-Mini-Before-Annealing on Hugging Face; [Y]
RUC-GSAI/YuLan-Mini, pretrain/ (modeling_yulanmini.py, configuration_yulanmini.py, train.sh, phase26.sh,
datasets/data_mix); [R] tables of the paper, arXiv:2412.17743, as quoted by third parties.

The authors train in 27 mixes; here the 25 of the stable stage are one phase with their sums, those of annealing another
(sources below 1 % are left out). Their matrices learn at 0.01 * 256/1920, everything else at 0.01: neo has one rate, the
matrices'. Their annealing is 1 - sqrt; here it is linear (ours). Warm-up of about 10B tokens is from memory.
Data: one folder per source under data/yulan_mini with the yulan-team/YuLan-Mini tokenizer (99,000 pieces).
"""

from math import sqrt

from neo.config import new, phase

MATRIX_LR = 0.01 * 256 / 1920   # [Y], [R]: muP, base width 256


def shares(billions):
    total = sum(billions.values())
    return {source: tokens / total for source, tokens in billions.items()}


def get_config():
    c = new()
    c.model.update(
        vocab_size=99000, num_layers=56, d_model=1920, num_heads=30, num_kv_heads=6, head_dim=64, d_ff=4800,   # [H-yul]
        max_seq_len=28672, rope_base=10000.0, norm_eps=1e-6, qkv_bias=True, tied_embeddings=True,              # [H-yul], [Y]
        wesar=True, embedding_multiplier=10.0, residual_multiplier=1.4 / sqrt(56), logit_multiplier=1.0)       # [H-yul]
    c.phases = [
        phase("stable", tokens=1004.56e9, seq_len=4096, global_batch=1008,                        # [Y] train.sh, data_mix
              peak_lr=MATRIX_LR, final_lr=MATRIX_LR, lr_shape="constant", warmup_tokens=10e9,     # [Y]; warm-up from memory
              mixture=shares({                                                                    # [Y] billions of tokens
                  "fineweb-edu": 405.11, "chinese-fineweb-edu": 74.34, "code_clean_deepseek": 72.21, "aa_math": 53.86,
                  "dclm_baseline": 45.11, "the_stack_v2_python": 41.79, "the-stack-v2": 41.49, "arxiv-paper-en": 30.11,
                  "dolma": 28.78, "starcoder_smollm": 24.02, "books3-book-en": 20.14, "pes2o-paper-en": 20.01,
                  "cicg-news-en": 18.99, "wjp_scored": 14.2, "OpenCoder-LLM": 13.54, "infimm-webmath": 13.18,
                  "MNBVC": 12.77, "smollm-corpus": 12.75})),
        phase("annealing", tokens=80.33e9, seq_len=28672, global_batch=144, rope_base=490000.0,   # [Y], [R], [H-yul]
              peak_lr=MATRIX_LR, final_lr=0.0052 * MATRIX_LR, lr_shape="linear",                  # end factor (derived) [Y]
              mixture=shares({                                                                    # [Y] billions of tokens
                  "fineweb-edu": 27.54, "chinese-fineweb-edu": 5.44, "code_clean_deepseek": 1.06, "aa_math": 1.18,
                  "dclm_baseline": 3.07, "the_stack_v2_python": 1.97, "the-stack-v2": 1.85, "arxiv-paper-en": 2.05,
                  "dolma": 0.68, "books3-book-en": 2.01, "pes2o-paper-en": 1.36, "cicg-news-en": 1.3, "wjp_scored": 3.09,
                  "OpenCoder-LLM": 5.8, "infimm-webmath": 2.65, "MNBVC": 1.08, "smollm-corpus": 1.41,
                  "cbooks-book-cn": 1.36, "code_gen_qwen": 4.82, "decay": 5.24, "longwanjuan-others": 1.16}))]
    c.optimizer.update(b1=0.9, b2=0.95, eps=1e-15, weight_decay=0.1, clip_norm=1.0, z_loss=1e-4)   # [Y] phase25.sh
    c.init.update(std=5e-5, gain_width=256)                                                        # [H-yul]
    c.checkpoint.update(every_steps=500, permanent_every_steps=9728)                               # ours: one per mix
    return c
