"""Where the API is and the key to it: from arguments, the environment, or this machine's own cluster."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import httpx2

from deployments.settings import default_state_dir

DEFAULT_URL = "http://127.0.0.1:8000"
ADMIN_KEY_FILE = "admin-key"  # in the state folder; `up` and `serve` keep the first admin's key there
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True)
class Endpoint:
    """Where the API is, and the key to it."""

    url: str
    api_key: str | None = field(default=None, repr=False)

    @classmethod
    def find(cls, url: str | None = None, api_key: str | None = None, state_dir: Path | None = None) -> Self:
        """From what is given, else OURVIDZ_URL and OURVIDZ_API_KEY, else this machine's own cluster.

        The admin key in the state folder is used for an address of this machine only: it is never sent elsewhere.
        ValueError when the address or the key can't be one.
        """
        url = (url or os.environ.get("OURVIDZ_URL") or DEFAULT_URL).rstrip("/")
        api_key = api_key or os.environ.get("OURVIDZ_API_KEY") or None
        try:
            host = httpx2.URL(url).host
        except httpx2.InvalidURL:
            host = ""
        if not host or not url.startswith(("http://", "https://")):
            raise ValueError("the address of the API begins with http:// or https:// and names a host")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ValueError("an API key has printable ASCII characters only")
        if api_key is None and host in LOOPBACK:
            folder = state_dir or Path(os.environ.get("OURVIDZ_STATE_DIR") or default_state_dir())
            api_key = kept_admin_key(folder)
        return cls(url, api_key)


def kept_admin_key(state_dir: Path) -> str | None:
    """The first admin's key as `up` and `serve` keep it; None where there is none that this user may read."""
    try:
        return (state_dir / ADMIN_KEY_FILE).read_text(encoding="ascii").strip() or None
    except (OSError, UnicodeDecodeError):
        return None
