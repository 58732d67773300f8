"""Collectors: read the devices of a host and publish what they say."""
