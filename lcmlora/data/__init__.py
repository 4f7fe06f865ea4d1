"""Captioned pictures: where they come from, which are kept, and the latent cache that training reads."""
