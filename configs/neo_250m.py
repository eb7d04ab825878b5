"""MAP-NEO scaling-law 250M: 0.2509B parameters (0.1196B without embeddings).

    python -m neo.train --config=configs/neo_250m.py

1.0T tokens [H-sl, AN]; cost and loss are not published. This configuration has not been trained with neo.

Sources: [N] multimodal-art-projection/Megatron-LM-NEO, neo/scripts; [H-sl] file listings of the
m-a-p/neo_scalinglaw_* repositories on Hugging Face; [LL] iamtatsuki05/lenslapse, docs/model-card.md; [AN] the MAP-NEO
paper, arXiv:2405.19327, as quoted by third parties; [H-mat] the card of m-a-p/Matrix on Hugging Face;
inferred: fits the published file sizes, not stated anywhere.

Data: as configs/neo_7b.py, under data/neo_250m; vocabulary padded to 64,128 rows (tensor parallel 1) [N].
"""

from neo.config import new, phase

STEP = 1024 * 8192   # tokens per optimizer step: iteration 60000 <-> 503.32B tokens (derived from [H-sl])


def get_config():
    c = new()
    c.model.update(
        # layers, width, vocabulary [LL]; kv heads and d_ff inferred
        vocab_size=64128, num_layers=8, d_model=1024, num_heads=8, num_kv_heads=1, d_ff=4096,
        max_seq_len=8192, rope_base=10000.0, norm_eps=1e-5, tied_embeddings=False)   # as neo_7b (inferred)
    c.data.update(cross_document_attention=True, mask_end_of_document=True, seed=42)   # [N]
    c.phases = [phase(
        "fundamental", tokens=1.0e12, seq_len=8192, global_batch=1024,
        # as neo_7b (inferred)
        peak_lr=2e-4, start_lr=2e-5, final_lr=2e-5, warmup_tokens=2000 * STEP, lr_shape="cosine",
        # as neo_7b (inferred)
        mixture=dict(common_crawl=0.5255, code=0.2229, other=0.2516))]
    # Matrix has 4690B tokens [H-mat]; its parts by the shares above (derived)
    c.data.source_tokens = dict(common_crawl=2465e9, code=1045e9, other=1180e9)
    c.optimizer.update(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=1.0)   # [N]
    c.init.update(std=0.02, seed=42)                                                 # [N]
    c.checkpoint.update(every_steps=500, permanent_every_steps=2000)                 # [H-sl]: iter_0002000, ...
    return c
