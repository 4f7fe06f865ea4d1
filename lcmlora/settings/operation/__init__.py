"""Settings of what goes on around the runs: who is told, what is kept, what it may cost. No stage depends on them."""
