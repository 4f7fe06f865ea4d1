"""Drawing with a released adapter: a diffusers pipeline, and the model that MLflow serves."""
