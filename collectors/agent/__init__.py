"""The collector's loop: reads devices at a fixed interval, packs samples, spills and publishes."""
