"""Models to serve: their description, sizes of weights and caches, and plans of their layers over devices."""
