"""Prefect tasks, which call the library or DVC, and the processes that they start. Order and policy are the flows'."""
