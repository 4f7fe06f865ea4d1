"""What a project's Prefect server knows of its runs: those of the past, those that go on, and the next."""
