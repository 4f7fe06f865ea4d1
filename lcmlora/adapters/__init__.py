"""The adapter: a LoRA's layers, the spellings of its files, and adapters added to one another."""
