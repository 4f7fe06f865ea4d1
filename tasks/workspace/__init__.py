"""What happens in a project's folder at the moment: which stages are stale and why, which run, who holds what."""
