"""What every store checks before it tries a transaction, so that all refuse the same."""

from __future__ import annotations

from atoll.model.errors import InvalidInput
from atoll.store.contract import CompareFailed, Transaction


def check_transaction(transaction: Transaction) -> None:
    """Refuse what has no single meaning: a key that is changed twice, or is empty. Errors: InvalidInput."""
    keys = [*transaction.put, *transaction.delete]
    if len(set(keys)) != len(keys):
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise InvalidInput(f"a transaction changes {twice[0]} twice")
    for key in (*keys, *transaction.compare):
        if not key:
            raise InvalidInput("a transaction has an empty key")


def compare_failed(key: str, wanted: int, found: int) -> CompareFailed:
    """The error for a key whose revision is not the expected one; 0 = does not exist."""
    if wanted == 0:
        why = f"{key} exists already"
    elif found == 0:
        why = f"{key} was deleted by somebody else"
    else:
        why = f"{key} was changed by somebody else (revision {found}, expected {wanted})"
    return CompareFailed(why, key=key)
