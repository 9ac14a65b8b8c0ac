"""Prompt tuning of frozen T5 and LLaMA-family models in JAX."""
