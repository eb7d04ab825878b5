"""MPT-7B: 6.649B parameters; ALiBi, LayerNorm without bias, exact GELU, tied embeddings, no biases.

    python -m neo.data.inspect --config=configs/mpt_7b.py         # the mixture and how often each source is read
    python -m neo.train --config=configs/mpt_7b.py
    python -m neo.convert to-hf runs/mpt_7b exports/mpt-7b        # MptForCausalLM

Cost: about 9.5 days on 440 A100-40GB, 200,000 US dollars [S3].
Expected: ARC-Challenge 47.7 (25-shot), HellaSwag 77.57 (10-shot), MMLU 30.8 (5-shot) [leaderboard]; the loss is not published.
This configuration has not been trained with neo.

Sources: [H-mpt] config.json of mosaicml/mpt-7b on Hugging Face; [S3] the model card; [F] mosaicml/llm-foundry,
llmfoundry/models and scripts/train/yamls/pretrain/mpt-7b.yaml (an example, not the run itself); [leaderboard]
discussion 86 of mosaicml/mpt-7b.

Mixture: the table of [S3], with its source sizes. It reads Wikipedia 8.21 times, more than data.max_epochs allows by default.
Its mC4 row prints 417.99B tokens and 0.14 epochs, which do not go with 330B taken; 2417.99B would: a digit lost (derived).

The authors trained with Lion and never published its learning rate or weight decay; this recipe has the example's
decoupled AdamW, which is a known quantity. Data: one folder per source under data/mpt_7b with the
EleutherAI/gpt-neox-20b tokenizer, padded to 50,432 rows [H-mpt]. Options of the larger mpt-30b: model.clip_qkv=6;
model.qk_norm=full is llm-foundry's qk_ln.
"""

from neo.config import new, phase

STEP = 1760 * 2048   # tokens per optimizer step [S3]
TABLE = dict(        # share of the mixture, billions of tokens in the source [S3]
    mc4_en=(0.33, 2417.99), c4_en_semdedup=(0.299, 100.42), redpajama_common_crawl=(0.10, 878.45),   # 417.99 is printed
    the_stack_selected=(0.10, 463.78), redpajama_wikipedia_en=(0.04, 4.87), the_stack_markdown=(0.035, 107.07),
    s2orc=(0.033, 48.85), redpajama_books=(0.03, 26.02), redpajama_arxiv=(0.019, 28.10),
    redpajama_stackexchange=(0.014, 20.54))


def get_config():
    c = new()
    c.model.update(
        vocab_size=50432, num_layers=32, d_model=4096, num_heads=32, num_kv_heads=32, d_ff=16384, max_seq_len=2048,  # [H-mpt]
        positions=("alibi",), alibi_bias_max=8.0, norm="layer", norm_eps=1e-5, mlp="plain", activation="gelu",   # [H-mpt], [F]
        tied_embeddings=True)                                                                                    # [H-mpt]
    c.phases = [phase(
        "main", tokens=1.0e12, seq_len=2048, global_batch=1760,                        # [S3]
        peak_lr=1.2e-4, final_lr=1.2e-5, warmup_tokens=100 * STEP, lr_shape="cosine",  # [F] example: alpha_f 0.1
        mixture={source: share for source, (share, _) in TABLE.items()})]              # [S3]
    c.data.source_tokens = {source: billions * 1e9 for source, (_, billions) in TABLE.items()}   # [S3]
    c.data.max_epochs_of = dict(redpajama_wikipedia_en=8.22)                           # [S3]: 8.21, and whole windows
    c.optimizer.update(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0, clip_norm=1.0)     # [F] example; the run used Lion [S3]
    c.init.update(scheme="kaiming")                                                    # [H-mpt] with init_div_is_residual
    c.data.update(cross_document_attention=True, seed=17)                              # [H-mpt] no sequence ids; seed [F]
    c.checkpoint.update(every_steps=500, permanent_every_steps=5000)                   # ours
    return c
