"""`lcmlora <verb>`: one module for each group of verbs."""

from lcmlora.cli.main import app

__all__ = ["app"]
