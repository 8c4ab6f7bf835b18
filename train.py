"""Train a Hamiltonian Generative Network from pixels, or a Neural Hamiltonian Flow on points.

    python train.py --system three_body         # writes runs/three_body/
    python train.py --data clips.npy            # clips of your own, (N, T, H, W, C), see README
    python train.py --density two_moons         # a flow; --data points.npy, (N, D), for points of your own
    python train.py --resume                    # goes on with the newest run
    torchrun --nproc_per_node=8 train.py --system three_body

    python train.py --bench                     # how fast all this is here

Batches of a system are simulated and rendered afresh: nothing but the run's folder is written.
"""
import argparse
import gc
import io
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import physics

from eval import (MODELS, TEST_SEED, Clips, Help, Parser, Points, TestClips, at_least, fail, flow_table, keep_memory, load, measure,
                  measure_flow, movies, newest_run, pick_device, provenance, read_checkpoint, read_data, table, test_clips, unit)
from hgn import ARCHITECTURES, GECO, HGN, HNN, INTEGRATORS, CentroidEncoder, Couplings
from nhf import BASES, DENSITIES, NHF, RealNVP
from physics import BACKGROUND, SYSTEMS, initial_states, jitter, noise_floor, render, simulate

DEFAULTS = {"hgn": {"steps": 5000, "batch_size": 16, "lr": 6e-3}, "hnn": {"steps": 5000, "batch_size": 16, "lr": 1e-3},
            "hnn_conv": {"steps": 5000, "batch_size": 16, "lr": 1e-3}, "nhf": {"steps": 5000, "batch_size": 512, "lr": 2e-2},
            "realnvp": {"steps": 10000, "batch_size": 512, "lr": 5e-3}}        # twice as fast a step
ROWS = {"HGN (leapfrog)": (), "HGN (Euler)": ("--integrator", "euler"), "HGN (deterministic)": ("--deterministic",),
        "HGN (no f_psi)": ("--no-f-psi",), "HNN": ("--model", "hnn"), "HNN (conv)": ("--model", "hnn_conv")}
LOOK_EVERY = 2000                   # steps from one evaluation to the next
READERS = 4                         # threads that read clips of one's own
FITTED = 0.8                        # of many context frames, from this part of a run on the state is fitted to all of them
POOL = 64                           # batches whose trajectories are simulated together
HERE = ("device", "compile", "resume", "name", "bench", "table")             # of the command alone, not of the run
FREE = ("steps", "window", "save_every", "keep_going")                                # what --resume may change
FLOWS = ("nhf", "realnvp")
RANK, WORLD = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))     # torchrun sets them
WORTH_COMPILING = 10000             # steps on a CPU: 16 ms a step saved, 63 s of compilation from an empty cache


def noise(text):
    return "paper" if text == "paper" else at_least(0, float)(text)


def parse():
    parser = Parser(description=__doc__.split("\n")[0], formatter_class=Help)
    data = parser.add_argument_group("data")
    data.add_argument("--system", choices=SYSTEMS, help="what to learn (default: mass_spring)")
    data.add_argument("--density", choices=DENSITIES, help="learn this density instead, with a flow")
    data.add_argument("--data", metavar="PATH", help="learn from data of your own: clips, an .npy or .npz array (N, T, H, W, C) or a "
                      "folder of GIFs or of folders of pictures; or points (N, D), whose density a flow learns")
    data.add_argument("--size", type=int, default=32, help="pixels a side, a multiple of 8 from 16 to 128")
    data.add_argument("--noise", type=noise, default=0.0, help="sigma on every coordinate before painting, or 'paper'; goes with --context 30")
    data.add_argument("--dt", type=at_least(0, float, above=True), default=0.125, help="time between frames")
    data.add_argument("--window", type=at_least(1), default=30, help="frames to learn from, before and after frame 0")
    data.add_argument("--targets", type=at_least(1), default=8, help="random frames of the window painted for the loss")
    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=MODELS, help="for a system hgn, or the baselines hnn and hnn_conv; for a density nhf or realnvp")
    model.add_argument("--arch", choices=ARCHITECTURES, default="compact", help="paper: the published networks")
    model.add_argument("--latent", type=at_least(1), help="numbers in q (default: the true system's; of clips of your own 4), or maps in q (paper: 16)")
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
    flow.add_argument("--kinetic", choices=("mlp", "quadratic"), default="mlp", help="K(p): as in the paper, or |p L|^2 / 2")
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
    run.add_argument("--save-every", type=at_least(1), default=250, help="steps from one checkpoint to the next")
    run.add_argument("--keep-going", action="store_true", help="train on where a checkpoint cannot be written, as on a full disk")
    run.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    run.add_argument("--compile", action=argparse.BooleanOptionalAction,
                     help="compile the training step: a minute or more at first, seconds from then on; on a CPU it takes a "
                          "sixth off every step, so the default there is to compile the compact model from "
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
        clips = bool(args.data) and read_data(args.data).ndim != 2
        flow = bool(args.density or args.data and not clips)
        args.model = args.model or ("nhf" if flow else "hgn")
        if flow != (args.model in FLOWS):
            fail(f"--model {args.model} needs {'--system NAME or clips' if flow else '--density NAME or points (N, D)'}")
        for k, v in DEFAULTS[args.model].items():
            setattr(args, k, getattr(args, k) or v)
        if (args.model != "hgn" or args.data) and (args.bench or args.table):
            fail("--bench and --table choose the models themselves: give a --system, or none, and no --model")
        if args.batch_size % WORLD:
            fail(f"--batch-size {args.batch_size} is shared by {WORLD} processes: give a multiple of {WORLD}")
        if args.model.startswith("hnn") and not 3 <= args.targets <= min(11, 2 * args.window + 1):
            fail(f"--model {args.model} learns from --targets frames in a row, from 3 to {min(11, 2 * args.window + 1)}, not {args.targets}")
        if flow:
            return args, None, None
        if clips:
            if args.noise:
                fail("--noise is for simulated systems: --data is taken as it is")
            own = Clips(vars(args))
            if args.model != "hgn" and own.length < args.targets:
                fail(f"--model {args.model} learns from --targets {args.targets} frames in a row, clips of {args.data} have {own.length}")
            args.size, true_latent, true_periodic = own.size, 4, False
        else:
            args.system = args.system or "mass_spring"
            true_latent, true_periodic = initial_states(SYSTEMS[args.system], 1)[0].numel(), SYSTEMS[args.system].periodic
        if args.latent is None and args.arch == "compact":
            args.latent = true_latent
        args.periodic = true_periodic if args.periodic is None else args.periodic
        if args.context > args.window + 1:
            fail(f"--context {args.context} is longer than the {args.window + 1} frames of a training clip: "
                 "raise --window or lower --context")
        return args, None, None
    # The run's own options, then those given on the command line, which may change only what FREE names.
    path = newest_run() if args.resume == "newest" else Path(args.resume)
    model, checkpoint = load(path)
    config = checkpoint["config"]
    for action in parser._actions:                          # a stranger's file gets no further than a stranger's command line
        value = config.get(action.dest)
        try:
            if value is not None and action.type:
                action.type(str(value))
            if value is not None and action.choices and value not in [*action.choices]:
                raise ValueError
        except (argparse.ArgumentTypeError, ValueError):
            fail(f"{path} says {action.dest} = {str(value)[:40]!r}, which no run can have: train again")
    parser.set_defaults(**{k: v for k, v in config.items() if k not in HERE})
    args = parser.parse_args()
    changed = [k for k in config if k not in HERE + FREE and getattr(args, k, None) != config[k]]
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


def save(path, packed):
    """All or nothing, and on the disk before it gets its name: a crash while writing leaves the last checkpoint whole."""
    with open(f"{path}.new", "wb") as file:
        file.write(packed)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.new", path)


class Batches:
    """Batch number `step` of a run, the same whenever it is asked for and however many processes share it: a resumed run sees what
    it would have seen. A system's is drawn, simulated and painted on the device; clips of one's own are read by threads,
    some batches ahead."""
    def __init__(self, args, device, noise=None, share=None):
        """noise: shape of one clip's posterior noise, or None. share: which of how many, by default this process's."""
        self.args, self.device, self.noise, self.pool = args, device, noise, None
        rank, world = share or (RANK, WORLD)
        self.mine = slice(rank * args.batch_size // world, (rank + 1) * args.batch_size // world)
        self.data, self.reader, self.ahead = Clips(vars(args)) if args.data else None, ThreadPoolExecutor(READERS), {}

    def __call__(self, step):
        """Returns this process's context frames, target frames, their times (B, targets), and the posterior's noise (B, *noise)."""
        if not self.data:
            return self.draw(step)
        self.ahead = {i: self.ahead.get(i) or self.reader.submit(self.draw, i) for i in range(step, step + 1 + READERS)}
        context, targets, *rest = (x if x is None else x.to(self.device, non_blocking=True) for x in self.ahead[step].result())
        return unit(context), unit(targets), *rest

    def draw(self, step):
        args, mine, system = self.args, self.mine, SYSTEMS.get(self.args.system)
        B, device = args.batch_size, "cpu" if self.data else self.device
        generator = torch.Generator(device).manual_seed((args.seed << 20) + step + 2 ** 19)
        # The horizon grows from 5 frames to the whole window over the first 30 % of the run, but not faster than in 300 steps:
        # then H is wrong for so long a time that the encoder learns to see nothing move.
        reach = min(args.window, 5 + int(args.window * step / max(300, 0.3 * args.steps)))
        if self.data:
            clips = self.data.train[torch.randint(len(self.data.train), (B,), generator=generator)]
            frame0 = torch.randint(self.data.length - args.context + 1, (B, 1), generator=generator)
            low, high = (-frame0).clamp(min=-reach), (self.data.length - 1 - frame0).clamp(max=reach)
        else:
            low, high, frame0 = -reach, reach, torch.tensor(max(args.window + 1, args.context) - 1, device=device)
        times = torch.randint(-reach, reach + 1, (B, args.targets), generator=generator, device=device)
        if args.model != "hgn":                             # HNN looks at frames in a row
            high, times = high - args.targets + 1, times[:, :1]
        times = low + (times - low) % (high - low + 1)      # folded into the clip
        if args.model != "hgn":
            times = times + torch.arange(args.targets, device=device)
        at = torch.cat((frame0 + torch.arange(args.context, device=device).expand(B, -1), frame0 + times), 1)[mine]
        if self.data:
            frames = self.data.read(clips[mine], at)
        else:
            q = self.trajectories(step)
            seen = q[torch.arange(len(q), device=device).unsqueeze(1), at]
            off = jitter(system, torch.zeros(B, *seen.shape[1:], dtype=q.dtype, device=device), args.noise, generator)
            frames = render(system, seen + off[mine], args.size)
        noise = torch.randn(B, *self.noise, generator=generator, device=device)[mine] if self.noise else None
        batch = frames[:, :args.context], frames[:, args.context:], times[mine], noise
        return [x if x is None else x.pin_memory() for x in batch] if self.data and self.device.type == "cuda" else batch

    def trajectories(self, step):
        """True q of this process's clips from -window to window round a random start, simulated for POOL batches at once."""
        args, system, B, number = self.args, SYSTEMS[self.args.system], self.args.batch_size, step // POOL
        if self.pool != number:
            generator = torch.Generator(self.device).manual_seed((args.seed << 20) + number)
            start = [x.unflatten(0, (POOL, B))[:, self.mine].flatten(0, 1)
                     for x in initial_states(system, B * POOL, generator, self.device)]
            length = max(args.window + 1, args.context)
            before, after = (simulate(system, *start, length, dt)[0] for dt in (-args.dt, args.dt))
            self.pool, self.q = number, torch.cat((before.flip(1)[:, :-1], after), 1).unflatten(0, (POOL, -1))
        return self.q[step % POOL]


def build(args):
    """The model that args describe."""
    if args.model in FLOWS:
        points = Points(vars(args))
        flow = NHF(points.dim, args.hamiltonians, args.leapfrog_steps, kinetic=args.kinetic, base=args.base, shift=points.shift, scale=points.scale)
        return flow if args.model == "nhf" else RealNVP.like(flow)
    background = Clips(vars(args)).background if args.data else BACKGROUND
    frame = {"size": args.size, "channels": len(background), "dt": args.dt, "background": background, "latent": args.latent}
    try:
        if args.model != "hgn":
            return HNN(**frame, conv=args.model == "hnn_conv")
        return HGN(**frame, context=args.context, arch=args.arch, integrator=args.integrator, substeps=args.substeps,
                   periodic=args.periodic, f_psi=args.f_psi, deterministic=args.deterministic)
    except ValueError as error:
        fail(str(error))


def make_optimisers(model, lr, device):
    """Muon for matrices: what tells one orbit from the next is a hundredth of what the encoder sees, and Muon learns small
    and large directions alike (40 % less error than Adam alone after 2,500 steps of two_body). Adam for the rest, and at
    three times the rate for the compact encoder, whose last fraction of a pixel is what limits prediction, and at four for its
    decoder, which is small. K's matrix learns slowly: nothing in the pictures ties the scales of p of motions that are independent
    of each other, as the centre of mass is, and they drift."""
    compact = isinstance(getattr(model, "encoder", None), CentroidEncoder)
    parts = [(3.0, [*model.encoder.parameters()]), (4.0, [*model.decoder.parameters()]), (0.03, [model.H.K.L])] if compact else []
    apart = {w for _, part in parts for w in part}
    free = [w for w in model.parameters() if w not in apart]
    matrices, others = [w for w in free if w.dim() == 2], [w for w in free if w.dim() != 2]
    groups = [{"params": part, "factor": factor} for factor, part in [(1.0, others), *parts]]
    adam = torch.optim.Adam(groups, lr, betas=(0.9, 0.99), eps=1e-12, fused=device.type == "cuda")
    if not matrices:                                        # the paper's networks have none
        return [adam]
    return [adam, torch.optim.Muon(matrices, lr, weight_decay=0.0, eps=1e-12, adjust_lr_fn="match_rms_adamw")]


class Loss(nn.Module):
    """A loss as the forward of a module, which is what DistributedDataParallel wraps."""
    def __init__(self, model, loss):
        super().__init__()
        self.model, self.forward = model, loss


def shared(model, loss, args):
    """`loss`, and under torchrun with its gradients averaged over all processes, each of which has its share of the batch."""
    if WORLD == 1:
        return loss
    return DistributedDataParallel(Loss(model, loss), find_unused_parameters=args.deterministic or args.arch == "paper" or args.context > 5)


def average(values):
    """Tensors of one number as numbers, their means over all processes."""
    values = torch.stack([v.detach().double().cpu() for v in values])
    if WORLD > 1:
        dist.all_reduce(values)
    return (values / WORLD).tolist()


def set_rate(optimisers, lr, step, steps):
    """Warm up to lr over 100 steps, then down to zero along a cosine."""
    scale = min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in (group for optimiser in optimisers for group in optimiser.param_groups):
        group["lr"] = lr * scale * group.get("factor", 1.0)


def descend(model, loss, optimisers, most):
    """One step of the optimisers down the gradient of loss, clipped to the norm `most`."""
    model.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), most)
    for optimiser in optimisers:
        optimiser.step()


def update(model, loss, optimisers, batch, reach, beta, consistency, fit=False):
    """One training step, with `fit` from the states of HGN.fitted; returns loss, mse, kl. Nothing in it waits for a GPU."""
    context, targets, times, noise = batch
    mean = model.fitted(model.encode(context)[0], context) if fit else None
    values = loss(context, targets, times, reach, beta, noise, consistency, mean)
    descend(model, values[0], optimisers, 0.01)             # a late frame gone wrong weighs no more
    return values


def fit_prior(model, args, device):
    """f_psi alone and anew, at a run's end, on the states of up to 32,768 clips: in batches of hundreds it learns what sixteen states
    a step leave blurred. Of two bodies, that they orbit one way or the other and never fall towards each other. Anew, as one
    that followed the states while they moved stays folded as they were then."""
    torch.manual_seed(args.seed)
    model.f_psi.load_state_dict(Couplings(2 * model.dim).state_dict())
    rounds = min(10000, 1 + args.steps // 2)
    size = min(512, rounds)
    batches = Batches(argparse.Namespace(**vars(args) | {"window": args.context, "targets": 1}), device, share=(0, 1))
    with torch.no_grad():                                   # on batches of after the last step
        states = [model.encode(batches(args.steps + i)[0]) for i in range(max(1, POOL * size // args.batch_size))]
    mean, logvar = (torch.cat(x) for x in zip(*states))
    optimisers, generator = make_optimisers(model.f_psi, 1e-2, device), torch.Generator(device).manual_seed(args.seed)
    for i in range(rounds):
        chosen = torch.randint(len(mean), (size,), generator=generator, device=device)
        noise = torch.randn(size, mean.shape[1], generator=generator, device=device)
        u, log_det = model.f_psi.inverse(mean[chosen] + (0.5 * logvar[chosen]).exp() * noise)
        set_rate(optimisers, 1e-2, i, rounds)
        descend(model.f_psi, (0.5 * u.square().sum(1) - log_det).mean(), optimisers, 0.01)


def compiled(function, device):
    """`function` as one region without graph breaks, compiled once for its shapes; on a GPU replayed as CUDA graphs, so
    that a thousand small kernels cost one launch. Too many recompilations are an error instead of a silent fall-back."""
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    warnings.filterwarnings("ignore", message="invoke_subgraph traced multiple backward graphs")    # the last step's
    # Inductor may not choose memory layouts: the networks are channels_last already, and torch 2.13 gets the strides of
    # convolutions inside a nested region wrong. Nor may it use a buffer again: a state that a nested region both returns and keeps
    # for the way back is one buffer to it and two to its caller, who overwrites what is kept (V's gradients were half wrong).
    options = {"layout_optimization": False, "allow_buffer_reuse": False, "inplace_buffers": False,
               "triton.cudagraphs": device.type == "cuda"}
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
    frames = torch.zeros(2, args.context + args.targets, model.config["channels"], args.size, args.size, device=device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model.loss(frames[:, :args.context], frames[:, args.context:],
                   torch.zeros(2, args.targets, dtype=torch.long, device=device), args.window)
    numbers = 2 * len(SYSTEMS[args.system].colours) * POOL * 2 * max(args.window, args.context) if args.system else 0
    return sum(n for at, n in kept.items() if at not in weights) + 4 * 8 * numbers


def check_memory(model, args, device):
    """Refuse a batch that cannot fit before anything is written, and name one that does."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:                                                   # Windows does not say
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    most = 0.9 * free * (WORLD if device.type == "cuda" else 1) // bytes_per_clip(model, args)
    if args.batch_size > most:
        fail(f"--batch-size {args.batch_size} does not fit into {free / 2 ** 30:.0f} GiB: --batch-size {max(most, 1):.0f} does")


def bench(args, device):
    """Time data, rollout and training step, eager and compiled, against the machine's own peak. One table and one JSON."""
    import resource                                         # not on Windows
    B, rows, cuda = args.batch_size, [], device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None

    def timed(*calls, least=7, seconds=2.0):
        """Of each call the seconds of its first run and the median of the others; in turn, so that a busy machine slows all alike."""
        times = [[] for _ in calls]
        while len(times[0]) <= least or sum(times[0][1:]) < seconds:
            for call, spent in zip(calls, times):
                start = time.perf_counter()
                call()
                wait()
                spent.append(time.perf_counter() - start)
            if len(times[0]) == 1:
                gc.collect()
                gc.freeze()                                 # see compiled_or_eager
        return [(spent[0], statistics.median(spent[1:])) for spent in times]

    def both(what, clips, eager, fast):
        """A row for `eager`, and one for `fast`, which compiles on its first call."""
        with FlopCounterMode(display=False) as counter:
            eager()
        for how, call, (first, median) in zip(("eager", "compiled"), (eager, fast), timed(eager, fast)):
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                call()
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
    peak = 2 * 2048 ** 3 / timed(lambda: a @ a)[0][1] / 1e9
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
    plain = timed(data)[0][1]
    physics.compile_loops()
    first, fast = timed(data)[0]
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
    many = hgn and model.lead > 2                           # context frames, to all of which a state can be fitted
    batches = Batches(args, device, None if args.deterministic or not hgn else model.z_shape)
    beta = torch.tensor(geco.beta if args.geco else args.beta, device=device)
    test, loss_of = test_clips(vars(args), 100, device), model.loss
    if hgn and not args.resume:
        whole = Batches(args, device, share=(0, 1))
        seen = [whole(args.steps + i)[1].flatten(0, 1)[:2048] for i in range(max(1, 2048 // (args.batch_size * args.targets)))]
        model.fit_chart(torch.cat(seen))                    # the batches of after the last step
    if args.compile is None:
        args.compile = device.type == "cuda" or (hgn and args.arch == "compact" and args.steps >= WORTH_COMPILING)
    if args.compile:
        context, targets, times, noise = batches(first)
        loss_of = compiled_or_eager(model.loss, device, context, targets, times, args.window, beta, noise, args.consistency)
    loss_of = shared(model, loss_of, args)

    def advance(step, optimisers):
        loss, mse, kl = update(model, loss_of, optimisers, batches(step), args.window, beta, args.consistency,
                               many and step >= FITTED * args.steps)
        if args.geco:
            beta.fill_(geco.update(average([mse])[0]))
        if hgn and step + 1 == args.steps and model.flow and not (args.deterministic or many):
            fit_prior(model, args, device)
        return {"loss": loss, "mse": mse, "kl": kl, "beta": beta}

    def look(folder):
        movies(model, test, folder, 90)
        return measure(model, test)
    return advance, look


def learn_density(args, device, model, geco, first):
    """The same of a flow, which is small enough to stay on the CPU."""
    points, weights_of = Points(vars(args)), model.log_weights
    if args.compile:
        shape = (args.batch_size // WORLD, points.dim)
        weights_of = compiled_or_eager(weights_of, device, torch.zeros(shape), torch.zeros(args.samples, *shape))
    weights_of = shared(model, weights_of, args)
    mine = slice(RANK * args.batch_size // WORLD, (RANK + 1) * args.batch_size // WORLD)

    def advance(step, optimisers):
        generator = torch.Generator().manual_seed((args.seed << 20) + step)
        x = points.draw(args.batch_size, generator)
        log_w = weights_of(x[mine], torch.randn(args.samples, *x.shape, generator=generator)[:, mine])
        nll = math.log(len(log_w)) - log_w.logsumexp(0).mean()
        descend(model, nll, optimisers, 1.0)
        return {"loss": nll, "elbo": log_w.mean(), "nll": nll}

    def look(folder):
        return measure_flow(model, points, 2000, (1, 64))
    return advance, look


def main():
    args, folder, resumed = parse()
    pixels = args.model not in FLOWS
    device = pick_device(args.device if pixels else "cpu")
    if WORLD > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    keep_memory()
    torch.manual_seed(args.seed)
    if args.bench or args.table:
        return (bench if args.bench else tables)(args, device)
    model, checkpoint = resumed or (build(args), {"step": 0, "seconds": 0.0, "setbacks": 0})
    model.to(device).train()
    if pixels:
        check_memory(model, args, device)
    optimisers, geco, start = make_optimisers(model, args.lr, device), GECO(args.tolerance), time.time()

    def restore(checkpoint):
        model.load_state_dict(checkpoint["model"])
        for optimiser, state in zip(optimisers, checkpoint["optimisers"], strict=True):
            optimiser.load_state_dict({**optimiser.state_dict(), "state": state["state"]})
            if any(x.shape not in ((), w.shape) for w, kept in optimiser.state.items() for x in kept.values()):
                raise ValueError
        geco.beta, geco.mse = (x if x is None else float(x) for x in checkpoint["geco"])
    if resumed:
        try:
            restore(checkpoint)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError):
            fail(f"{folder} was trained by another version of this code, which grouped weights otherwise: train again; "
                 "eval.py still reads it")
    folder, before = folder or (RANK == 0 and new_folder(args)), checkpoint["seconds"]
    config = {k: v for k, v in vars(args).items() if k not in HERE}
    done, setbacks, stopped = checkpoint["step"], checkpoint.get("setbacks", 0), []

    def heed(number, _):
        if stopped:                                         # asked twice
            raise SystemExit(128 + number)
        stopped.append(number)
    for number in (signal.SIGINT, signal.SIGTERM):          # heeded between two steps, when weights and optimisers agree
        signal.signal(number, heed)

    def written(action, *what, **values):
        """Write on one process only, and not without a word where that fails."""
        try:
            return action(*what, **values) if RANK == 0 else None
        except OSError as error:
            line = f"cannot write into {folder} ({error.strerror}), where the last checkpoint stays as it was"
            if not args.keep_going:
                bar.close()
                fail(f"{line}: make room, then --resume {folder}/checkpoint.pt")
            print(f"{line}; going on without", flush=True)

    def record(step, **values):
        with open(folder / "metrics.jsonl", "a") as log:
            log.write(json.dumps({"step": step, "seconds": round(before + time.time() - start, 1), **values}) + "\n")

    def store():
        """The state as it would be saved, which is also where a run goes back to; saved."""
        file = io.BytesIO()
        torch.save({"kind": args.model, "model": model.state_dict(), "model_config": model.config,
                    "optimisers": [optimiser.state_dict() for optimiser in optimisers],
                    "geco": (geco.beta, geco.mse), "setbacks": setbacks, "step": done, "config": config, "seed": args.seed,
                    "seconds": before + time.time() - start, **provenance()}, file)
        written(save, folder and folder / "checkpoint.pt", file.getvalue())
        return file

    def evaluate():
        model.eval()
        result = look(folder)
        record(done, **{k: v for k, v in result.items() if isinstance(v, float)})
        model.train()
        return result

    bar = tqdm(initial=done, total=args.steps, unit="step", disable=RANK > 0)
    if resumed:                                             # what was logged after the checkpoint will be logged again
        log = folder / "metrics.jsonl"
        lines = [line for line in (log.read_text().splitlines(True) if log.exists() else ()) if line.endswith("}\n")]
        written(save, log, "".join(line for line in lines if json.loads(line)["step"] <= done).encode())
        if RANK == 0:
            bar.write(f"resumed {folder}/checkpoint.pt at step {done} of {args.steps}")
    advance, look = (learn_pixels if pixels else learn_density)(args, device, model, geco, done)
    good = store()
    if not resumed:
        written(record, 0, config=config, **provenance())
    try:
        while done < args.steps:
            set_rate(optimisers, args.lr * 0.5 ** setbacks, done, args.steps)
            values = advance(done, optimisers)
            done += 1
            bar.update()
            stop = torch.tensor(stopped[:1] or [0])
            if WORLD > 1:                                   # all stop at the same step
                dist.all_reduce(stop, op=dist.ReduceOp.MAX)
            keep = stop.item() or done % args.save_every == 0 or done == args.steps
            if done % 20 == 0 or keep:
                values = dict(zip(values, average(list(values.values()))))
                if not math.isfinite(values["loss"]) or keep and not all(w.isfinite().all() for w in model.parameters()):
                    if setbacks == 3:
                        bar.close()
                        fail(f"the loss was not finite at step {done}, after three times at a lower rate: try --lr {args.lr / 16:g}, "
                             f"and look for wrong values in --data; {folder}/checkpoint.pt is from before")
                    good.seek(0)
                    checkpoint, failed = torch.load(good, map_location=device, weights_only=True), done
                    restore(checkpoint)
                    done, setbacks = checkpoint["step"], setbacks + 1
                    bar.n = done
                    if RANK == 0:
                        bar.write(f"the loss was not finite at step {failed}: back to step {done}, at --lr {args.lr / 2 ** setbacks:g}")
                    continue
                bar.set_postfix({k: f"{v:.3g}" for k, v in values.items()},
                                per_s=f"{args.batch_size * (bar.format_dict['rate'] or 0):.0f}")
                written(record, done, **values)
            if keep:
                good = store()
            if stop.item():
                bar.close()
                if RANK == 0:
                    print(f"stopped after step {done}: go on with python train.py --resume {folder}/checkpoint.pt")
                raise SystemExit(128 + stop.item())
            if done % LOOK_EVERY == 0 and done < args.steps:
                written(evaluate)
    except torch.OutOfMemoryError:
        fail(f"out of memory at step {done}: try --batch-size {args.batch_size // 2}; the last checkpoint is whole")
    bar.close()
    result, seconds = written(evaluate), before + time.time() - start
    if result and pixels:
        table(result, config)
        print(f"\n{seconds:.0f} s. Look at {folder}/rollout.gif, then: python eval.py --reverse --speed 2 --sample 4")
    elif result:
        flow_table({args.model: result})
        print(f"\n{seconds:.0f} s. Then: python eval.py --checkpoint {folder}/checkpoint.pt")
    if WORLD > 1:
        dist.barrier()                                      # while the first process still looks
        del advance                                         # it holds DistributedDataParallel, whose threads may abort the exit
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
