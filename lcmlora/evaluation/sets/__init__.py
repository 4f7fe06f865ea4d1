"""What an evaluation draws: captions and own prompts, seeds, and the settings of solvers, which a search finds."""
