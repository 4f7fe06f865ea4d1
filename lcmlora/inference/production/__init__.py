"""A served adapter in production: metrics for Prometheus, and the sample of prompts that a server may keep."""
