"""Commands that run the parts: collect, process, plan, export, dashboard."""
