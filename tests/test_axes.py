"""Axis types and their solver: worked examples, then random equations against a model that only knows what is alive."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from structprune.ir.axes import EMPTY, UNIT, Atom, Axis, Product, Reason, Solver, Sum, Unsolved, concat, kept_entries, kept_size, positions, product


@pytest.fixture
def solver() -> Solver:
    return Solver()


def free(solver: Solver, axis: Axis) -> list[Atom]:
    """The atoms of an axis from which something can be removed."""
    return [atom for atom in dict.fromkeys(solver.atoms(axis)) if solver.reason(atom) is None]


# ------------------------------------------------------------------------------------------------------------ normal form


def test_products_are_flat_and_know_no_units():
    a, b, c = Atom(2), Atom(3), Atom(5)
    assert product([a, UNIT, product([b, c])]) == Product((a, b, c))
    assert product([UNIT, a]) is a
    assert product([]) == UNIT
    assert UNIT.size == 1


def test_sums_are_flat_and_know_no_empty_terms():
    a, b, c = Atom(2), Atom(3), Atom(5)
    assert concat([a, EMPTY, concat([b, c])]) == Sum((a, b, c))
    assert concat([EMPTY, a]) is a
    assert concat([]) == EMPTY
    assert EMPTY.size == 0


def test_units_are_terms_for_they_are_entries():
    assert concat([UNIT, UNIT]) == Sum((UNIT, UNIT))
    assert concat([UNIT, UNIT]).size == 2


def test_axes_print_as_arithmetic():
    a, b, c = Atom(2), Atom(3), Atom(5)
    assert str(Product((a, Sum((b, c))))) == "2·(3 + 5)"
    assert (str(UNIT), str(EMPTY)) == ("1", "0")


def test_one_entry_is_a_unit_and_none_is_empty(solver: Solver):
    assert solver.fresh(1) == UNIT
    assert solver.fresh(0) == EMPTY
    assert isinstance(solver.fresh(2), Atom)


# ------------------------------------------------------------------------------------------------------------- equating


def test_two_atoms_become_the_older_one(solver: Solver):
    older, younger = Atom(4), Atom(4)
    assert solver.equate(younger, older) is older
    assert solver.resolve(younger) is older


def test_equality_is_transitive(solver: Solver):
    atoms = [Atom(4) for _ in range(5)]
    for a, b in pairwise(reversed(atoms)):
        solver.equate(a, b)
    assert {solver.resolve(a) for a in atoms} == {atoms[0]}


def test_axes_of_different_size_are_never_equal(solver: Solver):
    with pytest.raises(Unsolved, match="4 and 6 entries"):
        solver.equate(Atom(4), Atom(6))


def test_an_atom_learns_the_structure_of_its_equal(solver: Solver):
    channels, form = Atom(12), Product((Atom(3), Atom(4)))
    solver.equate(channels, form)
    assert solver.resolve(channels) == form


def test_what_one_user_learns_all_users_know(solver: Solver):
    weight, bias = Atom(12), Atom(12)
    solver.equate(weight, bias)
    solver.equate_products([bias], [Atom(3), Atom(4)])
    assert solver.resolve(weight) == solver.resolve(bias)
    assert str(solver.resolve(weight)) == "3·4"


# ---------------------------------------------------------------------------------------------------------------- views


def test_a_view_splits_an_atom(solver: Solver):
    channels, heads, width = Atom(12), Atom(3), Atom(4)
    solver.equate_products([channels], [heads, width])
    assert solver.resolve(channels) == Product((heads, width))


def test_a_view_merges_axes(solver: Solver):
    channels, space, features = Atom(3), Atom(4), Atom(12)
    solver.equate_products([channels, space], [features])
    assert solver.resolve(features) == Product((channels, space))


def test_a_view_refines_what_lies_across_by_common_divisors(solver: Solver):
    """(6, 4) seen as (3, 8): the six are 3 · 2, and the eight are that 2 · 4."""
    six, four, three, eight = Atom(6), Atom(4), Atom(3), Atom(8)
    solver.equate_products([six, four], [three, eight])
    two = solver.resolve(six).factors[1]
    assert solver.resolve(six) == Product((three, two))
    assert solver.resolve(eight) == Product((two, four))
    assert (three.size, two.size, four.size) == (3, 2, 4)


def test_a_view_there_and_back_is_no_news(solver: Solver):
    channels, heads, width, again = Atom(12), Atom(3), Atom(4), Atom(12)
    solver.equate_products([channels], [heads, width])
    solver.equate_products([heads, width], [again])
    assert solver.resolve(again) == solver.resolve(channels) == Product((heads, width))


def test_units_take_no_part_in_a_view(solver: Solver):
    a, b = Atom(5), Atom(5)
    solver.equate_products([UNIT, a], [b, UNIT, UNIT])
    assert solver.resolve(b) is a


def test_a_shuffle_transposes_the_factors(solver: Solver):
    channels, groups, inner, shuffled = Atom(12), Atom(3), Atom(4), Atom(12)
    solver.equate_products([channels], [groups, inner])
    solver.equate_products([inner, groups], [shuffled])
    assert solver.resolve(shuffled) == Product((inner, groups))


def test_a_shuffle_added_to_itself_makes_a_self_product(solver: Solver):
    """x + shuffle(x) with 4 × 4 channels: entry (i, j) lives with (j, i), so rows live as columns do."""
    channels, rows, columns = Atom(16), Atom(4), Atom(4)
    solver.equate_products([channels], [rows, columns])
    solver.equate(Product((rows, columns)), Product((columns, rows)))
    assert solver.resolve(channels) == Product((rows, rows))
    keep = {rows: np.array([0, 2])}
    assert kept_entries(solver.resolve(channels), keep).tolist() == [0, 2, 8, 10]


def test_an_unsolvable_view_freezes_only_its_block(solver: Solver):
    """(7 · (2 + 3)) seen as (7, 5) is fine; (2 · 3) seen as (3 · 2) with both known to be primes is not."""
    outside, a, b, c, d, same = Atom(7), Atom(2), Atom(3), Atom(3), Atom(2), Atom(7)
    solver.equate_products([outside, a, b], [same, c, d])
    assert free(solver, outside) == [outside]
    assert solver.resolve(same) is outside
    assert [solver.reason(atom) for atom in (a, b, c, d)] == [Reason("a reshape cuts across these channels")] * 4


def test_a_view_of_a_long_sum_that_has_no_common_factor_freezes_it(solver: Solver):
    total = Sum((Atom(101), Atom(99)))
    left, right = Atom(100), Atom(2)
    solver.equate_products([total], [left, right])
    assert not any(free(solver, axis) for axis in (total, left, right))


# ----------------------------------------------------------------------------------------------------------------- sums


def test_a_cut_splits_an_atom(solver: Solver):
    channels = Atom(8)
    before, after = solver.cut(channels, 3)
    assert solver.resolve(channels) == Sum((before, after))
    assert (before.size, after.size) == (3, 5)


def test_a_cut_at_the_end_is_no_cut(solver: Solver):
    channels = Atom(8)
    assert solver.cut(channels, 0) == (EMPTY, channels)
    assert solver.cut(channels, 8) == (channels, EMPTY)
    assert solver.resolve(channels) is channels


def test_a_cut_between_terms_leaves_them_whole(solver: Solver):
    a, b, c = Atom(2), Atom(3), Atom(4)
    assert solver.cut(Sum((a, b, c)), 5) == (Sum((a, b)), c)


def test_equal_sums_are_cut_at_the_same_places(solver: Solver):
    a, b, c, d = Atom(4), Atom(6), Atom(7), Atom(3)
    solver.equate(Sum((a, b)), Sum((c, d)))
    assert str(solver.resolve(b)) == "3 + 3"
    assert solver.resolve(b).terms[1] is solver.resolve(d)
    assert solver.resolve(c) == Sum((a, solver.resolve(b).terms[0]))


def test_a_gate_couples_the_halves(solver: Solver):
    hidden = Atom(10)
    value, gate = solver.cut(hidden, 5)
    half = solver.equate(value, gate)
    assert solver.resolve(hidden) == Sum((half, half))
    assert kept_entries(solver.resolve(hidden), {half: np.array([1, 4])}).tolist() == [1, 4, 6, 9]


def test_a_sum_of_equal_halves_is_not_a_product_but_divides_like_one(solver: Solver):
    half = Atom(5)
    outer, inner = solver.divide(Sum((half, half)), 5)
    assert outer == Sum((UNIT, UNIT))
    assert inner is half


def test_a_cut_between_rows_of_a_product_cuts_its_outer_factor(solver: Solver):
    outer, inner = Atom(4), Atom(3)
    before, after = solver.cut(Product((outer, inner)), 6)
    low, high = solver.resolve(outer).terms
    assert (low.size, high.size) == (2, 2)
    assert (before, after) == (Product((low, inner)), Product((high, inner)))


def test_a_cut_inside_a_row_sets_that_row_apart(solver: Solver):
    """4 rows of 3, cut at 7 = 2·3 + 1: rows 0 and 1 may go, row 2 may not, row 3 is one entry: a unit."""
    outer, inner = Atom(4), Atom(3)
    before, after = solver.cut(Product((outer, inner)), 7)
    assert str(solver.resolve(outer)) == "2 + 1 + 1"
    assert str(solver.resolve(inner)) == "1 + 2"
    assert str(solver.resolve(before)) == "2·(1 + 2) + 1"
    assert str(solver.resolve(after)) == "2 + 1 + 2"
    assert [atom.size for atom in free(solver, Product((outer, inner)))] == [2, 2]


def test_terms_divide_one_by_one_where_each_is_a_multiple(solver: Solver):
    """(6 + 4) channels in groups of 2: the groups are 3 + 2, the pairs are one axis."""
    a, b = Atom(6), Atom(4)
    outer, inner = solver.divide(Sum((a, b)), 2)
    assert str(outer) == "3 + 2"
    assert solver.resolve(a) == Product((outer.terms[0], inner))
    assert solver.resolve(b) == Product((outer.terms[1], solver.resolve(inner)))


def test_terms_are_cut_where_blocks_lie_across_them(solver: Solver):
    """(3 + 5) channels in blocks of 4: the second block starts inside the 5, and both blocks live and die together."""
    a, b = Atom(3), Atom(5)
    outer, inner = solver.divide(Sum((a, b)), 4)
    assert outer == Sum((UNIT, UNIT))
    assert solver.resolve(inner) == solver.resolve(Sum((a, solver.resolve(b).terms[0])))
    keep = {atom: np.array([0]) for atom in free(solver, a)}
    assert kept_entries(solver.resolve(Sum((a, b))), keep).tolist() == [0, 3, 4, 7]


def test_an_axis_divides_only_by_its_divisors(solver: Solver):
    with pytest.raises(Unsolved, match="no multiple"):
        solver.divide(Atom(8), 3)
    with pytest.raises(Unsolved, match="cannot be divided"):
        solver.divide(Product((Atom(2), Atom(9))), 6)


def test_dividing_by_all_or_by_one_is_no_news(solver: Solver):
    axis = Atom(8)
    assert solver.divide(axis, 8) == (UNIT, axis)
    assert solver.divide(axis, 1) == (axis, UNIT)


# --------------------------------------------------------------------------------------------------------------- freezing


def test_the_first_reason_stands_and_names_its_source(solver: Solver):
    atom = Atom(4)
    solver.site = "net.py:7"
    solver.freeze(atom, "model input")
    solver.freeze(atom, "model output")
    assert str(solver.reason(atom)) == "model input (net.py:7)"


def test_freezing_goes_to_every_atom_of_an_axis(solver: Solver):
    a, b = Atom(2), Atom(3)
    solver.freeze(Product((a, Sum((b, UNIT)))), "why")
    assert free(solver, Sum((a, b))) == []


@pytest.mark.parametrize("first", ["frozen", "free"])
def test_an_equal_of_a_frozen_axis_is_frozen_for_the_same_reason(solver: Solver, first: str):
    frozen, other = (Atom(6), Atom(6)) if first == "frozen" else reversed((Atom(6), Atom(6)))
    solver.freeze(frozen, "model output")
    solver.equate(other, frozen)
    assert solver.reason(solver.resolve(other)) == Reason("model output")


def test_a_form_equal_to_a_frozen_atom_is_frozen_all_through(solver: Solver):
    frozen, heads, width = Atom(6), Atom(2), Atom(3)
    solver.freeze(frozen, "model output")
    solver.equate(Product((heads, width)), frozen)
    assert solver.reason(heads) == solver.reason(width) == Reason("model output")


def test_a_frozen_axis_teaches_nothing(solver: Solver):
    """Two views of one frozen axis do not meet: what one says of its pieces, the other does not hear."""
    space = Atom(12)
    solver.freeze(space, "model input")
    rows, columns = solver.divide(space, 4)
    other_rows, other_columns = solver.divide(space, 3)
    assert solver.resolve(space) is space
    assert all(solver.reason(piece) == Reason("model input") for piece in (rows, columns, other_rows, other_columns))
    before, after = solver.cut(space, 5)
    assert solver.resolve(space) is space
    assert all(solver.reason(piece) == Reason("model input") for piece in (before, after))


def test_one_frozen_factor_leaves_the_other_free(solver: Solver):
    channels, three, width = Atom(12), Atom(3), Atom(4)
    solver.equate_products([channels], [three, width])
    solver.freeze(three, "each entry is taken by itself")
    assert free(solver, channels) == [width]


# --------------------------------------------------------------------------------------------- what a decision means


def test_kept_entries_of_a_product_are_the_outer_product():
    rows, columns = Atom(3), Atom(4)
    keep = {rows: np.array([0, 2]), columns: np.array([1, 3])}
    assert kept_entries(Product((rows, columns)), keep).tolist() == [1, 3, 9, 11]


def test_kept_entries_of_a_sum_follow_each_other():
    a, b = Atom(3), Atom(4)
    assert kept_entries(Sum((a, b)), {a: np.array([1]), b: np.array([0, 3])}).tolist() == [1, 3, 6]


def test_positions_say_which_entry_of_the_atom_each_entry_stands_on():
    rows, columns = Atom(2), Atom(3)
    axis = Product((rows, columns))
    assert [p.tolist() for p in positions(axis, rows)] == [[0, 0, 0, 1, 1, 1]]
    assert [p.tolist() for p in positions(axis, columns)] == [[0, 1, 2, 0, 1, 2]]
    assert positions(axis, Atom(2)) == []


def test_positions_give_every_occurrence():
    half, other = Atom(2), Atom(1)
    assert [p.tolist() for p in positions(Sum((half, other, half)), half)] == [[0, 1, -1, -1, -1], [-1, -1, -1, 0, 1]]
    assert [p.tolist() for p in positions(Product((half, half)), half)] == [[0, 0, 1, 1], [0, 1, 0, 1]]


# ----------------------------------------------------------------------------------------------------- random equations
#
# The model: an atom is an array of truth values, one per entry, that says what is alive; a product is alive where all
# its factors are, a sum is its terms in a row. It knows nothing of solving.

Alive = Mapping[Atom, np.ndarray]


def alive(axis: Axis, atoms: Alive) -> np.ndarray:
    if isinstance(axis, Atom):
        return atoms[axis]
    if isinstance(axis, Sum):
        return np.concatenate([np.zeros(0, dtype=bool), *(alive(t, atoms) for t in axis.terms)])
    result = np.ones(1, dtype=bool)
    for factor in axis.factors:
        result = np.outer(result, alive(factor, atoms)).ravel()
    return result


def leaves(axis: Axis) -> list[Atom]:
    """The atoms of an axis as it stands, unresolved."""
    if isinstance(axis, Atom):
        return [axis]
    return [atom for part in (axis.factors if isinstance(axis, Product) else axis.terms) for atom in leaves(part)]


def truth(size: int, kept: np.ndarray) -> np.ndarray:
    """The indices that are kept, as truth values."""
    values = np.zeros(size, dtype=bool)
    values[kept] = True
    return values


class System:
    """A solver, the atoms that exist from the start, and the equations that have been stated, as they were stated."""

    def __init__(self) -> None:
        self.solver = Solver()
        self.pool: list[Atom] = []
        self.equations: list[tuple[Axis, Axis]] = []
        self.frozen: list[Axis] = []

    def atom(self, size: int) -> Atom:
        atom = Atom(size)
        self.pool.append(atom)
        return atom

    def free_atoms(self) -> list[Atom]:
        """The atoms that are free in the end, those of the pieces included."""
        axes = [*self.pool, *(side for equation in self.equations for side in equation)]
        return [atom for axis in dict.fromkeys(axes) for atom in free(self.solver, axis)]


def divisors(size: int) -> list[int]:
    return [d for d in range(2, size) if size % d == 0]


@st.composite
def axes(draw: st.DrawFn, system: System, size: int, depth: int = 2) -> Axis:
    """A tree of exactly `size` entries, over new atoms and old ones."""
    if size < 2:
        return UNIT if size else EMPTY
    forms = ["atom", "atom again", *(["product"] if divisors(size) and depth else []), *(["sum"] if depth else [])]
    form = draw(st.sampled_from(forms))
    if form == "product":
        outer = draw(st.sampled_from(divisors(size)))
        return product([draw(axes(system, outer, depth - 1)), draw(axes(system, size // outer, depth - 1))])
    if form == "sum":
        first = draw(st.integers(1, size - 1))
        return concat([draw(axes(system, first, depth - 1)), draw(axes(system, size - first, depth - 1))])
    same = [atom for atom in system.pool if atom.size == size]
    return draw(st.sampled_from(same)) if same and form == "atom again" else system.atom(size)


SIZES = st.sampled_from([2, 3, 4, 5, 6, 8, 9, 12, 16, 18, 24])


@st.composite
def factorisations(draw: st.DrawFn, system: System, size: int) -> list[Axis]:
    """A shape of `size` entries in all."""
    sizes = []
    while len(sizes) < 2 and (choices := divisors(size)):
        sizes.append(draw(st.sampled_from(choices)))
        size //= sizes[-1]
    return [draw(axes(system, s, 1)) for s in (*sizes, size)]


@st.composite
def systems(draw: st.DrawFn) -> System:
    """Up to eight equations of every kind, stated one after the other."""
    system = System()
    solver = system.solver
    for _ in range(draw(st.integers(1, 8))):
        kind = draw(st.sampled_from(["equate", "equate", "cut", "divide", "view", "view", "freeze"]))
        size = draw(SIZES)
        axis = draw(axes(system, size))
        if kind == "equate":
            other = draw(axes(system, size))
            assert solver.equate(axis, other).size == size
            system.equations.append((axis, other))
        elif kind == "cut":
            pieces = solver.cut(axis, draw(st.integers(0, size)))
            system.equations.append((axis, concat(pieces)))
        elif kind == "divide":
            inner = draw(st.sampled_from([1, *divisors(size), size]))
            try:
                factors = solver.divide(axis, inner)
            except Unsolved:
                continue
            assert factors[1].size == inner
            system.equations.append((axis, product(factors)))
        elif kind == "view":
            left, right = draw(factorisations(system, size)), draw(factorisations(system, size))
            solver.equate_products(left, right)
            system.equations.append((product(left), product(right)))
        else:
            solver.freeze(axis, "because")
            system.frozen.append(axis)
    return system


@st.composite
def decided(draw: st.DrawFn) -> tuple[System, dict[Atom, np.ndarray]]:
    """A system, and for some of its free atoms the entries that stay."""
    system = draw(systems())
    keep = {}
    for atom in system.free_atoms():
        kept = draw(st.none() | st.sets(st.integers(0, atom.size - 1), min_size=1))
        if kept is not None:
            keep[atom] = np.array(sorted(kept))
    return system, keep


thorough = settings(max_examples=200, deadline=None, derandomize=True)


@thorough
@given(decided())
def test_both_sides_of_every_equation_keep_the_same_entries(case):
    """Cuts and divisions too: their pieces, put together again, keep what the axis keeps."""
    system, keep = case
    for left, right in system.equations:
        kept = [kept_entries(system.solver.resolve(side), keep).tolist() for side in (left, right)]
        assert kept[0] == kept[1]


@thorough
@given(decided())
def test_solutions_are_solutions_of_the_equations_as_stated(case):
    """Give every atom in them the life that the solver gives it: the equations hold, as they were stated, unresolved."""
    system, keep = case
    stated = dict.fromkeys(atom for equation in system.equations for side in equation for atom in leaves(side))
    atoms = {atom: truth(atom.size, kept_entries(system.solver.resolve(atom), keep)) for atom in stated}
    for left, right in system.equations:
        assert alive(left, atoms).tolist() == alive(right, atoms).tolist()


@thorough
@given(decided())
def test_kept_size_counts_kept_entries(case):
    system, keep = case
    widths = {atom: len(kept) for atom, kept in keep.items()}
    for axis in (side for equation in system.equations for side in equation):
        known = system.solver.resolve(axis)
        entries = kept_entries(known, keep)
        assert known.size == axis.size
        assert kept_size(known, widths) == len(entries) == len(set(entries.tolist()))
        assert (np.diff(entries) > 0).all()
        assert all(0 <= e < axis.size for e in entries)


@thorough
@given(decided())
def test_an_entry_is_kept_where_every_atom_that_it_stands_on_is(case):
    system, keep = case
    for axis in (side for equation in system.equations for side in equation):
        known = system.solver.resolve(axis)
        stays = np.ones(known.size, dtype=bool)
        for atom in dict.fromkeys(system.solver.atoms(known)):
            kept = truth(atom.size, kept_entries(atom, keep))
            for standing in positions(known, atom):
                stays &= (standing < 0) | kept[standing]
        assert np.flatnonzero(stays).tolist() == kept_entries(known, keep).tolist()


@thorough
@given(decided())
def test_frozen_axes_keep_everything(case):
    system, keep = case
    for axis in system.frozen:
        assert kept_entries(system.solver.resolve(axis), keep).tolist() == list(range(axis.size))


@thorough
@given(systems())
def test_resolving_ends_in_normal_form_and_changes_no_size(system: System):
    for axis in [*system.pool, *(side for equation in system.equations for side in equation)]:
        known = system.solver.resolve(axis)
        assert known.size == axis.size
        assert known == _normal(known)
        assert all(system.solver.resolve(atom) is atom for atom in system.solver.atoms(known))


def _normal(axis: Axis) -> Axis:
    if isinstance(axis, Atom):
        return axis
    return product(map(_normal, axis.factors)) if isinstance(axis, Product) else concat(map(_normal, axis.terms))


@thorough
@given(systems())
def test_frozen_atoms_are_never_refined(system: System):
    for axis in system.frozen:
        for atom in leaves(axis):
            assert not free(system.solver, atom)


# ------------------------------------------------------------------------------------------- nothing is coupled in vain


@st.composite
def sums_of_pairs(draw: st.DrawFn) -> tuple[list[Atom], list[tuple[Axis, Axis]]]:
    """Equations between sums of atoms, all of even sizes, so that no cut leaves a single entry."""
    pool = [Atom(2 * draw(st.integers(1, 4))) for _ in range(draw(st.integers(2, 6)))]
    equations = []
    for _ in range(draw(st.integers(1, 5))):
        sides = [concat(draw(st.lists(st.sampled_from(pool), min_size=1, max_size=3))) for _ in range(2)]
        missing = sides[0].size - sides[1].size
        if missing:
            pool.append(Atom(abs(missing)))
            sides[missing > 0] = concat([sides[missing > 0], pool[-1]])
        equations.append((sides[0], sides[1]))
    return pool, equations


@thorough
@given(sums_of_pairs())
def test_sums_couple_exactly_the_entries_that_the_equations_chain_together(case):
    """The classes of entries under 'stands at the same place in an equation', counted, are the entries of the free atoms."""
    pool, equations = case
    parent = {(atom, i): (atom, i) for atom in pool for i in range(atom.size)}

    def root(entry: tuple[Atom, int]) -> tuple[Atom, int]:
        while parent[entry] != entry:
            entry = parent[entry]
        return entry

    solver = Solver()
    for left, right in equations:
        solver.equate(left, right)
        for a, b in zip(*([(atom, i) for atom in leaves(side) for i in range(atom.size)] for side in (left, right)), strict=True):
            parent[root(a)] = root(b)
    classes = {root(entry) for entry in parent}
    found = dict.fromkeys(atom for axis in pool for atom in solver.atoms(axis))
    assert sum(atom.size for atom in found) == len(classes)
    assert not any(solver.reason(atom) for atom in found)
