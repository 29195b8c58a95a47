"""Leave out what Triton's interpreter does over and over to no effect: more than half of its time.

Its functions are replaced by what gives the same numbers; `check_quick_interpreter.py` compares.
"""

from __future__ import annotations

import dataclasses
import functools
from types import FunctionType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

PLAIN = {name: getattr(interpreter, name) for name in ("_patch_lang", "_get_np_dtype")}
PLAIN_OPTIONS = interpreter.interpreter_builder.options


def quicken() -> None:
    """Make the interpreter of this process a quick one."""
    interpreter._patch_lang = patch_lang
    interpreter._get_np_dtype = np_dtype
    # Looking whether integers overflow is three operations more for each; only `debug` tells it.
    interpreter.interpreter_builder.options = dataclasses.replace(
        PLAIN_OPTIONS, sanitize_overflow=PLAIN_OPTIONS.debug
    )


def patch_lang(fn: FunctionType) -> Any:
    """Put interpreted functions in the place of the language's, unless the caller's are there.

    The plain one looks at every name of the language again for each call of a device function.
    """
    langs = [each for each in fn.__globals__.values() if each is tl or each is tl.core]
    if langs and not any(tl.core.is_builtin(lang.load) for lang in langs):
        return interpreter._LangPatchScope()
    return PLAIN["_patch_lang"](fn)


def np_dtype(dtype: tl.dtype) -> Any:
    """Return numpy's dtype; the plain one makes its table anew for each tensor."""
    scalar = dtype.scalar
    # Pointers have no hash.
    return PLAIN["_get_np_dtype"](dtype) if scalar.is_ptr() else _np_dtype_of(scalar)


@functools.cache
def _np_dtype_of(scalar: tl.dtype) -> Any:
    return PLAIN["_get_np_dtype"](scalar)
