"""Random networks by the thousand, with random plans: is any answer wrong, does anything crash?

    python bench/fuzz.py [--networks 3000] [--seed 0] [--write]

The networks and the check are those of tests/test_random_networks.py: chains of drawn steps over all operator families, each small
model compared with two oracles that know nothing of each other. Every chunk of networks has a seed of its own; a failing chunk is shrunk by
hypothesis to its smallest network, counted, and the next chunk goes on. --write keeps the counts in bench/results/fuzz.json.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version

import zoo

CHUNK = 50


def chunk(seed: int) -> tuple[int, Counter[str], str]:
    """Networks tried, operators met, and what failed, if anything did."""
    import torch
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from hypothesis import strategies as st
    from networks import networks
    from test_random_networks import check, operators_met

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    operators_met.clear()
    tried = 0

    @seeded(seed)
    @settings(max_examples=CHUNK, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink])
    @given(networks(), st.data())
    def many(network, data):  # type: ignore[no-untyped-def]
        nonlocal tried
        tried += 1
        check(network, data)

    try:
        many()
    except Exception as error:  # whatever it is, it is what this looks for
        return tried, operators_met, f"seed {seed}: " + "".join(traceback.format_exception(error))[-6000:]
    return tried, operators_met, ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0, help="of the first chunk; the others count on")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--write", action="store_true", help="keep the counts in bench/results")
    arguments = parser.parse_args()
    started, tried = time.perf_counter(), 0
    operators: Counter[str] = Counter()
    failures: list[str] = []
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for number, met, failure in pool.map(chunk, range(arguments.seed, arguments.seed + -(-arguments.networks // CHUNK))):
            tried += number
            operators += met
            failures += [failure] if failure else []
            print(f"{tried} networks, {len(operators)} operators, {len(failures)} failures, {time.perf_counter() - started:.0f} s", flush=True)
            if failure:
                print(failure, flush=True)
    print("operators:", ", ".join(f"{name} {count}" for name, count in operators.most_common()))
    print(f"{tried} networks, {len(operators)} operators, {len(failures)} failures")
    if arguments.write:
        counts = {
            "networks": tried,
            "failures": failures,
            "operators": dict(operators.most_common()),
            "seed": arguments.seed,
            "torch": version("torch"),
        }
        (zoo.ROOT / "bench" / "results" / "fuzz.json").write_text(json.dumps(counts, indent=1) + "\n")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
