"""The distillation of an adapter, its validation, and fine-tunes by the ordinary diffusion loss."""
