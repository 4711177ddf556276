"""The whole suite of inputs and quotas again, on PostgreSQL."""

from tests.unit.jobs.test_input_store import *  # noqa: F403 - every test, with the `store_url` of this folder
