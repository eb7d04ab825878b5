"""Conversion: Hugging Face folders in, Hugging Face folders and GGUF files out, each checked against the other side's library.

Name maps, config translation and the file readers live in `neo.models.hf` and `neo.train.weights`; here are the command
line (`python -m neo.convert`) and the writers.
"""
