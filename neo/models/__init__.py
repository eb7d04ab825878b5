"""The decoder as Flax NNX modules, its parameters as a plain nested dict, and its FLOPs."""
