"""Moxin-7B: 8.114B parameters (7.852B without embeddings), Mistral-7B deepened to 36 blocks, sliding window 4096.

    python -m neo.train --config=configs/moxin_7b.py

Cost: about 160,000 US dollars for the authors' whole run [abstract of arXiv:2412.06845v5].
Expected: HellaSwag 72.06, ARC-C 48.15 zero-shot for the original base model [S1]; the loss is not published.
This configuration has not been trained with neo.

Sources: [S1] Moxin-7B technical report, arXiv:2412.06845; [H-mox] config.json of moxin chat; [X] moxin-org/Moxin-LLM,
train/pretrain.py. The peak learning rate and batch are not published: the report prints 2e-6, which is hardly the peak
of a run from scratch; the code's default is used. Of the three phases this recipe has the first, 2K context; tokens
per phase and proportions are not published either.
"""

from neo.config import new, phase

STEP = 2048 * 2048   # tokens per optimizer step (inferred)


def get_config():
    c = new()
    c.model.update(
        vocab_size=32000, num_layers=36, d_model=4096, num_heads=32, num_kv_heads=8, head_dim=128, d_ff=14336,   # [S1]
        windows=(4096,), max_seq_len=32768, rope_base=10000.0, norm_eps=1e-5, tied_embeddings=False)             # [H-mox]
    c.phases = [phase(
        "context_2k", tokens=1.5e12, seq_len=2048, global_batch=2048,             # [S1] over 1.5T in all; batch inferred
        peak_lr=3e-4, final_lr=3e-5, warmup_tokens=2000 * STEP,                   # [X] code defaults; cosine to 10 % [S1]
        lr_shape="cosine",
        mixture=dict(slimpajama=0.4, dclm_baseline=0.4, the_stack_dedup=0.2))]    # sources [S1]; weights inferred
    c.data.source_tokens = dict(slimpajama=627e9)                                     # [S1]; the others' sizes are not given
    c.optimizer.update(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=1.0)   # [S1]; clip [X]
    c.init.update(std=0.02)                                                          # [H-mox]
    c.checkpoint.update(every_steps=500, permanent_every_steps=5000)                 # ours
    return c
