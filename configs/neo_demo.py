"""The demo: a small model on the Python standard library, start to end on two CPU cores in a few minutes.

    make demo
    # or: python -m neo.data.prepare --demo --out=data/demo && python -m neo.train --config=configs/neo_demo.py

Cost: 4 to 8 minutes on 2 cores, about 1.4 GB of memory. Expected: see README.md; the corpus depends on the Python version.

Every number is ours, chosen for the time budget.
"""

from neo.config import new, phase

STEP = 4 * 256   # tokens per optimizer step


def get_config():
    c = new()
    c.model.update(
        vocab_size=4096, num_layers=4, d_model=256, num_heads=8, num_kv_heads=4, d_ff=688,
        windows=(64, 0), max_seq_len=256, tied_embeddings=True)
    c.data.store = "data/demo"
    c.phases = [phase(
        "main", tokens=1200 * STEP, seq_len=256, global_batch=4, peak_lr=2e-3, final_lr=1e-4,
        warmup_tokens=40 * STEP, mixture=dict(code=0.7, prose=0.3))]
    c.train.update(remat="none")
    c.checkpoint.update(every_steps=100, keep_last=2, permanent_every_steps=600)
    c.log.every_steps = 10
    c.eval.update(every_steps=300, tokens=200_000, sample_every_steps=300, sample_prompts=("def __init__(self", "Return the"))
    return c
