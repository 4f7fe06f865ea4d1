"""What keeps the servers of `lcmlora up` apart from others and in order: ports, logs, environment, the worker."""
