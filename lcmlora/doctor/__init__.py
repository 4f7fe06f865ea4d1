"""What a distillation takes: counted from an architecture before anything is fetched, or measured on this machine."""
