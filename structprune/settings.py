"""`--config file.toml`: options under the names of their flags; what is typed beside it wins."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from structprune.errors import InputError, did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def use(context: typer.Context, path: Path | None) -> Path | None:
    """The callback of --config: makes what the file says the defaults of the command. Raises InputError, naming file and key, for what it cannot be.

    `context.obj` then has what the file says.
    """
    if path is None:
        return None
    known = {option.lstrip("-"): p for p in context.command.params for option in p.opts}
    negated = {option.lstrip("-"): p for p in context.command.params for option in p.secondary_opts}  # --no-latency
    found = _read(path)
    defaults: dict[str, Any] = {}
    for key, value in found.items():
        parameter = known.get(key) or negated.get(key)
        if parameter is None or key in ("config", "help"):
            names = did_you_mean(key, [*known, *negated])
            raise InputError(f"{path}: {context.info_name} has no option {key!r}{names}; keys are the names of its flags")
        if isinstance(value, dict) or (key in negated and not isinstance(value, bool)):
            raise InputError(f"{path}: {key!r} cannot be {value!r}; options are plain values")
        defaults[parameter.name or key] = not value if key in negated else _typed(value, getattr(parameter, "multiple", False))
    context.default_map = {**(context.default_map or {}), **defaults}
    context.obj = found
    return path


def _typed(value: Any, many: bool) -> Any:
    """As on the command line: an option that is given once takes a list as 1,2, and one that may be repeated takes a single value too."""
    if many:
        return [str(v) for v in (value if isinstance(value, list) else [value])]
    return ",".join(map(str, value)) if isinstance(value, list) else value


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path} is no TOML: {error}") from error
