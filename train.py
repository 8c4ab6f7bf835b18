"""Train a Hamiltonian Generative Network from pixels, or a Neural Hamiltonian Flow on points.

    python train.py --system three_body         # writes runs/three_body/
    python train.py --data clips.npy            # clips of your own, (N, T, H, W, C), see README
    python train.py --density two_moons         # a flow; --data points.npy, (N, D), for your own
    python train.py --resume                    # goes on with the newest run

    python train.py --bench                     # how fast all this is here

Batches of a system are simulated and painted afresh: nothing but the run's folder is written.
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
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import physics
from eval import (
    MODELS, Clips, Help, Parser, Points, at_least, fail, flow_table, keep_memory, load, measure,
    measure_flow, movies, newest_run, pick_device, provenance, read_data, table, test_clips, unit,
)  # fmt: skip
from hgn import ARCHITECTURES, GECO, HGN, HNN, INTEGRATORS, Couplings
from nhf import BASES, DENSITIES, NHF, RealNVP
from physics import SYSTEMS, initial_states, jitter, render, simulate

DEFAULTS = {
    "hgn": {"steps": 3000, "batch_size": 16, "lr": 4e-3},
    "paper": {"steps": 5000, "batch_size": 16, "lr": 1.5e-4},
    "hnn": {"steps": 5000, "batch_size": 16, "lr": 1e-3},
    "nhf": {"steps": 5000, "batch_size": 512, "lr": 2e-2},
    "realnvp": {"steps": 10000, "batch_size": 512, "lr": 5e-3},  # twice as fast a step
}
LOOK_EVERY = 2000  # steps from one evaluation to the next
READERS = 4  # threads that read clips of one's own
POOL = 64  # batches whose trajectories are simulated together
HERE = ("device", "compile", "resume", "name", "bench")  # of the command alone, not of the run
FREE = ("steps", "window", "save_every")  # what --resume may change
FLOWS = ("nhf", "realnvp")
CHART = 0.25  # part of a compact run in which chart and decoder learn single frames, without H
GROWTH = 0.5  # part of the rest over which the horizon grows to the whole window
SEEN = 2048  # frames that the chart starts from
STATES = 32768  # clips whose states the prior is fitted to at the end
RATES = {  # times --lr, of parts of a compact model: a decoder is small; filters that change fast
    "decoder": 3.0,  # leave what is made of their features behind
    "encoder.chart.filters": 0.1,
    "encoder.chart.shapes": 0.1,
}
PATIENCE = 5  # looks at a loss that is not finite before a run stops


def parse(**defaults):
    """The command line as a namespace, every value in its range; nothing is read or made."""
    parser = Parser(description=__doc__.split("\n")[0], formatter_class=Help)
    whole, positive = at_least(1), at_least(0, float, above=True)
    data = parser.add_argument_group("data")
    data.add_argument("--system", choices=SYSTEMS, help="what to learn (default: mass_spring)")
    data.add_argument("--density", choices=DENSITIES, help="learn this with a flow instead")
    data.add_argument("--data", metavar="PATH", help="clips (N, T, H, W, C) or points (N, D)")
    data.add_argument("--size", type=int, default=32, help="pixels a side, 16 to 128")
    data.add_argument("--noise", type=noise, default=0.0, help="on every coordinate; or 'paper'")
    data.add_argument("--dt", type=positive, default=0.125, help="time between frames")
    data.add_argument("--window", type=whole, default=30, help="frames to learn from")
    data.add_argument("--targets", type=whole, default=8, help="frames of it painted for the loss")
    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=MODELS, help="hgn, or a baseline; of densities nhf")
    model.add_argument("--arch", choices=ARCHITECTURES, default="compact", help="of hgn")
    model.add_argument("--latent", type=whole, help="numbers in q; of the paper's, maps in q")
    model.add_argument("--context", type=whole, default=5, help="first frames the encoder sees")
    model.add_argument("--integrator", choices=INTEGRATORS, help="default: that of --arch")
    model.add_argument("--substeps", type=whole, default=1, help="integrator steps a frame")
    model.add_argument("--periodic", action=argparse.BooleanOptionalAction, help="q are angles")
    model.add_argument(
        "--no-f-psi", dest="f_psi", action="store_false", help="without f_psi (paper)"
    )
    model.add_argument("--deterministic", action="store_true", help="no sampling of z, no KL")
    flow = parser.add_argument_group("flow")
    flow.add_argument("--hamiltonians", type=whole, default=8, help="how many in a row")
    flow.add_argument("--leapfrog-steps", type=whole, default=1, help="of each Hamiltonian")
    flow.add_argument("--kinetic", choices=("mlp", "quadratic"), default="mlp", help="K(p)")
    flow.add_argument("--base", choices=BASES, default="gaussian", help="where the flow starts")
    flow.add_argument("--samples", type=whole, default=1, help="draws of p in the bound; 1: ELBO")
    train = parser.add_argument_group("training")
    for name, kind in (("steps", whole), ("batch-size", whole), ("lr", positive)):
        values = ", ".join(f"{k} {v[name.replace('-', '_')]}" for k, v in DEFAULTS.items())
        train.add_argument(f"--{name}", type=kind, help=f"default: {values}")
    train.add_argument("--beta", type=at_least(0, float), default=1e-3, help="weight of the KL")
    train.add_argument("--geco", action="store_true", help="the paper's constraint, no fixed beta")
    train.add_argument("--tolerance", type=positive, default=2e-4, help="pixel MSE of --geco")
    train.add_argument("--seed", type=at_least(0), default=0, help="of weights, data and samples")
    run = parser.add_argument_group("run")
    run.add_argument("--name", help="folder under runs/ (default: the system's name)")
    run.add_argument("--resume", nargs="?", const="newest", metavar="CHECKPOINT", help="go on")
    run.add_argument("--save-every", type=whole, default=250, help="steps between checkpoints")
    run.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    run.add_argument("--compile", action="store_true", help="fuse the step: a minute at first")
    run.add_argument("--bench", action="store_true", help="measure; --compile adds rows")
    parser.set_defaults(**defaults)
    args = parser.parse_args()
    if args.seed >= 2**20:
        fail(f"--seed must be below {2**20}, not {args.seed}")
    if args.name and Path(args.name).name != args.name:
        fail(f"--name {args.name} is not the name of a folder")
    return args


def noise(text):
    return "paper" if text == "paper" else at_least(0, float)(text)


def settle(args):
    """Fill in what depends on the data and on other options, and refuse what does not go
    together."""
    given = [f"--{k} {getattr(args, k)}" for k in ("system", "density", "data") if getattr(args, k)]
    if len(given) > 1:
        fail(f"{given[0]} and {given[1]} exclude each other: give one")
    flow = bool(args.density or args.data and read_data(args.data).ndim == 2)
    args.model = args.model or ("nhf" if flow else "hgn")
    if flow != (args.model in FLOWS):
        needs = "--system NAME or clips" if flow else "--density NAME or points (N, D)"
        fail(f"--model {args.model} needs {needs}")
    if args.bench and (args.model != "hgn" or args.data):
        fail("--bench chooses the model itself: give a --system, or none")
    kind = "paper" if args.arch == "paper" and args.model == "hgn" else args.model
    for k, v in DEFAULTS[kind.removesuffix("_conv")].items():
        setattr(args, k, getattr(args, k) or v)
    if flow:
        return
    if args.data:
        if args.noise:
            fail("--noise is for simulated systems: --data is taken as it is")
        own = Clips(vars(args))
        args.size, latent, periodic, length = own.size, None, False, own.length
    else:
        args.system = args.system or "mass_spring"
        system, length = SYSTEMS[args.system], args.window
        latent, periodic = initial_states(system, 1)[0].numel(), system.periodic
    args.latent = args.latent or (None if kind == "paper" else latent)
    args.periodic = periodic if args.periodic is None else args.periodic
    if args.context > args.window and kind in ("hgn", "paper"):
        fail(f"--context {args.context} is longer than a training clip: raise --window or lower it")
    if kind == "paper" and args.window > length:
        args.window = length
    if kind.startswith("hnn") and not 3 <= args.targets <= length:
        fail(f"--model {args.model} learns from --targets frames in a row, 3 to {length}")


def resumed(args):
    """The options of the run that --resume names, its model, its checkpoint and its folder."""
    path = newest_run() if args.resume == "newest" else Path(args.resume)
    model, checkpoint = load(path)
    config = {k: v for k, v in checkpoint["config"].items() if k in vars(args) and k not in HERE}
    # As text, which the parser reads like a command line's: a stranger's file gets no further.
    kept = (None, True, False)
    args = parse(**{k: v if any(v is x for x in kept) else str(v) for k, v in config.items()})
    for k, v in config.items():
        if k not in FREE and getattr(args, k) != v:
            fail(f"--{k.replace('_', '-')} cannot change in a resumed run: start another")
    if path.name != "checkpoint.pt":
        fail(f"{path} is not in a run's folder: mkdir -p runs/{path.stem} && cp {path} "
             f"runs/{path.stem}/checkpoint.pt, then resume that")  # fmt: skip
    if args.steps <= checkpoint["step"]:
        fail(f"{path} has already made {checkpoint['step']} steps: ask for more with --steps")
    if not os.access(path.parent, os.W_OK):
        fail(f"cannot write into {path.parent}: copy the run to a folder of your own")
    return args, model, checkpoint, path.parent


def new_folder(args):
    """runs/<name>/, never one that holds a run already."""
    first = args.system or args.density or Path(args.data).resolve().stem
    first += "-realnvp" if args.model == "realnvp" else ""
    numbered = itertools.chain([first], (f"{first}-{i}" for i in itertools.count(2)))
    for name in [args.name] if args.name else numbered:
        folder = Path("runs") / name
        if not folder.exists():
            try:
                folder.mkdir(parents=True)
            except OSError as error:
                fail(f"cannot make {folder} ({error.strerror}): run where you may write")
            return folder
    fail(f"{folder} exists: --resume {folder}/checkpoint.pt goes on with it, "
         "another --name starts afresh")  # fmt: skip


class Batches:
    """Batch number `step` of a run, the same whenever it is asked for: a resumed run sees what it
    would have seen. A system's is drawn, simulated and painted on the device; clips of one's own
    are read by threads, some batches ahead.

    A batch of the compact model is the frames that the encoder sees (B, context, C, S, S), frames
    to score (B, targets, C, S, S) and their times (B, targets), counted from the first that it
    sees. The paper's model and HNN take whole clips (B, T, C, S, S)."""

    def __init__(self, args, device):
        self.args, self.device, self.pool, self.ahead = args, device, None, {}
        self.data = Clips(vars(args)) if args.data else None
        self.reader = ThreadPoolExecutor(READERS)
        self.whole = {"paper": args.window, "compact": 0}[args.arch]
        self.whole = args.targets if args.model != "hgn" else self.whole
        self.length = self.data.length if self.data else args.window
        self.most = min(args.window, self.length) - 1  # the farthest time that is scored

    def __call__(self, step):
        if not self.data:
            return self.draw(step)
        steps = range(step, step + 1 + READERS)
        self.ahead = {i: self.ahead.get(i) or self.reader.submit(self.draw, i) for i in steps}
        batch = (x.to(self.device, non_blocking=True) for x in self.ahead[step].result())
        return [unit(x) if x.dim() == 5 else x for x in batch]

    def draw(self, step):
        args, shape = self.args, (self.args.batch_size, 1)
        device = "cpu" if self.data else self.device
        generator = torch.Generator(device).manual_seed((args.seed << 20) + step + 2**19)
        uniform = lambda *shape: torch.rand(shape, generator=generator, device=device)
        seen = torch.arange(self.whole or args.context, device=device)
        reach = 0 if self.whole else self.horizon(step)
        half = self.length // 2 if self.data else reach  # of one's own, where every frame counts
        ahead = min(reach, half)
        room = self.length - max(len(seen) - 1, ahead)  # places where what is read can begin
        first = (uniform(*shape) * room).long()
        if self.whole:
            at, times = first + seen, None
        else:
            far = (self.length - 1 - first).clamp(max=reach)
            times = (uniform(len(first), args.targets) * (far + 1)).long()
            at = torch.cat((first + seen, first + times), 1)
        if self.data:
            clips = (uniform(len(first)) * len(self.data.train)).long()
            frames = self.data.read(self.data.train[clips], at)
        else:
            q = self.trajectories(step)
            q = q[torch.arange(len(q), device=device).unsqueeze(1), at]
            system = SYSTEMS[args.system]
            frames = render(system, jitter(system, q, args.noise, generator), args.size)
        batch = [frames] if self.whole else [*frames.split([len(seen), args.targets], 1), times]
        pinned = self.data and self.device.type == "cuda"
        return [x.pin_memory() for x in batch] if pinned else batch

    def horizon(self, step):
        """How far from the first frame a compact model is scored at this step: it grows from 3
        frames."""
        share = (step / self.args.steps - CHART) / ((1 - CHART) * GROWTH)
        return min(self.most, 3 + int(self.args.window * max(0, share)))

    def trajectories(self, step):
        """True q of the batch's clips (B, length, bodies, dims), simulated for POOL batches at
        once."""
        args, system, number = self.args, SYSTEMS[self.args.system], step // POOL
        if self.pool != number:
            generator = torch.Generator(self.device).manual_seed((args.seed << 20) + number)
            start = initial_states(system, args.batch_size * POOL, generator, self.device)
            q = simulate(system, *start, args.window, args.dt)[0]
            self.pool, self.q = number, q.unflatten(0, (POOL, -1))
        return self.q[step % POOL]


def build(args):
    """The model that args describe."""
    if args.model in FLOWS:
        points = Points(vars(args))
        flow = NHF(
            points.dim, args.hamiltonians, args.leapfrog_steps, kinetic=args.kinetic,
            base=args.base, shift=points.shift, scale=points.scale,
        )  # fmt: skip
        return flow if args.model == "nhf" else RealNVP.like(flow)
    channels = Clips(vars(args)).channels if args.data else 3
    frame = {"size": args.size, "channels": channels, "dt": args.dt}
    try:
        if args.model != "hgn":
            return HNN(**frame, latent=args.latent or 4, conv=args.model == "hnn_conv")
        options = "context arch latent integrator substeps periodic f_psi deterministic".split()
        return HGN(**frame, **{k: getattr(args, k) for k in options})
    except ValueError as error:
        fail(str(error))


def make_optimisers(model, lr, rates={}, muon=False):
    """Adam, with rates[prefix] times lr for the parameters that the prefix names. With muon, that
    for matrices elsewhere, which learns small and large directions alike."""
    named = [(next((p for p in rates if name.startswith(p)), None), w)
             for name, w in model.named_parameters()]  # fmt: skip
    matrices = [w for prefix, w in named if muon and not prefix and w.dim() == 2]
    apart = {id(w) for w in matrices}
    groups = {prefix: [] for prefix in (None, *rates)}
    for prefix, w in named:
        groups[prefix] += [w] if id(w) not in apart else []
    cuda = named[0][1].is_cuda  # where a graph replays steps, the rate is a tensor
    rate = lambda: torch.tensor(lr, device="cuda") if cuda else lr
    groups = [{"params": group, "lr": rate(), "times": rates.get(prefix, 1.0)}
              for prefix, group in groups.items() if group]  # fmt: skip
    adam = torch.optim.Adam(groups, lr, betas=(0.9, 0.99), eps=1e-12, fused=cuda, capturable=cuda)
    if not matrices:
        return [adam]
    return [adam, Muon(matrices, rate())]


class Muon(torch.optim.Optimizer):
    """Jordan et al. 2024: momentum, made orthogonal by five Newton-Schulz iterations. As
    torch.optim.Muon with adjust_lr_fn="match_rms_adamw", but in float32, as most CPUs are slow at
    bfloat16, and at a rate that may be a tensor, which a step that is replayed as a graph needs."""

    def __init__(self, matrices, lr):
        super().__init__(matrices, {"lr": lr})

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        for w in (w for w in group["params"] if w.grad is not None):
            momentum = self.state[w].setdefault("momentum", torch.zeros_like(w))
            momentum.lerp_(w.grad, 0.05)
            x = torch.lerp(w.grad, momentum, 0.95)  # Nesterov's
            x = x.mT if len(x) > x.shape[1] else x
            x = x / (x.norm() + 1e-12)
            for _ in range(5):
                a = x @ x.mT
                x = 3.4445 * x + (2.0315 * (a @ a) - 4.775 * a) @ x
            x = x.mT if x.shape != w.shape else x
            w.sub_(group["lr"] * 0.2 * max(w.shape) ** 0.5 * x)


def set_rate(optimisers, lr, step, steps):
    """Warm up to lr over 50 steps, then down to zero along a cosine."""
    lr = lr * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in (group for optimiser in optimisers for group in optimiser.param_groups):
        rate = lr * group.get("times", 1.0)
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def descend(model, loss, optimisers, most=1.0):
    """One step of the optimisers down the gradient of loss, clipped to the norm `most`; where that
    is not finite the weights stay as they are. Nothing in it waits for a GPU."""
    model.zero_grad()
    loss.backward()
    weights = [w for w in model.parameters() if w.grad is not None]
    good = torch.nn.utils.clip_grad_norm_(weights, most).isfinite()
    before = [w.detach().clone() for w in weights]
    for w in weights:
        w.grad.masked_fill_(~good, 0.0)
    for optimiser in optimisers:
        optimiser.step()
    with torch.no_grad():
        for w, old in zip(weights, before):
            w.copy_(torch.where(good, w, old))


class Graphed:
    """step(*tensors) -> tensors on a GPU: three times as it is, from then on replayed as one CUDA
    graph, so that thousands of small kernels cost one launch."""

    def __init__(self, step):
        self.step, self.calls, self.stream = step, 0, torch.cuda.Stream()

    def __call__(self, *batch):
        self.calls += 1
        if self.calls <= 3:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                values = self.step(*batch)
            torch.cuda.current_stream().wait_stream(self.stream)
            return values
        if self.calls == 4:
            self.batch, self.graph = [x.clone() for x in batch], torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.values = self.step(*self.batch)
        for x, new in zip(self.batch, batch):
            x.copy_(new)
        self.graph.replay()
        return self.values


def compiled(function):
    """`function` as one region without graph breaks, compiled once for its shapes. Too many
    recompilations are an error instead of a silent fall-back."""
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    warnings.filterwarnings("ignore", message="invoke_subgraph traced multiple backward graphs")
    # Inductor may not choose memory layouts: torch 2.13 gets the strides of convolutions inside a
    # nested region wrong. Nor may it use a buffer again: a state that a nested region both returns
    # and keeps for the way back is one buffer to it and two to its caller, who overwrites what is
    # kept.
    options = {"layout_optimization": False, "allow_buffer_reuse": False, "inplace_buffers": False}
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)


class Pixels:
    """A run on clips: advance(step) makes a training step, look(folder) measures and writes a
    movie."""

    def __init__(self, args, model, device):
        self.args, self.model, self.device = args, model, device
        self.batches, self.test = Batches(args, device), test_clips(vars(args), 100, device)
        self.compact = args.model == "hgn" and args.arch == "compact"
        self.optimisers = make_optimisers(
            model, args.lr, RATES if self.compact else {}, self.compact
        )
        self.geco = GECO(args.tolerance, beta=args.beta, device=device)
        self.charted = int(CHART * args.steps) if self.compact else 0  # steps of the first stage
        self.fixed, self.reach = args.compile or device.type == "cuda", self.batches.most
        fast = compiled if args.compile else lambda function: function
        graph = Graphed if device.type == "cuda" else lambda function: function
        losses = (self.chart_loss, self.loss)
        self.steps = [graph(self.stepper(fast(loss))) for loss in losses]

    def start(self):
        """Fit what needs no learning to frames of batches after the last step."""
        frames = self.batches(self.args.steps)[-1 if self.batches.whole else 1].flatten(0, 1)
        batches = range(1, 1 + SEEN // len(frames))
        more = [self.batches(self.args.steps + i)[0].flatten(0, 1) for i in batches]
        self.model.fit(torch.cat([frames, *more])[:SEEN])

    def chart_loss(self, context, targets, times):
        return self.model.chart_loss(targets)

    def loss(self, *batch):
        if self.compact:
            return self.model.charted_loss(*batch, self.reach, self.geco.beta)
        return self.model.loss(*batch, *([self.geco.beta] if self.args.model == "hgn" else []))

    def stepper(self, loss):
        def step(*batch):
            values = loss(*batch)
            descend(self.model, values[0], self.optimisers)
            if self.args.geco:
                self.geco.update(values[1])
            return values

        return step

    def stage(self, step):
        """How far the stage of training is that `step` belongs to: (steps done, steps in all)."""
        if step < self.charted:
            return step, self.charted
        return step - self.charted, self.args.steps - self.charted

    def advance(self, step):
        torch.manual_seed((self.args.seed << 20) + step)  # of z: a resumed run draws the same
        self.reach = self.batches.most if self.fixed else self.batches.horizon(step)
        values = self.steps[0 if step < self.charted else 1](*self.batches(step))
        if self.compact and step + 1 == self.args.steps and not self.args.deterministic:
            fit_prior(self.model, self.args, self.device)
        return dict(zip(("loss", "mse", "kl"), values)) | {"beta": self.geco.beta}

    def look(self, folder):
        movies(self.model, self.test, folder, 90)
        return measure(self.model, self.test)


def fit_prior(model, args, device):
    """The learnt prior alone and anew, at a run's end, on the states of many clips: in batches of
    hundreds it learns what sixteen states a step leave blurred. Anew, as one that followed the
    states while they moved stays folded as they were then."""
    torch.manual_seed(args.seed)
    model.prior.load_state_dict(Couplings(*model.prior.shape).state_dict())
    rounds = min(10000, 1 + args.steps // 2)
    size = min(512, rounds)
    few = argparse.Namespace(**vars(args) | {"targets": 1, "window": args.context})
    batches = Batches(few, device)
    with torch.no_grad():  # on batches of after the last step
        n = max(1, STATES * size // 512 // args.batch_size)
        states = [model.encode(batches(args.steps + i)[0]) for i in range(n)]
    mean, logvar = (torch.cat(x) for x in zip(*states))
    optimisers = make_optimisers(model.prior, 5e-3)
    generator = torch.Generator(device).manual_seed(args.seed)

    def step(z, mean, logvar):
        loss = model.prior.kl(z, mean, logvar).mean()
        descend(model.prior, loss, optimisers)
        return (loss,)

    step = Graphed(step) if device.type == "cuda" else step
    for i in range(rounds):
        set_rate(optimisers, 5e-3, i, rounds)
        at = torch.randint(len(mean), (size,), generator=generator, device=device)
        noise = torch.randn(size, mean.shape[1], generator=generator, device=device)
        step(mean[at] + (0.5 * logvar[at]).exp() * noise, mean[at], logvar[at])


class Densities:
    """The same of a flow, which is small enough to stay on the CPU."""

    def __init__(self, args, model, device):
        self.args, self.model, self.points = args, model, Points(vars(args))
        self.optimisers, self.geco = make_optimisers(model, args.lr, muon=True), GECO()
        self.weights = compiled(model.log_weights) if args.compile else model.log_weights

    def start(self):
        pass

    def stage(self, step):
        return step, self.args.steps

    def advance(self, step):
        generator = torch.Generator().manual_seed((self.args.seed << 20) + step)
        x = self.points.draw(self.args.batch_size, generator)
        log_w = self.weights(x, torch.randn(self.args.samples, *x.shape, generator=generator))
        nll = math.log(len(log_w)) - log_w.logsumexp(0).mean()
        descend(self.model, nll, self.optimisers)
        return {"loss": nll, "elbo": log_w.mean(), "nll": nll}

    def look(self, folder):
        return measure_flow(self.model, self.points, 2000, (1, 64))


class Run:
    """The folder of a run: its checkpoint and its log, and what is needed to go on as if
    uninterrupted."""

    def __init__(self, args, learner, folder, checkpoint):
        self.args, self.learner, self.folder = args, learner, folder
        self.config = {k: v for k, v in vars(args).items() if k not in HERE}
        self.done, self.before = checkpoint.get("step", 0), checkpoint.get("seconds", 0.0)
        self.start = time.time()
        if checkpoint:
            self.restore(checkpoint)

    @property
    def seconds(self):
        return self.before + time.time() - self.start

    def restore(self, checkpoint):
        """Weights, optimisers and beta of a checkpoint; what was logged after it is dropped."""
        try:
            pairs = zip(self.learner.optimisers, checkpoint["optimisers"], strict=True)
            for optimiser, state in pairs:
                optimiser.load_state_dict({**optimiser.state_dict(), "state": state["state"]})
                kept = ((w, x) for w, values in optimiser.state.items() for x in values.values())
                if any(x.shape not in ((), w.shape) for w, x in kept):
                    raise ValueError
            geco = self.learner.geco
            for mine, kept in zip((geco.beta, geco.mse), checkpoint["geco"]):
                mine.fill_(float(kept))
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError):
            fail(f"{self.folder} was trained by another version of this code: train again")
        log, lines = self.folder / "metrics.jsonl", []
        for line in log.read_text().splitlines(True) if log.exists() else ():
            try:
                lines += [line] * (json.loads(line)["step"] <= self.done)
            except (ValueError, KeyError, TypeError):  # cut where a run was killed
                pass
        self.write("metrics.jsonl", "".join(lines).encode())

    def write(self, name, packed):
        """All or nothing, and on the disk before it gets its name: a crash leaves the last one
        whole."""
        try:
            with open(self.folder / f"{name}.new", "wb") as file:
                file.write(packed)
                file.flush()
                os.fsync(file.fileno())
            os.replace(self.folder / f"{name}.new", self.folder / name)
        except OSError as error:
            self.cannot(error)

    def cannot(self, error):
        fail(f"cannot write into {self.folder} ({error.strerror}), where the last checkpoint stays "
             f"as it was: make room, then --resume {self.folder}/checkpoint.pt")  # fmt: skip

    def save(self):
        learner, file = self.learner, io.BytesIO()
        state = {
            "kind": self.args.model, "model": learner.model.state_dict(),
            "model_config": learner.model.config, "config": self.config, "step": self.done,
            "optimisers": [optimiser.state_dict() for optimiser in learner.optimisers],
            "geco": (learner.geco.beta.item(), learner.geco.mse.item()), "seconds": self.seconds,
            **provenance(),
        }  # fmt: skip
        torch.save(state, file)
        self.write("checkpoint.pt", file.getvalue())

    def log(self, **values):
        line = {"step": self.done, "seconds": round(self.seconds, 1), **values}
        try:
            with open(self.folder / "metrics.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
        except OSError as error:
            self.cannot(error)

    def evaluate(self):
        self.learner.model.eval()
        try:
            result = self.learner.look(self.folder)
        except OSError as error:
            self.cannot(error)
        self.learner.model.train()
        self.log(**{k: v for k, v in result.items() if isinstance(v, float)})
        return result


def bench(args, device):
    """Time data, rollout and training step against the machine's own peak: one table, one JSON."""
    rows, cuda = [], device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None

    def timed(call, least=7, seconds=2.0):
        """Seconds of the first call, and the median of the others."""
        spent, warm = [], 5 if cuda else 1  # a graph is captured at the fourth step
        while len(spent) < warm + least or sum(spent[warm:]) < seconds:
            start = time.perf_counter()
            call()
            wait()
            spent.append(time.perf_counter() - start)
            if len(spent) == warm:
                gc.collect()
                gc.freeze()  # a million of the compiler's objects slow Python down
        return spent[0], statistics.median(spent[warm:])

    def row(what, how, clips, call, flops):
        first, median = timed(call)
        share = flops / median / 1e9 / peak
        cell = {"what": what, "how": how, "first_s": first, "ms": 1e3 * median}
        rows.append(cell | {"clips_s": clips / median, "share_of_peak": share})
        if cuda:
            rows[-1]["memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
            torch.cuda.reset_peak_memory_stats()
        print(f"{what:<44}{how:<10}{first:7.1f} s{1e3 * median:10.2f} ms"
              f"{clips / median:10.0f} clips/s{share:7.1%} of peak", flush=True)  # fmt: skip

    def steps(what, **changes):
        """Rows of a training step: as it is, compiled, and on a GPU both as one graph."""
        options = argparse.Namespace(**{**vars(args), "steps": 10**6, **changes})
        options.lr = options.lr or 1e-4
        for compile in (False, True)[: 1 + args.compile]:
            options.compile = compile
            torch.manual_seed(args.seed)
            learner = Pixels(options, build(options).to(device), device)
            learner.start()
            batch = learner.batches(0)
            plain = learner.stepper((compiled if compile else lambda f: f)(learner.loss))
            if not compile:
                with FlopCounterMode(display=False) as counter:
                    plain(*batch)
            clips, flops = options.batch_size, counter.get_total_flops()
            row(what, "compiled" if compile else "eager", clips, lambda: plain(*batch), flops)
            if cuda:
                graph, how = learner.steps[1], ("compiled, graph" if compile else "graph")
                row(what, how, clips, lambda: graph(*batch), flops)

    a = torch.randn(4096, 4096, device=device)
    peak = 2 * 4096**3 / timed(lambda: a @ a)[1] / 1e9
    where = torch.cuda.get_device_name(device) if cuda else f"{torch.get_num_threads()} threads"
    print(f"{device}, {where}; a large matmul reaches {peak:.0f} GFLOP/s")
    paper = {"arch": "paper", "latent": None, "window": 30}
    for B in (args.batch_size, 512):
        steps(f"compact step, batch {B}, {args.targets} frames", batch_size=B)
    steps(f"paper step, batch {args.batch_size}, 30 frames", **paper)
    model = build(args).to(device)
    with torch.no_grad():
        state = [torch.randn(args.batch_size, model.config["latent"], device=device) for _ in "qp"]
        rollout = lambda: model.decode(model.rollout(*state, 29)[0])
        row(f"rollout, {args.batch_size} x 30 frames", "eager", args.batch_size, rollout, 0)
    for name in SYSTEMS:
        n = 2048 if cuda else 256
        draw = lambda: physics.clips(SYSTEMS[name], n, size=args.size, device=device)
        row(f"data, {n} clips of {name}", "eager", n, draw, 0)
    path = Path("runs") / f"bench-{device.type}.json"
    path.parent.mkdir(exist_ok=True)
    report = {**provenance(), "config": vars(args), "machine": where, "peak_gflop_s": peak}
    path.write_text(json.dumps(report | {"table": rows}, indent=1))
    print(f"wrote {path}")


def loop(run, learner):
    """Train to the last step. Returns whether a signal stopped it before."""
    args, stopped, bad = run.args, [], 0

    def heed(number, _):
        if stopped:  # asked twice
            raise SystemExit(128 + number)
        stopped.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):  # heeded between two steps, when all agree
        signal.signal(number, heed)
    bar = tqdm(initial=run.done, total=args.steps, unit="step")
    while run.done < args.steps:
        set_rate(learner.optimisers, args.lr, *learner.stage(run.done))
        values = learner.advance(run.done)
        run.done += 1
        bar.update()
        if run.done % 20 == 0 or run.done == args.steps or stopped:
            values = dict(zip(values, torch.stack([v.detach() for v in values.values()]).tolist()))
            bad = 0 if math.isfinite(values["loss"]) else bad + 1
            if bad == PATIENCE:
                bar.close()
                fail(f"the loss is not finite at step {run.done}: try --lr {args.lr / 4:g}, and "
                     f"look for wrong values in --data; the last checkpoint is whole")  # fmt: skip
            bar.set_postfix({k: f"{v:.3g}" for k, v in values.items()})
            run.log(**values)
        if not bad and (run.done % args.save_every == 0 or run.done == args.steps or stopped):
            run.save()
        if stopped:
            bar.close()
            print(f"stopped after step {run.done}: go on with "
                  f"python train.py --resume {run.folder}/checkpoint.pt")  # fmt: skip
            raise SystemExit(128 + stopped[0])
        if run.done % LOOK_EVERY == 0 and run.done < args.steps:
            run.evaluate()
    bar.close()


def main():
    args, checkpoint, folder = parse(), {}, None
    if args.resume:
        args, model, checkpoint, folder = resumed(args)
    else:
        settle(args)
    pixels = args.model not in FLOWS
    device = pick_device(args.device if pixels else "cpu")
    keep_memory()
    torch.manual_seed(args.seed)
    if args.bench:
        return bench(args, device)
    model = (model if checkpoint else build(args)).to(device).train()
    learner = (Pixels if pixels else Densities)(args, model, device)
    if not checkpoint:
        learner.start()
    run = Run(args, learner, folder or new_folder(args), checkpoint)
    if checkpoint:
        print(f"resumed {folder}/checkpoint.pt at step {run.done} of {args.steps}")
    else:
        run.log(config=run.config, **provenance())
        run.save()
    try:
        loop(run, learner)
    except torch.OutOfMemoryError:
        fail(f"out of memory at step {run.done}: try --batch-size {args.batch_size // 2}; "
             "the last checkpoint is whole")  # fmt: skip
    result = run.evaluate()
    if not pixels:
        flow_table({args.model: result})
        print(
            f"\n{run.seconds:.0f} s. Then: python eval.py --checkpoint {run.folder}/checkpoint.pt"
        )
        return
    table(result, run.config)
    print(f"\n{run.seconds:.0f} s. Look at {run.folder}/rollout.gif, then: "
          "python eval.py --reverse --speed 2 --sample 4")  # fmt: skip
    error = next(v for k, v in result.items() if k.startswith("mse_0_"))
    if not error <= 0.5 * result["blank_mse"]:
        print("The error is above half of a blank prediction's: little was learnt. Try more "
              "--steps, more --latent, a lower --lr, and check --dt.")  # fmt: skip


if __name__ == "__main__":
    main()
