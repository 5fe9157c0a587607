"""Whether a run goes to the server of Weights & Biases; nothing heavy is imported."""

from __future__ import annotations

import netrc
import os
from urllib.parse import urlparse


def choose_mode(asked: str) -> str:
    """online, offline or off. $WANDB_MODE decides for auto; without it, whether a key is configured."""
    if asked != "auto":
        return asked
    from_environment = os.environ.get("WANDB_MODE", "")
    if from_environment:
        return {"disabled": "off", "online": "online", "shared": "online"}.get(from_environment, "offline")
    return "online" if has_key() else "offline"


def has_key() -> bool:
    """Whether W&B would find credentials: in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            if path and netrc.netrc(os.path.expanduser(path)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
