"""SQL for readers: sandboxed, fairly queued, answered in parts."""
