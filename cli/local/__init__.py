"""A cluster on this machine: its supervisor, embedded bus, access and demo."""
