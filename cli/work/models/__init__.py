"""Commands that serve a model."""
