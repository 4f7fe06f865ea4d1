"""What this machine has for its users to share: its GPUs, and locks on them."""
