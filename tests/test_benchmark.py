"""Latency measurement: what ran, in which order, and what is concluded; never how fast this machine is."""

import itertools
import json
import time

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn
from torch.nn.utils import prune

from structprune.backends import benchmark as module_under_test
from structprune.backends.benchmark import Comparison, Latency, Ratio, benchmark, environment
from structprune.errors import InputError

X = torch.ones(2, 3)
TURN = 0.003  # seconds; above the shortest timing, so that a turn is exactly one run


class Sleeper(nn.Module):
    """Sleeps, and logs its name into a list that copies of the module share."""

    def __init__(self, name: str = "", duration: float = TURN, log: list | None = None):
        super().__init__()
        self.name, self.duration = name, duration
        self.record = (log if log is not None else []).append

    def forward(self, x):
        self.record((self.name, self.training, torch.is_inference_mode_enabled(), torch.get_num_threads()))
        time.sleep(self.duration)
        return x


def write_onnx(path, shape=("batch", 3), element=TensorProto.FLOAT, names=("x",)):
    inputs = [helper.make_tensor_value_info(name, element, shape) for name in names]
    output = helper.make_tensor_value_info("y", element, None)
    graph = helper.make_graph([helper.make_node("Sum", list(names), ["y"])], "sum", inputs, [output])
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString())
    return path


def comparison(low: float, high: float) -> Comparison:
    latencies = tuple(Latency(name, "torch-cpu", 1.0, 0.9, 1.1, 20, 1000.0, peak) for name, peak in (("dense", 4_000_000), ("pruned", None)))
    ratios = {"dense": Ratio(1.0, 1.0, 1.0), "pruned": Ratio((low + high) / 2, low, high)}
    return Comparison(latencies, ratios, "cpu", 2, {"cpu": "a processor", "gpus": []}, ("a remark",))


# ---------------------------------------------------------------------------------------------------------------- timing


def timed_rounds(seed: int) -> list[tuple[str, ...]]:
    """The order of the candidates in each of 8 rounds; the warm-up comes before and is cut off."""
    log: list[tuple] = []
    result = benchmark({name: Sleeper(name, TURN, log) for name in "abc"}, (X,), rounds=8, seconds=60, seed=seed)
    assert {latency.samples for latency in result.latencies} == {8}
    names = [name for name, *_ in log][-24:]
    return [tuple(names[start : start + 3]) for start in range(0, 24, 3)]


def test_every_candidate_runs_once_a_round_in_a_seeded_random_order():
    rounds = timed_rounds(seed=0)
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(rounds)) > 1, "the order never changes"
    assert rounds == timed_rounds(seed=0) != timed_rounds(seed=1)


def test_modules_run_in_evaluation_and_inference_mode_and_the_original_is_untouched():
    log: list[tuple] = []
    original = Sleeper("a", TURN, log).train()
    x = X.clone()
    benchmark({"a": original, "writes its input": Writer()}, (x,), rounds=5)
    assert {entry[1:3] for entry in log} == {(False, True)}
    assert original.training and torch.equal(x, X)


class Writer(nn.Module):
    def forward(self, x):
        return x.add_(1)


def test_short_candidates_are_repeated_within_a_turn():
    calls: list[str] = []
    interrupted = itertools.cycle([0.25, 0.25, 9.0])
    runners = [lambda: calls.append("a") or 0.5, lambda: calls.append("b") or next(interrupted)]
    times = module_under_test._time_rounds(runners, [2, 3], rounds=6, seconds=60, rest=0.0, seed=0)
    assert times.shape == (6, 2) and (times == [0.5, 0.25]).all()
    assert calls.count("a") == 12 and calls.count("b") == 18
    assert module_under_test._warmed_up("a", lambda: time.sleep(1e-4) or 3e-4)[1] == 7  # ceil(2 ms / 0.3 ms)


def test_stops_at_the_time_limit_but_not_before_five_rounds():
    result = benchmark({"a": Sleeper()}, (X,), rounds=1000, seconds=0)
    assert result.latencies[0].samples == 5
    assert any("5 of 1000 rounds" in note for note in result.notes)
    assert benchmark({"a": Sleeper()}, (X,), rounds=1).latencies[0].samples == 5


def test_a_module_that_sleeps_twice_as_long_takes_twice_the_time():
    result = benchmark({"once": Sleeper(duration=0.01), "twice": Sleeper(duration=0.02)}, (X,), rounds=15)
    once, twice = result.ratios["once"], result.ratios["twice"]
    assert (once.median, once.low, once.high) == (1.0, 1.0, 1.0)
    assert 1.5 < twice.low <= twice.median <= twice.high < 2.5
    assert result.latencies[0].low_ms <= result.latencies[0].median_ms <= result.latencies[0].high_ms
    assert result.verdict("twice").startswith("twice: slower: ")


def test_threads_hold_during_the_run_and_are_restored_even_after_a_failure():
    before = torch.get_num_threads()
    log: list[tuple] = []
    result = benchmark({"a": Sleeper("a", TURN, log)}, (X,), threads=before + 1, rounds=5)
    assert {entry[3] for entry in log} == {before + 1} and result.threads == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(InputError, match="linear: does not run on these inputs: .*shapes"):
        benchmark({"linear": nn.Linear(7, 7)}, (X,), threads=before + 1)
    assert torch.get_num_threads() == before


def test_bootstrap_is_seeded_and_narrows_with_the_number_of_rounds():
    few, many = (np.random.default_rng(1).normal(10.0, 1.0, size=size) for size in (20, 2000))
    median, low, high = module_under_test._bootstrap([many], seed=0)
    assert (median, low, high) == module_under_test._bootstrap([many], seed=0)
    assert median == np.median(many) and low < 10.0 < high
    assert high - low < 0.25 < np.subtract(*module_under_test._bootstrap([few], seed=0)[:0:-1])
    # The large-sample interval of a normal median: 2 * 1.96 * sqrt(pi / 2 / n).
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(np.pi / 2 / 2000), rel=0.3)


def test_the_interval_tells_of_sessions_that_differ_however_steady_each_of_them_is():
    parts = [np.full(100, level) for level in (9.0, 10.0, 11.0)]
    median, low, high = module_under_test._bootstrap(parts, seed=0)
    assert (median, low, high) == (10.0, 9.0, 11.0)


def test_onnx_sessions_are_started_anew_and_modules_are_not(tmp_path, monkeypatch):
    started, copied = [], []
    session, evaluation_copy = module_under_test._session, module_under_test._evaluation_copy
    monkeypatch.setattr(module_under_test, "_session", lambda *arguments: started.append(arguments[0]) or session(*arguments))
    monkeypatch.setattr(module_under_test, "_evaluation_copy", lambda *arguments: copied.append(arguments[0]) or evaluation_copy(*arguments))
    files = {"module": nn.Identity(), "file": write_onnx(tmp_path / "model.onnx")}
    result = benchmark(files, (X,), rounds=22, seconds=60, resources=False)
    assert copied == ["module"] and started == ["file"] * (22 // module_under_test.MIN_ROUNDS)
    assert result.latencies[1].samples == 22


def test_notes_tell_of_a_busy_machine_and_too_many_threads(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    quiet = {"samples": 20, "rounds": 20, "seconds": 10.0, "threads": 2, "cores": 4, "others": 1.9, "mixed": False}
    assert module_under_test._notes(**quiet) == ()
    (note,) = module_under_test._notes(**quiet | {"others": 2.5})
    assert note == "other processes kept 2.5 cores of this machine busy: repeat this when it is idle"
    assert module_under_test._notes(**quiet | {"cores": 1}) == ("2 threads on 1 core(s): threads wait for each other",)


# -------------------------------------------------------------------------------------------------------------- runtimes


def test_module_onnx_file_directory_and_exported_program_side_by_side(tmp_path):
    write_onnx(tmp_path / "model.onnx")
    torch.export.save(torch.export.export(nn.Linear(3, 4), (X,)), tmp_path / "linear.pt2")
    lines: list[str] = []
    candidates = {"dense": nn.Linear(3, 4), "file": str(tmp_path / "model.onnx"), "directory": tmp_path, "exported": tmp_path / "linear.pt2"}
    result = benchmark(candidates, (X,), rounds=5, progress=lines.append)
    assert [latency.runtime for latency in result.latencies] == ["torch-cpu", "onnxruntime-cpu", "onnxruntime-cpu", "torch-cpu"]
    assert list(result.ratios) == list(candidates) and all(latency.median_ms > 0 for latency in result.latencies)
    assert any("different runtimes" in note for note in result.notes)
    assert [line for line in lines if "warming up" in line] == [f"benchmark: warming up {name}" for name in candidates]


def test_modules_and_exported_programs_run_compiled(tmp_path, monkeypatch):
    """torch.compile itself would need a C++ compiler, and half a minute."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)
    torch.export.save(torch.export.export(nn.Linear(3, 4), (X,)), tmp_path / "linear.pt2")
    candidates = {"module": nn.Linear(3, 4), "exported": tmp_path / "linear.pt2", "file": write_onnx(tmp_path / "model.onnx")}
    result = benchmark(candidates, (X,), rounds=5, compiled=True)
    assert [latency.runtime for latency in result.latencies] == ["torch.compile-cpu", "torch.compile-cpu", "onnxruntime-cpu"]
    assert len(compiled) == 2


def test_masked_module_can_be_timed():
    masked = nn.Linear(3, 4)
    prune.random_unstructured(masked, "weight", 0.5)
    assert not masked.weight.is_leaf  # what copy.deepcopy refuses
    assert benchmark({"masked": masked}, (X,), rounds=5).latencies[0].samples == 5


@pytest.mark.parametrize(("dtype", "element"), [(torch.float32, TensorProto.FLOAT), (torch.float64, TensorProto.DOUBLE)])
def test_onnx_runtime_reads_the_values_it_was_given(tmp_path, monkeypatch, dtype, element):
    path = write_onnx(tmp_path / "model.onnx", element=element, names=("x", "z"))
    transposed, other = torch.arange(6, dtype=dtype).reshape(3, 2).T, torch.full((2, 3), 10, dtype=dtype)
    session = module_under_test._session("a", path, "cpu", 0, 1)
    binding = session.io_binding()
    monkeypatch.setattr(session, "io_binding", lambda: binding)
    monkeypatch.setattr(module_under_test, "_session", lambda *arguments: session)
    assert module_under_test._onnx_runner("a", path, (transposed, other), "cpu", torch.device("cpu"), 1)() > 0
    np.testing.assert_array_equal(binding.copy_outputs_to_cpu()[0], [[10, 12, 14], [11, 13, 15]])


def test_idle_onnx_threads_do_not_take_cores_from_the_next_candidate(tmp_path):
    """Processor time while this process sleeps after a run, where threads left spinning would show: 25 ms and more without the option."""
    x = torch.ones(512, 512)
    path = tmp_path / "model.onnx"
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, (512, 512))]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "x"], ["y"])], "square", inputs, [output])
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString())
    run = module_under_test._onnx_runner("a", path, (x,), "cpu", torch.device("cpu"), 2)
    idle = []
    for _ in range(5):
        run()
        before = time.process_time()
        time.sleep(0.05)
        idle.append(time.process_time() - before)
    assert np.median(idle) < 0.01


@pytest.mark.parametrize(("threads", "mixed", "rest"), [(2, True, 0.01), (1, True, 0.0), (2, False, 0.0)])
def test_openmp_threads_get_time_to_fall_asleep_before_another_runtime(tmp_path, monkeypatch, threads, mixed, rest):
    rests = []
    monkeypatch.setattr(module_under_test, "_time_rounds", lambda *arguments: rests.append(arguments[4]) or np.ones((5, 2)))
    second = write_onnx(tmp_path / "model.onnx") if mixed else nn.Identity()
    benchmark({"dense": nn.Identity(), "pruned": second}, (X,), threads=threads)
    assert set(rests) == {rest}


# ---------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), r"a: model.onnx takes 2 input\(s\) \('x', 'mask'\), 0 given; none is left for 'x'"),
        ((X,), r"2 input\(s\) .* 1 given; none is left for 'mask'"),
        ((X, X, X), r"2 input\(s\) \('x', 'mask'\), 3 given$"),
        ((X, X[0]), r"input 'mask' of model.onnx has rank 2 \(batchx3\), the tensor given has rank 1 \(3,\)"),
        ((X, X[:, :2]), r"input 'mask' of model.onnx has shape batchx3, the tensor given has 2x2"),
        ((X.long(), X), r"input 'x' of model.onnx is tensor\(float\), the tensor given is torch.int64"),
        ((X.to(torch.complex64), X), r"input 'x' .* torch.complex64"),
        (X, r"inputs must be a tuple of tensors; write \(x,\)"),
        (([1.0],), "inputs must be a tuple of tensors"),
    ],
)
def test_inputs_that_do_not_fit_are_named(tmp_path, inputs, message):
    path = write_onnx(tmp_path / "model.onnx", names=("x", "mask"))
    with pytest.raises(InputError, match=message):
        benchmark({"a": path}, inputs)


def test_undeclared_rank_is_accepted(tmp_path):
    path = write_onnx(tmp_path / "model.onnx", shape=None)
    assert benchmark({"a": path}, (X,), rounds=5).latencies[0].samples == 5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.onnx", None, "a: no such file: .*missing.onnx"),
        ("broken.onnx", b"not a model", "a: .*broken.onnx: ONNX Runtime cannot load it: "),
        ("broken.pt2", b"not a model", "a: .*broken.pt2: torch.export cannot load it: "),
        ("weights.pth", b"", "a: .*weights.pth: cannot run a '.pth' file; export it to .onnx"),
        ("", None, "a: no such file: .*model.onnx"),  # a directory without one
    ],
)
@pytest.mark.filterwarnings("ignore")  # torch.export.load warns about a broken file before it fails
def test_files_that_cannot_be_used(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        benchmark({"a": tmp_path / name}, (X,))
    assert "\n" not in str(caught.value)


def test_candidates_and_options_that_cannot_be_used():
    with pytest.raises(InputError, match="no candidates"):
        benchmark({}, (X,))
    with pytest.raises(InputError, match="a: a module or a path .* not int"):
        benchmark({"a": 3}, (X,))
    with pytest.raises(InputError, match="threads must be at least 1, not 0"):
        benchmark({"a": nn.Identity()}, (X,), threads=0)
    with pytest.raises(InputError, match="device 'tpu' is unknown: use 'cpu', 'cuda'"):
        benchmark({"a": nn.Identity()}, (X,), device="tpu")
    with pytest.raises(InputError, match="a: does not run on these inputs: .*positional argument"):
        benchmark({"a": nn.Identity()}, (X, X))


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "tensorrt"])
def test_no_gpu_is_one_clear_line(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=f"device '{device}': PyTorch .* finds no CUDA GPU; check the driver"):
        benchmark({"a": nn.Identity()}, (X,), device=device)


def test_missing_provider_and_missing_gpu_number_are_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    path = write_onnx(tmp_path / "model.onnx")
    with pytest.raises(InputError, match="a: device 'tensorrt': ONNX Runtime .* was built without TensorrtExecutionProvider"):
        benchmark({"a": path}, (X,), device="tensorrt")
    with pytest.raises(InputError, match=r"device 'cuda:3': PyTorch finds only 1 GPU\(s\)"):
        benchmark({"a": path}, (X,), device="cuda:3")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu(tmp_path):
    result = benchmark({"dense": nn.Linear(3, 4), "narrow": nn.Linear(3, 2)}, (X,), device="cuda", rounds=5)
    assert {latency.runtime for latency in result.latencies} == {"torch-cuda"} and result.machine["gpus"]
    if "CUDAExecutionProvider" in result.machine["providers"]:
        result = benchmark({"a": write_onnx(tmp_path / "model.onnx")}, (X,), device="cuda", rounds=5)
        assert result.latencies[0].runtime == "onnxruntime-cuda"


# --------------------------------------------------------------------------------------------------------------- reports


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.50, 0.60, "pruned: 1.82x faster (1.67-2.00)"),
        (0.96, 0.98, "pruned: 1.03x faster (1.02-1.04)"),
        (0.90, 1.10, "pruned: no gain: 1.00x the time of dense (0.90-1.10)"),
        (0.40, 1.00, "pruned: no gain: 0.70x the time of dense (0.40-1.00)"),
        (0.996, 0.998, "pruned: no gain: 1.00x the time of dense (1.00-1.00)"),
        (1.10, 1.30, "pruned: slower: 1.20x the time of dense (1.10-1.30)"),
    ],
)
def test_verdict_in_words(low, high, verdict):
    assert comparison(low, high).verdict("pruned") == verdict
    assert comparison(low, high).verdict("dense") == "dense: the baseline"


def test_prints_as_an_aligned_table_with_verdicts():
    assert (
        str(comparison(0.5, 0.6))
        == """\
candidate  runtime    median ms  95 % interval  time ratio  95 % interval  rounds   per s  peak MB
dense      torch-cpu      1.000    0.900-1.100       1.000    1.000-1.000      20  1000.0      4.0
pruned     torch-cpu      1.000    0.900-1.100       0.550    0.500-0.600      20  1000.0
dense: the baseline
pruned: 1.82x faster (1.67-2.00)
on cpu (a processor), 2 threads
note: a remark"""
    )


def test_report_is_plain_json():
    result = benchmark({"dense": Sleeper(), "pruned": Sleeper()}, (X,), rounds=5)
    data = result.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["ratios"]["dense"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert data["latencies"][1]["name"] == "pruned" and set(data["verdicts"]) == {"dense", "pruned"}
    assert data["device"] == "cpu" and any("only 5 rounds" in note for note in data["notes"])


def test_environment_describes_the_machine():
    machine = environment()
    assert machine["torch"] == torch.__version__ and "CPUExecutionProvider" in machine["providers"]
    assert machine["cores"] >= 1 and machine["cpu"] and isinstance(machine["gpus"], list)
    assert json.loads(json.dumps(machine)) == machine
