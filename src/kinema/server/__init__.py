"""The HTTP side: an OpenAI-compatible API over the service."""
