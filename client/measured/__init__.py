"""Rates of devices that somebody has measured: in jobs that served the same model, or in AIConfigurator's tables."""
