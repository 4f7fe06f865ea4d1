"""The release of an adapter: the bundle, its card and report, and publishing it."""
