"""Metrics of runs and models for Prometheus: `lcmlora metrics`."""
