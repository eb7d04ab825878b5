"""MAP-NEO 7B: 7.794B parameters (7.399B without embeddings), fundamental phase.

    python -m neo.train --config=configs/neo_7b.py                     # TPU pod or GPU cluster, one process per host
    python -m neo.train --config=neo_7b --config.data.synthetic=True   # burn in a machine without data

Cost: MAP-NEO trained 4.5T tokens at 7200 tokens/s/GPU on 512 H800, about 14.1 days (derived) [AN].
Expected: training loss near 0.659 at the end, by the paper's own scaling law [AN, secondary]; MMLU 58.14 after both phases [M].
This configuration has not been trained with neo.

Sources: [H-neo] config.json of m-a-p/neo_7b on Hugging Face; [N] multimodal-art-projection/Megatron-LM-NEO,
neo/scripts/pretrain_7b.sh; [M] multimodal-art-projection/MAP-NEO; [AN] the MAP-NEO paper, arXiv:2405.19327, as quoted
by third parties; [H-mat] the card of m-a-p/Matrix on Hugging Face.

Data: prepare one folder per source under data/neo_7b with the m-a-p/neo_7b tokenizer (64,000 SentencePiece pieces and
5 added tokens, padded to 64,256 rows [N]). The weights are the shares of the whole Matrix corpus [AN]; the paper also
gives 14.77 % code for this phase, which these shares do not reproduce.
"""

from neo.config import new, phase

STEP = 1024 * 8192   # tokens per optimizer step: 1024 sequences [N] of 8192 [H-neo]


def get_config():
    c = new()
    c.model.update(
        vocab_size=64256, num_layers=28, d_model=3072, num_heads=16, num_kv_heads=16, d_ff=24576,   # [H-neo]
        max_seq_len=8192, rope_base=10000.0, norm_eps=1e-5, tied_embeddings=False)                  # [H-neo]
    # no reset flags, --eod-mask-loss, seed [N]
    c.data.update(cross_document_attention=True, mask_end_of_document=True, seed=42)
    c.phases = [phase(
        "fundamental", tokens=3.726e12, seq_len=8192, global_batch=1024,           # [AN], [H-neo], [N]
        peak_lr=2e-4, start_lr=2e-5, final_lr=2e-5, warmup_tokens=2000 * STEP,     # [AN]: 2e-5 -> 2e-4 over 2k steps
        lr_shape="cosine",                                                         # [N]
        mixture=dict(common_crawl=0.5255, code=0.2229, other=0.2516))]             # [AN]; other = the rest
    # Matrix has 4690B tokens [H-mat]; its parts by the shares above (derived)
    c.data.source_tokens = dict(common_crawl=2465e9, code=1045e9, other=1180e9)
    c.optimizer.update(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=1.0)   # [N]
    c.init.update(std=0.02, seed=42)                                                 # [H-neo], [N]
    c.checkpoint.update(every_steps=500, permanent_every_steps=2000)                 # ours; saves every 2000 [N]
    return c
