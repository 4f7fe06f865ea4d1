"""Adapters: a LoRA's layers, its files in all spellings, and the combination of several adapters."""
