"""A 124M-parameter model for one small accelerator: TPU v5e-1 or a T4, 16 GB each, as Colab lends them.

    python -m neo.data.tokenizer train mytext/ --out=data/colab/tokenizer --vocab_size=32000
    python -m neo.data.prepare mytext/ --out=data/colab --source=text --tokenizer=data/colab/tokenizer
    python -m neo.train --config=configs/neo_colab.py

Cost and result: not run on a v5e-1 or a T4 yet; `--print_config` gives the memory estimate (about 2 GB of state).
A T4 has no bfloat16 units: compute_dtype "auto" then takes float32, with the blockwise attention.

Every number is ours. Shape: Llama-like with the proportions of a 12-layer, 768-wide GPT; one full-attention layer
after three of window 512. 2.5e9 tokens are 20 per parameter (Hoffmann et al., arXiv:2203.15556).
"""

from neo.config import new, phase

STEP = 256 * 1024   # tokens per optimizer step


def get_config():
    c = new()
    c.model.update(
        vocab_size=32000, num_layers=12, d_model=768, num_heads=12, num_kv_heads=4, d_ff=2048,
        windows=(512, 512, 512, 0), max_seq_len=1024, tied_embeddings=False)
    c.data.store = "data/colab"
    c.phases = [phase(
        "main", tokens=2.5e9, seq_len=1024, global_batch=256, peak_lr=6e-4, final_lr=6e-5,
        warmup_tokens=200 * STEP, mixture=dict(text=1.0))]
    c.checkpoint.update(every_steps=200)
    c.eval.update(every_steps=200, sample_every_steps=200)
    return c
