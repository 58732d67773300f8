"""Login through an OpenID Connect provider: who somebody is by its claims, and credentials of the bus for a time."""
