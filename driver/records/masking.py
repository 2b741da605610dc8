"""What leaves this machine, or is shown around, has no secrets: trackers, report.html, commands, the card."""

import re
from typing import Any

from video_opd.config import Config

MASK = "***"
_NAME = re.compile(r"(key|token|secret|password|passwd|credentials?|authorization)$", re.IGNORECASE)
_IN_TEXT = (
    re.compile(
        r"\b(hf_|sk-|gh[a-z]_|github_pat_|glpat-|xox[a-z]-|AKIA|ASIA|AIza)[\w-]{12,}"
    ),  # by their form
    re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+"),  # a JSON web token
    re.compile(r"(?<=://)[^/?#\s]+(?=@)"),  # the user and password of a URL, which may hold an @
    re.compile(
        r"(?<=[?&])[\w.-]*(?:key|token|secret|password|sig|signature|credential)=[^&\s]+", re.IGNORECASE
    ),
)


def masked(value: Any, name: str = "") -> Any:
    """Plain values without what looks like a secret, by the name of its key or by its form."""
    if isinstance(value, dict):
        return {key: masked(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [masked(inner, name) for inner in value]
    if isinstance(value, str) and _NAME.search(name):
        return MASK
    if isinstance(value, str):
        for pattern in _IN_TEXT:
            value = pattern.sub(MASK, value)
    return value


def masked_config(config: Config) -> dict[str, Any]:
    """The configuration as plain values; of worker_env the names alone."""
    tree = config.model_dump(mode="json")
    return masked(tree) | {"worker_env": dict.fromkeys(tree["worker_env"], MASK)}
