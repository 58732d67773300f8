"""Recordings, and the source that replays them."""
