"""What can be tested where."""

from __future__ import annotations

import sys

# Dynamo's runtime exists for Linux alone.
collect_ignore = [] if sys.platform == "linux" else ["cluster"]
