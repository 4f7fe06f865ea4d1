"""What is kept of versions and runs, and how the others are deleted."""
