"""Commands of those who want GPUs: request, run, renew, release, queue."""
