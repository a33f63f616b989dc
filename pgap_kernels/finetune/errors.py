"""What the user can put right."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right; the message is one line that says what and how."""
