"""Links that open a video without a key, for a while.

A link has the time of its end, and a signature over that and the video. Its secret is shared by all servers of one job
database. So a link opens this video alone, and nobody else can make or prolong one.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from kinema.errors import Unauthorized
from kinema.ids import JobId

# 128 bits: nobody guesses a signature.
_DIGEST_CHARS = 32
# The ends of links are this part of their lifetime apart, so that answers within that time have the same link, and a
# browser does not load the video again.
_STEPS = 24


@dataclass(frozen=True, slots=True)
class Links:
    """Signs and checks links that open for at least ``lifetime_s`` seconds. The clock is in seconds since the epoch."""

    secret: bytes
    lifetime_s: float
    clock: Callable[[], float] = time.time

    def query(self, job_id: JobId) -> str:
        """Return the query of a link to the job's video."""
        step_s = max(self.lifetime_s / _STEPS, 1.0)
        expires = math.ceil((math.floor(self.clock() / step_s) + 1) * step_s + self.lifetime_s)
        return f"expires={expires}&signature={self._sign(job_id, str(expires))}"

    def check(self, job_id: JobId, expires: str, signature: str) -> None:
        """Raise Unauthorized unless the link was signed here for this video and is not over."""
        if not hmac.compare_digest(self._sign(job_id, expires).encode(), signature.encode()):
            raise Unauthorized("the signature of this link is not valid; ask for the video again to get a new link")
        if self.clock() >= int(expires):  # it was written here, since its signature is right
            raise Unauthorized("this link has expired; ask for the video again to get a new link")

    def _sign(self, job_id: JobId, expires: str) -> str:
        message = f"content {job_id} {expires}".encode()
        return hmac.new(self.secret, message, hashlib.sha256).hexdigest()[:_DIGEST_CHARS]
