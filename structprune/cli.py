"""`structprune` on the command line: arguments → pipeline. No logic lives here.

Progress goes to stderr and the summary to stdout, so that both can be piped. Exit status: 0 done and verified, 2 bad input or
usage, 3 the target cannot be reached, 1 an error of our own.
"""

from __future__ import annotations

import atexit
import gc
import itertools
import json
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from structprune import settings, terminal
from structprune.errors import InputError, StructpruneError, one_line

if TYPE_CHECKING:  # torch is imported when a command runs, not for --help
    from structprune.backends.benchmark import Comparison
    from structprune.frontends.load import Loaded

app = typer.Typer(
    help="Make a trained network smaller and measurably faster: prune whole channels, verify, export to ONNX, benchmark.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ModelSpec = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="a file (.pt .pth .pt2 .safetensors .onnx), a folder of transformers, `demo`, or a constructor: timm:NAME, torchvision:NAME, "
        "package.module:function",
    ),
]
Arch = Annotated[str | None, typer.Option("--arch", help="constructor for a state_dict or safetensors file; transformers:CLASS for a folder")]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        help="shape of an example input, such as 1x3x224x224 or 2x16:int64; once for each input. Of an .onnx file also by name, x=1x3x64x64, "
        "for sizes that it leaves free; sr:=16000 fixes the value of an input that decides which branch runs",
    ),
]
Trust = Annotated[bool, typer.Option("--trust-pickle", help="load a pickled module: this runs code of whoever wrote the file")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of the summary")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="say nothing on the way to the result")]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE.toml", help="options under the names of their flags; those typed win", callback=settings.use, is_eager=True
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]
Ignore = Annotated[list[str] | None, typer.Option("--ignore", help="name or pattern of modules or tensors that keep their channels; repeatable")]
Dynamic = Annotated[
    list[str] | None,
    typer.Option("--dynamic", help="axes that may change size beside the batch: 2,3 of every input, or NAME=1 of one; repeatable"),
]
Threads = Annotated[int | None, typer.Option("--threads", help="threads of the runtime; as torch is set by default")]
TimeLimit = Annotated[float | None, typer.Option("--time-limit", metavar="SECONDS", help="end with an error, and nothing written, after so long")]
MemoryLimit = Annotated[str | None, typer.Option("--memory-limit", metavar="SIZE", help="end with an error where more is needed, such as 8GB")]
Seed = Annotated[int, typer.Option("--seed", help="seed of everything random")]

_state = {"debug": False}
_NO_MEMORY = "there is not enough memory for this model; raise --memory-limit if you set one, or give smaller inputs or fewer samples"
_NO_SAMPLES = "no samples were given: a few hundred unlabelled ones keep most of the accuracy, as --calibration photos/"


@app.command()
def compress(
    context: typer.Context,
    model: ModelSpec,
    target: Annotated[
        str,
        typer.Option(
            "--target",
            help="what must hold: latency=0.5 or 4ms, channels=, macs=2G, params=, memory=, size=10MB, joined by commas; a front: latency=0.3:0.9:7",
        ),
    ] = "macs=0.5",
    dead: Annotated[bool, typer.Option("--dead", help="remove only channels that contribute nothing; the answer stays the same to rounding")] = False,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            metavar="DATA",
            help="unlabelled samples: a folder of pictures, .npy, .npz, .safetensors, module:function, or `synthetic`: made from batch norms",
        ),
    ] = None,
    compensate: Annotated[bool, typer.Option(help="fit the weights that are left to the calibration samples")] = True,
    matching: Annotated[
        int, typer.Option("--matching", metavar="STEPS", help="then fit all layers together, by gradients, without labels: a few hundred steps")
    ] = 0,
    sharded: Annotated[bool, typer.Option("--sharded", help="under torchrun: the processes share the work on the samples")] = False,
    evaluate: Annotated[
        str | None, typer.Option("--evaluate", metavar="MODULE:FUNCTION", help="a function of the model that returns a score, higher is better")
    ] = None,
    criterion: Annotated[
        str, typer.Option("--criterion", help="which channels matter: auto, reconstruction, l1, l2, ...: docs/criteria.md")
    ] = "auto",
    out: Annotated[Path | None, typer.Option("--out", help="output directory; by default structprune-NAME here")] = None,
    arch: Arch = None,
    input: Inputs = None,
    ignore: Ignore = None,
    dynamic: Dynamic = None,
    allocation: Annotated[str, typer.Option("--allocation", help="how widths are found: auto, milp, greedy, uniform")] = "auto",
    align: Annotated[int | None, typer.Option("--align", help="widths are multiples of this, instead of the measured steps")] = None,
    runtime: Annotated[str, typer.Option("--runtime", help="what it is deployed in, and timed: onnxruntime, torch, torch.compile")] = "onnxruntime",
    device: Annotated[str, typer.Option("--device", help="where it is deployed, and timed: cpu, cuda or tensorrt")] = "cpu",
    threads: Threads = None,
    seed: Seed = 0,
    trust_pickle: Trust = False,
    half: Annotated[bool, typer.Option("--half", help="the small model computes in float16, in all its files")] = False,
    quantize: Annotated[str | None, typer.Option("--quantize", metavar="int8", help="also write model.int8.onnx; needs --calibration")] = None,
    opset: Annotated[int | None, typer.Option("--opset", help="version of ONNX's operators; by default that of torch's exporter")] = None,
    latency: Annotated[bool, typer.Option("--latency/--no-latency", help="measure both models")] = True,
    time_limit: TimeLimit = None,
    memory_limit: MemoryLimit = None,
    config: Config = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compress MODEL, verify the result, and write original.onnx, model.onnx, model.pt2, weights, plan and report."""
    _state["debug"] = debug
    _limit(time_limit, memory_limit)
    silent = sharded and _rank() > 0  # the first process speaks and writes
    with terminal.progress(quiet or silent) as say:
        from structprune import pipeline
        from structprune.backends.directory import check_writable
        from structprune.frontends.trace import parse_dynamic
        from structprune.result import check_form

        target = "dead" if dead else target
        directory = out if out is not None else Path("structprune-" + _file_name(model))
        check_writable(directory)
        loaded = _loaded(say, model, arch=arch, inputs=input or (), trust_pickle=trust_pickle, seed=seed)
        options: dict[str, Any] = {
            "example_kwargs": loaded.kwargs,
            "calibration": _calibration(say, calibration, loaded, seed),
            "compensate": compensate,
            "matching": matching,
            "evaluate": loaded.evaluate if evaluate is None else _evaluation(evaluate),
            "dynamic": parse_dynamic(dynamic or ()),
            "criterion": criterion,
            "ignore": tuple(ignore or ()),
            "allocation": allocation,
            "align": align,
            "runtime": runtime,
            "device": device,
            "threads": threads,
            "seed": seed,
            "sharded": sharded,
            "progress": say,
        }
        check_form(loaded.model, half, quantize, options["calibration"] is not None)
        saving: dict[str, Any] = {
            "latency": latency,
            "half": half,
            "quantize": quantize,
            "opset": opset,
            "model_name": loaded.name,
            "notes": (*loaded.notes, *([_NO_SAMPLES] if options["calibration"] is None and not dead else [])),
            "typed": {"command": shlex.join(["structprune", *sys.argv[1:]]), "config": context.obj},
        }
        answer: Any
        show: Callable[[], None]
        if ":" in target:
            from structprune.backends import front

            results = pipeline.front(loaded.model, loaded.args, target, **options)
            if silent:
                return
            reports = {r.plan.target.replace("=", "-"): r for r in results}
            rows = front.rows_of({name: r.save(directory / name, **saving) for name, r in reports.items()})
            front.save(rows, directory, loaded.name)
            answer, show = rows, partial(print, front.table(rows))
        else:
            result = pipeline.compress(loaded.model, loaded.args, target, **options)
            if silent:
                return
            report = result.save(directory, **saving)
            answer, show = report.to_dict(), partial(terminal.show_report, report)
    _answer(answer, show, directory, as_json)


@app.command()
def inspect(
    model: ModelSpec,
    other: Annotated[str | None, typer.Argument(metavar="", hidden=True)] = None,
    arch: Arch = None,
    input: Inputs = None,
    why: Annotated[
        list[str] | None,
        typer.Option("--why", metavar="LAYER [LAYER]", help="what a layer is coupled to and what freezes it; of two, what couples them"),
    ] = None,
    seed: Seed = 0,
    trust_pickle: Trust = False,
    config: Config = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """What can be pruned in MODEL, what cannot, and why."""
    _state["debug"] = debug
    layers = [*(why or ()), *([other] if other else ())]
    if len(layers) > 2 or (other and not why):
        raise InputError("inspect takes one MODEL, and --why one or two layers")
    with terminal.progress(quiet) as say:
        from structprune import pipeline

        loaded = _loaded(say, model, arch=arch, inputs=input or (), trust_pickle=trust_pickle, seed=seed)
        say("trace and infer")
        if why:
            explanation = pipeline.explain(loaded.model, loaded.args, *layers, example_kwargs=loaded.kwargs)
        else:
            groups = pipeline.inspect(loaded.model, loaded.args, example_kwargs=loaded.kwargs)
    if why:
        print(explanation)
        return
    if as_json:
        print(json.dumps(groups.to_dict(), indent=1))
        return
    terminal.show_groups(groups)


@app.command()
def bench(
    candidates: Annotated[
        list[str] | None, typer.Argument(metavar="A [B ...]", help="ONNX files, .pt2 files or output directories; the first is the baseline")
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="of ONNX files on the CPU also: the time by operator, and what did not shrink")] = False,
    table: Annotated[bool, typer.Option("--table", help="print the measured times of operators that `compress` has kept")] = False,
    input: Inputs = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda or tensorrt")] = "cpu",
    threads: Annotated[str, typer.Option("--threads", help="threads of the runtime; several, such as 1,2, are measured one after the other")] = "",
    batch: Annotated[str, typer.Option("--batch", help="batch sizes in the place of the inputs' own, such as 1,8,32")] = "",
    size: Annotated[str, typer.Option("--size", help="heights and widths of pictures in the place of the inputs' own, such as 160,224")] = "",
    seconds: Annotated[float, typer.Option("--seconds", help="time limit of each measurement")] = 10.0,
    compiled: Annotated[bool, typer.Option("--compile", help="run .pt2 files under torch.compile")] = False,
    chart: Annotated[Path | None, typer.Option("--chart", metavar="FILE", help="draw it: FILE.svg, .png or .pdf")] = None,
    resources: Annotated[bool, typer.Option(help="peak memory and energy too, where the machine tells")] = True,
    seed: Seed = 0,
    config: Config = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Latency side by side: interleaved rounds, ratios with intervals. An output directory alone compares its two ONNX files."""
    _state["debug"] = debug
    if table == bool(candidates):
        raise InputError("bench takes files or output directories to compare, or --table alone")
    if table:
        from structprune.backends import tables

        rows = tables.rows()
        print(json.dumps(rows) if as_json else "\n".join(f"{s:>16} {1e3 * t:9.4f} ms  {what}  {place}" for place, what, s, t in rows))
        return
    settings = [_numbers("--threads", threads), _numbers("--batch", batch), _numbers("--size", size)]
    answers: list[dict[str, Any]] = []
    texts: list[str] = []
    drawn: dict[str, Comparison] = {}
    with terminal.progress(quiet) as say:
        from structprune.backends import charts, profiles
        from structprune.backends.benchmark import benchmark
        from structprune.backends.candidates import example_inputs, named, resized

        if chart is not None:
            charts.check(chart)
        chosen = named(candidates or [])
        for number, samples, side in itertools.product(*settings):
            inputs = resized(example_inputs(chosen, input or (), seed), samples, side)
            compared = benchmark(
                chosen, inputs, device=device, threads=number, seconds=seconds, seed=seed, resources=resources, compiled=compiled, progress=say
            )
            found = profiles.profiles(chosen, inputs, compared.threads) if profile else {}
            shapes = ", ".join("×".join(map(str, t.shape)) for t in inputs)
            answers.append(compared.to_dict() | {"inputs": [list(t.shape) for t in inputs]} | (profiles.to_dict(found) if found else {}))
            texts.append(f"inputs {shapes}\n{compared}" + (profiles.to_text(found) if found else ""))
            drawn[f"{shapes}\n{compared.threads} thread{'' if compared.threads == 1 else 's'}"] = compared
        if chart is not None:
            charts.save(charts.latencies(drawn), chart)
    if as_json:
        print(json.dumps(answers[0] if len(answers) == 1 else answers, indent=1))
    else:
        print("\n\n".join(texts))


def _limit(seconds: float | None, memory: str | None) -> None:
    from structprune import limits

    if seconds is not None:
        limits.limit_time(seconds)
    if memory is not None:
        limits.limit_memory(memory)


def _numbers(option: str, text: str) -> list[int | None]:
    """The numbers of a list with commas; of an empty one, None."""
    try:
        numbers: list[int | None] = [int(part) for part in text.split(",")] if text else [None]
    except ValueError as error:
        raise InputError(f"{option} {text!r}: write numbers with commas between them, such as 1,2") from error
    if any(n is not None and n < 1 for n in numbers):
        raise InputError(f"{option} {text!r}: numbers start at 1")
    return numbers


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="an output directory of `structprune compress`")],
    config: Config = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Every check again, from the saved files alone."""
    _state["debug"] = debug
    with terminal.progress(quiet) as say:
        from structprune.backends.directory import verify_directory

        say(f"verify {directory}")
        found = verify_directory(directory)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        print("\n".join(f"{name:<36} {value}" for name, value in found.items() if not isinstance(value, (list, dict))))
        print(f"{directory}: verified")


@app.command()
def compare(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR [DIR ...]", help="output directories of `structprune compress`, of fronts too")],
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="write a page that links to the reports")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compressions side by side: what each kept of latency, work, parameters and accuracy."""
    _state["debug"] = debug
    from structprune.backends import front

    rows = front.rows_of(front.read(directories))
    if html is not None:
        front.save_page(rows, html, f"{len(rows)} compressions")
    print(json.dumps(rows, indent=1) if as_json else front.table(rows))


@app.command()
def recover(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="an output directory of `structprune compress`")],
    train: Annotated[
        str, typer.Option("--train", metavar="MODULE:FUNCTION", help="returns batches of inputs, or of (inputs, labels); or does so for an epoch")
    ],
    evaluate: Annotated[
        str | None, typer.Option("--evaluate", metavar="MODULE:FUNCTION", help="a function of the model that returns a score, higher is better")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="output directory; by default DIR-recovered")] = None,
    epochs: Annotated[int, typer.Option("--epochs", help="at most so many")] = 1,
    lr: Annotated[float | None, typer.Option("--lr", help="the highest learning rate; by default 0.02 (SGD) or 3e-4 (AdamW)")] = None,
    distill: Annotated[list[str] | None, typer.Option("--distill", help="what is learnt of the teacher: logits, dist, mse; repeatable")] = None,
    labels: Annotated[bool | None, typer.Option("--labels/--no-labels", help="demand or ignore labels; by default those given are used")] = None,
    patience: Annotated[int | None, typer.Option("--patience", help="end when so many epochs brought no better --evaluate; keep the best")] = None,
    checkpoint: Annotated[Path | None, typer.Option("--checkpoint", metavar="FILE", help="where the run stands; if it exists, go on")] = None,
    teacher: Annotated[str | None, typer.Option("--teacher", metavar="MODEL", help="the dense model, instead of DIR/original.onnx")] = None,
    arch: Arch = None,
    device: Annotated[str, typer.Option("--device", help="where it trains: cpu, cuda or cuda:N")] = "cpu",
    seed: Seed = 0,
    trust_pickle: Trust = False,
    config: Config = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train the small model of DIR for a short while, with the original as its teacher; torchrun shares the work among processes."""
    _state["debug"] = debug
    with terminal.progress(quiet) as say:
        from structprune import teaching
        from structprune.frontends.load import load

        target = out if out is not None else directory.with_name(f"{directory.absolute().name}-recovered")
        options: dict[str, Any] = {
            "teacher": load(teacher, arch=arch, trust_pickle=trust_pickle, seed=seed).model if teacher is not None else None,
            "evaluate": _evaluation(evaluate) if evaluate is not None else None,
            "epochs": epochs,
            "lr": lr,
            "distill": tuple(distill or ("logits",)),
            "labels": "auto" if labels is None else labels,
            "patience": patience,
            "checkpoint": checkpoint,
            "device": device,
            "seed": seed,
        }
        report = teaching.recover_directory(directory, train, target, progress=say, **options)
    if _rank() == 0:
        _answer(report.to_dict(), partial(terminal.show_report, report), target, as_json)


def _rank() -> int:
    """The number of this process under torchrun, from 0."""
    from structprune import processes

    return processes.rank()


def _answer(answer: Any, show: Callable[[], None], directory: Path, as_json: bool) -> None:
    """What was made, as JSON or for people, where it lies, and what to do with it."""
    page, again = ("report.html", "time both models again: structprune bench")
    if isinstance(answer, list):  # a front
        page, again = ("front.html", "print the table again: structprune compare")
    if as_json:
        print(json.dumps(answer, indent=1))
    else:
        show()
        print(f"\nwritten to {directory}/\nopen {directory / page} in a browser; {again} {shlex.quote(str(directory))}")


def _loaded(say: Callable[[str], None], model: str, **options: Any) -> Loaded:
    """The model that the user named; what was inferred about it is said."""
    from structprune.frontends.load import load

    say(f"load {model}")
    loaded = load(model, **options)
    for note in loaded.notes:
        say(note)
    return loaded


def _calibration(say: Callable[[str], None], spec: str | None, loaded: Loaded, seed: int) -> Any:
    """The samples that the user named, or that come with the demo; `synthetic` ones are made when the model is traced."""
    if spec is None:
        return loaded.calibration
    from structprune.calibrate.synthetic import SYNTHETIC
    from structprune.frontends.calibration import calibration

    if spec == SYNTHETIC:
        return spec
    data, notes = calibration(spec, loaded.model, loaded.args, seed=seed)
    for note in notes:
        say(note)
    return data


def _evaluation(spec: str) -> Callable[[Any], float]:
    from structprune.frontends.users_code import called, named_object

    form = "package.module:function; --evaluate names a function of the model"
    function = named_object(spec, form, "a function of the model that returns a number")
    return lambda model: float(called(spec, function, model))


def _file_name(spec: str) -> str:
    """A model's name as part of a file name."""
    stem = Path(spec).stem if Path(spec).suffix in (".pt", ".pth", ".pt2", ".safetensors", ".bin", ".ckpt", ".onnx") else spec
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in stem).strip("-.")


def main() -> None:
    """Run the command line; every error that we raise on purpose is one line and an exit status."""
    from structprune.limits import TimeIsUp, is_out_of_memory

    atexit.register(gc.freeze)  # or Python looks through all that torch has made once more before it ends, for a second or two
    try:
        app()
    except TimeIsUp as error:
        _fail(error, InputError.exit_status)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if is_out_of_memory(error):
            _fail(error, InputError.exit_status, _NO_MEMORY)
        if isinstance(error, StructpruneError):
            _fail(error, error.exit_status)
        if isinstance(error, OSError):
            _fail(InputError(f"{type(error).__name__}: {error}"), InputError.exit_status)
        _fail(error, 1, f"internal error: {one_line(error)}; run again with --debug and report it with the traceback")


def _fail(error: BaseException, status: int, text: str = "") -> None:
    if _state["debug"]:
        import traceback

        traceback.print_exception(error)
    print(f"structprune: {text or ' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
