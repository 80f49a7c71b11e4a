"""Which of diffusers' tests fail for a reason that is no fault of TAP's."""

from __future__ import annotations


def reason(test: str, mode: str) -> str | None:
    return None
