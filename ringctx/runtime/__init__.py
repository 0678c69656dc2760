"""Inference: weights, engine, cache, sampling. The model is the wrapped transformers model, not a second one."""
