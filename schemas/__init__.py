"""The contract between the parts: messages, the metric catalogue, and the layout of the bus."""
