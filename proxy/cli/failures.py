"""What goes wrong in a command, as a line for the reader and an exit status. Statuses 1 and 3 are given only here; 2, wrong
usage, is Typer's own."""

from __future__ import annotations

import errno
from socket import gaierror

FAILED = 1
WRONG_SETTINGS = 3


# What helps with an error of the accounts, as commands.
_REMEDIES = {
    "list_teams": "'beanmeter team list' shows all, archived ones too",
    "add_team": "make it with 'beanmeter team add NAME'",
    "list_keys": "'beanmeter key list' shows the ids, which start with key_",
    "add_key": "make a new one with 'beanmeter key add TEAM'",
    "list_budgets": "'beanmeter budget list' shows those there are",
    "list_limits": "'beanmeter limit list' shows those there are",
    "list_reviews": "'beanmeter review list' shows those in review",
}


class Failed(Exception):
    """A command can't do what it was asked; the message tells the reader what to do instead."""


def explain(error: Exception) -> tuple[int, str] | None:
    """(exit status, one line) for an error that an operator can do something about; ``None`` for a defect of ours."""
    from sqlalchemy.exc import DBAPIError, SQLAlchemyError

    from proxy.ledger.accounts import AccountError
    from proxy.ledger.migrate import SchemaError
    from proxy.settings import SettingsError

    match error:
        case SettingsError():
            return WRONG_SETTINGS, _one_line(error)
        case AccountError(remedy=str(remedy)):
            return FAILED, f"{_one_line(error)}; {_REMEDIES[remedy]}"
        case Failed() | AccountError() | SchemaError():
            return FAILED, _one_line(error)
        case DBAPIError():
            # The driver's words alone: around them SQLAlchemy prints the statement and its values.
            return FAILED, f"the database can't be used ({_one_line(error.orig)}): check it and BEANMETER_DATABASE_URL"
        case SQLAlchemyError():
            return FAILED, f"the database can't be used ({_one_line(error)}): check it and BEANMETER_DATABASE_URL"
        case UnicodeEncodeError():
            return FAILED, "an argument is not text in UTF-8"
        case OSError(errno=errno.EADDRINUSE):
            return FAILED, "another process listens on this port already; choose another with --port"
        case gaierror() | OSError(errno=errno.EADDRNOTAVAIL):
            return FAILED, "this machine has no such address; choose another with --host"
        case OSError():
            return FAILED, _one_line(error)
        case _:
            return None


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
