"""Reports over the history: what a period's leases used and cost, as a structure, and that as text, HTML and PDF."""
