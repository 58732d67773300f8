"""From the streams to batches, exactly once."""
