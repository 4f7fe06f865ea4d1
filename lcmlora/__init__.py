"""Production pipeline for LCM-LoRA: distil, evaluate, release and register acceleration adapters."""

__version__ = "0.1.0"
