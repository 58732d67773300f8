"""Jobs: specification, calls, output and results."""
