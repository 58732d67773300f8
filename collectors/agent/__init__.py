"""The collector's loop: reads devices at their pace, packs, spills and publishes."""
