"""Makes a Python script of a function and its arguments, which a runner executes on another host.

A function that can be imported is named; its module must be there too, as it is with a shared file system. Others,
such as those of a notebook, are pickled by cloudpickle where that is installed, else sent as their source.
"""

from __future__ import annotations

import ast
import base64
import builtins
import dis
import functools
import importlib
import importlib.util
import inspect
import pickle
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, Final

from ..errors import InvalidRequest

_SHEBANG_BYTES: Final = 250
"""Longest first line that Linux executes (`BINPRM_BUF_SIZE`, 256)."""

_MAIN: Final = """

def _call() -> None:
    import base64
    import os
    import pickle

    inputs = {inputs}
    load = pickle.loads
    chosen = inputs[int(os.environ["CORRAL_ARRAY_INDEX"])] if {array} else inputs[0]
    function, (arguments, keywords) = _function(load), load(base64.b85decode(chosen))
    function(*arguments, **keywords)


if __name__ == "__main__":
    _call()
"""


def script_of(function: Callable[..., Any], arguments: Sequence[Any], python: str | None = None) -> str:
    """A Python script that calls a function with arguments.

    What the function returns is dropped; the script ends with 1 and a traceback if it raises.

    Args:
        function: a function, or a `functools.partial` of one.
        arguments: positional arguments.
        python: interpreter on the hosts; None for the path of this one.

    Raises:
        InvalidRequest: the function or its arguments can't be sent; the message says what to do.
    """
    return _script(function, [tuple(arguments)], python, array=False)


def script_of_map(function: Callable[..., Any], inputs: Sequence[Any], python: str | None = None) -> str:
    """A Python script that calls a function with the input of its index, as tasks of an array do; see `script_of`."""
    return _script(function, [(one,) for one in inputs], python, array=True)


def shell_map(command: Sequence[str], inputs: Sequence[Any]) -> str:
    """A shell script that runs a command with the input of its index as a further argument."""
    words = " ".join(shlex.quote(str(one)) for one in inputs)
    run = " ".join(shlex.quote(str(word)) for word in command)
    return f'#!/bin/bash\ninputs=({words})\nexec {run} "${{inputs[$CORRAL_ARRAY_INDEX]}}"\n'


def _script(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], python: str | None, *, array: bool) -> str:
    keywords: dict[str, Any] = {}
    before: tuple[Any, ...] = ()
    while isinstance(function, functools.partial):
        before, keywords = (*function.args, *before), {**function.keywords, **keywords}
        function = function.func
    getter, dumps = _sent(function)
    inputs = [_packed(((*before, *call), keywords), dumps, function) for call in calls]
    listed = "[\n" + "".join(f"        {one!r},\n" for one in inputs) + "    ]"
    return _shebang(python) + getter + _MAIN.format(inputs=listed, array=array)


def _shebang(python: str | None) -> str:
    line = f"#!{python or sys.executable}"
    if len(line) > _SHEBANG_BYTES or " " in line:
        raise InvalidRequest(
            f"{python or sys.executable!r} can't be named as an interpreter: give `python` as a path of at most "
            f"{_SHEBANG_BYTES} bytes without spaces, such as /usr/bin/python3",
            "invalid",
        )
    return f"{line}\n"


def _sent(function: Callable[..., Any]) -> tuple[str, Callable[[Any], bytes]]:
    """Source of `_function`, which returns the function on the other host; and what pickles its arguments."""
    if folder := importable(function):
        root, module, name = folder
        return (
            f"def _function(load):\n    import importlib\n    import operator\n    import sys\n\n"
            f"    sys.path.insert(0, {root!r})\n"
            f"    return operator.attrgetter({name!r})(importlib.import_module({module!r}))\n",
            pickle.dumps,
        )
    if importlib.util.find_spec("cloudpickle"):
        dumps: Callable[[Any], bytes] = importlib.import_module("cloudpickle").dumps
        packed = base64.b85encode(dumps(function)).decode()
        return f"def _function(load):\n    import base64\n\n    return load(base64.b85decode({packed!r}))\n", dumps
    return _source(function) + f"\n\ndef _function(load):\n    return {function.__name__}\n", pickle.dumps


def importable(function: Callable[..., Any]) -> tuple[str, str, str] | None:
    """Folder, module and name by which a function can be imported; None if it can't."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if not module or module == "__main__" or "<" in name:
        return None
    try:
        found: Any = importlib.import_module(module)
        file = getattr(found, "__file__", None)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return None
    if found is not function or file is None:
        return None
    place = Path(file).resolve()
    up = module.count(".") + (1 if place.name == "__init__.py" else 0)
    return str(place.parents[up]), module, name


def _source(function: Callable[..., Any]) -> str:
    """Source of a function that needs nothing but its arguments and modules."""
    name = getattr(function, "__qualname__", repr(function))
    if not isinstance(function, FunctionType) or function.__name__ == "<lambda>":
        raise _cannot(name, "it is no function that has a name")
    if function.__code__.co_freevars:
        raise _cannot(name, f"it uses {', '.join(function.__code__.co_freevars)} of the function around it")
    try:
        text = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        raise _cannot(name, "its source is not known") from None
    tree = ast.parse(text).body[0]
    if not isinstance(tree, ast.FunctionDef) or tree.decorator_list:
        raise _cannot(name, "it is decorated, or no plain function")
    defaults = [one for one in (*tree.args.defaults, *tree.args.kw_defaults) if one is not None]
    in_defaults = {node.id for one in defaults for node in ast.walk(one) if isinstance(node, ast.Name)}
    needed: list[str] = []
    for used in sorted(_global_names(function) | in_defaults):
        if used not in function.__globals__:
            if hasattr(builtins, used) or used == function.__name__:
                continue
            raise _cannot(name, f"{used} is not defined")
        value = function.__globals__[used]
        if isinstance(value, ModuleType):
            needed.append(f"import {value.__name__} as {used}")
        elif value is not function:
            raise _cannot(name, f"it uses {used}, which is defined outside of it")
    return "from __future__ import annotations\n\n" + "".join(f"{line}\n" for line in needed) + "\n\n" + text


def _global_names(function: FunctionType) -> set[str]:
    """Global names that a function uses, in its inner functions too."""
    found: set[str] = set()
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [one for one in code.co_consts if isinstance(one, type(code))]
        found |= {
            str(step.argval) for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")
        }
    return found


def _cannot(name: str, why: str) -> InvalidRequest:
    return InvalidRequest(
        f"the function {name} can't be sent to another host: {why}. Put it into a module that the hosts can import, "
        "or install cloudpickle here and there (pip install cloudpickle), which sends functions with what they use",
        "invalid",
        "$.script",
    )


def _packed(
    call: tuple[tuple[Any, ...], dict[str, Any]], dumps: Callable[[Any], bytes], function: Callable[..., Any]
) -> str:
    try:
        return base64.b85encode(dumps(call)).decode()
    except Exception as error:  # pickle raises several kinds, and so do objects
        name = getattr(function, "__qualname__", repr(function))
        raise InvalidRequest(
            f"an argument of {name} can't be sent to another host: {error}. Pass plain values, and names of files",
            "invalid",
            "$.script",
        ) from None
