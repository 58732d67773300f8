"""Distribution of work items over the granted devices."""
