"""Processes of the service: settings become parts that are started and stopped in order."""
