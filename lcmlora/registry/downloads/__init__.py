"""Versions on this disk: downloaded from the registry, checked, and found again without it."""
