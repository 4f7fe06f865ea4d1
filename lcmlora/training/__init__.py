"""The training loop with its batches, optimizer and checkpoints, for anything that has a loss."""
