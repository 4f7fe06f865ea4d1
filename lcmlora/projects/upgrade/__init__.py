"""Bringing a project to the installed version: its generated files, its params.yaml, and what becomes stale."""
