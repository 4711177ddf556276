"""The durable list of jobs."""
