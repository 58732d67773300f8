"""Requests that wait: the queue, its durable form, forecasts, and the clients that are heard."""
