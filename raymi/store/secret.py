"""Keeps what is secret in the environment out of a store: error messages and job files may quote it."""

import os
import re

_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.IGNORECASE)
_SHORTEST = 8
"""Characters; shorter values are no secrets, and would be found in innocent text."""


def scrub(text: str) -> str:
    """`text` with the value of every environment variable named like a secret replaced by three asterisks."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _SECRET_NAME.search(name):
            text = text.replace(value, "***")
    return text
