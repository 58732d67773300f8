"""SQL for readers: confined, in turns, answered in parts."""
