"""Backup and restore of what Git and DVC do not hold: registry, Prefect's state, releases, artifacts, passwords."""
