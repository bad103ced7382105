"""The user's own code: what a name stands for, and calls whose errors become one line that names the user's own."""

from __future__ import annotations

import importlib
import operator
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from structprune.errors import InputError, StructpruneError, did_you_mean, one_line

_PACKAGES = (Path(__file__).parents[1], Path(torch.__file__).parent, Path(importlib.__file__).parent)
LIBRARIES = tuple(f"{package}{os.sep}" for package in _PACKAGES)  # begin the names of files of other code
_NOT_THE_USERS = ("<", *LIBRARIES)


def named_object(spec: str, form: str, wanted: str) -> Any:
    """What `package.module:name` names, imported with the current directory on the path. form: what it is not, if it has another form, and advice;
    wanted: what the name should be, both for the InputError.
    """
    module_name, _, attribute = spec.partition(":")
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*", spec):
        raise InputError(f"{spec!r} is not {form}")
    import_from_current_directory()
    try:
        with torch.random.fork_rng(devices=[]):  # the weights shall not depend on whether this is the first import
            module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # importing runs the user's code, which may raise anything or end with sys.exit
        if not isinstance(error, ModuleNotFoundError) or not f"{module_name}.".startswith(f"{error.name}."):
            raise InputError(f"importing {module_name} failed: {one_line(error)}{users_line(error)}; correct that, or name another one") from error
        advice = (
            f"did you mean {module_name[:-3]}:{attribute}?" if module_name.endswith(".py") else "install it, or start in the directory that holds it"
        )
        raise InputError(f"{spec}: there is no module {error.name}; {advice}") from error
    try:
        return operator.attrgetter(attribute)(module)
    except AttributeError as error:
        close = did_you_mean(attribute, dir(module))
        raise InputError(f"{module_name} has no {attribute!r}{close}; name {wanted}") from error


def called(spec: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    except (Exception, SystemExit) as error:  # a constructor is someone else's code and may raise anything
        raise InputError(f"{spec} failed: {one_line(error)}{users_line(error)}; correct that, or name another constructor") from error


@contextmanager
def users_code(what: str) -> Iterator[None]:
    """Whatever code of the user's own raises becomes an InputError that names `what` and the line."""
    try:
        yield
    except StructpruneError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"{what} failed: {one_line(error)}{users_line(error)}; correct that and run it again") from error


@contextmanager
def as_written() -> Iterator[None]:
    """Whatever mode the caller is in, tensors can be trained that are made here; and what is under torch.compile runs as it is written: to compile
    it for sizes that are tried once would take minutes.
    """
    with torch.inference_mode(False), torch.compiler.set_stance("force_eager"):
        yield


def import_from_current_directory() -> None:
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())


def users_line(error: BaseException) -> str:
    """' at file:line', the innermost of the user's own code that an error passed, or that its message tells of; empty where it never got there."""
    passed = [(frame.filename, str(frame.lineno)) for frame in traceback.extract_tb(error.__traceback__)]
    told = re.findall(r'File "([^"]+)", line (\d+)', str(error))
    own = [place for place in passed + told if not place[0].startswith(_NOT_THE_USERS)]
    return f" at {':'.join(own[-1])}" if own else ""
