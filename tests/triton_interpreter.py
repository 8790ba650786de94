"""Triton's interpreter without half of its work.

It replaces the functions of `triton.language` by its own when a kernel is launched, and looks through all of them again
in every call of one jit function by another.
"""

import functools
import inspect

import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def languages(function) -> list:
    """The modules of `triton.language` that a jit function sees."""
    return [value for value in function.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)]


def patch_once() -> None:
    """Leaves out what is replaced already. A Triton that works in another way is left as it is."""
    patch = getattr(interpreter, "_patch_lang", None)
    scope = getattr(interpreter, "_LangPatchScope", None)
    if patch is None or scope is None:
        return

    def patch_if_new(function):
        are_patched = not any(tl.core.is_builtin(language.load) for language in languages(function))
        return scope() if are_patched else patch(function)

    interpreter._patch_lang = patch_if_new
