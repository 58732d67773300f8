"""Jobs: which of their tasks wait, run and have ended, and what the runners shall do. Pure; I/O is in `broker/`."""
