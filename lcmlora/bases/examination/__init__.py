"""Whether a base's folder is whole, finite and consistent, before anything is trained on it."""
