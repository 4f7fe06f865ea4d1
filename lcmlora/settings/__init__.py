"""The settings of params.yaml, one module for each topic: their types, limits, defaults and descriptions."""
