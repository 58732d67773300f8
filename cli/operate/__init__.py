"""Commands for operating and observing a fleet: context, config, fleet, query, health, auth and others."""
