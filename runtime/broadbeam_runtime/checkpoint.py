"""Model sources: from where a spec says to a local directory in Hugging Face's layout."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A model that cannot be fetched, converted or loaded; one line naming the file and what is wrong."""
