"""Plans to serve a model: whether devices hold it, how its layers are split, and what throughput to expect."""
