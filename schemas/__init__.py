"""The contract between the parts: messages, the metric catalog, and the layout of the bus."""
