"""Several processes that train one adapter: starting them, and what they tell each other."""
