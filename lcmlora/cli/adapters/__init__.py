"""Verbs for adapters of any origin: finding the named adapter, converting, combining and drawing with it."""
