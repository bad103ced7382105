"""Axis types, and the solver that infers them.

Every axis of every tensor in a network has a *type*, and finding these types answers the question of structured
pruning: which channels of which tensors must live or die together?

Three forms are enough.

    Atom            n entries about which nothing more is known. Any subset of them may be removed.
    Product(a, b)   a·b entries, laid out row by row: entry (i, j) stands at i·|b| + j. It lives when i and j live.
                    Heads × width, groups × channels per group, gates × hidden units.
    Sum(a, b)       the entries of a, then those of b: what `cat` joins and `split` takes apart.

An axis of one entry is the empty product, `UNIT`: there is nothing in it to remove, and it joins nothing when it is
broadcast. An axis of no entries is the empty sum.

Inference is unification. Each axis of a parameter starts as a fresh atom. Operators state *equations* between the axes
that they read and write, and the solver makes them true by *refining* atoms: a view that splits 32 channels into
(4, 8) binds the atom of 32 to `Product(atom of 4, atom of 8)`, and as a binding holds wherever the atom occurs, every
other user of those 32 channels learns at once that they are 4 × 8. What is still an atom at the end is a group of
coupled channels, and because the atoms are independent of each other, what a plan removes from a tensor is always an
outer product of kept indices.

An axis that must keep all its entries is *frozen* with a reason. The structure of a frozen axis no longer matters: to
cut or divide it gives frozen pieces and teaches the solver nothing, which keeps batch, space and time cheap. Equations that
have no solution (a view that cuts across an atom) freeze the atoms in them: when in doubt, everything stays.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TypeAlias

import numpy as np

_names = count()


@dataclass(frozen=True, eq=False, slots=True)
class Atom:
    """`size` entries with no known structure; two atoms are the same only if they are the same object."""

    size: int
    number: int = field(default_factory=lambda: next(_names))

    def __str__(self) -> str:
        return f"{self.size}"


@dataclass(frozen=True, slots=True)
class Product:
    """Row-major product of its factors, the outermost first."""

    factors: tuple[Axis, ...]

    @property
    def size(self) -> int:
        return math.prod(f.size for f in self.factors)

    def __str__(self) -> str:
        return "·".join(f"({f})" if isinstance(f, Sum) else str(f) for f in self.factors) or "1"


@dataclass(frozen=True, slots=True)
class Sum:
    """Concatenation of its terms."""

    terms: tuple[Axis, ...]

    @property
    def size(self) -> int:
        return sum(t.size for t in self.terms)

    def __str__(self) -> str:
        return " + ".join(map(str, self.terms)) or "0"


Axis: TypeAlias = "Atom | Product | Sum"
Shape: TypeAlias = "tuple[Axis, ...]"
Keep: TypeAlias = "Mapping[Atom, np.ndarray]"

UNIT = Product(())
EMPTY = Sum(())
_MANY = 64  # pieces of a sum that are equated one by one; more are taken for a layout that we do not understand


def product(factors: Iterable[Axis]) -> Axis:
    """The product in normal form: flat, without units, never a product of one."""
    flat: list[Axis] = []
    for factor in factors:
        flat.extend(factor.factors if isinstance(factor, Product) else (factor,))
    return flat[0] if len(flat) == 1 else Product(tuple(flat))


def concat(terms: Iterable[Axis]) -> Axis:
    """The sum in normal form: flat, without empty terms, never a sum of one."""
    flat: list[Axis] = []
    for term in terms:
        flat.extend(term.terms if isinstance(term, Sum) else (term,) if term.size else ())
    return flat[0] if len(flat) == 1 else Sum(tuple(flat))


@dataclass(frozen=True)
class Reason:
    """Why an axis keeps all its entries: what was met, and where (an operator and the user's source line)."""

    why: str
    at: str = ""

    def __str__(self) -> str:
        return f"{self.why} ({self.at})" if self.at else self.why


class Unsolved(Exception):
    """An equation that no refinement of atoms can make true."""


class Solver:
    """Bindings of atoms and reasons of frozen ones; equations come in through `equate`, `cut`, `divide`, `freeze`.

    Invariants: an atom is bound at most once; a bound atom equals its binding in size; a frozen atom is never bound
    to a product or sum; sizes only shrink along bindings, so resolving ends.
    """

    def __init__(self) -> None:
        self._bound: dict[Atom, Axis] = {}
        self._frozen: dict[Atom, Reason] = {}
        self.site = ""  # the source line whose equations are being stated; goes into every Reason

    # --- reading ----------------------------------------------------------------------------------------------

    def fresh(self, size: int) -> Axis:
        """A new axis of which only the size is known."""
        return UNIT if size == 1 else Atom(size) if size else EMPTY

    def resolve(self, axis: Axis) -> Axis:
        """What is known of an axis by now, in normal form: every atom in it is free."""
        if isinstance(axis, Atom):
            bound = self._bound.get(axis)
            if bound is None:
                return axis
            self._bound[axis] = known = self.resolve(bound)  # path compression
            return known
        parts = axis.factors if isinstance(axis, Product) else axis.terms
        known_parts = tuple(self.resolve(p) for p in parts)
        if all(a is b for a, b in zip(parts, known_parts, strict=True)):
            return axis
        return product(known_parts) if isinstance(axis, Product) else concat(known_parts)

    def atoms(self, axis: Axis) -> Iterator[Atom]:
        """The free atoms of an axis, in order; one that occurs twice comes twice."""
        return leaves(self.resolve(axis))

    def reason(self, atom: Atom) -> Reason | None:
        """Why a free atom is frozen, or None."""
        return self._frozen.get(atom)

    # --- stating equations --------------------------------------------------------------------------------------

    def freeze(self, axis: Axis, why: str | Reason) -> None:
        """Keep every entry of `axis`. The first reason given to an atom stands."""
        for atom in self.atoms(axis):
            if atom not in self._frozen:
                self._frozen[atom] = why if isinstance(why, Reason) else Reason(why, self.site)

    def equate(self, a: Axis, b: Axis) -> Axis:
        """State that two axes of one size live and die together, entry by entry. Returns the common type.

        What cannot be made equal is frozen on both sides: it is then equal because nothing is removed from it.
        """
        a, b = self.resolve(a), self.resolve(b)
        if a is b:
            return a
        if a.size != b.size:
            raise Unsolved(f"axes of {a.size} and {b.size} entries cannot be equal")
        if isinstance(a, Atom) or isinstance(b, Atom):
            return self._bind(a, b)
        if isinstance(a, Product) and isinstance(b, Product):
            self.equate_products(a.factors, b.factors)
        else:
            total, other = (a, b) if isinstance(a, Sum) else (b, a)
            assert isinstance(total, Sum)
            try:
                for term, piece in zip(total.terms, self.split(other, [t.size for t in total.terms]), strict=True):
                    self.equate(term, piece)
            except Unsolved:
                self._give_up([a, b])
        return self.resolve(a)

    def equate_products(self, left: Sequence[Axis], right: Sequence[Axis]) -> None:
        """State that two row-major index spaces are the same: what a view of one shape as another says.

        Both lists are walked from the right like a zipper, in blocks: a block ends where both sides have multiplied
        up to the same number, so that an unsolvable block freezes nothing outside itself.
        """
        left = [f for axis in left for f in _factors(self.resolve(axis))]
        right = [f for axis in right for f in _factors(self.resolve(axis))]
        while left or right:
            mine, yours = [left.pop()], [right.pop()]
            while (m := math.prod(f.size for f in mine)) != (y := math.prod(f.size for f in yours)):
                if m < y:
                    mine.insert(0, left.pop())
                else:
                    yours.insert(0, right.pop())
            try:
                self._zip(list(mine), list(yours))
            except Unsolved:
                self._give_up(mine + yours)

    def divide(self, axis: Axis, inner: int) -> tuple[Axis, Axis]:
        """Split an axis into (outer, inner) factors, the inner one of the given size, refining it where needed."""
        axis = self.resolve(axis)
        if inner == 1:
            return axis, UNIT
        if inner == axis.size:
            return UNIT, axis
        if axis.size % inner:
            raise Unsolved(f"{axis} is no multiple of {inner}")
        if isinstance(axis, Atom):
            outer_axis, inner_axis = self.fresh(axis.size // inner), self.fresh(inner)
            self._refine(axis, Product((outer_axis, inner_axis)))
            return outer_axis, inner_axis
        if isinstance(axis, Sum):
            if not any(t.size % inner for t in axis.terms):  # a'·inner + b'·inner = (a' + b')·inner
                outers, inners = zip(*(self.divide(t, inner) for t in axis.terms), strict=True)
            elif axis.size // inner <= _MANY:  # cut across the terms: inner + inner + ... = (1 + 1 + ...)·inner
                inners = tuple(self.split(axis, [inner] * (axis.size // inner)))
                outers = (UNIT,) * len(inners)
            else:
                raise Unsolved(f"{axis} has no common factor of {inner}")
            for other in inners[1:]:
                self.equate(inners[0], other)
            return concat(outers), inners[0]
        *rest, last = axis.factors
        if last.size % inner == 0:
            outer_axis, inner_axis = self.divide(last, inner)
            return product([*rest, outer_axis]), inner_axis
        if inner % last.size == 0:
            outer_axis, inner_axis = self.divide(product(rest), inner // last.size)
            return outer_axis, product([inner_axis, last])
        raise Unsolved(f"{axis} cannot be divided by {inner}")

    def cut(self, axis: Axis, at: int) -> tuple[Axis, Axis]:
        """Split an axis into the entries before and from `at`, refining it where the cut falls inside an atom."""
        axis = self.resolve(axis)
        if at == 0:
            return EMPTY, axis
        if at == axis.size:
            return axis, EMPTY
        if isinstance(axis, Atom):
            before, after = self.fresh(at), self.fresh(axis.size - at)
            self._refine(axis, Sum((before, after)))
            return before, after
        if isinstance(axis, Sum):
            for i, term in enumerate(axis.terms):
                if at < term.size:
                    before, after = self.cut(term, at)
                    return concat((*axis.terms[:i], before)), concat((after, *axis.terms[i + 1 :]))
                at -= term.size
            raise AssertionError("a cut lies inside the axis")
        first, rest = axis.factors[0], product(axis.factors[1:])
        whole, part = divmod(at, rest.size)
        before, after = self.cut(first, whole)
        if part == 0:
            return product((before, rest)), product((after, rest))
        # The cut falls inside one entry of the first factor: that entry is set apart, and can no longer be removed.
        _, after = self.cut(after, 1)
        low, high = self.cut(rest, part)
        head = (product((before, rest)),) if before.size else ()
        tail = (product((after, rest)),) if after.size else ()
        return concat((*head, low)), concat((high, *tail))

    def split(self, axis: Axis, sizes: Iterable[int]) -> list[Axis]:
        """Cut an axis into consecutive pieces of the given sizes, which add up to its own."""
        pieces, rest = [], axis
        for size in sizes:
            piece, rest = self.cut(rest, size)
            pieces.append(piece)
        return pieces

    # --- making them true -----------------------------------------------------------------------------------------

    def _bind(self, a: Axis, b: Axis) -> Axis:
        """One of the two is an atom: it becomes the other, or both are frozen if it is frozen."""
        if not isinstance(a, Atom):
            a, b = b, a
        assert isinstance(a, Atom)
        if (reason := self._frozen.get(a)) is not None:
            self.freeze(b, reason)
            if not isinstance(b, Atom):
                return a
            a, b = b, a  # two frozen atoms are one
        elif isinstance(b, Atom) and b.number > a.number and b not in self._frozen:
            a, b = b, a  # the older of two free atoms stays
        self._bound[a] = b
        return b

    def _refine(self, atom: Atom, form: Product | Sum) -> None:
        """Bind a free atom to a form; the pieces of a frozen atom are frozen like it, and it stays as it is."""
        if (reason := self._frozen.get(atom)) is not None:
            self.freeze(form, reason)
        else:
            self._bound[atom] = form

    def _zip(self, left: list[Axis], right: list[Axis]) -> None:
        """Equate two lists of factors of equal product by greatest common divisors, from the right."""
        while left and right:
            a, b = self.resolve(left.pop()), self.resolve(right.pop())
            if isinstance(a, Product) or isinstance(b, Product):  # refined since the list was made
                left.extend(_factors(a))
                right.extend(_factors(b))
                if not (left and right):
                    break
                a, b = left.pop(), right.pop()
            common = math.gcd(a.size, b.size)
            if common == 1:
                raise Unsolved(f"{a} and {b} have no common factor")
            a_outer, a_inner = self.divide(a, common)
            b_outer, b_inner = self.divide(b, common)
            self.equate(a_inner, b_inner)
            left.extend(_factors(self.resolve(a_outer)))
            right.extend(_factors(self.resolve(b_outer)))

    def _give_up(self, axes: Iterable[Axis]) -> None:
        for axis in axes:
            self.freeze(axis, "a reshape cuts across these channels")


def _factors(axis: Axis) -> tuple[Axis, ...]:
    return axis.factors if isinstance(axis, Product) else (axis,)


# --- what a decision about atoms means for an axis ------------------------------------------------------------------
# These read resolved axes: `Solver.resolve` first.


def leaves(axis: Axis) -> Iterator[Atom]:
    """The atoms of an axis, in order; one that occurs twice comes twice."""
    if isinstance(axis, Atom):
        yield axis
    else:
        for part in axis.factors if isinstance(axis, Product) else axis.terms:
            yield from leaves(part)


def kept_size(axis: Axis, widths: Mapping[Atom, int]) -> int:
    """How many entries an axis keeps when each atom keeps `widths[atom]` (all of them where it is not listed)."""
    if isinstance(axis, Atom):
        return widths.get(axis, axis.size)
    if isinstance(axis, Product):
        return math.prod(kept_size(f, widths) for f in axis.factors)
    return sum(kept_size(t, widths) for t in axis.terms)


def kept_entries(axis: Axis, keep: Keep) -> np.ndarray:
    """The indices of an axis that stay, ascending, when each atom keeps `keep[atom]` (all where it is not listed)."""
    if isinstance(axis, Atom):
        return np.asarray(keep[axis]) if axis in keep else np.arange(axis.size)
    entries = np.zeros(1 if isinstance(axis, Product) else 0, dtype=np.int64)
    if isinstance(axis, Product):
        for factor in axis.factors:
            entries = np.add.outer(entries * factor.size, kept_entries(factor, keep)).ravel()
        return entries
    offset = 0
    for term in axis.terms:
        entries = np.concatenate([entries, kept_entries(term, keep) + offset])
        offset += term.size
    return entries


def positions(axis: Axis, atom: Atom) -> list[np.ndarray]:
    """For every occurrence of `atom` in an axis: which entry of the atom each entry of the axis stands on, or -1.

    Scores of channels are gathered along these: entry k of the axis speaks for entry positions[...][k] of the atom.
    """
    if isinstance(axis, Atom):
        return [np.arange(axis.size)] if axis is atom else []
    found = []
    if isinstance(axis, Product):
        outer, inner = 1, axis.size
        for factor in axis.factors:
            inner //= factor.size
            for own in positions(factor, atom):
                found.append(np.tile(np.repeat(own, inner), outer))
            outer *= factor.size
        return found
    offset = 0
    for term in axis.terms:
        for own in positions(term, atom):
            whole = np.full(axis.size, -1, dtype=np.int64)
            whole[offset : offset + term.size] = own
            found.append(whole)
        offset += term.size
    return found
