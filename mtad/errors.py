"""The exceptions that a user may see.

Their messages are shown verbatim, so each one names the value, the allowed range and the next
step. Everything else that escapes is a bug.
"""

from __future__ import annotations


class MtadError(Exception):
    """Base of every error that is meant for the eyes of a user."""


class ConfigError(MtadError, ValueError):
    """A parameter is outside its range, or the request makes no sense."""


class PromptError(MtadError, ValueError):
    """The prompt is empty, or does not fit into the context of the pair."""


class PairError(MtadError):
    """The pair is unknown, cannot be loaded, or its two models cannot work together."""


class FetchError(MtadError):
    """Model weights could not be fetched, verified or written."""


class BudgetError(MtadError):
    """A search would need more forwarded nodes than `node_budget` allows."""


class TraceError(MtadError, ValueError):
    """A file is not a trace that this version can read."""


class Cancelled(MtadError):
    """The run was asked to stop. Raised between two passes, never inside one."""


class DeadlineExceeded(Cancelled):
    """The run reached its deadline."""
