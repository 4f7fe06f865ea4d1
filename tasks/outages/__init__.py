"""Runs that outlive what they report to: Prefect's server being away, their worker, a run's temporary server."""
