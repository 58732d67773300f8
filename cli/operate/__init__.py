"""Commands of operators and of those who look: context, config, fleet, query, health, auth."""
