"""`python -m neo.convert`: Hugging Face to neo, neo to Hugging Face and GGUF, averages, and the check that it went right."""

from __future__ import annotations

from neo.cli import JSON, Argument, Command, Namespace, main

_CHECKPOINT = Argument("checkpoint", "workdir, workdir@STEP, workdir@16.78B (tokens), checkpoint folder or Hugging Face folder",
                       positional=True)
_OVERWRITE = Argument("overwrite", "replace what stands at OUT", default=False, type=bool)

COMMAND = Command(
    prog="neo.convert",
    summary="Convert models: Hugging Face to neo, neo to Hugging Face and GGUF; average and verify them.",
    verbs={
        "from-hf": Command(
            prog="from-hf", summary="Make a neo checkpoint of a Hugging Face model, to train on, to sample, to convert.",
            arguments=(
                Argument("src", "folder with config.json and *.safetensors, or a repository id (owner/name)", positional=True),
                Argument("out", "the new checkpoint folder", positional=True),
                Argument("revision", "branch, tag or commit of the repository", default="", shown="its default branch"),
                _OVERWRITE),
            examples=("python -m neo.convert from-hf m-a-p/neo_7b checkpoints/neo_7b",
                      "python -m neo.convert from-hf my_llama/ checkpoints/my_llama")),
        "to-hf": Command(
            prog="to-hf", summary="Make a Hugging Face folder: safetensors, configs, tokenizer, model card.",
            arguments=(
                _CHECKPOINT, Argument("out", "the new folder; with --all one folder per checkpoint in it", positional=True),
                Argument("dtype", "type of the weights; source keeps theirs", default="bf16",
                         choices=("bf16", "fp16", "fp32", "source")),
                Argument("shard_size", "largest size of a weight file", default="5GB"),
                Argument("all", "every checkpoint of the workdir, each in a folder named by its tokens (16.78B)",
                         default=False, type=bool),
                Argument("model_type", "class of transformers (llama, mistral, qwen2, granite, mpt, ...); auto: the plainest "
                         "one that holds the model as it is", default="auto"),
                Argument("repeat_kv", "let a class without grouped heads (mpt) have each key/value head repeated",
                         default=False, type=bool),
                _OVERWRITE),
            examples=("python -m neo.convert to-hf runs/neo_demo export/neo_demo",
                      "python -m neo.convert to-hf runs/neo_7b export/intermediate --all --dtype=bf16")),
        "to-gguf": Command(
            prog="to-gguf", summary="Make a GGUF file for llama.cpp and what is built on it.",
            arguments=(
                _CHECKPOINT, Argument("out", "the new file, *.gguf", positional=True),
                Argument("type", "type of the matrices: f32, f16, bf16, q8_0, q4_0, q5_0, ...; K-quants (q4_k_m, ...)",
                         default="q8_0", type=str.lower),
                Argument("gguf_arch", "architecture in the file; auto: the one llama.cpp computes exactly as neo does",
                         default="auto"),
                _OVERWRITE),
            examples=("python -m neo.convert to-gguf runs/neo_demo export/neo_demo.gguf",
                      "python -m neo.convert to-gguf my_llama/ my_llama-f16.gguf --type=f16")),
        "average": Command(
            prog="average", summary="Average the parameters of checkpoints into a new one.",
            arguments=(
                Argument("checkpoint", "checkpoints of one architecture, or with --last one workdir", positional=True,
                         many=True),
                Argument("out", "the new checkpoint folder", positional=True),
                Argument("weights", "one weight per checkpoint, as 0.2,0.8; scaled to a sum of 1", default="", shown="equal"),
                Argument("last", "the newest so many checkpoints of the workdir; 0 = those named", default=0, type=int),
                _OVERWRITE),
            examples=("python -m neo.convert average runs/neo_7b checkpoints/neo_7b_average --last=4",
                      "python -m neo.convert average runs/a@5000 runs/a@6000 checkpoints/mix --weights=0.2,0.8")),
        "verify": Command(
            prog="verify", summary="Compare an export's logits and greedy text with the checkpoint's; exit 3 beyond tolerance.",
            arguments=(
                _CHECKPOINT,
                Argument("export", "the Hugging Face folder (needs transformers and torch) or GGUF file (needs xllamacpp)",
                         positional=True),
                JSON),
            examples=("python -m neo.convert verify runs/neo_demo export/neo_demo",
                      "python -m neo.convert verify runs/neo_demo export/neo_demo.gguf --json")),
    },
    examples=("python -m neo.convert to-hf runs/neo_demo export/neo_demo",
              "python -m neo.convert to-gguf runs/neo_demo export/neo_demo.gguf --type=q8_0"),
)


def run(args: Namespace) -> None:
    """One verb; each is a module of its own, imported only when asked for."""
    import importlib

    modules = {"from-hf": "from_hf", "to-hf": "to_hf", "to-gguf": "to_gguf", "average": "average", "verify": "verify"}
    try:
        importlib.import_module(f"neo.convert.{modules[args.verb]}").run(args)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command goes on from here") from None


if __name__ == "__main__":
    main(COMMAND, run)
