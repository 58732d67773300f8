"""Jobs: commands, records, events, and the runners that start them."""
