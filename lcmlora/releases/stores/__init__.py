"""Where releases are published to, one class for each kind of address."""
