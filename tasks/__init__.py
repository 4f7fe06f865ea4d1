"""Prefect tasks: each calls the library, or one DVC stage, once. Order and policy are the flows' business."""
