"""The latent cache: what training reads in place of pictures and captions."""
