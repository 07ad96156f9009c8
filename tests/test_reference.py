"""The API reference describes every public name."""

from __future__ import annotations

import builtins
import inspect
import re
import sys

import pdoc.doc
import pytest
import reference
from torch import nn

from samekit import errors


def documented(namespace):
    """Yield the public members that a module or class defines, and those of its classes."""
    for member in namespace.members.values():
        inherited = member.taken_from[0] != namespace.modulename or (
            namespace.kind == "class" and member not in namespace.own_members
        )
        if member.kind == "module" or member.name.startswith("_") or inherited:
            continue
        # The checkpoint gives the names of layers, and their module describes what they compute.
        if not (member.kind == "variable" and namespace.kind == "class" and issubclass(namespace.obj, nn.Module)):
            yield member
        if member.kind == "class":
            yield from documented(member)


@pytest.mark.parametrize("name", reference.modules())
def test_every_class_and_function_is_described(name):
    reference.prepare()
    module = pdoc.doc.Module.from_name(name)
    assert module.docstring.strip()
    # The name and the type of a field can say all that there is to say.
    described = [member for member in documented(module) if member.kind != "variable"]
    assert [member.qualname for member in described if not member.docstring.strip()] == []


@pytest.mark.parametrize("name", reference.modules())
def test_arguments_and_errors_are_those_that_there_are(name):
    """An Args section names all arguments of its function and no others; errors are existing classes."""
    reference.prepare()
    for member in documented(pdoc.doc.Module.from_name(name)):
        if member.kind != "function":
            continue
        described = section(member.docstring, "Args")
        parameters = [p for p in inspect.signature(member.obj).parameters if p not in ("self", "cls")]
        assert described in ([], parameters), member.qualname
        for error in [each for line in section(member.docstring, "Raises") for each in line.split(", ")]:
            places = (errors, builtins, sys.modules[name])
            assert any(hasattr(place, error) for place in places), (member.qualname, error)


def section(docstring, head):
    """Return the names that a section of a docstring describes."""
    found = re.search(rf"^{head}:\n((?:[ ].*\n?|\n)*)", docstring, re.MULTILINE)
    return re.findall(r"^    (\w+(?:, \w+)*): ", found[1], re.MULTILINE) if found else []
