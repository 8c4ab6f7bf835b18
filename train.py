"""Train a Hamiltonian Generative Network from pixels, or a Neural Hamiltonian Flow on points.

    python train.py --system three_body         # writes runs/three_body/
    python train.py --density two_moons         # a flow; --data points.npy for points of your own
    python train.py --resume                    # goes on with the newest run

    python train.py --bench                     # how fast all this is here

Every batch is simulated and rendered afresh: nothing but the run's folder is written.
"""
import argparse
import gc
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import physics

from eval import (MODELS, TEST_SEED, Help, Parser, Points, TestClips, at_least, fail, flow_table, keep_memory, load, measure,
                  measure_flow, movies, newest_run, pick_device, provenance, read_checkpoint, table)
from hgn import ARCHITECTURES, GECO, HGN, HNN, INTEGRATORS, CentroidEncoder
from nhf import BASES, DENSITIES, NHF, RealNVP
from physics import BACKGROUND, SYSTEMS, initial_states, jitter, noise_floor, render, simulate

DEFAULTS = {"hgn": {"steps": 5000, "batch_size": 16, "lr": 3e-3}, "hnn": {"steps": 5000, "batch_size": 16, "lr": 1e-3},
            "hnn_conv": {"steps": 5000, "batch_size": 16, "lr": 1e-3}, "nhf": {"steps": 5000, "batch_size": 512, "lr": 2e-2},
            "realnvp": {"steps": 10000, "batch_size": 512, "lr": 5e-3}}        # twice as fast a step
ROWS = {"HGN (leapfrog)": (), "HGN (Euler)": ("--integrator", "euler"), "HGN (deterministic)": ("--deterministic",),
        "HGN (no f_psi)": ("--no-f-psi",), "HNN": ("--model", "hnn"), "HNN (conv)": ("--model", "hnn_conv")}
POOL = 64                           # batches whose trajectories are simulated together
KEPT = ("steps", "device", "compile", "resume", "name", "bench", "table")     # options that --resume may change
WORTH_COMPILING = 10000             # steps on a CPU: 20 ms a step saved, 80 s of compilation from an empty cache


def noise(text):
    return "paper" if text == "paper" else at_least(0, float)(text)


def parse():
    parser = Parser(description=__doc__.split("\n")[0], formatter_class=Help)
    data = parser.add_argument_group("data")
    data.add_argument("--system", choices=SYSTEMS, help="what to learn (default: mass_spring)")
    data.add_argument("--density", choices=DENSITIES, help="learn this density instead, with a flow")
    data.add_argument("--data", metavar="POINTS.npy", help="learn the density of these points, (N, D), with a flow")
    data.add_argument("--size", type=int, default=32, help="pixels a side, a multiple of 8 from 16 to 128")
    data.add_argument("--noise", type=noise, default=0.0, help="sigma on every coordinate before painting, or 'paper'")
    data.add_argument("--dt", type=at_least(0, float, above=True), default=0.125, help="time between frames")
    data.add_argument("--window", type=at_least(1), default=30, help="frames to learn from, before and after frame 0")
    data.add_argument("--targets", type=at_least(1), default=8, help="random frames of the window painted for the loss")
    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=MODELS, help="for a system hgn, or the baselines hnn and hnn_conv; for a density nhf or realnvp")
    model.add_argument("--arch", choices=ARCHITECTURES, default="compact", help="paper: the published networks")
    model.add_argument("--latent", type=at_least(1), help="numbers in q (default: the true system's), or maps in q (paper: 16)")
    model.add_argument("--context", type=at_least(1), default=5,
                       help="first frames that the encoder sees; 30: the paper's formula")
    model.add_argument("--integrator", choices=INTEGRATORS, default="leapfrog", help="euler: the paper's ablation")
    model.add_argument("--substeps", type=at_least(1), default=1, help="integrator steps from one frame to the next")
    model.add_argument("--periodic", action=argparse.BooleanOptionalAction, help="q are angles (default: if the true system's are)")
    model.add_argument("--no-f-psi", dest="f_psi", action="store_false", help="ablation: z itself is the initial state")
    model.add_argument("--deterministic", action="store_true", help="ablation: no sampling of z and no KL")
    flow = parser.add_argument_group("flow")
    flow.add_argument("--hamiltonians", type=at_least(1), default=8, help="how many in a row")
    flow.add_argument("--leapfrog-steps", type=at_least(1), default=1, help="of each Hamiltonian")
    flow.add_argument("--kinetic", choices=("mlp", "quadratic"), default="mlp", help="K(p): as in the paper, or c p^2 / 2")
    flow.add_argument("--base", choices=BASES, default="gaussian", help="density that the flow starts from")
    flow.add_argument("--samples", type=at_least(1), default=1, help="draws of p a point in the bound to train on; 1: the ELBO")
    train = parser.add_argument_group("training")
    for name, kind, text in (("steps", at_least(1), "training steps"), ("batch-size", at_least(1), "clips or points a step"),
                             ("lr", at_least(0, float, above=True), "highest learning rate")):
        default = ", ".join(f"{model} {values[name.replace('-', '_')]}" for model, values in DEFAULTS.items())
        train.add_argument(f"--{name}", type=kind, help=f"{text} (default: {default})")
    train.add_argument("--beta", type=at_least(0, float), default=1e-3, help="weight of the KL, see HGN.loss")
    train.add_argument("--consistency", type=at_least(0, float), default=0.3, help="weight of the misfit, see HGN.loss")
    train.add_argument("--geco", action="store_true", help="the paper's constrained loss instead of a fixed beta")
    train.add_argument("--tolerance", type=at_least(0, float, above=True), default=2e-4,
                       help="pixel MSE that --geco asks for")
    train.add_argument("--seed", type=at_least(0), default=0, help="of the weights, the data and the posterior samples")
    run = parser.add_argument_group("run")
    run.add_argument("--name", help="folder under runs/ (default: the system's name, with a number if it is taken)")
    run.add_argument("--resume", nargs="?", const="newest", metavar="CHECKPOINT",
                     help="go on with a run, by default the newest")
    run.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    run.add_argument("--compile", action=argparse.BooleanOptionalAction,
                     help="compile the training step: a minute or more at first, seconds from then on; on a CPU it takes a "
                          "quarter off every step, so the default there is to compile the compact model from "
                          f"{WORTH_COMPILING} steps and nothing else; on a GPU everything")
    run.add_argument("--bench", action="store_true", help="measure instead of training: a table, and runs/bench-DEVICE.json")
    run.add_argument("--table", action="store_true", help="train and measure all rows of the paper's tables on a system, --steps each")
    args = parser.parse_args()
    if args.seed >= 2 ** 20:
        fail(f"--seed must be below {2 ** 20}, not {args.seed}")
    if not args.resume:
        if args.name and Path(args.name).name != args.name:
            fail(f"--name {args.name} is not the name of a folder")
        given = [f"--{k} {getattr(args, k)}" for k in ("system", "density", "data") if getattr(args, k)]
        if len(given) > 1:
            fail(f"{given[0]} and {given[1]} exclude each other: give one")
        flow = bool(args.density or args.data)
        args.model = args.model or ("nhf" if flow else "hgn")
        if flow == args.model.startswith("h"):
            fail(f"--model {args.model} needs {'--system NAME' if flow else '--density NAME or --data POINTS.npy'}")
        for k, v in DEFAULTS[args.model].items():
            setattr(args, k, getattr(args, k) or v)
        if args.model != "hgn" and (args.bench or args.table):
            fail("--bench and --table choose the models themselves: give a --system, or none, and no --model")
        if args.model.startswith("hnn") and not 3 <= args.targets <= min(11, 2 * args.window + 1):
            fail(f"--model {args.model} learns from --targets frames in a row, from 3 to {min(11, 2 * args.window + 1)}, not {args.targets}")
        if flow:
            return args, None, None
        args.system = args.system or "mass_spring"
        if args.latent is None and args.arch == "compact":
            args.latent = initial_states(SYSTEMS[args.system], 1)[0].numel()
        args.periodic = SYSTEMS[args.system].periodic if args.periodic is None else args.periodic
        if args.context > args.window + 1:
            fail(f"--context {args.context} is longer than the {args.window + 1} frames of a training clip: "
                 "raise --window or lower --context")
        return args, None, None
    # The run's own options, then those given on the command line, which may change only what KEPT names.
    path = newest_run() if args.resume == "newest" else Path(args.resume)
    model, checkpoint = load(path)
    config = checkpoint["config"]
    parser.set_defaults(**config)
    args = parser.parse_args()
    changed = [k for k in config if k not in KEPT and getattr(args, k) != config[k]]
    if changed:
        fail(f"--{changed[0].replace('_', '-')} cannot change in a resumed run: start another without --resume")
    if path.name != "checkpoint.pt":
        fail(f"{path} is not in a run's folder: mkdir -p runs/{path.stem} && cp {path} runs/{path.stem}/checkpoint.pt, then resume that")
    if args.steps <= checkpoint["step"]:
        fail(f"{path} has already made {checkpoint['step']} steps: ask for more with --steps")
    if not os.access(path.parent, os.W_OK):
        fail(f"cannot write into {path.parent}: copy the run to a folder of your own")
    return args, path.parent, (model, checkpoint)


def new_folder(args):
    """runs/<name>/, never one that holds a run already."""
    first = args.system or (args.density or Path(args.data).stem) + ("-realnvp" if args.model == "realnvp" else "")
    for name in [args.name] if args.name else itertools.chain([first], (f"{first}-{i}" for i in itertools.count(2))):
        folder = Path("runs") / name
        if not folder.exists():
            try:
                folder.mkdir(parents=True)
            except OSError as error:
                fail(f"cannot make {folder} ({error.strerror}): run from a folder that you may write to")
            return folder
    fail(f"{folder} exists: --resume {folder}/checkpoint.pt goes on with it, another --name starts afresh")


def save(path, checkpoint):
    """All or nothing, and on the disk before it gets its name: a crash while writing leaves the last checkpoint whole."""
    with open(f"{path}.new", "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.new", path)


class Batches:
    """Batch number `step` of a run, the same whenever it is asked for: a resumed run sees what it would have seen.
    All of it is drawn, simulated and painted on the device."""
    def __init__(self, args, device, noise=None):
        """noise: shape of one clip's posterior noise, or None."""
        self.args, self.system, self.device, self.noise, self.pool = args, SYSTEMS[args.system], device, noise, None

    def __call__(self, step):
        """Returns context frames, target frames, their times (B, targets), and the posterior's noise (B, *noise)."""
        args, B, number = self.args, self.args.batch_size, step // POOL
        if self.pool != number:                             # trajectories from -window to window round a random start
            generator = torch.Generator(self.device).manual_seed((args.seed << 20) + number)
            start = initial_states(self.system, B * POOL, generator, self.device)
            length = max(args.window + 1, args.context)
            before, after = (simulate(self.system, *start, length, dt)[0] for dt in (-args.dt, args.dt))
            self.pool, self.q = number, torch.cat((before.flip(1)[:, :-1], after), 1)
            self.frame0 = length - 1
        generator = torch.Generator(self.device).manual_seed((args.seed << 20) + step + 2 ** 19)
        q = self.q[step % POOL * B:(step % POOL + 1) * B]
        # The horizon grows from 5 frames to the whole window over the first 30 % of the run.
        reach = min(args.window, 5 + int(args.window * step / (0.3 * args.steps)))
        times = torch.randint(-reach, reach + 1, (B, args.targets), generator=generator, device=self.device)
        if args.model != "hgn":                             # HNN looks at frames in a row
            times = times[:, :1].clamp(max=reach + 1 - args.targets) + torch.arange(args.targets, device=self.device)
        rows = torch.arange(B, device=self.device).unsqueeze(1)
        seen = torch.cat((q[:, self.frame0:self.frame0 + args.context], q[rows, self.frame0 + times]), 1)
        frames = render(self.system, jitter(self.system, seen, args.noise, generator), args.size)
        noise = self.noise and torch.randn(B, *self.noise, generator=generator, device=self.device)
        return frames[:, :args.context], frames[:, args.context:], times, noise


def build(args):
    """The model that args describe."""
    if args.density or args.data:
        points = Points(vars(args))
        flow = NHF(points.dim, args.hamiltonians, args.leapfrog_steps, kinetic=args.kinetic, base=args.base, shift=points.shift, scale=points.scale)
        return flow if args.model == "nhf" else RealNVP.like(flow)
    try:
        if args.model != "hgn":
            return HNN(args.size, latent=args.latent, conv=args.model == "hnn_conv", dt=args.dt, background=BACKGROUND)
        return HGN(size=args.size, context=args.context, arch=args.arch, latent=args.latent, integrator=args.integrator,
                   substeps=args.substeps, periodic=args.periodic, f_psi=args.f_psi, deterministic=args.deterministic, dt=args.dt, background=BACKGROUND)
    except ValueError as error:
        fail(str(error))


def make_optimisers(model, lr, device):
    """Muon for matrices: what tells one orbit from the next is a hundredth of what the encoder sees, and Muon learns small
    and large directions alike (40 % less error than Adam alone after 2,500 steps of two_body). Adam for the rest, and at a
    third of the rate for the chart, which starts almost right and would lose the coordinates that vary least."""
    chart = list(model.encoder.parameters()) if isinstance(getattr(model, "encoder", None), CentroidEncoder) else []
    free = [w for w in model.parameters() if all(w is not c for c in chart)]
    matrices, others = [w for w in free if w.dim() == 2], [w for w in free if w.dim() != 2]
    groups = [{"params": others, "factor": 1.0}] + [{"params": chart, "factor": 0.3}] * bool(chart)
    adam = torch.optim.Adam(groups, lr, betas=(0.9, 0.99), eps=1e-12, fused=device.type == "cuda")
    if not matrices:                                        # the paper's networks have none
        return [adam]
    return [adam, torch.optim.Muon(matrices, lr, weight_decay=0.0, eps=1e-12, adjust_lr_fn="match_rms_adamw")]


def update(model, loss, optimisers, batch, reach, beta, consistency):
    """One training step; returns loss, mse, kl. Nothing in it waits for a GPU."""
    context, targets, times, noise = batch
    values = loss(context, targets, times, reach, beta, noise, consistency)
    model.zero_grad()
    values[0].backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)    # a late frame gone wrong weighs no more
    for optimiser in optimisers:
        optimiser.step()
    return values


def compiled(function, device):
    """`function` as one region without graph breaks, compiled once for its shapes; on a GPU replayed as CUDA graphs, so
    that a thousand small kernels cost one launch. Too many recompilations are an error instead of a silent fall-back."""
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    warnings.filterwarnings("ignore", message="invoke_subgraph traced multiple backward graphs")    # the last step's
    # Inductor may not choose memory layouts: the networks are channels_last already, and torch 2.13 gets the strides of
    # convolutions inside a nested region wrong.
    options = {"layout_optimization": False, "triton.cudagraphs": device.type == "cuda"}
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)


def compiled_or_eager(function, device, *example):
    """`function` compiled, after a first call and backward that show whether compiling works here; else as it is, and a line."""
    print(f"compiling the training step for {device}: up to a minute, or seconds from the cache")
    try:
        if device.type != "cpu":                            # there it would save less than it takes
            physics.compile_loops()
        fast = compiled(function, device)
        fast(*example)[0].mean().backward()
        gc.collect()
        gc.freeze()                                         # a million of the compiler's objects slow Python down
        return fast
    except torch.OutOfMemoryError:
        raise
    except Exception as error:                              # no compiler, no Triton, a Python too new for this torch, ...
        print(f"cannot compile here, running eagerly: {' '.join(str(error).split())[:150]}")
        return function


def bytes_per_clip(model, args):
    """Memory that a training step needs for each clip, measured on two: what autograd keeps and as much again for the
    gradients, plus the trajectories simulated ahead."""
    device, kept = model.background.device, {}
    weights = {w.untyped_storage().data_ptr() for w in model.parameters()}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    frames = torch.zeros(2, args.context + args.targets, 3, args.size, args.size, device=device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model.loss(frames[:, :args.context], frames[:, args.context:],
                   torch.zeros(2, args.targets, dtype=torch.long, device=device), args.window)
    numbers = 2 * len(SYSTEMS[args.system].colours) * POOL * 2 * max(args.window, args.context)
    return sum(n for at, n in kept.items() if at not in weights) + 4 * 8 * numbers


def check_memory(model, args, device):
    """Refuse a batch that cannot fit before anything is written, and name one that does."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:                                                   # Windows does not say
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    most = 0.9 * free // bytes_per_clip(model, args)
    if args.batch_size > most:
        fail(f"--batch-size {args.batch_size} does not fit into {free / 2 ** 30:.0f} GiB: --batch-size {max(most, 1):.0f} does")


def bench(args, device):
    """Time data, rollout and training step, eager and compiled, against the machine's own peak. One table and one JSON."""
    import resource                                         # not on Windows
    B, rows, cuda = args.batch_size, [], device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None

    def timed(call, least=7, seconds=2.0):
        """Seconds of the first call, then the median of the others."""
        times = []
        while len(times) <= least or sum(times[1:]) < seconds:
            start = time.perf_counter()
            call()
            wait()
            times.append(time.perf_counter() - start)
            if len(times) == 1:
                gc.collect()
                gc.freeze()                                 # see compiled_or_eager
        return times[0], statistics.median(times[1:])

    def both(what, clips, eager, fast):
        """A row for `eager`, and one for `fast`, which compiles on its first call."""
        with FlopCounterMode(display=False) as counter:
            eager()
        for how, call in (("eager", eager), ("compiled", fast)):
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            first, median = timed(call)
            memory = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            speed = counter.get_total_flops() / median / 1e9
            rows.append({"what": what, "how": how, "first_s": first, "ms": 1e3 * median, "clips_s": clips / median,
                         "gflop_s": speed, "share": speed / peak, "memory_mb": memory / 2 ** 20})
            print(f"{what:<48}{how:<9}{first:7.1f} s{1e3 * median:10.2f} ms{clips / median:9.0f} clips/s{speed / peak:7.1%} of peak"
                  f"{memory / 2 ** 20:8.0f} MB", flush=True)

    def step_of(what, **changes):
        options = argparse.Namespace(**vars(args) | changes)
        model = build(options).to(device)
        batch = Batches(options, device, None if args.deterministic else model.z_shape)(args.steps)
        optimisers, beta = make_optimisers(model, args.lr, device), torch.tensor(args.beta, device=device)
        step = lambda loss: update(model, loss, optimisers, batch, options.window, beta, args.consistency)
        fast = compiled(model.loss, device)
        both(what, len(batch[0]), lambda: step(model.loss), lambda: step(fast))

    model, a = build(args).to(device), torch.randn(2048, 2048, device=device)
    peak = 2 * 2048 ** 3 / timed(lambda: a @ a)[1] / 1e9
    print(f"{device}, {torch.get_num_threads()} threads; a large matmul reaches {peak:.0f} GFLOP/s")
    states = [torch.randn(2 * B, model.dim, device=device, requires_grad=True) for _ in "qp"]

    def backward(rollout):
        model.zero_grad()
        rollout(*states, 30)[0].square().sum().backward()
    fast = compiled(model.rollout, device)
    both(f"latent rollout, {2 * B} x 30, forward and backward", 2 * B, lambda: backward(model.rollout), lambda: backward(fast))
    frames = lambda: model.decode(model.rollout(*states, 29)[0][:B])
    with torch.no_grad():
        both(f"rollout with frames, {B} x 30", B, frames, compiled(frames, device))
    step_of(f"training step, batch {B}, {args.targets} of {2 * args.window + 1} frames")
    step_of(f"training step, batch {B}, 30 frames", window=15, targets=30)
    step_of(f"training step, batch 512, {args.targets} frames", batch_size=512)
    data = lambda: physics.clips(SYSTEMS[args.system], 256, noise=args.noise, size=args.size, device=device)
    plain = timed(data)[1]
    physics.compile_loops()
    first, fast = timed(data)
    print(f"data, 256 clips of 30 frames: {256 / plain:.0f} clips/s eager, {256 / fast:.0f} compiled (first call {first:.0f} s)")
    path = Path("runs") / f"bench-{device.type}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**provenance(), "config": vars(args), "threads": torch.get_num_threads(), "peak_gflop_s": peak,
                                "table": rows, "data_clips_s": {"eager": 256 / plain, "compiled": 256 / fast}}, indent=1))
    print(f"wrote {path}")


def tables(args, device, clips=256):
    """The paper's Tables 1 and 2 on one system: every row of ROWS on clean and on noisy pictures, with 5 and 30 context frames,
    each trained for --steps by a command of its own or resumed where it stopped. Writes results/table_SYSTEM.json."""
    path, cells = Path("results") / f"table_{args.system}.json", []
    path.parent.mkdir(exist_ok=True)
    print(f"{'':<54}{'train MSE':>10}{'test MSE':>10}{'spread':>8}{'floor':>8}   var H: train, test")
    for noise, context, (row, options) in itertools.product(("0", "paper"), (5, 30), ROWS.items()):
        if context > 5 and "--model" in options:            # HNN sees two frames
            continue
        name = "-".join(("table", args.system, noise, str(context), *(o.strip("-") for o in options)))
        checkpoint = Path("runs") / name / "checkpoint.pt"
        what = (["--resume", str(checkpoint)] if checkpoint.exists() else
                ["--system", args.system, "--noise", noise, "--context", str(context), "--name", name, "--arch", args.arch,
                 "--seed", str(args.seed), *options])
        if not checkpoint.exists() or read_checkpoint(checkpoint)["step"] < args.steps:
            subprocess.run([sys.executable, __file__, "--steps", str(args.steps), "--device", str(device), *what], check=True,
                           stdout=subprocess.DEVNULL)
        model, saved = load(checkpoint, device)
        config, cell = saved["config"], {"row": row, "noise": noise, "context": context, "seconds": saved["seconds"]}
        for part, seed, n in (("train", args.seed << 20, config["batch_size"] * POOL), ("test", TEST_SEED, clips)):
            seen = TestClips(config, n, seed, device)       # of training, the very first clips
            seen.q, seen.p, seen.observed = seen.q[:clips], seen.p[:clips], seen.observed[:clips]
            result = measure(model, seen, 30, 30)
            cell[part] = {k: result[k] for k in ("mse_0_29", "mse_std_over_clips", "energy_variance", "energy_std_ratio")}
            cell[part]["mse"] = result.get("mse_noisy", result["mse_0_29"])
        cell["floor"] = noise_floor(SYSTEMS[args.system], noise, config["size"],
                                    generator=torch.Generator().manual_seed(TEST_SEED + 1)) if noise == "paper" else 0.0
        cells.append(cell)
        path.write_text(json.dumps({**provenance(), "config": vars(args), "cells": cells}, indent=1))
        print(f"{row:<22}{'clean' if noise == '0' else 'noisy'}, {context:2d} context frames, {saved['step']:6d} steps"
              f"{cell['train']['mse'] * 1e4:10.2f}{cell['test']['mse'] * 1e4:10.2f}{cell['test']['mse_std_over_clips'] * 1e4:8.2f}"
              f"{cell['floor'] * 1e4:8.2f}   {cell['train']['energy_variance']:.1e}, {cell['test']['energy_variance']:.1e}", flush=True)


def learn_pixels(args, device, model, geco, first):
    """HGN's part of a run: advance(step, optimisers) makes a training step and returns what to log, look(folder) measures the
    model and writes its movie."""
    hgn = args.model == "hgn"
    batches = Batches(args, device, None if args.deterministic or not hgn else model.z_shape)
    beta = torch.tensor(geco.beta if args.geco else args.beta, device=device)
    test, loss_of = TestClips(vars(args), 100, device=device), model.loss
    if first == 0 and hgn:
        seen = [batches(args.steps + i)[1].flatten(0, 1)[:2048] for i in range(max(1, 2048 // (args.batch_size * args.targets)))]
        model.fit_chart(torch.cat(seen))                    # the batches of after the last step
    if args.compile is None:
        args.compile = device.type == "cuda" or (hgn and args.arch == "compact" and args.steps >= WORTH_COMPILING)
    if args.compile:
        context, targets, times, noise = batches(first)
        loss_of = compiled_or_eager(model.loss, device, context, targets, times, args.window, beta, noise, args.consistency)

    def advance(step, optimisers):
        loss, mse, kl = update(model, loss_of, optimisers, batches(step), args.window, beta, args.consistency)
        if args.geco:
            beta.fill_(geco.update(mse.item()))
        return {"loss": loss, "mse": mse, "kl": kl, "beta": beta}

    def look(folder):
        movies(model, test, folder, 90)
        return measure(model, test)
    return advance, look


def learn_density(args, device, model, geco, first):
    """The same of a flow, which is small enough to stay on the CPU."""
    points, weights_of = Points(vars(args)), model.log_weights
    if args.compile:
        shape = (args.batch_size, points.dim)
        weights_of = compiled_or_eager(weights_of, device, torch.zeros(shape), torch.zeros(args.samples, *shape))

    def advance(step, optimisers):
        generator = torch.Generator().manual_seed((args.seed << 20) + step)
        x = points.draw(args.batch_size, generator)
        log_w = weights_of(x, torch.randn(args.samples, *x.shape, generator=generator))
        nll = math.log(len(log_w)) - log_w.logsumexp(0).mean()
        model.zero_grad()
        nll.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        return {"loss": nll, "elbo": log_w.mean(), "nll": nll}

    def look(folder):
        return measure_flow(model, points, 2000, (1, 64))
    return advance, look


def main():
    args, folder, resumed = parse()
    device = pick_device(args.device if args.system else "cpu")
    keep_memory()
    torch.manual_seed(args.seed)
    if args.bench or args.table:
        return (bench if args.bench else tables)(args, device)
    model, checkpoint = resumed or (build(args), {"step": 0, "seconds": 0.0})
    model.to(device).train()
    if args.system:
        check_memory(model, args, device)
    optimisers, geco = make_optimisers(model, args.lr, device), GECO(args.tolerance)
    if resumed:
        try:
            for optimiser, state in zip(optimisers, checkpoint["optimisers"], strict=True):
                optimiser.load_state_dict(state)
        except ValueError:
            fail(f"{folder} was trained by another version of this code, which grouped weights otherwise: train again; "
                 "eval.py still reads it")
        geco.beta, geco.mse = checkpoint["geco"]
    folder, start, before = folder or new_folder(args), time.time(), checkpoint["seconds"]
    config = {k: v for k, v in vars(args).items() if k not in KEPT} | {"steps": args.steps}
    advance, look = (learn_pixels if args.system else learn_density)(args, device, model, geco, checkpoint["step"])
    log = open(folder / "metrics.jsonl", "a")

    def record(step, **values):
        log.write(json.dumps({"step": step, "seconds": round(before + time.time() - start, 1), **values}) + "\n")
        log.flush()

    def store(step):
        save(folder / "checkpoint.pt", {
            "kind": args.model, "model": model.state_dict(), "model_config": model.config,
            "optimisers": [optimiser.state_dict() for optimiser in optimisers],
            "geco": (geco.beta, geco.mse), "step": step, "config": config, "seed": args.seed,
            "seconds": before + time.time() - start, **provenance()})

    def evaluate(step):
        model.eval()
        result = look(folder)
        record(step, **{k: v for k, v in result.items() if isinstance(v, float)})
        model.train()
        return result

    if not resumed:
        record(0, config=config, **provenance())
    bar = tqdm(range(checkpoint["step"], args.steps), initial=checkpoint["step"], total=args.steps, unit="step")
    done, stopped = checkpoint["step"], []
    for number in (signal.SIGINT, signal.SIGTERM):          # heeded between two steps, when weights and optimisers agree
        signal.signal(number, lambda number, _: stopped.append(number))
    try:
        for step in bar:
            # Warm up over 100 steps, then down to zero along a cosine.
            scale = min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
            for group in (group for optimiser in optimisers for group in optimiser.param_groups):
                group["lr"] = args.lr * scale * group.get("factor", 1.0)
            values = advance(step, optimisers)
            done = step + 1
            if done % 20 == 0 or done == args.steps:
                values = {k: v.item() for k, v in values.items()}
                if not math.isfinite(values["loss"]):
                    fail(f"the loss is {values['loss']} at step {done}: try a lower --lr; the checkpoint is from before")
                bar.set_postfix({k: f"{v:.3g}" for k, v in values.items()},
                                per_s=f"{args.batch_size * (bar.format_dict['rate'] or 0):.0f}")
                record(done, **values)
            if stopped or done % 250 == 0 and done < args.steps:
                store(done)
            if stopped:
                bar.close()
                print(f"stopped after step {done}: go on with python train.py --resume {folder}/checkpoint.pt")
                raise SystemExit(128 + stopped[0])
            if done % 2000 == 0 and done < args.steps:
                evaluate(done)
    except torch.OutOfMemoryError:
        fail(f"out of memory at step {done}: try --batch-size {args.batch_size // 2}; the last checkpoint is whole")
    except OSError as error:
        fail(f"cannot write into {folder} ({error.strerror}): make room, then --resume {folder}/checkpoint.pt; it is whole")
    store(args.steps)
    result, seconds = evaluate(args.steps), before + time.time() - start
    if args.system:
        table(result, config)
        print(f"\n{seconds:.0f} s. Look at {folder}/rollout.gif, then: python eval.py --reverse --speed 2 --sample 4")
    else:
        flow_table({args.model: result})
        print(f"\n{seconds:.0f} s. Then: python eval.py --checkpoint {folder}/checkpoint.pt")


if __name__ == "__main__":
    main()
