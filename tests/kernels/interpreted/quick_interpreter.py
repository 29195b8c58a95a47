"""Leave out what Triton's interpreter does over and over to no effect: two thirds of its time.

Its functions are replaced by what gives the same numbers; `check_quick_interpreter.py` compares.
"""

from __future__ import annotations

import dataclasses
import functools
from types import FunctionType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

PLAIN_OPTIONS = interpreter.interpreter_builder.options


def quicken() -> None:
    """Make the interpreter of this process a quick one."""
    for owner, name in PLAIN:
        setattr(owner, name, QUICK[owner, name])
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
    return PLAIN[interpreter, "_patch_lang"](fn)


def np_dtype(dtype: tl.dtype) -> Any:
    """Return numpy's dtype; the plain one makes its table anew for each tensor."""
    scalar = dtype.scalar
    # Pointers have no hash.
    return PLAIN[interpreter, "_get_np_dtype"](dtype) if scalar.is_ptr() else _np_dtype_of(scalar)


def make_block_type(self: Any, element_ty: tl.dtype, shape: Any) -> None:
    """Do what `block_type.__init__` does; the plain one looks at every size of each tensor anew."""
    sizes = tuple([each.value if isinstance(each, tl.constexpr) else each for each in shape])
    self.element_ty = element_ty
    self.shape, self.numel, text = _block_shape(sizes)
    self.name = f"<{text}, {element_ty}>"


def make_tensor(self: Any, handle: Any, type: Any) -> None:
    """Do what `tensor.__init__` does; the plain one makes its shape anew for each tensor."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    sizes = tuple(type.shape.values) if type.is_block() else ()
    self.shape, self.numel = _tensor_shape(sizes)


@functools.cache
def _np_dtype_of(scalar: tl.dtype) -> Any:
    return PLAIN[interpreter, "_get_np_dtype"](scalar)


@functools.cache
def _block_shape(sizes: tuple[int, ...]) -> tuple[Any, int, str]:
    plain = object.__new__(tl.block_type)
    PLAIN[tl.block_type, "__init__"](plain, tl.int1, list(sizes))
    return plain.shape, plain.numel, str(plain.shape)


@functools.cache
def _tensor_shape(sizes: tuple[int, ...]) -> tuple[Any, Any]:
    plain = object.__new__(tl.tensor)
    PLAIN[tl.tensor, "__init__"](
        plain, None, tl.block_type(tl.int1, list(sizes)) if sizes else tl.int1
    )
    return plain.shape, plain.numel


QUICK: dict[tuple[Any, str], Any] = {
    (interpreter, "_patch_lang"): patch_lang,
    (interpreter, "_get_np_dtype"): np_dtype,
    (tl.block_type, "__init__"): make_block_type,
    (tl.tensor, "__init__"): make_tensor,
}
PLAIN = {(owner, name): getattr(owner, name) for owner, name in QUICK}
