"""The error tree equals the drawing in its docstring, and SamekitError catches every error."""

from __future__ import annotations

import builtins
import inspect
import re

from samekit import SamekitError, errors


def drawn_tree():
    """Return depth, name and builtin base of each line of the drawing."""
    drawing = re.findall(r"^( *[│├└─ ]*)(\w+Error)\b *(?:\((\w+)\))?", errors.__doc__, re.MULTILINE)
    return [(len(indent) // 4, name, builtin) for indent, name, builtin in drawing]


def real_classes():
    return {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}


def test_drawing_is_complete():
    assert {name for _, name, _ in drawn_tree()} == real_classes()
    assert len(drawn_tree()) == len(real_classes())


def test_drawing_is_true():
    parents = {}
    for depth, name, builtin in drawn_tree():
        parents[depth] = getattr(errors, name)
        bases = parents[depth].__bases__
        if name == "SamekitError":
            assert bases == (Exception,)
            continue
        assert bases[0] is parents[depth - 1], name
        assert bases[1:] == ((getattr(builtins, builtin),) if builtin else ()), name


def test_every_error_is_caught_as_ours():
    assert SamekitError is errors.SamekitError
    assert all(issubclass(getattr(errors, name), SamekitError) for name in real_classes())
    assert all(getattr(errors, name).__doc__ for name in real_classes())
