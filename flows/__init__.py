"""Prefect flows: the order of the tasks, what happens when one fails, and what a person is told at the end."""
