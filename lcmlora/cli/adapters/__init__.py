"""Verbs for adapters, whoever made them: which one is meant, and what is done with it."""
