"""Which attributes of the user's modules hold sizes that changed: guesses, in the order in which they are worth a try.

A number that surgery changed in the graph is looked for in the modules whose forward made the node, the innermost first, among the
attributes that the source line mentions. Where several have that value (8 heads in blocks of 8), the smallest sets of attributes that explain
every change are tried. Nothing here is proof: whoever uses a guess compares answers.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from structprune.ir.graph import formulas_of, owners_of, source_code_of
from structprune.ir.source import Formula
from structprune.ops.rules import Literals, Number

Attributes = dict[str, dict[str, Any]]  # module name -> attribute, or attribute of one (config.hidden_size) -> new value

_MANY_KEYS = 12  # attributes in doubt, of which small sets are tried
_CHOICES = 24

_MENTIONED, _IMPLIED, _HELD, _COMPUTED, _BESIDE = range(5)
_LISTS = (tuple, list, torch.Size)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def guesses(model: nn.Module, tensors: Mapping[int, Tensor], literals: Literals) -> Iterator[Attributes]:
    """tensors: the small ones, by the identity of the original ones."""
    modules = dict(model.named_modules())
    makers = _makers(model, modules, literals)
    choices = list(itertools.islice(_choices(modules, _explanations(modules, makers, literals)), _CHOICES))
    tried: list[Attributes] = []
    of_torch = {name: module for name, module in modules.items() if _is_of_torch(module)}  # classes made of these may compute scales from their sizes
    few = choices[:2]
    ways = ((modules, None, choices), (modules, "torch.", few), (modules, "", few), (of_torch, None, few))
    for described, among, all_chosen in ways:  # torch's own layers describe themselves; in others a number may mean something else
        for chosen in all_chosen:
            for options in (chosen, chosen[::-1]):  # of 8 heads as wide as 8 channels, the number of the heads may be the first or the last to change
                attributes = _described(described, tensors, _followed(modules, options))
                if among is not None:
                    attributes = _sizes_by_value(modules, tensors, attributes, among)
                if attributes not in tried:
                    tried.append(attributes)
                    yield attributes


def follow(module: nn.Module, original: nn.Module, attributes: Mapping[str, Any]) -> None:
    """Give a copy of a module these attributes; not those of settings that the original still shares with it, or that cannot change."""
    for path, value in attributes.items():
        *through, name = path.split(".")
        holder, before = module, original
        for step in through:
            holder, before = getattr(holder, step), getattr(before, step)
        if holder is not before:
            with suppress(AttributeError) if through else nullcontext():  # of a frozen dataclass
                setattr(holder, name, value)


class _Option(NamedTuple):
    """An attribute that would explain why a number in the graph changed."""

    level: int  # how far out the module is whose forward made the node; its children, whose methods it may have called, stand beside it
    owner: str
    name: str
    old: Number
    new: Number
    doubt: int  # _MENTIONED in the source line; or _IMPLIED by one that is: half the heads, as wide as before, are half of `self.width` in
    # `self.width // self.heads`; or _HELD by the module; or the number may be _COMPUTED from it: 3 · self.width, or self.width // 2; or it is
    # _BESIDE one that is mentioned, and as large: heads of queries and of keys
    in_turn: bool = True  # not of `view(-1, self.inputs, self.outputs)`, where both are 32 and the other number changed


def _choices(modules: Mapping[str, nn.Module], changes: Sequence[Sequence[_Option]]) -> Iterator[list[_Option]]:
    """Sets of attributes that may explain the changes: first of those that surely do, then of others too.

    A number that no attribute explains was computed from the sizes of tensors, and follows by itself; so may one that might be computed from an
    attribute, and any that an attribute holds by chance: modules further out, a child beside the module that made a node, or one of many.
    """
    sure, held, computed = (_explained(changes, lambda o, most=doubt: o.doubt <= most) for doubt in (_IMPLIED, _HELD, _COMPUTED))  # type: ignore[misc]
    in_turn = _explained(changes, lambda o: o.doubt <= _IMPLIED and o.in_turn)
    yield from map(_innermost, (sure, held, computed) if in_turn == sure else (in_turn, sure, held, computed))
    yield [option for options in held for option in options if option.level == 0 and option.owner == options[0].owner]
    yield [option for options in held if len(options) == 1 for option in options]
    yield _innermost(_explained(changes, lambda o: o.doubt != _COMPUTED))
    if any(o.doubt == _IMPLIED for all_of in changes for o in all_of):
        yield _innermost(_explained(changes, lambda o: o.doubt == _MENTIONED))
    yield []
    for other in dict.fromkeys(_key(modules, o) for o in _innermost(sure) if not _is_of_torch(modules[o.owner])):
        yield [o for o in _innermost(sure) if _key(modules, o) != other]  # of eight heads, eight entries wide, what changed was the width
    for explained in (sure, held):
        yield from _smallest_sets(modules, explained)
    for chosen in dict.fromkeys(_key(modules, o) for all_of in changes for o in all_of if o.doubt == _COMPUTED):
        yield _innermost(_explained(changes, lambda o, chosen=chosen: o.doubt < _COMPUTED or _key(modules, o) == chosen))  # type: ignore[misc]
    yield from _smallest_sets(modules, computed)


def _explained(changes: Sequence[Sequence[_Option]], trusted: Callable[[_Option], bool]) -> list[tuple[_Option, ...]]:
    """The changes that trusted options explain, each with these."""
    return [options for all_of in changes if (options := tuple(filter(trusted, all_of)))]


def _innermost(explained: Sequence[Sequence[_Option]]) -> list[_Option]:
    return [option for options in explained for option in options if option.level == options[0].level]


def _key(modules: Mapping[str, nn.Module], option: _Option) -> tuple[type, str]:
    """An attribute of a class: what goes for one module of it goes for all."""
    return type(modules[option.owner]), option.name


def _makers(model: nn.Module, modules: Mapping[str, nn.Module], literals: Literals) -> dict[fx.Node, list[str]]:
    """For every node with a number that changed, the modules whose forward made it, the innermost first, each by the name that it has in `modules`.

    A module that several share is told by the name by which its caller reached it.
    """
    names = {id(module): name for name, module in modules.items()}
    shared = {name: names[id(module)] for name, module in model.named_modules(remove_duplicate=False)}
    return {node: [shared[owner] for owner in owners_of(node) if owner in shared] for node in literals}


def _explanations(modules: Mapping[str, nn.Module], makers: Mapping[fx.Node, Sequence[str]], literals: Literals) -> list[tuple[_Option, ...]]:
    """For every number that changed, the attributes that may explain it, those of the innermost module first."""
    found: dict[tuple[_Option, ...], None] = {}
    for node, changes in literals.items():
        code = source_code_of(node)
        for old, new in changes:
            options: list[_Option] = []
            for level, owner in enumerate(makers[node]):
                children = [f"{owner}.{child}" if owner else child for child, _ in modules[owner].named_children()] if level == 0 else []
                own = [c for c in children if c in modules and not _is_of_torch(modules[c])]  # a shared child has one name
                near = [owner, *own]
                known = level == 0 and _is_of_torch(modules[owner])
                known_so_far = {_place(modules, o) for o in options}
                more = _in_turn(_holding({n: _values_in(modules[n]) for n in near}, code, level, old, new, known), code, changes)
                options += [o for o in more if _place(modules, o) not in known_so_far]  # settings that many modules share are one thing
            if options:
                found[tuple(options)] = None
    return [*found, *dict.fromkeys(_implied(modules, makers, literals, found))]


def _implied(
    modules: Mapping[str, nn.Module], makers: Mapping[fx.Node, Sequence[str]], literals: Literals, explained: Iterable[Sequence[_Option]]
) -> Iterator[tuple[_Option, ...]]:
    """Attributes of which, and of others that surely change, code computes a number: what they must be for that to be the number that it is now."""
    known: dict[tuple[int, str], dict[int, int]] = {}
    for option in itertools.chain.from_iterable(explained):
        if option.doubt == _MENTIONED and isinstance(option.old, int) and isinstance(option.new, int):
            known.setdefault(_place(modules, option), {})[option.old] = option.new
    for node, changes in literals.items():
        numbers = set(_numbers_in(pytree.tree_leaves((node.args, node.kwargs))))
        after = {old: new for old, new in changes if isinstance(old, int) and isinstance(new, int)}
        for formula, owner in itertools.product(formulas_of(node), makers[node]):
            held = {name: value for name, value in _values_in(modules[owner]).items() if type(value) is int}
            if not all(name in held for name in formula.names) or (old := formula(held)) not in numbers:
                continue
            places = {name: _place(modules, _Option(0, owner, name, 0, 0, _IMPLIED)) for name in formula.names}
            told = {name: known[place][held[name]] for name, place in places.items() if held[name] in known.get(place, {})}
            rest = [name for name in formula.names if name not in told]
            if told and len(rest) == 1 and (value := _solved(formula, {**held, **told}, rest[0], after.get(old, old))) != held[rest[0]]:
                yield (_Option(0, owner, rest[0], held[rest[0]], value, _IMPLIED),)


def _solved(formula: Formula, held: Mapping[str, int], name: str, wanted: int) -> int:
    """What an attribute must be for a formula to give the number that is wanted; what it is, where that is nothing that it may be."""
    given = formula(held)
    for value in (held[name] * wanted // given, held[name] * given // wanted) if given > 0 and wanted > 0 else ():  # above the line, or below it
        if value > 0 and formula({**held, name: value}) == wanted:
            return value
    return held[name]


def _place(modules: Mapping[str, nn.Module], option: _Option) -> tuple[int, str]:
    """The object that has an attribute, by its identity, and the attribute's name there."""
    holder, _, name = f"{option.owner}.{option.name}".lstrip(".").rpartition(".")
    return id(operator.attrgetter(holder)(modules[""]) if holder else modules[""]), name


def _is_of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.")


def _values_in(module: nn.Module) -> Mapping[str, Any]:
    """Its attributes, but for those that every module has; of a convolution not those that its weight tells; and the numbers among its settings."""
    own = ("in_channels", "out_channels") if isinstance(module, nn.modules.conv._ConvNd) else ()
    values = {name: value for name, value in vars(module).items() if name not in own and name not in _OF_EVERY_MODULE}
    settings = {name: vars(value) for name, value in values.items() if hasattr(value, "__dict__") and not isinstance(value, (nn.Module, Tensor))}
    return values | {f"{name}.{inner}": value for name, held in settings.items() for inner, value in held.items() if type(value) is int}


def _holding(held: Mapping[str, Mapping[str, Any]], code: str, level: int, old: Number, new: Number, known: bool) -> list[_Option]:
    """The attributes of a module and its children (by their names) that explain a change.

    Of those that the code mentions, the ones that hold the number, or else that it may be computed from; without such, those that it has a variable
    of the same name for, or any that hold it, but for settings, which many share.
    known: of a layer of torch's own, whose code is not told, and reads no other numbers.
    """

    def mentioned(name: str, before: str = r"\._*") -> bool:
        return _mention(name, code, before) is not None

    found = [(m, a) for m, attributes in held.items() for a, v in attributes.items() if _holds(v, old)]
    sure = [_Option(level, m, a, old, new, _MENTIONED) for m, a in found if known or mentioned(a)]
    variables = [(m, a) for m, a in found if mentioned(a, r"(?<![\w.])")]
    by_chance = [_Option(level, m, a, old, new, _HELD) for m, a in variables or found if variables or "." not in a]
    if sure and not known:
        return sure + [_Option(level, m, a, old, new, _BESIDE) for m, a in found if "." not in a and not mentioned(a)]
    if sure or isinstance(old, tuple) or isinstance(new, tuple):
        return sure or by_chance
    module, attributes = next(iter(held.items()))
    numbers = [(a, v) for a, v in attributes.items() if type(v) is int and v > 1 and v != old and mentioned(a)]
    factors = [_Option(level, module, a, v, v * new // old, _COMPUTED) for a, v in numbers if old % v == 0 and v * new % old == 0]
    multiples = [_Option(level, module, a, v, v // old * new, _COMPUTED) for a, v in numbers if v % old == 0]
    return [*factors, *multiples] or by_chance


def _mention(name: str, code: str, before: str = r"\._*") -> re.Match[str] | None:
    """Where code first reads an attribute; a public name and a private one of the same are one thing."""
    *_, last = name.split(".")
    return re.search(rf"{before}{last.lstrip('_')}\b(?!\s*=[^=])", code)


def _in_turn(options: Sequence[_Option], code: str, changes: Sequence[tuple[Number, Number]]) -> list[_Option]:
    """The same, where the code names as many attributes as a list has of that number: those whose turn it is are the ones that changed there."""
    sites = {o: site.start() for o in options if o.doubt == _MENTIONED and (site := _mention(o.name, code)) is not None}
    order = sorted(set(sites.values()))
    lists = [(b, a) for b, a in changes if isinstance(b, tuple) and isinstance(a, tuple) and len(b) == len(a)]
    for before, after in lists if len(order) > 1 else ():
        now = [new for old, new in zip(before, after, strict=True) if old == options[0].old]
        if len(now) == len(order):
            turns = dict(zip(order, now, strict=True))
            return [o._replace(in_turn=o not in sites or turns[sites[o]] == o.new) for o in options]
    return list(options)


def _smallest_sets(modules: Mapping[str, nn.Module], changes: Sequence[tuple[_Option, ...]]) -> Iterator[list[_Option]]:
    """Choices of attributes, by class and name, such that every change is explained; small ones first."""

    keys = [tuple(dict.fromkeys(_key(modules, option) for option in options)) for options in changes]
    certain = {k[0] for k in keys if len(k) == 1}
    open_ones = [k for k in keys if not certain.intersection(k)]
    doubtful = list(dict.fromkeys(k for options in open_ones for k in options))
    if len(doubtful) > _MANY_KEYS or len(certain) == len({k for options in keys for k in options}):
        return
    for number in range(len(doubtful) + 1):
        for chosen in itertools.combinations(doubtful, number):
            held = certain.union(chosen)
            if all(held.intersection(k) for k in open_ones):
                yield [option for options in changes for option in options if _key(modules, option) in held]


def _followed(modules: Mapping[str, nn.Module], options: Sequence[_Option]) -> Attributes:
    numbers: dict[tuple[str, str], dict[Number, Number]] = {}
    for option in options:
        numbers.setdefault((option.owner, option.name), {})[option.old] = option.new
    found: Attributes = {}
    for (owner, name), new in numbers.items():
        value = operator.attrgetter(name)(modules[owner])
        whole = next((after for before, after in new.items() if isinstance(after, tuple) and _holds(value, before)), None)
        found.setdefault(owner, {})[name] = type(value)(whole) if whole else _with_numbers(value, new)
    return found


def _described(modules: Mapping[str, nn.Module], tensors: Mapping[int, Tensor], attributes: Attributes) -> Attributes:
    """`attributes`, and what torch's own layers say of their sizes."""
    for name, module in modules.items():
        for attribute, value in _described_sizes(module, tensors, attributes.get(name, {})).items():
            if getattr(module, attribute, value) != value:
                attributes.setdefault(name, {})[attribute] = value
    return attributes


def _sizes_by_value(modules: Mapping[str, nn.Module], tensors: Mapping[int, Tensor], attributes: Attributes, among: str) -> Attributes:
    """`attributes`, and every other integer of a module that is a size of its tensors, where all tensors of that size changed alike.

    among: how the names of the modules' classes begin.
    """
    found = {name: dict(values) for name, values in attributes.items()}
    for name, module in modules.items():
        if not type(module).__module__.startswith(among):
            continue
        sizes: dict[int, set[int]] = {}
        for tensor in [*module.parameters(), *module.buffers()]:
            for before, after in zip(tensor.shape, tensors.get(id(tensor), tensor).shape, strict=True):
                sizes.setdefault(before, set()).add(after)
        changed = {before: after.pop() for before, after in sizes.items() if len(after) == 1 and after != {before}}
        for attribute, value in vars(module).items():
            if type(value) is int and value in changed and attribute not in found.get(name, {}):
                found.setdefault(name, {})[attribute] = changed[value]
    return found


def _holds(value: Any, number: Number) -> bool:
    """Whether it is that number, or a container of it; or the numbers of that tuple, in their order."""
    numbers = _numbers_in(value)
    if isinstance(number, tuple):
        return type(value) in _LISTS and numbers == list(number) and len(numbers) == len(value)
    return number in numbers


def _numbers_in(value: Any) -> list[int]:
    """Among tensors, words and others."""
    if type(value) in (*_LISTS, dict):
        return [number for inner in (value.values() if isinstance(value, dict) else value) for number in _numbers_in(inner)]
    return [value] if type(value) is int else []


def _with_numbers(value: Any, new: Mapping[Number, Number]) -> Any:
    """The same, with others in the place of the numbers in `new`."""
    if isinstance(value, dict):
        return {key: _with_numbers(inner, new) for key, inner in value.items()}
    if type(value) in _LISTS:
        return type(value)(_with_numbers(inner, new) for inner in value)
    return new.get(value, value) if type(value) is int else value


def _described_sizes(module: nn.Module, tensors: Mapping[int, Tensor], changed: Mapping[str, Any]) -> dict[str, Any]:
    """What torch's own layers say of their sizes, read off their small tensors."""

    def shape(name: str) -> tuple[int, ...]:
        tensor = getattr(module, name)
        return tuple(tensors.get(id(tensor), tensor).shape)

    if isinstance(module, nn.modules.conv._ConvNd):
        groups = changed.get("groups", module.groups)
        first, second, *_ = shape("weight")
        return (
            {"in_channels": first, "out_channels": second * groups} if module.transposed else {"in_channels": second * groups, "out_channels": first}
        )
    if isinstance(module, nn.Linear):
        return {"out_features": shape("weight")[0], "in_features": shape("weight")[1]}
    if isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm)) and isinstance(module.weight, Tensor):
        return {"num_channels" if isinstance(module, nn.GroupNorm) else "num_features": shape("weight")[0]}
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return {"num_embeddings": shape("weight")[0], "embedding_dim": shape("weight")[1]}
    if isinstance(module, nn.RNNBase):
        sizes = {"input_size": shape("weight_ih_l0")[1], "hidden_size": shape("weight_hh_l0")[0] // {"LSTM": 4, "GRU": 3}.get(module.mode, 1)}
        return sizes | ({"proj_size": shape("weight_hr_l0")[0]} if module.proj_size else {})
    if isinstance(module, nn.PReLU):
        return {"num_parameters": shape("weight")[0]}
    if isinstance(module, nn.LayerNorm) and isinstance(module.weight, Tensor):
        return {"normalized_shape": shape("weight")}
    return {}
