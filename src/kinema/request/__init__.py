"""From what a client sent to a request that is complete."""
