"""Token ids as an array. What is no integer is no token id, a boolean neither."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from mrss_provider.errors import InvalidRequestError, shown


def to_array(ids: Sequence[int]) -> NDArray[np.int32]:
    """Return ids as [T], read-only.

    Raises:
        OverflowError: an id that int32 does not hold.
        TypeError: something that is no integer.
    """
    found = np.frombuffer(array("i", ids), np.int32)
    # An array takes True for 1. In most prompts few ids are so small.
    if bool in set(map(type, map(ids.__getitem__, np.flatnonzero(found < 2).tolist()))):
        raise TypeError("a boolean is no token id")
    found.flags.writeable = False
    return found


def refusal(field: str, ids: Iterable[object], vocab_size: int) -> InvalidRequestError:
    """Return the error that names the first of `ids` that a vocabulary does not have.

    Args:
        field: the key that they came with.
        ids: one of them is none of the vocabulary's.
        vocab_size: of the vocabulary.
    """
    bad = next(i for i in ids if not _is_id(i, vocab_size))
    kind = "token ids" if _is_integer(bad) else "integers as token ids"
    return InvalidRequestError(
        f"{field} must have {kind} in [0, {vocab_size}), got {shown(bad)}", param=field
    )


def _is_id(value: object, vocab_size: int) -> bool:
    return _is_integer(value) and 0 <= value < vocab_size  # type: ignore[operator]


def _is_integer(value: object) -> bool:
    # As `array` has it: NumPy's integers are some, too.
    return hasattr(value, "__index__") and not isinstance(value, bool | np.bool_)
