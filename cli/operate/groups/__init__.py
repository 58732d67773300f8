"""`corral group`: groups with their quotas, and the files that declare them."""
