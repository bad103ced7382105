"""`OnnxModule`: the program of a file as a torch module. Its forward runs the nodes one after the other, and torch.export can trace it.

Weights are parameters under the file's names, so that plan and report speak of what the user knows. Running statistics are buffers.
Constants of which sizes are made, and single numbers that stand in arithmetic, are plain numbers in the graph.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.traceback import annotate

from structprune.errors import InputError, first_line
from structprune.frontends.onnx_in import operators
from structprune.frontends.onnx_in.reading import Body, Node, Program
from structprune.frontends.onnx_in.table import OPERATORS, Call, run
from structprune.frontends.onnx_in.values import Sizes, Unsupported, Value, sizes_of
from structprune.ir.graph import ORIGIN
from structprune.ir.signature import Signature

assert operators.__all__  # importing them fills the table

_NUMBERS = 1024  # entries: an integer constant up to this size is kept as numbers
_WEIGHED = frozenset({
    "Conv", "ConvTranspose", "Gemm", "MatMul", "PRelu", "BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization",
    "RMSNormalization", "LSTM", "GRU", "RNN", "Einsum",
})  # fmt: skip
_STATES = {("BatchNormalization", 3), ("BatchNormalization", 4), ("LSTM", 5), ("LSTM", 6), ("GRU", 5), ("RNN", 5)}  # nothing that is trained
_NAMELESS = re.compile(r"\d+|onnx::\w+|.*Constant(_\d+)?(_output_\d+)?|.*::.*")  # names that an exporter made up


class OnnxModule(nn.Module):
    """Called with the file's inputs in their order; answers with a tensor, or a tuple for several outputs.

    fixed: values of inputs that decide which branches run. An answer to any other value is not a number.
    """

    def __init__(self, program: Program, fixed: Mapping[str, Any] | None = None):
        super().__init__()
        self.program = program
        self.fixed = dict(fixed or {})
        self.signature = Signature(
            program.path,
            program.digest,
            tuple(port.name for port in program.inputs),
            program.body.outputs,
            tuple(port.sizes for port in program.inputs),
            tuple(self.fixed.items()),
        )
        self._names: dict[Body, dict[str, str]] = {}  # a constant's name in the file -> the name of the tensor
        self._numbers: dict[Body, dict[str, Sizes]] = {}
        self._refuse_unknown(program.body.nodes)
        taken: set[str] = set()
        self._hold(program.body, taken)
        self.eval()

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        values: dict[str, Value] = dict(zip(self.signature.inputs, inputs, strict=True))
        given = dict(values)
        for name, value in self.fixed.items():
            values[name] = Sizes.of(value, inputs[self.signature.inputs.index(name)].dtype)
        answers = tuple(
            self._as_answer(name, value) for name, value in zip(self.signature.outputs, self._run(self.program.body, values), strict=True)
        )
        for name, value in self.fixed.items():
            as_fixed = given[name] == value
            answers = tuple(torch.where(as_fixed, a, float("nan")) if a.is_floating_point() else a for a in answers)
        return answers[0] if len(answers) == 1 else answers

    def _as_answer(self, name: str, value: Value | None) -> Tensor:
        if value is None:
            raise InputError(f"{self.program.path}: nothing makes the output {name!r}")
        return value.tensor() if isinstance(value, Sizes) else value

    # --- running ------------------------------------------------------------------------------------------------------------

    def _run(self, body: Body, values: dict[str, Value]) -> list[Value | None]:
        """The outputs of a graph or branch; values: what it can read from outside."""
        values.update(self._numbers[body])
        for name, tensor in self._names[body].items():
            values[name] = self.get_parameter_or_buffer(tensor)
        for node in body.nodes:
            values.update((n, v) for n, v in zip(node.outputs, self._answers(node, values), strict=False) if n and v is not None)
        return [values.get(name) for name in body.outputs]

    def get_parameter_or_buffer(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        return getattr(self.get_submodule(owner), leaf)  # type: ignore[no-any-return]

    def _answers(self, node: Node, values: Mapping[str, Value]) -> Iterable[Value | None]:
        inputs = [values.get(name) if name else None for name in node.inputs]
        if node.op == "If":
            return self._branch(node, inputs[0], values)
        entry = OPERATORS.get(node.op)
        if entry is None:
            raise self._unknown(node)
        try:
            with annotate({ORIGIN: f"{self.program.path.name}: {node.name or node.op}"}):
                return run(entry, Call(node, self.program.opset), inputs)
        except Unsupported as why:
            raise InputError(f"{self.program.path}: {node} is not supported {why}") from why
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            if torch.compiler.is_exporting():  # torch.export reads the errors of symbolic sizes itself
                raise
            shapes = ", ".join("x".join(map(str, v.shape)) or "scalar" for v in inputs if isinstance(v, Tensor))
            raise InputError(
                f"{self.program.path}: {node} cannot be run on {shapes}: {first_line(error)}; give inputs that the model takes with --input"
            ) from error

    def _branch(self, node: Node, condition: Value | None, values: Mapping[str, Value]) -> list[Value | None]:
        """What an If answers, where its condition is known while the model is traced."""
        if not isinstance(condition, Sizes):
            names = sorted(self._inputs_behind(node.inputs[0]))
            scalar = [p.name for p in self.program.inputs if p.name in names and not p.sizes]
            advice = (
                f"fix it with --input {scalar[0]}:=VALUE, and the small model is that of this value"
                if scalar
                else "only branches that the sizes of inputs decide can be followed; export the model without it"
            )
            raise InputError(f"{self.program.path}: {node} depends on the value of {' and '.join(map(repr, names)) or 'an input'}; {advice}")
        body: Body = node.attributes["then_branch" if condition.item() else "else_branch"]
        return self._run(body, dict(values))

    def _inputs_behind(self, name: str) -> set[str]:
        """The model's inputs whose values a value is made of."""
        makers = {o: n for n in self.program.body.every_node() for o in n.outputs}
        found, seen, left = set(), set(), [name]
        while left:
            value = left.pop()
            if value in seen:
                continue
            seen.add(value)
            if value in self.signature.inputs:
                found.add(value)
            elif value in makers and makers[value].op not in ("Shape", "Size"):
                left += [n for n in makers[value].inputs if n]
        return found

    def _refuse_unknown(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            if node.op != "If" and node.op not in OPERATORS:
                raise self._unknown(node)

    def _unknown(self, node: Node) -> InputError:
        return InputError(
            f"{self.program.path}: {node} is not an operator that structprune imports; cut the model before it, or export it without "
            "(docs/onnx.md lists those that are)"
        )

    # --- weights --------------------------------------------------------------------------------------------------------------

    def _hold(self, body: Body, taken: set[str]) -> None:
        """Make the constants of a graph, and of its branches, parameters, buffers or numbers."""
        readers: dict[str, list[tuple[Node, int]]] = {}
        for node in body.every_node():
            for i, name in enumerate(node.inputs):
                readers.setdefault(name, []).append((node, i))
        answered = {*body.outputs, *(o for node in body.every_node() for branch in node.bodies() for o in branch.outputs)}
        sizes = made_into_sizes(body)
        names = self._names[body] = {}
        numbers = self._numbers[body] = {}
        for name, tensor in body.constants.items():
            reading = readers.get(name, [])
            if not reading and name not in answered:
                continue
            weight = tensor.is_floating_point() and (tensor.numel() > 1 or any(n.op in _WEIGHED for n, _ in reading))
            if (name in sizes and tensor.numel() <= _NUMBERS) or (not weight and tensor.numel() <= _NUMBERS):
                numbers[name] = sizes_of(tensor)
                continue
            names[name] = key = _state_name(name, reading, body, taken)
            state = any((n.op, i) in _STATES for n, i in reading)
            self._register(key, tensor if state or not tensor.is_floating_point() else nn.Parameter(tensor))
        for node in body.nodes:
            for branch in node.bodies():
                self._hold(branch, taken)

    def _register(self, name: str, tensor: Tensor) -> None:
        *path, leaf = name.split(".")
        owner: nn.Module = self
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner._modules[part]  # type: ignore[assignment]
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(leaf, tensor)
        else:
            owner.register_buffer(leaf, tensor)


def made_into_sizes(body: Body) -> set[str]:
    """Values that nothing but sizes is made of: walked back from where operators take sizes."""
    makers = {o: n for n in body.every_node() for o in n.outputs if o}
    left = [
        name
        for node in body.every_node()
        if (entry := OPERATORS.get(node.op)) is not None
        for i, name in enumerate(node.inputs)
        if i in entry.sizes and name
    ]
    left += [node.inputs[0] for node in body.every_node() if node.op == "If"]
    found: set[str] = set()
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        maker = makers.get(name)
        if maker is not None and (entry := OPERATORS.get(maker.op)) is not None and entry.numbers is not None:
            left += [n for n in maker.inputs if n]
    return found


def _state_name(name: str, reading: list[tuple[Node, int]], body: Body, taken: set[str]) -> str:
    """A tensor's name in the state_dict: the file's, or after the node that reads it where an exporter made it up; no name twice."""
    wanted = name
    if reading and (_NAMELESS.fullmatch(name) or not name.strip("./: ")):
        node, index = reading[0]
        parameters = OPERATORS[node.op].parameters if node.op in OPERATORS else ()
        owner = node.name.removesuffix(f"/{node.op}") or next((o for o in node.outputs if o), node.op)
        leaf = parameters[index] if index < len(parameters) else f"input_{index}"
        wanted = f"{owner.strip('/').replace('/', '.')}.{leaf}"
    parts = [re.sub(r"[^\w/:-]", "_", part) for part in wanted.split(".") if part]  # torch.fx writes names into code that it runs
    parts = [f"_{p}" if hasattr(fx.GraphModule, p) or p in _OWN else p for p in parts] or ["constant"]
    key = ".".join(parts)
    number = 1
    while _clashes(key, taken):
        number += 1
        key = "_".join([*parts, str(number)])
    taken.add(key)
    return key


_OWN = frozenset({"meta", "program", "fixed", "signature", "training", "_names", "_numbers"})


def _clashes(key: str, taken: set[str]) -> bool:
    """A name is not another one, nor the module of another one, nor within another one."""
    return key in taken or any(t.startswith(f"{key}.") or key.startswith(f"{t}.") for t in taken)
