"""What versions have cost."""
