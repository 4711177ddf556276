"""API keys. A job remembers the name of the key that made it, or of a key without a name a digest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from kinema.errors import Unauthorized
from kinema.settings import KeySettings

# 128 bits: nobody finds another key with the same digest.
_DIGEST_CHARS = 32
_SHOWN_CHARS = 8


class Keys:
    """The accepted keys. Without keys all callers are the same client, which has no name."""

    def __init__(self, text: str, named: Mapping[str, KeySettings] | None = None) -> None:
        """``text`` has the keys without names, separated by commas; ``named`` are the others by their ids."""
        keys = [key.strip() for key in text.split(",") if key.strip()]
        self._named = named or {}
        # What jobs remember of a key, by its digest.
        self._ids = {key_id(key): key_id(key) for key in keys} | named_digests(self._named)
        self._owners = set(self._ids.values())

    def identify(self, headers: Mapping[str, str]) -> str:
        """Return the id of the key in the headers; an empty text on a server without keys. Raises Unauthorized.

        OpenAI's SDKs send a bearer token, and their variant for Azure sends an ``api-key``.
        """
        if not self._ids:
            return ""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("api-key", "")
        if not given:
            raise Unauthorized
        found = self._ids.get(key_id(given))
        if found is None:
            raise Unauthorized(
                "this API key is not known here; send one of this server's as 'Authorization: Bearer KEY'"
            )
        return found

    def accepts(self, owner: str) -> bool:
        """Tell whether this is the id of an accepted key."""
        return owner in self._owners

    def name(self, owner: str) -> str | None:
        """The name of the key with this id; for one without a name the beginning of its digest, if it is a key."""
        return owner.partition(":")[2] or owner[:_SHOWN_CHARS] or None

    def sees_all_usage(self, owner: str) -> bool:
        """Tell whether this key may know what others have made."""
        return owner in self._named and self._named[owner].sees_all_usage


def named_digests(named: Mapping[str, KeySettings]) -> dict[str, str]:
    """The ids of the keys with names, by the digest of each key."""
    return {key_id(key): owner for owner, one in named.items() for key in one.keys}


def key_id(key: str) -> str:
    """Return the digest by which a key is remembered. Nobody can find the key from it."""
    return hashlib.sha256(key.encode()).hexdigest()[:_DIGEST_CHARS]
