# The work is in scripts/, so that a machine without make can do it too.
.PHONY: setup check fix test test-search test-families test-faults test-hostile test-fuzz test-gpu test-sglang test-all serve demo

setup:
	scripts/setup

check:
	scripts/check

fix: setup
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

test:
	scripts/test

test-search:
	scripts/test-search

test-families:
	scripts/test-families

test-faults:
	scripts/test-faults

test-hostile:
	scripts/test-hostile

test-fuzz:
	scripts/test-fuzz

test-gpu:
	scripts/test-gpu

test-sglang:
	scripts/test-sglang

test-all: check test test-faults test-hostile

serve: setup
	.venv/bin/kinema serve

demo:
	scripts/demo
