"""A recipe for tests: two phases, two sources, a model of some thousand parameters.

    python -m neo.train --config=tests/recipes/tiny.py --config.data.synthetic=True
"""

from neo.config import new, phase


def get_config():
    c = new()
    c.model.update(vocab_size=320, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, d_ff=64, windows=(16, 0),
                   max_seq_len=64)
    c.phases = [
        phase("short", tokens=8 * 8 * 32, seq_len=32, global_batch=8, mixture=dict(a=0.7, b=0.3), peak_lr=1e-2,
              final_lr=1e-3, warmup_tokens=2 * 8 * 32),
        phase("long", tokens=4 * 4 * 64, seq_len=64, global_batch=4, mixture=dict(a=0.5, b=0.5), peak_lr=1e-3,
              final_lr=1e-4, lr_shape="linear", rope_base=20000.0),
    ]
    c.train.update(compile_cache=False)   # the tests share one
    c.checkpoint.update(every_steps=4, keep_last=2)
    c.eval.update(every_steps=6, tokens=600)
    c.log.update(every_steps=1, plot=False, tensorboard=False, progress="plain")
    return c
