"""The job store's whole suite again, on PostgreSQL."""

from tests.unit.jobs.test_sql import *  # noqa: F403 - every test, with the `store_url` of this folder
