"""Queries and keys: two answers that meet in one product, q kᵀ, and nowhere else. What matters of their channels is that product.

No layer sums over the width of queries and keys, so nothing can make up for a channel of it; but the two layers may answer in any other basis, as
long as the product stays. Of all products of rank r the nearest to q kᵀ, over independent rows q and k with C = E[q qᵀ] and D = E[k kᵀ], is

    q P (k R)ᵀ     P = C^−½ U S^½,   R = D^−½ V S^½     with  U S Vᵀ = C^½ D^½,  of which the r largest singular values stay,

and it misses Σ_{i>r} S_i² (Eckart and Young, 1936, in the metric of both). So W_q becomes Pᵀ W_q, and W_k becomes Rᵀ W_k, head by head; where several
heads of queries share one of keys, C is the sum of theirs. A softmax over keys does not see what all keys of a sample have in common: there D is
taken of what they differ by.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np
import torch
from torch import Tensor, fx

from structprune import processes
from structprune.analysis.infer import Types
from structprune.calibrate.arrivals import arrivals
from structprune.calibrate.readers import Reader, reader_of, readers
from structprune.calibrate.stepping import Stepping
from structprune.ir.axes import Atom, Keep
from structprune.ir.graph import Graph, attribute, shape_of, size_of
from structprune.ir.operators import operator_name
from structprune.ir.samples import Samples, samples_in
from structprune.transform.surgery import Surgery, kept_part

_VIEWS = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "expand", "clone", "contiguous", "detach", "alias"}
_ORDERS = {"permute", "transpose", "t", "mT", "movedim", "repeat_interleave"}
_PARTS = {"split", "split_with_sizes", "chunk", "slice", "select", "unbind", "getitem"}
_BEFORE_SOFTMAX = {"mul", "div", "add", "where", "masked_fill", "dropout"} | _VIEWS
_ROUNDING = 1e-7  # of the largest eigenvalue


@dataclass(frozen=True)
class Vector:
    """The entries of a reader's answer that are one head's query, or key: [width]."""

    reader: fx.Node
    entries: tuple[int, ...]


@dataclass(frozen=True)
class Head:
    """Queries and keys that meet. left, right: [width, width], P and R for the full width, columns by falling `strength`, the singular values."""

    lefts: tuple[Vector, ...]
    rights: tuple[Vector, ...]
    left: Tensor
    right: Tensor
    strength: Tensor


@dataclass(frozen=True)
class Logits:
    """All heads whose queries and keys have one atom as their width."""

    atom: Atom
    heads: tuple[Head, ...]

    def losses(self) -> np.ndarray:
        """[width + 1]: the energy of the products that is missed when so many channels stay."""
        tails = [head.strength.square().flip(0).cumsum(0).flip(0) for head in self.heads]
        return np.append(torch.stack(tails).sum(0).cpu().numpy(), 0.0)


@dataclass(frozen=True)
class Turn:
    """A reader's answer in the basis in which its channels are cut: entries [width] become `matrix` [width, r] of them, at the entries that stay."""

    parts: Sequence[tuple[Tensor, Tensor, Tensor]]  # entries, those that stay, and the matrix

    def __call__(self, value: Tensor, axis: int) -> Tensor:
        """Of an answer, or of a weight or bias along the axis of its answer."""
        turned = value.clone()
        for entries, staying, basis in self.parts:
            own = value.index_select(axis, entries.to(value.device)).movedim(axis, -1).to(basis.dtype) @ basis.to(value.device)
            turned.index_copy_(axis, staying.to(value.device), own.movedim(-1, axis).to(value.dtype))
        return turned


def turn_weights(graph: Graph, types: Types, keep: Keep, surgery: Surgery, turned: Mapping[fx.Node, Turn]) -> None:
    """Give the small model's readers, in place, the weights under which they answer as the dense ones do in the turned basis."""
    for small, node in surgery.originals.items():
        mine, dense = (reader_of(small), reader_of(node)) if node in turned else (None, None)
        if mine is None or dense is None:
            continue
        for old, new, axis in ((dense.weight, mine.weight, 1 - dense.input_axis), (dense.bias, mine.bias, 0)):
            if old is not None and new is not None:
                value = kept_part(turned[node](graph.tensor(old).detach(), axis), types.shape(old), keep)
                attribute(surgery.module, str(new.target)).data.copy_(value)


def turns(found: Iterable[Logits], keep: Keep) -> dict[fx.Node, Turn]:
    """What becomes of the answers of readers, by their nodes in the dense graph, where the widths of queries and keys are cut."""
    parts: dict[fx.Node, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for logits in found:
        if logits.atom not in keep or not len(keep[logits.atom]):
            continue
        staying = torch.as_tensor(keep[logits.atom])
        for head in logits.heads:
            for vectors, basis in ((head.lefts, head.left), (head.rights, head.right)):
                for vector in vectors:
                    entries = torch.tensor(vector.entries)
                    parts.setdefault(vector.reader, []).append((entries, entries[staying], basis[:, : len(staying)]))
    return {node: Turn(own) for node, own in parts.items()}


@torch.no_grad()
def measured_logits(graph: Graph, types: Types, samples: Samples) -> list[Logits]:
    """The products of queries and keys whose width can be cut, as they are on samples."""
    products = _products(graph, types)
    if not products:
        return []
    sums: dict[tuple[fx.Node, int], Tensor] = {}
    run, joining = Stepping(graph.module), arrivals(graph, samples)
    while (node := run.upcoming) is not None:
        run.join(one.batch for one in joining.get(node, ()))
        run.step()
        if node in products:
            for side in (0, 1):
                own = torch.stack([products[node].moments(side, values) for values in run.values]).sum(0)
                (sums[node, side],) = processes.total(own)
        run.forget(node)
    by_atom: dict[Atom, list[_Product]] = {}
    for product in products.values():
        if all(sums[product.node, side].isfinite().all() for side in (0, 1)):
            by_atom.setdefault(product.atom, []).append(product)
    return [Logits(atom, tuple(_heads(own, sums))) for atom, own in by_atom.items()]


# --- where queries meet keys -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Product:
    """One node that multiplies queries with keys. `pairs`: of every position of its leading axes, the numbers of its query and key in `vectors`."""

    node: fx.Node
    atom: Atom
    operands: tuple[fx.Node, fx.Node]
    axes: tuple[int, int]  # of each operand the axis that is summed over
    vectors: tuple[tuple[Vector, ...], tuple[Vector, ...]]
    numbers: tuple[Tensor, Tensor]  # of each operand the numbers of the vectors at its leading positions, which repeat themselves
    pairs: frozenset[tuple[int, int]]
    softmax: bool

    def moments(self, side: int, values: Mapping[fx.Node, Any]) -> Tensor:
        """[vectors, width, width]: Σ of x xᵀ over all rows x of each; of keys under a softmax, of what they differ by within a sample."""
        value = values[self.operands[side]]
        rows = value.movedim(self.axes[side], -1).flatten(0, -3).double()
        if side == 1 and self.softmax:
            rows = rows - rows.mean(1, keepdim=True)
        number = self.numbers[side].repeat(len(rows) // len(self.numbers[side]))
        found = rows.new_zeros(len(self.vectors[side]), rows.shape[2], rows.shape[2])
        return found.index_add_(0, number.to(rows.device), rows.transpose(1, 2) @ rows)


def _products(graph: Graph, types: Types) -> dict[fx.Node, _Product]:
    """Only those whose queries and keys come from readers by mere rearrangement, each as one of the two, and go nowhere else."""
    candidates = {node: sides for node in graph.nodes if (sides := _sides(node, types)) is not None}
    atom_of = {node: types.shape(left)[axis] for node, ((left, axis), _) in candidates.items()}
    traced: dict[fx.Node, tuple[fx.Node, Tensor]] = {}
    ends: list[tuple[fx.Node, fx.Node]] = []
    for node, reader in readers(graph).items():
        if reader.kind != "transposed" and not types.atoms(node).isdisjoint(atom_of.values()):
            places, of_these = _followed(graph, reader)
            traced |= {place: (node, entries) for place, entries in places.items()}
            ends += of_these
    samples = samples_in(graph.flat_inputs())
    found = {node: _product(node, atom_of[node], sides, traced, samples) for node, sides in candidates.items()}
    products = {node: product for node, product in found.items() if product is not None}
    while True:
        elsewhere = {
            (traced[place][0], entry)
            for place, user in ends
            if place not in (products[user].operands if user in products else ())
            for entry in traced[place][1].unique().tolist()
        }
        claims = {(v.reader, e, side, v) for product in products.values() for side in (0, 1) for v in product.vectors[side] for e in v.entries}
        claimed = Counter((reader, entry) for reader, entry, *_ in claims)
        spoilt = [
            node
            for node, product in products.items()
            if any((v.reader, e) in elsewhere or claimed[v.reader, e] > 1 for vectors in product.vectors for v in vectors for e in v.entries)
        ]
        if not spoilt:
            return products
        for node in spoilt:
            del products[node]


Side = tuple[fx.Node, int]


def _sides(node: fx.Node, types: Types) -> tuple[Side, Side] | None:
    """Queries and keys of a product over an atom that may be cut, each with the axis that is summed over."""
    name = operator_name(node)
    if name not in ("scaled_dot_product_attention", "matmul", "bmm"):
        return None
    left, right, *others = node.args
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)) or left is right or left in others or right in others:
        return None
    shapes = types.shape(left), types.shape(right)
    if not all(isinstance(shape, tuple) and len(shape) >= 3 for shape in shapes):
        return None
    axes = len(shapes[0]) - 1, len(shapes[1]) - (1 if name == "scaled_dot_product_attention" else 2)
    atom = shapes[0][axes[0]]
    if not isinstance(atom, Atom) or shapes[1][axes[1]] is not atom or types.solver.reason(atom) is not None:
        return None
    return (left, axes[0]), (right, axes[1])


def _followed(graph: Graph, reader: Reader) -> tuple[dict[fx.Node, Tensor], list[tuple[fx.Node, fx.Node]]]:
    """Where the entries of a reader's answer go by rearrangement: every such node with the number of the entry at each place, and the pairs
    (node, user) at which that ends."""
    shape, axis = shape_of(reader.node.meta["val"]), reader.answer_axis
    numbers = torch.arange(shape[axis]).view([-1 if d == axis else 1 for d in range(len(shape))]).expand(shape)
    env: dict[fx.Node, Any] = {reader.node: numbers.contiguous()}
    ends: list[tuple[fx.Node, fx.Node]] = []
    for node in graph.nodes:
        mine = [n for n in node.all_input_nodes if n in env]
        if not mine:
            continue
        moved = _moved(node, env)
        if moved is None:
            ends += [(n, node) for n in mine]
        else:
            env[node] = moved
    return {node: value for node, value in env.items() if isinstance(value, Tensor)}, ends


def _moved(node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
    """A rearrangement's answer to numbers in the place of values; None for what computes, or reads something else too."""
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node) or first not in env:
        return None
    name = operator_name(node)
    if name == "dropout" or (name in ("mul", "div") and len(node.all_input_nodes) == 1):
        return env[first]
    sizes = {n: n.meta.get("val") for n in node.all_input_nodes if n not in env}
    if name not in _VIEWS | _ORDERS | _PARTS or not all(isinstance(size, (int, torch.SymInt)) for size in sizes.values()):
        return None

    def value(n: fx.Node) -> Any:
        return env[n] if n in env else size_of(sizes[n])

    return node.target(*fx.map_arg(node.args, value), **fx.map_arg(node.kwargs, value))  # type: ignore[operator]


def _product(node: fx.Node, atom: Atom, sides: tuple[Side, Side], traced: Mapping[fx.Node, tuple[fx.Node, Tensor]], samples: int) -> _Product | None:
    """None where an operand is no rearranged answer, where the rows of one head are not alike, or samples are not laid out one after the other."""
    vectors: list[tuple[Vector, ...]] = []
    leading: list[Tensor] = []
    repeated: list[Tensor] = []
    for operand, axis in sides:
        if operand not in traced:
            return None
        reader, entries = traced[operand]
        rows = entries.movedim(axis, -1)  # [samples and what else leads, rows, width]
        each = rows[..., 0, :]
        distinct, number = each.flatten(0, -2).unique(dim=0, return_inverse=True)
        if not (rows == rows[..., :1, :]).all() or (len(number) // samples) % (period := _period(number)):
            return None
        vectors.append(tuple(Vector(reader, tuple(v)) for v in distinct.tolist()))
        leading.append(number.view(each.shape[:-1]))
        repeated.append(number[:period])
    left, right = leading
    if node.kwargs.get("enable_gqa") and left.shape[-1] != right.shape[-1]:
        right = right.repeat_interleave(left.shape[-1] // right.shape[-1], -1)
    pairs = {tuple(p) for p in torch.stack(torch.broadcast_tensors(left, right), -1).flatten(0, -2).tolist()}
    return _Product(
        node,
        atom,
        (sides[0][0], sides[1][0]),
        (sides[0][1], sides[1][1]),
        (vectors[0], vectors[1]),
        (repeated[0], repeated[1]),
        frozenset(pairs),
        operator_name(node) == "scaled_dot_product_attention" or _reaches_softmax(node),
    )


def _period(numbers: Tensor) -> int:
    """After how many entries a sequence repeats itself to its end."""
    size = len(numbers)
    return next(p for p in range(1, size + 1) if size % p == 0 and (numbers.view(-1, p) == numbers[:p]).all())


def _reaches_softmax(node: fx.Node) -> bool:
    """Whether a product goes into a softmax over its last axis, by nothing but scales, masks and what is added."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        name = operator_name(user)
        if name in ("softmax", "_softmax"):
            return len(user.args) > 1 and user.args[1] in (-1, user.meta["val"].dim() - 1)
        if name not in _BEFORE_SOFTMAX or user.meta["val"].shape[-1] != node.meta["val"].shape[-1]:
            return False
        node = user
    return False


# --- bases -----------------------------------------------------------------------------------------------------------------


def _heads(products: Sequence[_Product], sums: Mapping[tuple[fx.Node, int], Tensor]) -> Iterator[Head]:
    """Queries and keys that must change their bases together."""
    second: dict[tuple[int, Vector], Tensor] = {}
    meet = nx.Graph()
    for product in products:
        for side in (0, 1):
            for vector, total in zip(product.vectors[side], sums[product.node, side], strict=True):
                second[side, vector] = second.get((side, vector), torch.zeros(())) + total
        meet.add_edges_from(((0, product.vectors[0][a]), (1, product.vectors[1][b])) for a, b in product.pairs)
    for together in nx.connected_components(meet):
        sides = [[vector for at, vector in together if at == side] for side in (0, 1)]
        grams = [torch.stack([second[side, vector] for vector in sides[side]]).sum(0) for side in (0, 1)]
        roots = [_root(gram) for gram in grams]
        u, s, v = torch.linalg.svd(roots[0][0] @ roots[1][0])
        yield Head(tuple(sides[0]), tuple(sides[1]), roots[0][1] @ u * s.sqrt(), roots[1][1] @ v.T * s.sqrt(), s)


def _root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric root of a matrix of second moments, and the inverse of that, on what samples show."""
    values, vectors = torch.linalg.eigh(gram)
    shown = values > _ROUNDING * values.max().clamp_min(1e-30)
    root = values.clamp_min(0).sqrt()
    inverse = torch.where(shown, 1 / root.clamp_min(1e-30), torch.zeros_like(root))
    return vectors * root @ vectors.T, vectors * inverse @ vectors.T
