"""The report: both of its faces say what happened, plainly, and cope with whatever is missing or hostile."""

import re
from copy import deepcopy
from html.parser import HTMLParser
from typing import Any

import pytest

from structprune.backends.report import FORMAT, Report
from structprune.errors import InputError

GROUPS = [
    {"name": "conv1", "channels": 64, "kept": 32, "exact": True, "reason": "", "members": ["conv1.weight[0]", "bn1.weight[0]", "conv2.weight[1]"]},
    {"name": "layer1.0.conv2", "channels": 256, "kept": 0, "exact": False, "reason": "a mean runs over the kept ones", "members": ["norm.weight[0]"]},
    {"name": "layer1.1.conv2", "channels": 100, "kept": 100, "exact": True, "reason": "", "members": ["layer1.1.conv2.weight[0]"]},
]
DATA: dict[str, Any] = {
    "format": FORMAT,
    "model": "torchvision:resnet50",
    "target": "macs=0.5",
    "criterion": "l2",
    "seed": 0,
    "params": {"before": 25_557_032, "after": 12_000_000},
    "macs": {"before": 4_089_184_256, "after": 2_044_592_128},
    "onnx_bytes": {"before": 102_400_000, "after": 48_100_000},
    "latency_ms": {
        "onnxruntime-cpu": {
            "before": {"median": 61.234, "low": 60.11, "high": 63.02},
            "after": {"median": 33.52, "low": 32.9, "high": 34.4},
            "ratio": {"median": 0.5464, "low": 0.532, "high": 0.559},
            "verdict": "pruned: 1.83x faster (1.79-1.88)",
            "threads": 2,
            "device": "cpu",
            "notes": ["only 9 rounds"],
        }
    },
    "accuracy": {"before": 0.93, "after": 0.8812},
    "verification": {
        "masked_error": 0.0,
        "tolerance": 1e-6,
        "onnx_error": 3.2e-7,
        "exact": False,
        "inexact": [{"name": "layer1.0.conv2", "reason": "a mean runs over the kept ones"}],
        "module": "the user's own class",
        "module_note": "checked by comparison",
        "dynamic_batch": True,
    },
    "groups": GROUPS,
    "frozen": [
        {"name": "conv1", "channels": 3, "reason": "model input", "at": ""},
        {"name": "fc", "channels": 1000, "reason": "model output", "at": "models/resnet.py:283"},
        *[{"name": f"pool{i}", "channels": 7, "reason": "a window slides along this axis", "at": "models/resnet.py:99"} for i in range(20)],
    ],
    "outline": [
        {"layer": "conv1.weight", "operator": "conv2d", "at": "models/resnet.py:268", "reads": ["f0"], "makes": ["g0"]},
        {"layer": "layer1.0.conv2.weight", "operator": "conv2d", "at": "models/resnet.py:92", "reads": ["g0"], "makes": ["g1"]},
        {"operator": "add", "at": "models/resnet.py:102", "ties": ["g0"]},
        {"layer": "fc.weight", "operator": "linear", "at": "models/resnet.py:283", "reads": ["g1", "g2"], "makes": ["f1"]},
    ],
    "operators": {
        "operators": {
            "original": {"Conv": {"kernels": 5, "seconds": 0.05}, "Add": {"kernels": 1, "seconds": 0.002}},
            "model": {"Conv": {"kernels": 5, "seconds": 0.025}, "Add": {"kernels": 1, "seconds": 0.002}},
        },
        "not_shrunk": {"model": [{"name": "node_add", "operator": "Add", "before": 0.002, "after": 0.002}]},
    },
    "options": {"criterion": "l2", "ignore": ["head", "stem*"], "threads": 2},
    "command": "structprune compress torchvision:resnet50 --target macs=0.5",
    "notes": ["random weights: accuracy says nothing"],
    "seconds": {"trace": 0.9, "verify": 3.25},
    "environment": {"cpu": "a processor", "cores": 2, "gpus": [], "providers": ["CPU", "CUDA"]},
}
OPTIONAL = sorted(DATA.keys() - {"format"})


def data_with(**changes: Any) -> dict[str, Any]:
    return deepcopy(DATA) | changes


def with_ratio(median: float, low: float, high: float) -> dict[str, Any]:
    data = data_with()
    data["latency_ms"]["onnxruntime-cpu"]["ratio"] = {"median": median, "low": low, "high": high}
    return data


class Page(HTMLParser):
    """What a browser would find: checks that tags balance, and collects the text of each kind of element."""

    VOID = ("meta", "wbr", "input")

    def __init__(self, source: str):
        super().__init__()
        self.open: list[str] = []
        self.kinds: set[str] = set()
        self.texts: dict[str, list[str]] = {}
        self.labels: list[str] = []
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.kinds.add(tag)
        for name, value in attrs:
            leads_out = name in ("src", "action", "data") or (name in ("href", "xlink:href") and not value.startswith("#"))
            assert not (name.startswith("on") or leads_out), f"{tag} {attrs} does something"
            if name == "aria-label":
                self.labels.append(value)
        if tag not in self.VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open}"
        self.open.pop()

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts[tag][-1] += data

    def text(self, tag: str = "body") -> str:
        return "\n".join(self.texts.get(tag, [])).replace("\u00a0", " ").replace("\u2011", "-")


def html(data: dict[str, Any], tmp_path) -> str:
    path = tmp_path / "report.html"
    Report(data).save_html(path)
    return path.read_text(encoding="utf-8")


def page(data: dict[str, Any], tmp_path) -> Page:
    return Page(html(data, tmp_path))


# ----------------------------------------------------------------------------------------------------------------- JSON


def test_round_trip(tmp_path):
    Report(DATA).save_json(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json").to_dict() == DATA


def test_to_dict_shares_nothing():
    report = Report(data_with())
    report.to_dict()["groups"].clear()
    assert report.to_dict() == DATA


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"{}", b'{"format": "structprune-plan/1"}'])
def test_load_refuses_what_is_no_report(content, tmp_path):
    path = tmp_path / "report.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"report\.json: "):
        Report.load(path)


def test_load_names_a_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.json"):
        Report.load(tmp_path / "nothing.json")


# --------------------------------------------------------------------------------------------------------------- verdict


@pytest.mark.parametrize(
    ("ratio", "claim"),
    [
        ((0.5464, 0.532, 0.559), "1.83× faster with ONNX Runtime on CPU."),
        ((0.97, 0.94, 1.02), "No gain with ONNX Runtime on CPU."),
        ((1.02, 0.99, 1.05), "No gain with ONNX Runtime on CPU."),
        ((0.998, 0.997, 0.999), "No gain with ONNX Runtime on CPU."),  # sure, but less than anybody would notice
        ((1.12, 1.08, 1.16), "Slower: 1.12× the time with ONNX Runtime on CPU."),
    ],
)
def test_headline_claims_no_more_than_the_interval(ratio, claim, tmp_path):
    data = with_ratio(*ratio)
    assert page(data, tmp_path).text("h1") == claim
    assert str(Report(data)).splitlines()[1] == claim


def test_headline_names_every_runtime(tmp_path):
    data = with_ratio(0.5, 0.49, 0.51)
    data["latency_ms"]["torch-cuda"] = with_ratio(1.0, 0.9, 1.1)["latency_ms"]["onnxruntime-cpu"]
    assert page(data, tmp_path).text("h1") == "2.00× faster with ONNX Runtime on CPU; no gain with PyTorch on CUDA."


@pytest.mark.parametrize(("error", "tolerance"), [(1e-3, 1e-6), (float("nan"), 1e-6), (0.0, None), (None, 1e-6)])
def test_says_verified_only_if_it_is(error, tolerance, tmp_path):
    assert " Verified: it answers as the original" in page(DATA, tmp_path).text("header")
    data = data_with()
    data["verification"] |= {"masked_error": error, "tolerance": tolerance}
    for text in (page(data, tmp_path).text(), str(Report(data))):
        assert "Not verified" in text
        assert "Verified:" not in text


# ------------------------------------------------------------------------------------------------------------------ text


def test_summary_is_aligned_and_humanised():
    lines = str(Report(DATA)).splitlines()
    assert lines[0] == "torchvision:resnet50 · target macs=0.5 · criterion l2 · seed 0"
    assert lines[3:10] == [
        "                                before    after          kept",
        "parameters                      25.6 M   12.0 M        47.0 %",
        "multiply-accumulates             4.1 G    2.0 G        50.0 %",
        "ONNX file                     102.4 MB  48.1 MB        47.0 %",
        "channels that can be pruned        420      132        31.4 %",
        "latency, ONNX Runtime on CPU   61.2 ms  33.5 ms        54.6 %  1.83× faster (95 % interval 1.79–1.88)",
        "accuracy                       93.00 %  88.12 %  -4.88 points",
    ]
    assert lines[11] == "frozen   model input; model output; a window slides along this axis ×20"
    assert lines[-2:] == ["note     random weights: accuracy says nothing", "note     latency, ONNX Runtime on CPU: only 9 rounds"]


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.0 K"), (999_949, "999.9 K"), (999_999, "1.0 M"), (4.1e9, "4.1 G"), (7e12, "7.0 T"), (2e15, "2.0 P")],
)
def test_counts_are_humanised(number, text):
    lines = str(Report({"params": {"before": number, "after": number}})).splitlines()
    assert re.split(r"\s{2,}", next(line for line in lines if line.startswith("parameters")))[1:3] == [text, text]


# ------------------------------------------------------------------------------------------------------------------ HTML


def test_page_is_well_formed_and_loads_nothing(tmp_path):
    source = html(DATA, tmp_path)
    assert {"title", "style", "table", "svg", "details"} <= Page(source).kinds
    for forbidden in ("https://", "<link", "<img", "@import", "url(h", "url(/", "import("):
        assert forbidden not in source.lower()
    assert {found.group() for found in re.finditer("http://[^\"' ]*", source)} <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert source.count("<script") == 1


def test_page_tells_all_that_the_data_holds(tmp_path):
    text = page(DATA, tmp_path).text()
    words = [g["name"] for g in GROUPS] + [m for g in GROUPS for m in g["members"]] + [f"pool{i} (7)" for i in range(20)]
    words += ["25.6 M", "12.0 M", "4.1 G", "102.4 MB", "61.2 ms", "60.1–63.0", "54.6 %", "53.2–55.9", "93.00 %", "-4.88 points"]
    words += [
        "models/resnet.py:283",
        "largest difference 0, tolerance 1e-6",
        "largest difference 3.2e-7",
        "the user's own class: checked by comparison",
    ]
    words += ["not exact: a mean runs over the kept ones", "random weights", "only 9 rounds", "3.25", "4.15", "a processor", "CPU, CUDA"]
    words += ["node_add", "2.00", "head, stem*", DATA["command"], "models/resnet.py:102"]
    assert [word for word in words if word not in text] == []


def test_repeated_reasons_are_collapsed(tmp_path):
    text = page(DATA, tmp_path).text()
    assert text.count("a window slides along this axis") == 1
    assert text.count("models/resnet.py:99") == 1
    assert "pool0 (7), pool1 (7) + 18 more" in text


def test_marks_of_charts_say_what_they_show(tmp_path):
    found = page(DATA, tmp_path)
    for g in GROUPS:
        assert f"{g['name']}: {g['kept']} of {g['channels']} channels" in found.labels
    assert {"conv before: 50.0 ms", "conv after: 25.0 ms"} <= set(map(str.lower, found.labels))
    assert "layer1.0" in found.text("text").splitlines()


def test_the_map_says_what_hangs_together_and_why(tmp_path):
    labels = page(DATA, tmp_path).labels
    assert "conv1: 32 of 64 channels stay. They stand together in conv1.weight[0], bn1.weight[0], conv2.weight[1]." in labels
    assert "conv1: its 3 entries stay: model input" in labels
    assert "fc: its 1000 entries stay: model output (models/resnet.py:283)" in labels
    assert "conv1.weight: conv2d at models/resnet.py:268; reads conv1; makes conv1" in labels
    assert "values: add at models/resnet.py:102; ties conv1" in labels


def test_names_from_users_are_text(tmp_path):
    hostile = "<script>alert('x')</script>\"&amp;"

    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {poisoned(key) if key in ("trace", "cpu", "onnxruntime-cpu") else key: poisoned(v) for key, v in value.items()}
        if isinstance(value, list):
            return [poisoned(v) for v in value]
        return hostile if isinstance(value, str) else value

    data = poisoned(DATA)
    source = html(data, tmp_path)
    assert source.count("<script>") == source.count("</script>") == 1
    assert "alert(" not in Page(source).text("script")
    assert hostile in Page(source).text("title")
    assert any(hostile in label for label in Page(source).labels)
    assert source.count("&lt;script&gt;") > 20


def test_a_name_that_is_no_unicode_is_no_obstacle(tmp_path):
    assert page(data_with(model="mod\udce9le.pt"), tmp_path).text("h1")


@pytest.mark.parametrize("empty", [None, {}])
def test_what_was_not_measured_is_said(empty, tmp_path):
    data = data_with(latency_ms=empty, accuracy=None, onnx_bytes=None)
    text = page(data, tmp_path).text()
    for words in ("Latency was not measured", "No ONNX file was exported.", "Accuracy was not measured.", "not exported", "not measured"):
        assert words in text
    assert "Latency was not measured, so whether it is faster is unknown." in str(Report(data))


@pytest.mark.parametrize("missing", OPTIONAL)
def test_any_part_may_be_missing(missing, tmp_path):
    data = data_with()
    del data[missing]
    page(data, tmp_path)
    assert str(Report(data))


def test_nothing_but_a_format_is_a_report(tmp_path):
    text = page({"format": FORMAT}, tmp_path).text()
    for words in ("unnamed model", "Parameters were not counted.", "Not verified", "There is no group", "Not recorded.", "not recorded"):
        assert words in text
    assert "Not verified" in str(Report({"format": FORMAT}))


def test_half_of_a_pair_is_shown_as_half(tmp_path):
    data = data_with(onnx_bytes={"before": None, "after": 48_100_000}, accuracy={"before": 0.9})
    data["latency_ms"]["onnxruntime-cpu"] = {"after": {"median": 0.01234}}
    lines = str(Report(data)).splitlines()
    assert "ONNX file – 48.1 MB –" in [" ".join(line.split()) for line in lines]
    assert "latency, ONNX Runtime on CPU – 0.0123 ms – not compared with the original" in [" ".join(line.split()) for line in lines]
    page(data, tmp_path)


def test_thousands_of_groups_stay_below_three_megabytes(tmp_path):
    members = [f"backbone.stages.2.blocks.117.{part}[{dim}]" for part in ("conv.weight", "norm.weight", "norm.bias") for dim in (0, 1)]
    groups = [
        {"name": f"backbone.stages.{i % 4}.blocks.{i}.conv", "channels": 512, "kept": i % 512, "exact": True, "members": members} for i in range(3000)
    ]
    steps = [{"layer": g["name"], "operator": "conv2d", "at": "net.py:7", "reads": [f"g{i // 9}"], "makes": [f"g{i}"]} for i, g in enumerate(groups)]
    source = html(data_with(groups=groups, outline=[*steps, *steps]), tmp_path)
    assert len(source.encode()) < 3_000_000
    assert Page(source).text("h1")
