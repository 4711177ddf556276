"""The whole suite of webhook endpoints and messages again, on PostgreSQL."""

from tests.unit.jobs.test_webhook_store import *  # noqa: F403 - every test, with the `store_url` of this folder
