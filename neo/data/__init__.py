"""Text to tokens to batches: preparation, tokenizer, token store, data order and loader."""
