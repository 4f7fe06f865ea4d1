"""Features of pictures, and the metrics that are computed from them."""
