"""Measurements of the service, as commands: ``kinema bench``."""
