"""`.onnx` in: what is imported answers as the file does, keeps its names, and is pruned like any other model; what is not is refused in one line."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_nodes
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import structprune as sp
from structprune.errors import InputError
from structprune.frontends.load import load
from structprune.frontends.onnx_in import load_onnx, table
from structprune.ir.graph import source_of

FLOAT = TensorProto.FLOAT


def weight(*shape: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) / np.sqrt(max(1, np.prod(shape[1:])))).astype(np.float32)


def model_of(
    nodes: list[Any],
    inputs: dict[str, list[Any]],
    outputs: list[str],
    weights: dict[str, np.ndarray] | None = None,
    *,
    opset: int = 18,
    kinds: dict[str, int] | None = None,
    domains: tuple[str, ...] = (),
    constants: bool = False,
) -> onnx.ModelProto:
    """constants: weights as Constant nodes, in the place of initializers."""
    kinds, weights = kinds or {}, weights or {}
    tensors = [numpy_helper.from_array(np.asarray(v), n) for n, v in weights.items()]
    if constants:
        nodes = [*(helper.make_node("Constant", [], [t.name], value=t) for t in tensors), *nodes]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(n, kinds.get(n, FLOAT), s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, kinds.get(n, FLOAT), None) for n in outputs],
        [] if constants else tensors,
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8 if opset < 20 else 10)
    with contextlib.suppress(onnx.shape_inference.InferenceError):
        model = onnx.shape_inference.infer_shapes(model)
    for output in model.graph.output:
        if not output.type.tensor_type.HasField("shape"):  # of what inference cannot follow
            output.type.tensor_type.shape.dim.add().dim_param = "any"
    return model


def saved(model: onnx.ModelProto, name: str = "net.onnx") -> str:
    onnx.save(model, name)
    return name


def refusal(model: onnx.ModelProto | str, *inputs: str) -> str:
    with pytest.raises(InputError) as caught:
        load_onnx(model if isinstance(model, str) else saved(model), inputs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def answers(path: str | Path, *inputs: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: v for i, v in zip(session.get_inputs(), inputs, strict=True)})  # type: ignore[no-any-return]


def convolutional(**options: Any) -> onnx.ModelProto:
    """Convolution, batch norm and the rest, under names that Python would not allow."""
    node = helper.make_node
    return model_of(
        [
            node("Conv", ["image:0", "stem/kernel:0", "stem.bias"], ["a"], name="stem", pads=[1, 1, 1, 1]),
            node("BatchNormalization", ["a", "bn.scale", "bn.bias", "bn.mean", "bn.var"], ["b"], name="bn"),
            node("Relu", ["b"], ["c"], name="act"),
            node("Conv", ["c", "12"], ["d"], name="/body/conv/Conv", strides=[2, 2], auto_pad="SAME_UPPER"),
            node("HardSwish", ["d"], ["e"]),
            node("GlobalAveragePool", ["e"], ["f"]),
            node("Flatten", ["f"], ["g"]),
            node("Gemm", ["g", "head.weight", "head.bias"], ["classes/out"], name="head"),
        ],
        {"image:0": ["batch", 3, 8, 8]},
        ["classes/out"],
        {
            "stem/kernel:0": weight(8, 3, 3, 3), "stem.bias": weight(8), "bn.scale": np.abs(weight(8)) + 1, "bn.bias": weight(8, seed=1),
            "bn.mean": weight(8, seed=2), "bn.var": np.abs(weight(8, seed=3)) + 1, "12": weight(12, 8, 3, 3), "head.weight": weight(12, 5),
            "head.bias": weight(5),
        },
        **options,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# --- the whole way ------------------------------------------------------------------------------------------------------------


def test_a_file_is_compressed_under_its_own_names(run: Callable[..., tuple[int, str, str]]) -> None:
    saved(convolutional())
    status, out, err = run("compress", "net.onnx", "--target", "channels=0.75", "--no-latency", "--out", "small", "--json")
    assert status == 0, err
    report = json.loads(out)
    assert report["macs"]["after"] < 0.8 * report["macs"]["before"] and report["verification"]["exact"]
    assert Path("small/original.onnx").read_bytes() == Path("net.onnx").read_bytes()
    before, after = (onnx.load(f"{name}.onnx").graph for name in ("net", "small/model"))
    assert [i.name for i in after.input] == ["image:0"] and [o.name for o in after.output] == ["classes/out"]
    assert [d.dim_param or d.dim_value for d in after.input[0].type.tensor_type.shape.dim] == ["batch", 3, 8, 8]
    assert after.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    pictures = weight(3, 3, 8, 8)
    (small,) = answers("small/model.onnx", pictures)
    assert small.shape == answers("net.onnx", pictures)[0].shape
    with torch.no_grad():
        assert np.allclose(sp.load("small")(torch.from_numpy(pictures)).numpy(), small, atol=1e-5)
    plan = json.loads(Path("small/plan.json").read_text())
    named = {t.name: t.dims for t in before.initializer}
    assert {n: list(t["shape"]) for n, t in plan["tensors"].items() if n in named} == {n: list(named[n]) for n in plan["tensors"] if n in named}
    assert set(plan["tensors"]) == {
        "stem/kernel:0", "stem.bias", "bn.scale", "bn.bias", "bn.mean", "bn.var", "body.conv.weight", "head.weight",
    }  # fmt: skip
    status, out, err = run("verify", "small", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["tensors_matched_in_original_onnx"] >= 6


def test_the_original_with_zeros_answers_as_the_small_file() -> None:
    """A second oracle: ONNX Runtime, on the user's own file."""
    from structprune.backends.directory import verify_directory

    node = helper.make_node
    file = saved(
        model_of(
            [node("Conv", ["x", "w", "b"], ["a"]), node("Relu", ["a"], ["r"]), node("Conv", ["r", "v"], ["y"])],
            {"x": ["n", 3, 9, 9]}, ["y"], {"w": weight(16, 3, 3, 3), "b": weight(16), "v": weight(4, 16, 1, 1)},
        )
    )  # fmt: skip
    imported = load_onnx(file)
    sp.compress(imported.model, imported.args, "channels=0.5").save("small", latency=False)
    found = verify_directory("small")
    assert found["original_onnx_masked"] < 1e-5 and found["tensors_matched_in_original_onnx"] == 3
    changed = onnx.load("small/original.onnx")
    values = numpy_helper.to_array(changed.graph.initializer[0]).copy()
    values += 0.01
    changed.graph.initializer[0].CopyFrom(numpy_helper.from_array(values, changed.graph.initializer[0].name))
    onnx.save(changed, "small/original.onnx")
    with pytest.raises(sp.StructpruneError, match="not the plan's slice"):
        verify_directory("small")


def test_constant_nodes_hold_weights_as_initializers_do() -> None:
    plans = []
    for constants in (False, True):
        imported = load_onnx(saved(convolutional(constants=constants)))
        assert sum(p.numel() for p in imported.model.parameters()) == 8 * 27 + 8 * 3 + 12 * 72 + 12 * 5 + 5
        assert {n for n, _ in imported.model.named_buffers()} == {"bn.mean", "bn.var"}
        plans.append(sp.compress(imported.model, imported.args, "channels=0.5").plan.to_dict()["tensors"])
    assert plans[0] == plans[1]


def test_the_small_model_trains_and_its_statistics_move() -> None:
    imported = load_onnx(saved(convolutional()))
    small = sp.compress(imported.model, imported.args, "channels=0.5").model
    before = {n: v.clone() for n, v in small.state_dict().items()}
    small.train()
    torch.optim.SGD(small.parameters(), 0.1).zero_grad()
    small(torch.randn(4, 3, 8, 8)).square().sum().backward()
    torch.optim.SGD(small.parameters(), 0.1).step()
    moved = {n for n, v in small.state_dict().items() if not torch.equal(v, before[n])}
    assert {"bn.mean", "bn.var", "stem/kernel:0", "head.weight"} <= moved


def test_it_is_copied_and_pickled_as_any_module() -> None:
    imported = load_onnx(saved(convolutional()))
    file = io.BytesIO()
    torch.save(imported.model, file)
    file.seek(0)
    wanted = imported.model(*imported.args)
    for other in (torch.load(file, weights_only=False), copy.deepcopy(imported.model)):
        assert torch.equal(other(*imported.args), wanted)
        assert sp.compress(other, imported.args, "channels=0.5").report.data["verification"]["masked_error"] < 1e-6


def test_what_is_frozen_names_the_node_of_the_file() -> None:
    imported = load_onnx(saved(convolutional()))
    graph = sp.trace(imported.model, imported.args)
    assert {"net.onnx: stem", "net.onnx: head", "net.onnx: /body/conv/Conv"} <= {source_of(n) for n in graph.nodes}
    assert {f.at for f in sp.inspect(imported.model, imported.args).frozen if f.reason == "model output"} == {"net.onnx: head"}


# --- versions of the standard -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [9, 11, 13, 18, 21, 23])
def test_every_opset_says_the_same_in_its_own_way(opset: int) -> None:
    """Squeeze, Clip, ReduceMean, Slice, Split, Pad and Upsample changed from attributes to inputs over the years."""
    node = helper.make_node
    weights: dict[str, np.ndarray] = {"w": weight(8, 3, 3, 3), "v": weight(6, 4, 1, 1)}
    numbers = {
        "axes": np.array([2, 3]), "last": np.array([3]), "one": np.array([1]), "end": np.array([7]), "pads": np.array([0, 0, 1, 2, 0, 0, 0, 1]),
        "split": np.array([4, 4]),
    }  # fmt: skip
    scales = {"scales": np.array([1, 1, 2, 2], np.float32), "low": np.float32(-0.5), "high": np.float32(0.5)}

    def sized(kind: str, inputs: list[str], outputs: list[str], since: int, given: dict[str, str], **attributes: Any) -> Any:
        """Attributes whose values are in `numbers`, as inputs since some opset."""
        if opset >= since:
            weights.update({n: numbers[n] for n in given.values()})
            return node(kind, [*inputs, *given.values()], outputs, **attributes)
        return node(kind, inputs, outputs, **attributes, **{a: numbers[n].tolist() for a, n in given.items()})

    if opset >= 11:
        weights.update(low=scales["low"], high=scales["high"])
    roi = "roi" if opset < 13 else ""
    weights.update(scales=scales["scales"], roi=np.zeros(0, np.float32))
    net = model_of(
        [
            sized("Pad", ["x"], ["p"], 11, {"pads": "pads"}),
            node("Conv", ["p", "w"], ["a"]),
            node("Clip", ["a", "low", "high"], ["b"]) if opset >= 11 else node("Clip", ["a"], ["b"], min=-0.5, max=0.5),
            sized("Split", ["b"], ["c", "d"], 13, {"split": "split"}, axis=1),
            node("Mul", ["c", "d"], ["e"]),
            node("Conv", ["e", "v"], ["f"]),
            node("Upsample", ["f", "scales"], ["g"])
            if opset == 9
            else node("Resize", ["f", roi, "scales"], ["g"], coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
            sized("Slice", ["g"], ["h"], 10, {"starts": "one", "ends": "end", "axes": "last"}),
            sized("ReduceMean", ["h"], ["i"], 18, {"axes": "axes"}, keepdims=1),
            sized("Squeeze", ["i"], ["j"], 13, {"axes": "axes"}),
            node("Softmax", ["j"], ["y"], axis=1),
        ],
        {"x": ["batch", 3, 6, 6]}, ["y"], weights, opset=opset,
    )  # fmt: skip
    imported = load_onnx(saved(net))
    assert imported.error < 1e-6
    result = sp.compress(imported.model, imported.args, "channels=0.5")
    kept = {g.name: len(g.keep) for g in result.plan.groups}
    assert kept == {"w": 2} and result.graph.dynamic == ((0,),)  # the gate's halves go together: 4 channels, 2 stay


def test_the_operators_of_the_standard_by_its_own_tests() -> None:
    """Every node test of the installed onnx: what is imported is right, the order of ties aside, which torch leaves open."""
    found = list(onnx_nodes.outcomes())
    wrong = {o.name: o.why for o in found if o.verdict == "differs" and not o.name.startswith("test_top_k_same_values")}
    assert wrong == {}
    right = {name for o in found if o.verdict == "agrees" for name in o.operators}
    assert sum(o.verdict == "agrees" for o in found) > 900
    assert set(table.OPERATORS) - right == {"GlobalLpPool"}  # of which the standard has no test


def test_a_node_test_that_is_imported_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = table.OPERATORS["Elu"]
    monkeypatch.setitem(table.OPERATORS, "Elu", table.Operator(lambda call, x: nn.functional.relu(x), (), (), None, ("x",)))
    assert "refused" in {o.verdict for o in onnx_nodes.outcomes("elu")}  # for the attribute that nobody asks for
    monkeypatch.setitem(table.OPERATORS, "Elu", table.Operator(lambda call, x: nn.functional.elu(x * (call.get("alpha") or 1)), (), (), None, ("x",)))
    assert "differs" in {o.verdict for o in onnx_nodes.outcomes("elu")}
    monkeypatch.setitem(table.OPERATORS, "Elu", entry)
    assert "differs" not in {o.verdict for o in onnx_nodes.outcomes("elu")}


# --- weights and products -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [None, (7,), (1, 7), (1,), (4, 1)])
@pytest.mark.parametrize(("transposed", "alpha", "beta"), [(0, 1.0, 1.0), (1, 1.0, 1.0), (1, 0.5, 1.0), (0, 1.0, 2.0)])
def test_gemm(bias: tuple[int, ...] | None, transposed: int, alpha: float, beta: float) -> None:
    """The weight stays as the file has it, and the hidden axis goes, from whichever side it is read."""
    node = helper.make_node
    weights = {"w": weight(6, 8), "v": weight(7, 8) if transposed else weight(8, 7)} | ({} if bias is None else {"b": weight(*bias)})
    imported = load_onnx(
        saved(
            model_of(
                [
                    node("MatMul", ["x", "w"], ["a"]),
                    node("Relu", ["a"], ["r"]),
                    node("Gemm", ["r", "v", *(["b"] if bias else [])], ["y"], transB=transposed, alpha=alpha, beta=beta),
                ],
                {"x": [4, 6]}, ["y"], weights,
            )
        )
    )  # fmt: skip
    assert imported.error < 1e-6
    plan = sp.compress(imported.model, imported.args, "channels=0.5").plan.to_dict()["tensors"]
    assert {n: list(t["keep"]) for n, t in plan.items()} == {"w": ["1"], "v": ["1"] if transposed else ["0"]}
    assert len(plan["w"]["keep"]["1"]) == 4


def test_gemm_of_a_transposed_input() -> None:
    imported = load_onnx(saved(model_of([helper.make_node("Gemm", ["x", "w"], ["y"], transA=1)], {"x": [6, 4]}, ["y"], {"w": weight(6, 3)})))
    assert imported.error < 1e-6


_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("biased", [True, False])
def test_recurrent(kind: str, direction: str, biased: bool) -> None:
    """Gates stand in another order in torch: a wrong one answers otherwise."""
    gates, ways = _GATES[kind], 2 if direction == "bidirectional" else 1
    weights = {"W": weight(ways, gates * 6, 5), "R": weight(ways, gates * 6, 6, seed=1), "V": weight(6, 4)}
    if biased:
        weights["B"] = weight(ways, 2 * gates * 6, seed=2)
    more = {"linear_before_reset": 1} if kind == "GRU" else {}
    nodes = [
        helper.make_node(kind, ["x", "W", "R", *(["B"] if biased else [])], ["all", "last"], hidden_size=6, direction=direction, **more),
        helper.make_node("MatMul", ["all", "V"], ["y"]),
    ]
    imported = load_onnx(saved(model_of(nodes, {"x": [7, 2, 5]}, ["y"], weights, opset=14)))
    assert imported.error < 1e-5
    plan = sp.compress(imported.model, imported.args, "channels=0.5").plan.to_dict()["tensors"]
    assert len(plan["W"]["keep"]["1"]) == gates * 3 and len(plan["R"]["keep"]["2"]) == 3 and len(plan["V"]["keep"]["0"]) == 3


def test_gru_that_resets_before() -> None:
    nodes = [helper.make_node("GRU", ["x", "W", "R", "B"], ["y", "last"], hidden_size=6, direction="bidirectional")]
    weights = {"W": weight(2, 18, 5), "R": weight(2, 18, 6, seed=1), "B": weight(2, 36, seed=2)}
    assert load_onnx(saved(model_of(nodes, {"x": [4, 2, 5]}, ["y", "last"], weights, opset=14))).error < 1e-5
    assert "linear_before_reset=0 over a length" not in refusal(model_of(nodes, {"x": ["n", 2, 5]}, ["y"], weights, opset=14), "x=4x3x5")


def test_a_constant_state_keeps_its_batch() -> None:
    nodes = [helper.make_node("LSTM", ["x", "W", "R", "", "", "h", "h"], ["y"], hidden_size=6), helper.make_node("Identity", ["h"], ["z"])]
    weights = {"W": weight(1, 24, 5), "R": weight(1, 24, 6), "h": weight(1, 3, 6)}
    nodes = [nodes[0], helper.make_node("MatMul", ["y", "V"], ["out"])]
    imported = load_onnx(saved(model_of(nodes, {"x": [4, 3, 5]}, ["out"], weights | {"V": weight(6, 4)}, opset=14)))
    plan = sp.compress(imported.model, imported.args, "channels=0.5").plan.to_dict()["tensors"]
    assert list(plan["h"]["keep"]) == ["2"]


def test_group_norm_as_it_is_exported_is_pruned() -> None:
    """Reshape to (batch, groups, rest), instance norm, and back."""
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 5, 1)).eval()
    _exported(net, torch.randn(2, 3, 9, 9))
    assert "InstanceNormalization" in {n.op_type for n in onnx.load("net.onnx").graph.node}
    imported = load_onnx("net.onnx")
    groups = {g.name: g.size for g in sp.inspect(imported.model, imported.args)}
    assert sorted(groups.values()) == [4, 4]  # groups, and channels within


def _exported(net: nn.Module, *inputs: Tensor, **options: Any) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        torch.onnx.export(net, inputs, "net.onnx", **({"dynamo": True, "external_data": False, "verbose": False} | options))


@pytest.mark.parametrize("name", ["attention", "recurrent", "joined"])
def test_there_and_back_again(name: str) -> None:
    """A torch model, exported and imported, is pruned as the model itself: as many multiply-accumulates stay."""
    import models

    model, inputs = models.build(name)
    _exported(model, *inputs)
    imported = load_onnx("net.onnx")
    from_file, from_torch = (sp.compress(m, x, "channels=0.5").report.data["macs"] for m, x in ((imported.model, imported.args), (model, inputs)))
    ratio = [m["after"] / m["before"] for m in (from_file, from_torch)]
    assert ratio[0] == pytest.approx(ratio[1], rel=0.02)


# --- sizes --------------------------------------------------------------------------------------------------------------------


def pyramid() -> onnx.ModelProto:
    """Any height and width: the smaller map is brought back to the size of the larger, which is asked of it at run time."""
    node = helper.make_node
    return model_of(
        [
            node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
            node("MaxPool", ["a"], ["b"], kernel_shape=[2, 2], strides=[2, 2]),
            node("Conv", ["b", "v"], ["c"]),
            node("Shape", ["a"], ["s"]),
            node("Slice", ["s", "two", "four"], ["hw"]),
            node("Shape", ["c"], ["t"]),
            node("Slice", ["t", "zero", "two"], ["nc"]),
            node("Concat", ["nc", "hw"], ["size"], axis=0),
            node("Resize", ["c", "", "", "size"], ["d"], mode="linear"),
            node("Concat", ["a", "d"], ["e"], axis=1),
            node("Conv", ["e", "u"], ["y"]),
        ],
        {"x": ["batch", 3, "height", "width"]},
        ["y"],
        {
            "w": weight(8, 3, 3, 3), "v": weight(8, 8, 1, 1), "u": weight(4, 16, 1, 1), "zero": np.array([0]), "two": np.array([2]),
            "four": np.array([4]),
        },
    )  # fmt: skip


def test_free_sizes_are_asked_for_with_a_command_that_works(run: Callable[..., tuple[int, str, str]]) -> None:
    saved(pyramid())
    status, _, err = run("compress", "net.onnx", "--no-latency", "--out", "small")
    assert status == 2 and not Path("small").exists()
    assert "'height' of 'x'" in err and "'width' of 'x'" in err
    command = shlex.split(err.partition("for example ")[2])
    status, _, err = run("compress", "net.onnx", "--target", "channels=0.5", "--no-latency", "--out", "small", *command)
    assert status == 0, err
    small = onnx.load("small/model.onnx").graph
    assert [d.dim_param or d.dim_value for d in small.input[0].type.tensor_type.shape.dim] == ["batch", 3, "height", "width"]
    assert answers("small/model.onnx", weight(3, 3, 10, 22))[0].shape == (3, 4, 10, 22)


def test_sizes_with_one_name_are_one_size() -> None:
    net = model_of([helper.make_node("Add", ["x", "h"], ["y"])], {"x": ["n", 4], "h": ["m", 4]}, ["y"])
    assert "1x4" in load_onnx(saved(net)).notes[0] or load_onnx(saved(net)).args[0].shape == (1, 4)
    net = model_of([helper.make_node("Concat", ["x", "h"], ["y"], axis=0)], {"x": ["n", "k"], "h": [2, "k"]}, ["y"])
    assert "'k' is 3 in one input and 4 in 'h'" in refusal(net, "x=1x3", "h=2x4")
    assert load_onnx(saved(net), ["x=1x3"]).args[1].shape == (2, 3)


def test_what_ends_onnx_runtime_is_refused_before_it_does() -> None:
    nodes = [helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2]), helper.make_node("MatMul", ["t", "w"], ["y"], "product")]
    half = {"x": TensorProto.FLOAT16, "y": TensorProto.FLOAT16}
    assert "node 'product' multiplies a transposed tensor in float16" in refusal(
        model_of(nodes, {"x": [2, 3, 4]}, ["y"], {"w": weight(4, 5).astype(np.float16)}, kinds=half)
    )


def test_inputs_that_do_not_fit_are_refused() -> None:
    net = model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": ["n", 4]}, ["y"])
    assert "'x' is nx4" in refusal(net, "x=2x5")
    assert "names no input" in refusal(net, "z=2x4")
    assert "is float32" in refusal(net, "x=2x4:int64")
    assert "cannot be used" in refusal(net, "x=2by4")
    assert "only a single number can be fixed" in refusal(net, "x:=3")
    assert "has 1 inputs" in refusal(net, "2x4", "2x4")


def test_a_branch_on_a_length_is_not_followed_to_other_lengths() -> None:
    """What is traced at 16 would double sequences of any length; the file doubles only those of 12 and more."""
    node = helper.make_node
    branches = {
        f"{name}_branch": helper.make_graph(
            [node("Mul", ["a", number], [f"out_{name}"])], name, [], [helper.make_tensor_value_info(f"out_{name}", FLOAT, None)]
        )
        for name, number in (("then", "double"), ("else", "same"))
    }
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "one"], ["length"]),
        node("Less", ["twelve", "length"], ["long"]),
        node("If", ["long"], ["b"], **branches),
        node("MatMul", ["b", "v"], ["y"]),
    ]
    weights = {
        "w": weight(4, 8), "v": weight(8, 3), "one": np.array(1), "twelve": np.array(12), "double": np.float32(2), "same": np.float32(1),
    }  # fmt: skip
    imported = load_onnx(saved(model_of(nodes, {"x": ["n", "length", 4]}, ["y"], weights)), ["x=1x16x4"])
    graph = sp.trace(imported.model, imported.args)
    assert graph.dynamic == ((0,),)
    assert any("axis 1 of x keeps its size" in note for note in graph.notes)


def switched() -> onnx.ModelProto:
    """An input decides which of two networks runs, as in models for two sampling rates."""
    node = helper.make_node

    def network(name: str) -> Any:
        nodes = [
            node("Constant", [], ["w"], value=numpy_helper.from_array(weight(6, 8, seed=len(name)), "w")),
            node("MatMul", ["x", "w"], ["a"], name=f"{name}/first"),
            node("Relu", ["a"], ["b"]),
            node("MatMul", ["b", "v"], [f"{name}_out"], name=f"{name}/second"),
        ]
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(f"{name}_out", FLOAT, None)])

    nodes = [
        node("Equal", ["rate", "wide"], ["is_wide"]),
        node("If", ["is_wide"], ["y"], name="rates", then_branch=network("wide16"), else_branch=network("narrow")),
    ]
    kinds = {"rate": TensorProto.INT64}
    return model_of(nodes, {"x": ["n", 6], "rate": []}, ["y"], {"wide": np.array(16000), "v": weight(8, 3)}, kinds=kinds)


def test_a_value_that_decides_is_fixed_and_any_other_is_not_answered() -> None:
    assert "depends on the value of 'rate'; fix it with --input rate:=VALUE" in refusal(switched())
    for rate in (16000, 8000):
        imported = load_onnx("net.onnx", [f"rate:={rate}"])
        assert imported.error < 1e-6
        result = sp.compress(imported.model, imported.args, "channels=0.5")
        result.save("small", latency=False)
        x = weight(2, 6)
        assert np.isfinite(answers("small/model.onnx", x, np.array(rate))[0]).all()
        assert np.isnan(answers("small/model.onnx", x, np.array(rate + 1))[0]).all()
    assert result.report.data["macs"]["after"] * 2 == result.report.data["macs"]["before"]


def test_noise_in_the_place_of_a_fixed_value_does_not_make_a_check_say_nothing() -> None:
    imported = load_onnx(saved(switched()), ["rate:=16000"])
    result = sp.compress(imported.model, imported.args, "channels=0.5")
    assert sp.verify(imported.model, result.small, result.plan).error <= 1e-8  # on noise of the plan's shapes
    with torch.no_grad():
        next(result.small.parameters()).mul_(1.01)
    with pytest.raises(sp.StructpruneError, match="differs from the reference"):
        sp.verify(imported.model, result.small, result.plan)
    again = sp.apply(load_onnx("net.onnx", ["rate:=16000"]).model, result.plan)
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in result.small.parameters())


def test_another_number_of_inputs_is_refused() -> None:
    imported = load_onnx(saved(convolutional()))
    with pytest.raises(InputError, match=r"net.onnx has 1 inputs \(image:0\), and 2 are given"):
        sp.compress(imported.model, imported.args * 2, "channels=0.5")


# --- what is refused ----------------------------------------------------------------------------------------------------------


QUANTISED = {
    "QuantizeLinear": ["x", "s", "z"], "DequantizeLinear": ["q", "s", "z"], "DynamicQuantizeLinear": ["x"], "MatMulInteger": ["q", "q"],
    "QLinearMatMul": ["q", "s", "z", "q", "s", "z", "s", "z"],
}  # fmt: skip


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_models_come_too_early(kind: str) -> None:
    outputs = ["y", "a", "b"] if kind == "DynamicQuantizeLinear" else ["y"]
    node = helper.make_node(kind, QUANTISED[kind], outputs, name="q0")
    net = model_of([node], {"x": [2, 2]}, ["y"], {"s": np.float32(1), "z": np.uint8(0), "q": np.ones((2, 2), np.uint8)})
    assert f"is quantised ({kind} at node 'q0'): prune first, then quantise" in refusal(net)


def test_an_unknown_operator_is_named(run: Callable[..., tuple[int, str, str]]) -> None:
    saved(model_of([helper.make_node("Det", ["x"], ["y"], name="volume")], {"x": [2, 3, 3]}, ["y"]))
    status, _, err = run("inspect", "net.onnx")
    assert status == 2 and len(err.splitlines()[-1]) < 250
    assert "Det (node 'volume') is not an operator that structprune imports; cut the model before it" in err
    net = model_of([helper.make_node("FusedConv", ["x"], ["y"], name="f", domain="com.microsoft")], {"x": [2]}, ["y"], domains=("com.microsoft",))
    assert "com.microsoft.FusedConv of node 'f' is not of the ONNX standard" in refusal(net)


def test_an_attribute_that_is_not_known_is_refused() -> None:
    """As of a later version of the operator."""
    net = model_of([helper.make_node("LSTM", ["x", "W", "R"], ["y"], name="lstm", hidden_size=6, clip=3.0)], {"x": [4, 2, 5]}, ["y"], {
        "W": weight(1, 24, 5), "R": weight(1, 24, 6),
    }, opset=14)  # fmt: skip
    assert "LSTM (node 'lstm') is not supported with clip" in refusal(net)


def test_sizes_that_depend_on_values_are_refused() -> None:
    net = model_of([helper.make_node("Reshape", ["x", "s"], ["y"])], {"x": [2, 6], "s": [2]}, ["y"], kinds={"s": TensorProto.INT64})
    onnx.save(net, "net.onnx")
    assert "does not run in ONNX Runtime" in refusal("net.onnx") or "depends on the values" in refusal("net.onnx")


def test_a_wrong_import_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison with ONNX Runtime can fail: a wrong function, a wrong epsilon, a wrong type, a wrong shape."""
    saved(convolutional())
    norm, relu = table.OPERATORS["BatchNormalization"].function, table.OPERATORS["Relu"].function

    def wrong(name: str, function: Callable[..., Any]) -> str:
        entry = table.OPERATORS[name]
        monkeypatch.setitem(table.OPERATORS, name, table.Operator(function, entry.sizes, entry.either, entry.numbers, entry.parameters))
        message = refusal("net.onnx")
        monkeypatch.setitem(table.OPERATORS, name, entry)
        return message

    assert "is not imported right, and is left alone: output 'classes/out'" in wrong("Relu", lambda call, x: nn.functional.leaky_relu(x, 0.01))
    assert "differs from ONNX Runtime's" in wrong("BatchNormalization", lambda call, x, *rest: norm(call, x, *rest) * 1.001)
    assert "float64 where" in wrong("Gemm", lambda call, x, w, b: (x @ w + b).double())
    assert "5x1" in wrong("Gemm", lambda call, x, w, b: (x @ w + b).t())
    assert relu is table.OPERATORS["Relu"].function and load_onnx("net.onnx").error < 1e-6


def test_a_trace_that_answers_otherwise_than_the_file_is_refused() -> None:
    saved(convolutional())
    imported = load_onnx("net.onnx")
    with torch.no_grad():
        imported.model.get_submodule("head").bias += 0.1
    with pytest.raises(InputError, match="is not imported right"):
        sp.compress(imported.model, imported.args, "channels=0.5")


def test_a_file_that_changed_meanwhile_is_not_passed_off_as_the_original() -> None:
    imported = load_onnx(saved(convolutional()))
    result = sp.compress(imported.model, imported.args, "channels=0.5")
    Path("net.onnx").write_bytes(Path("net.onnx").read_bytes() + b"\x00")
    with pytest.raises(InputError, match="has changed since it was read"):
        result.save("small", latency=False)
    assert not Path("small").exists()


# --- hostile files ------------------------------------------------------------------------------------------------------------


def external(location: str, **changes: int) -> onnx.ModelProto:
    """One weight that lies in another file."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("MatMul", ["a", "v"], ["y"])]
    net = model_of(nodes, {"x": [2, 6]}, ["y"], {"w": weight(6, 4), "v": weight(4, 3)})
    tensor = net.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": 0, "length": 96, **changes}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
    return net


def test_external_data_beside_the_model_are_read_and_come_along() -> None:
    Path("data.bin").write_bytes(weight(6, 4).tobytes())
    imported = load_onnx(saved(external("data.bin")))
    assert imported.error < 1e-6
    sp.compress(imported.model, imported.args, "channels=0.5").save("small", latency=False)
    assert np.array_equal(numpy_helper.to_array(onnx.load("small/original.onnx", load_external_data=False).graph.initializer[0]), weight(6, 4))


@pytest.mark.parametrize("location", ["../data.bin", "/etc/hostname", "link.bin", "sub/../../data.bin", ""])
def test_external_data_elsewhere_are_not_read(location: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "data.bin").write_bytes(bytes(96))
    (folder / "link.bin").symlink_to(tmp_path / "data.bin")
    os.chdir(folder)
    assert "lie outside of the model's folder" in refusal(external(location))


def test_external_data_that_are_missing_or_short() -> None:
    assert "should be in 'gone.bin', which is not there" in refusal(external("gone.bin"))
    Path("data.bin").write_bytes(bytes(50))
    assert "reach beyond the end" in refusal(external("data.bin"))
    assert "reach beyond the end" in refusal(external("data.bin", offset=-8, length=8))


def test_damaged_files_are_refused_in_one_line() -> None:
    whole = convolutional().SerializeToString()
    Path("net.onnx").write_bytes(whole[: len(whole) // 2])
    assert "net.onnx" in refusal("net.onnx")
    Path("net.onnx").write_bytes(b"\x80\x02not a model")
    assert "damaged or no ONNX file" in refusal("net.onnx")


def test_a_cycle_is_refused() -> None:
    nodes = [helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Relu", ["a"], ["b"]), helper.make_node("Relu", ["a"], ["y"])]
    assert "is no valid ONNX model" in refusal(model_of(nodes, {"x": [2]}, ["y"]))


def test_absurd_sizes_are_refused_before_they_are_allocated() -> None:
    net = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": [2, 6]}, ["y"], {"w": weight(6, 4)})
    net.graph.initializer[0].dims[0] = 1 << 40
    assert "claims 1099511627776x4 numbers, more than the file holds" in refusal(net)
    net.graph.initializer[0].dims[0] = 5  # fewer than there are
    assert "w" in refusal(net)
    nodes = [
        helper.make_node("ConstantOfShape", ["s"], ["c"]),
        helper.make_node("ReduceMax", ["c"], ["m"], keepdims=0),
        helper.make_node("Add", ["x", "m"], ["y"]),
    ]
    big = model_of(nodes, {"x": [2]}, ["y"], {"s": np.array([1 << 20, 1 << 20])})
    assert "net.onnx" in refusal(big)


def test_nothing_is_executed_from_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A custom operator's library is never loaded: its domain alone is a refusal."""
    monkeypatch.setattr(onnxruntime.SessionOptions, "register_custom_ops_library", lambda *_: pytest.fail("a library was loaded"))
    net = model_of([helper.make_node("Run", ["x"], ["y"], name="r", domain="evil")], {"x": [2]}, ["y"], domains=("evil",))
    assert "evil.Run of node 'r' is not of the ONNX standard" in refusal(net)


def test_a_name_is_not_code() -> None:
    """torch.fx writes the names of weights into Python that it runs."""
    evil = 'w");open("was_here","w");getattr(self,"v'
    nodes = [helper.make_node("MatMul", ["x", evil], ["a"]), helper.make_node("MatMul", ["a", "v"], ["y"])]
    imported = load_onnx(saved(model_of(nodes, {"x": [2, 4]}, ["y"], {evil: weight(4, 6), "v": weight(6, 3)})))
    sp.compress(imported.model, imported.args, "channels=0.5").save("small", latency=False)
    sp.load("small")(imported.args[0])
    assert not Path("was_here").exists()
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz_/:.-0123456789") for name in imported.model.state_dict())


def test_names_that_clash_or_that_torch_keeps_for_itself_are_told_apart() -> None:
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "forward"], ["a"]),
        node("MatMul", ["a", "w"], ["b"]),
        node("MatMul", ["b", "w.v"], ["c"]),
        node("MatMul", ["c", ".."], ["y"]),
    ]
    weights = {"forward": weight(4, 4), "w": weight(4, 4, seed=1), "w.v": weight(4, 4, seed=2), "..": weight(4, 4, seed=3)}
    imported = load_onnx(saved(model_of(nodes, {"x": [2, 4]}, ["y"], weights)))
    assert imported.error < 1e-6 and len(dict(imported.model.named_parameters())) == 4
    assert "_forward" in dict(imported.model.named_parameters())


def test_load_takes_a_file_as_any_model() -> None:
    loaded = load(saved(convolutional()), inputs=["image:0=2x3x8x8"])
    assert loaded.args[0].shape == (2, 3, 8, 8) and "opset 18, imported" in loaded.notes[0]
