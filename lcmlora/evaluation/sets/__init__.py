"""What an evaluation compares: the captions that are drawn, the seeds, and the settings of the solvers."""
