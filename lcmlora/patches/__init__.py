"""Changes to modules of torch, diffusers and PEFT in place: what a network's forward really runs."""
