"""Measure the speed of a training step: python results/bench.py [options of train.py].

The run that the options describe is built, but not trained. A matrix product, the drawing of a
batch and the training step are timed, on a GPU the step kernel by kernel and as a graph. The table
goes to runs/bench.json too.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from eval import provenance, run_main
from hgn import write_file

LEAST_SECONDS = 2  # that a median is taken over


def timed(what, n, function, *arguments):
    """Time a call that does n things: the first call, which compiles, and the median after it."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times = []
    while len(times) < 4 or sum(times[1:]) < LEAST_SECONDS:
        begin = time.perf_counter()
        function(*arguments)
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    first, *others = times
    s = statistics.median(others)
    print(f"{what:<42}{1e3 * s:9.4g} ms{n / s:10.4g}/s, first {first:.3g} s")
    peak = torch.cuda.max_memory_allocated()  # 0 without a GPU
    return {"what": what, "first_s": first, "s": s, "per_s": n / s, "peak_bytes": peak}


def bench(given):
    """Time the run that the given options describe."""
    device = given.pop("device", None)
    compile = given.pop("compile", None)
    options = train.settle(given)
    torch.manual_seed(options.seed)
    recipe = train.recipe_of(options, device, compile)
    model = recipe.build()
    step = train.step_of(recipe, model, train.optimisers_of(recipe, model))
    batch = recipe.batch(options.steps)  # with the farthest horizon
    a = torch.randn(4096, 4096, device=recipe.device)
    table = [timed("matmul of 4096, TFLOP", 2 * 4096**3 / 1e12, torch.matmul, a, a)]
    table.append(timed("batch", options.batch_size, recipe.batch, options.steps))
    if options.system:

        def draw():  # with the trajectories of POOL batches
            recipe.source.pool = None
            recipe.batch(options.steps)

        n = train.POOL * options.batch_size
        table.append(timed("trajectories of a pool, and a batch", n, draw))
    if isinstance(step, train.Graphed):
        what = "training step, kernel by kernel"
        table.append(timed(what, options.batch_size, step.step, *batch))
        for _ in range(train.Graphed.warm_up):  # the next call captures the graph
            step(*batch)
    table.append(timed("training step", options.batch_size, step, *batch))
    threads = torch.get_num_threads()
    report = {**provenance(), "threads": threads, "config": vars(options), "table": table}
    Path("runs").mkdir(exist_ok=True)
    write_file("runs/bench.json", json.dumps(report, indent=1).encode())
    print("wrote runs/bench.json")


if __name__ == "__main__":
    run_main(bench, train.parse())
