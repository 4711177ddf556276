"""The suite of what is looked for again, on PostgreSQL."""

from tests.unit.jobs.test_listing import *  # noqa: F403 - every test, with the `store_url` of this folder
