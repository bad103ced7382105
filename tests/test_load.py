"""Every form of MODEL on the command line, with real files; every refusal is one line that says what to do next."""

import pickle
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from structprune.errors import InputError
from structprune.frontends.example_inputs import candidates
from structprune.frontends.load import Loaded, load

BUILDERS = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))

def with_args():
    return net(), (torch.zeros(1, 3, 9, 9),)

def with_tensor():
    return net(), torch.zeros(1, 3, 9, 9)

def with_kwargs():
    return net(), (), {"input": torch.zeros(2, 3, 8, 8)}

class Factory:
    @staticmethod
    def build():
        return net()

instance = net()
number = 3

def not_a_module():
    return [net()]

def odd_args():
    return net(), "1x3x8x8"

def broken():
    raise ValueError("no such\\nwidth")

def exits():
    raise SystemExit(2)

def needs(width):
    return nn.Linear(width, 1)
"""


class Small(nn.Module):
    """A conv net for any image size; importable by pickle as tests' own module."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3)
        self.head = nn.Linear(channels, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean((2, 3)))


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.fixture(autouse=True)
def builders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`builders.py` in the current directory, which is not on sys.path before load() puts it there."""
    (tmp_path / "builders.py").write_text(BUILDERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.delitem(sys.modules, "builders", raising=False)


def refusal(spec: object, **options: object) -> str:
    """The one line with which `spec` is refused."""
    with pytest.raises(InputError) as caught:
        load(str(spec), **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message and "\x1b" not in message
    return message


def runs(loaded: Loaded) -> bool:
    with torch.no_grad():
        loaded.model.eval()(*loaded.args, **loaded.kwargs)
    return True


# Constructors


def test_demo_brings_its_samples_and_its_score() -> None:
    loaded = load("demo")
    assert runs(loaded) and loaded.args[0].shape[0] == 2
    assert loaded.evaluate is not None and "samples" in loaded.notes[0]


def test_timm() -> None:
    pytest.importorskip("timm")
    loaded = load("timm:test_resnet")
    assert runs(loaded) and loaded.name == "timm:test_resnet"
    assert any("input 1x3x160x160 from the model's pretrained_cfg" in n for n in loaded.notes)
    assert any("random weights (seed 0)" in n for n in loaded.notes)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("squeezenet1_1", [(1, 3, 224, 224)]),
        ("inception_v3", [(1, 3, 299, 299)]),
        ("mc3_18", [(1, 3, 16, 112, 112)]),
        ("lraspp_mobilenet_v3_large", [(1, 3, 224, 224)]),
    ],
)
def test_torchvision(name: str, shapes: list[tuple[int, ...]]) -> None:
    pytest.importorskip("torchvision")
    loaded = load(f"torchvision:{name}")
    assert [tuple(a.shape) for a in loaded.args] == shapes
    assert any("its family in torchvision" in n for n in loaded.notes)


def test_optical_flow_needs_two_images() -> None:
    """Asked of the candidates themselves: a forward pass of RAFT takes seconds."""
    model = pytest.importorskip("torchvision").models.get_model("raft_small", weights=None)
    assert [texts for texts, _ in candidates(model)] == [("1x3x128x128", "1x3x128x128")]


def test_a_detector_becomes_its_backbone() -> None:
    pytest.importorskip("torchvision")
    loaded = load("torchvision:ssdlite320_mobilenet_v3_large")
    assert runs(loaded) and loaded.args[0].shape == (1, 3, 320, 320)
    assert any("only its backbone" in n for n in loaded.notes)


@pytest.mark.parametrize(("spec", "close"), [("timm:resnet19", "resnet18"), ("torchvision:resnet19", "resnet18"), ("timm:hf-hub:a/b", "timm")])
def test_unknown_names_offer_close_ones(spec: str, close: str) -> None:
    pytest.importorskip(spec.partition(":")[0])
    message = refusal(spec)
    assert "has no model" in message and close in message
    assert ("did you mean" in message) == ("19" in spec)


@pytest.mark.parametrize("spec", ["timm:resnet18", "torchvision:resnet18"])
def test_a_missing_library_is_named(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = spec.partition(":")[0]
    for name in [n for n in sys.modules if n.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    assert f"pip install {library}" in refusal(spec)


@pytest.mark.parametrize(
    ("function", "args", "kwargs"),
    [
        ("net", "1x3x224x224", ""),
        ("with_args", "1x3x9x9", ""),
        ("with_tensor", "1x3x9x9", ""),
        ("with_kwargs", "", "2x3x8x8"),
        ("Factory.build", "1x3x224x224", ""),
        ("instance", "1x3x224x224", ""),
    ],
)
def test_own_constructor(function: str, args: str, kwargs: str) -> None:
    loaded = load(f"builders:{function}")
    assert runs(loaded)
    assert ["x".join(map(str, a.shape)) for a in loaded.args] == ([args] if args else [])
    assert ["x".join(map(str, v.shape)) for v in loaded.kwargs.values()] == ([kwargs] if kwargs else [])
    assert args in loaded.notes[-1] and kwargs in loaded.notes[-1]
    assert ("as returned by" in loaded.notes[-1]) == function.startswith("with")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("builders:nett", "did you mean net?"),
        ("builders:number", "is a int"),
        ("builders:not_a_module", "returned a list"),
        ("builders:odd_args", "returned (Sequential, str)"),
        ("builders:broken", "ValueError: no such at "),
        ("builders:broken", "builders.py:32"),
        ("builders:exits", "SystemExit"),
        ("builders:needs", "missing 1 required positional argument"),
        ("nowhere.at.all:net", "there is no module nowhere"),
        ("builders.py:net", "did you mean builders:net?"),
        ("raises:net", "importing raises failed: KeyError"),
        ("imports:net", "importing imports failed: ModuleNotFoundError: No module named 'not_installed'"),
        ("builders:", "is not a constructor"),
        ("https://somewhere/model.pt", "is not a constructor"),
        ("resnet50", "neither a file nor a constructor"),
        ("", "neither a file nor a constructor"),
    ],
)
def test_own_constructor_refusals(spec: str, words: str) -> None:
    Path("raises.py").write_text("{}['a']")
    Path("imports.py").write_text("import not_installed")
    assert words in refusal(spec)


def test_the_seed_fixes_weights_and_inputs_and_spares_the_global_generator() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = load("builders:net"), load("builders:net"), load("builders:net", seed=1)
    assert torch.equal(torch.rand(3), expected)
    for fixed, repeated, changed in [[x.model.get_parameter("0.weight") for x in (first, again, other)], [x.args[0] for x in (first, again, other)]]:
        assert torch.equal(fixed, repeated) and not torch.equal(fixed, changed)


def test_a_constructor_takes_no_arch() -> None:
    assert "leave out --arch timm:resnet18" in refusal("builders:net", arch="timm:resnet18")


# Files: weights


@pytest.fixture
def weights() -> dict[str, Tensor]:
    return dict(load("builders:net", seed=7).model.state_dict())


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".PT", ".safetensors"])
def test_state_dict(weights: dict[str, Tensor], suffix: str) -> None:
    path = f"w{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(weights, path)
    loaded = load(path, arch="builders:net")
    assert runs(loaded) and loaded.name == path
    assert all(torch.equal(v, weights[k]) for k, v in loaded.model.state_dict().items())
    message = refusal(path)
    assert path in message and "--arch" in message


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "module"])
def test_checkpoint_with_prefixes(weights: dict[str, Tensor], key: str) -> None:
    torch.save({"epoch": 3, key: {f"module._orig_mod.{k}": v for k, v in weights.items()}}, "c.ckpt")
    loaded = load("c.ckpt", arch="builders:with_args")
    assert torch.equal(loaded.model.get_parameter("0.weight"), weights["0.weight"]) and loaded.args[0].shape == (1, 3, 9, 9)
    assert f"read from {key!r} in c.ckpt" in loaded.notes
    assert [n for n in loaded.notes if "'module.'" in n] and [n for n in loaded.notes if "'_orig_mod.'" in n]


def test_a_prefix_that_belongs_to_the_model_stays() -> None:
    Path("wrapped.py").write_text("from torch import nn\ndef net(): return nn.ModuleDict({'module': nn.Linear(2, 2)})\n")
    torch.save({"module.weight": torch.ones(2, 2), "module.bias": torch.ones(2)}, "w.pt")
    loaded = load("w.pt", arch="wrapped:net", inputs=["1x2"])
    assert torch.equal(loaded.model.get_parameter("module.weight"), torch.ones(2, 2))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_of_another_model(weights: dict[str, Tensor], suffix: str) -> None:
    del weights["0.bias"]
    weights |= {"4.weight": torch.zeros(2, 9), **{f"extra.{i}": torch.zeros(1) for i in range(5)}}
    path = f"w{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(weights, path)
    message = refusal(path, arch="builders:net")
    assert message.startswith(f"{path} does not fit --arch builders:net: missing: 0.bias, unexpected: extra.0, extra.1 and 3 more")
    assert "of another shape: 4.weight (2x9 in the file, 2x4 in the model)" in message


def test_weights_of_a_much_larger_model_are_refused_in_a_few_words() -> None:
    torch.save(torchvision.models.resnet18().state_dict(), "r18.pt")
    message = refusal("r18.pt", arch="torchvision:resnet50")
    assert "missing: layer1.0.conv3.weight, layer1.0.bn3.weight and 196 more" in message
    assert len(message) < 300


@pytest.mark.parametrize(("arch", "words"), [("resnet50", "--arch resnet50 is not a constructor"), ("builders:nett", "did you mean net?")])
def test_arch_must_be_a_constructor(weights: dict[str, Tensor], arch: str, words: str) -> None:
    torch.save(weights, "w.pt")
    assert words in refusal("w.pt", arch=arch)


# Files: pickles


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_module_needs_trust(zipped: bool) -> None:
    model = Small()
    torch.save(model, "m.pt", _use_new_zipfile_serialization=zipped)
    assert refusal("m.pt") == "loading a pickled module runs code of whoever wrote it; pass --trust-pickle if you trust m.pt"
    loaded = load("m.pt", trust_pickle=True)
    assert runs(loaded) and torch.equal(loaded.model.get_parameter("conv.weight"), model.conv.weight)
    assert "leave out --arch" in refusal("m.pt", arch="builders:net", trust_pickle=True)


@pytest.mark.parametrize("writer", ["zip", "legacy", "plain"])
def test_an_evil_pickle_does_not_run_without_trust(tmp_path: Path, writer: str) -> None:
    mark = tmp_path / "mark"
    content = {"state_dict": {"a": torch.zeros(1)}, "extra": Evil(mark)}
    if writer == "plain":
        Path("e.pt").write_bytes(pickle.dumps(Evil(mark)))
    else:
        torch.save(content, "e.pt", _use_new_zipfile_serialization=writer == "zip")
    for arch in (None, "builders:net"):
        assert "--trust-pickle" in refusal("e.pt", arch=arch)
    assert not mark.exists()
    refusal("e.pt", trust_pickle=True)
    assert mark.exists()  # the test can fail: the pickle does what it says


def test_a_module_within_a_trusted_checkpoint() -> None:
    torch.save({"model": nn.DataParallel(Small().half()), "epoch": 3}, "y.pt")
    loaded = load("y.pt", trust_pickle=True)
    assert isinstance(loaded.model, Small) and loaded.args[0].dtype == torch.float16 and runs(loaded)


def test_trusted_weights_still_need_arch(weights: dict[str, Tensor]) -> None:
    torch.save({"state_dict": weights, "path": Path("a")}, "w.ckpt")
    assert "--trust-pickle" in refusal("w.ckpt", arch="builders:net")
    assert "--arch" in refusal("w.ckpt", trust_pickle=True)
    assert runs(load("w.ckpt", arch="builders:net", trust_pickle=True))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("keep_module", [True, False])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_a_class_that_is_gone_is_named(zipped: bool, keep_module: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("gone.py").write_text("from torch import nn\nclass Net(nn.Module): pass\n")
    monkeypatch.syspath_prepend(".")
    import gone  # type: ignore[import-not-found]

    torch.save(gone.Net(), "m.pt", _use_new_zipfile_serialization=zipped)
    if keep_module:
        monkeypatch.delattr(gone, "Net")
    else:
        Path("gone.py").unlink()
        monkeypatch.delitem(sys.modules, "gone")
    assert "needs the class gone.Net" in refusal("m.pt", trust_pickle=True)
    sys.modules.pop("gone", None)


# Files: what cannot be used


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_truncated(weights: dict[str, Tensor], zipped: bool, share: float) -> None:
    torch.save(weights, "t.pt", _use_new_zipfile_serialization=zipped)
    data = Path("t.pt").read_bytes()
    Path("t.pt").write_bytes(data[: int(share * len(data))])
    for trust in (False, True):
        assert "t.pt" in refusal("t.pt", arch="builders:net", trust_pickle=trust)


@pytest.mark.parametrize("text", ["not a model", "echo not a model", "hello"])  # they stop torch's reader with an error of another kind each
def test_text_is_refused_without_the_advice_to_switch_the_safe_reader_off(text: str) -> None:
    Path("t.pt").write_text(text)
    assert refusal("t.pt") == "t.pt is damaged or was not written by torch.save; save or copy it again"


def test_truncated_safetensors(weights: dict[str, Tensor]) -> None:
    save_file(weights, "t.safetensors")
    Path("t.safetensors").write_bytes(Path("t.safetensors").read_bytes()[:-8])
    assert "t.safetensors is damaged" in refusal("t.safetensors", arch="builders:net")


@pytest.mark.parametrize("text", ["hello world\n", "import torch\n", "(dp0\n.", "PK\x03\x04", "\x80"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_text_is_no_model(text: str, suffix: str) -> None:
    Path(f"a{suffix}").write_text(text, encoding="latin-1")
    for trust in (False, True):
        assert f"a{suffix}" in refusal(f"a{suffix}", arch="builders:net", trust_pickle=trust)


@pytest.mark.parametrize(
    ("value", "words"), [([1, 2], "holds a list,"), ({}, "holds a dict,"), ({"a": 1, "b": 2}, "the keys a, b,"), (torch.ones(2), "a Tensor")]
)
def test_other_objects_are_no_model(value: object, words: str) -> None:
    torch.save(value, "o.pt")
    assert words in refusal("o.pt", arch="builders:net")


def test_a_plain_pickle_is_no_model() -> None:
    Path("p.pt").write_bytes(pickle.dumps([1, 2]))
    assert "p.pt" in refusal("p.pt")
    assert "p.pt cannot be unpickled" in refusal("p.pt", trust_pickle=True)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_torchscript() -> None:
    torch.jit.trace(Small().eval(), torch.zeros(1, 3, 8, 8)).save("s.pt")
    for trust in (False, True):
        assert "TorchScript" in refusal("s.pt", trust_pickle=trust) and "--input" in refusal("s.pt", trust_pickle=trust)


@pytest.mark.parametrize("suffix", [".pt", ".pt2", ".safetensors", ".onnx"])
def test_missing_empty_and_directory(suffix: str) -> None:
    assert f"no file net{suffix}" in refusal(f"net{suffix}")
    Path(f"net{suffix}").touch()
    assert "is empty" in refusal(f"net{suffix}")
    assert "did you mean" in refusal(f"nett{suffix}")
    Path(f"dir{suffix}").mkdir()
    assert "is a directory" in refusal(f"dir{suffix}")


def test_a_result_directory_names_the_file_to_pass() -> None:
    Path("out").mkdir()
    Path("out/model.pt2").touch()
    assert str(Path("out/model.pt2")) in refusal("out")


def test_onnx_and_other_suffixes() -> None:
    Path("m.onnx").write_text("onnx")
    assert "m.onnx is damaged or no ONNX file" in refusal("m.onnx")
    assert "holds a whole model: leave out --arch timm:resnet18" in refusal("m.onnx", arch="timm:resnet18")
    Path("m.h5").write_text("keras")
    assert "m.h5 is not a model file" in refusal("m.h5")


# Files: exported programs


def test_pt2_brings_its_inputs() -> None:
    torch.export.save(torch.export.export(Small().eval(), (torch.zeros(2, 3, 8, 8),)), "p.pt2")
    loaded = load("p.pt2")
    assert runs(loaded) and loaded.args[0].shape == (2, 3, 8, 8)
    assert any("input 2x3x8x8 from the model's example_inputs" in n for n in loaded.notes)
    assert "leave out --arch" in refusal("p.pt2", arch="builders:net")
    Path("p.pt2").rename("p.pt")
    assert "rename it to p.pt2" in refusal("p.pt")


def test_damaged_pt2() -> None:
    Path("t.pt2").write_text("hello")
    assert "t.pt2" in refusal("t.pt2")


# Inputs


def test_input_syntax() -> None:
    loaded = load("builders:with_args", inputs=["1x3x16x16", "2x16:int64", "mask=1x3x8x8:bool", "scale=4:float64"])
    first, second = loaded.args
    assert first.shape == (1, 3, 16, 16) and first.dtype == torch.float32 and 0.8 < first.std() < 1.2
    assert second.shape == (2, 16) and second.dtype == torch.int64 and set(second.unique().tolist()) == {0, 1}
    assert {k: (tuple(v.shape), v.dtype) for k, v in loaded.kwargs.items()} == {"mask": ((1, 3, 8, 8), torch.bool), "scale": ((4,), torch.float64)}
    assert torch.equal(first, load("builders:net", inputs=["1x3x16x16"]).args[0])
    assert not torch.equal(first, load("builders:net", inputs=["1x3x16x16"], seed=1).args[0])


@pytest.mark.parametrize(
    "text", ["", "1x", "x3", "1,3,8,8", "0x3", "1x-3", "3:int65", "3:", "=3", "2a=3", "1x3:bool:", "9" * 30, "x".join(["999999"] * 4)]
)
def test_bad_input_syntax(text: str) -> None:
    assert f"--input {text!r}" in refusal("builders:net", inputs=[text])


def test_a_keyword_is_given_once() -> None:
    assert "--input 'a=2'" in refusal("builders:net", inputs=["a=1", "a=2"])


class LeNet(nn.Module):
    """Fits 28x28 images only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 5)
        self.fc = nn.Linear(4 * 12 * 12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.max_pool2d(self.conv(x), 2).flatten(1))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids)).mean(1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(5, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Pair(Small):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x + y)


class WithExample(Pair):
    """A model that knows its inputs."""

    example_inputs = ((torch.zeros(1, 3, 7, 7),), {"y": torch.zeros(1, 3, 7, 7)})


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Small(), "1x3x224x224 from its first layer, conv (Conv2d)"),
        (Small().double(), "1x3x224x224:float64 from its first layer, conv (Conv2d)"),
        (LeNet(), "1x1x28x28 from its first layer, conv (Conv2d)"),
        (Tokens(), "1x16:int64 from its first layer, embedding (Embedding)"),
        (Recurrent(), "1x16x5 from its first layer, rnn (GRU)"),
        (nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), "1x6 from its first layer, 0 (Linear)"),
        (nn.Sequential(nn.Conv1d(2, 4, 3)), "1x2x1024 from its first layer, 0 (Conv1d)"),
        (nn.Conv3d(2, 4, 3), "1x2x16x112x112 from its first layer, itself (Conv3d)"),
        (nn.TransformerEncoderLayer(8, 2, 16), "1x16x8 from its first layer, self_attn (MultiheadAttention)"),
        (WithExample(), "1x3x7x7, y=1x3x7x7 from the model's example_inputs"),
    ],
)
def test_inferred_inputs(model: nn.Module, expected: str) -> None:
    torch.save(model, "m.pt")
    loaded = load("m.pt", trust_pickle=True)
    assert loaded.notes == (f"input {expected}",) and loaded.model.training
    assert runs(loaded)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Pair(), "its forward needs 2 inputs (x, y)"),
        (nn.ReLU(), "its first layer tells no shape"),
        (nn.Sequential(nn.LazyConv2d(2, 3)), "its first layer tells no shape"),
        (nn.Sequential(nn.Linear(6, 4), nn.Linear(5, 2)), "mat1 and mat2"),
    ],
)
def test_inputs_that_cannot_be_inferred(model: nn.Module, words: str) -> None:
    torch.save(model, "m.pt")
    message = refusal("m.pt", trust_pickle=True)
    assert words in message and "--input 1x3x224x224" in message


def test_the_known_shape_gives_way_to_the_model_as_it_is() -> None:
    """A library's model with its first layer replaced by the user."""
    pytest.importorskip("torchvision")
    Path("grey.py").write_text(
        "from torch import nn\nfrom torchvision.models import squeezenet1_1\n"
        "def net():\n    model = squeezenet1_1()\n    model.features[0] = nn.Conv2d(1, 64, 3, stride=2)\n    return model\n"
    )
    assert load("grey:net").args[0].shape == (1, 1, 224, 224)
