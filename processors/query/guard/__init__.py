"""What a reader's SQL may do: an allow-list, and bounds on what parsing and binding may grow to."""
