"""Work items over the granted devices."""
