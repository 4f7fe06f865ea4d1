"""The files beside an adapter's weights, and what they say of it."""

from __future__ import annotations

WEIGHTS = "pytorch_lora_weights.safetensors"
SCHEDULER = "scheduler_config.json"
FACTS = "config.json"
