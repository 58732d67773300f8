"""`corral`: the command line, the supervisor of a local cluster, and its embedded bus."""
