"""The suite of stars again, on PostgreSQL."""

from tests.unit.jobs.test_stars import *  # noqa: F403 - every test, with the `store_url` of this folder
