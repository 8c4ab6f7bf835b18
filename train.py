"""Train a Hamiltonian Generative Network from pixels, or a Neural Hamiltonian Flow on points.

    python train.py --system three_body         # writes runs/three_body/
    python train.py --data film.mp4             # recordings of your own, see README
    python train.py --density two_moons         # a flow; --data points.npy, (N, D), for your own
    python train.py --resume                    # goes on with the newest run

Batches of a system are simulated and painted afresh: nothing but the run's folder is written.
"""

import argparse
import gc
import io
import json
import math
import signal
import statistics
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import physics
from eval import measure, measure_flow, movies, number, open_run
from eval import pick_device, provenance, table, test_set, write
from hgn import ARCHITECTURES, GECO, HGN, INTEGRATORS, Couplings
from hgn import chart_loss, charted_loss, hnn_loss
from nhf import DENSITIES, NHF, RealNVP
from physics import SYSTEMS, initial_states, jitter, read_points, render, simulate

DEFAULTS = {  # steps, batch size and learning rate
    "hgn": (3000, 16, 4e-3),
    "paper": (5000, 16, 1.5e-4),  # hgn with --arch paper
    "hnn": (5000, 16, 4e-4),
    "nhf": (4000, 512, 2e-2),
    "realnvp": (10000, 512, 5e-3),  # twice as fast a step
}
FLOWS = "nhf", "realnvp"
LOOK_EVERY = 2000  # steps from one evaluation to the next
READERS = 4  # threads that read recordings
POOL = 64  # batches whose trajectories are simulated together
HERE = "device", "compile", "resume", "name", "bench"  # of the command alone, not of the run
FREE = "steps", "window", "save_every"  # what --resume may change
CHART = 0.25  # part of a compact run in which chart and decoder learn single frames, without H
GROWTH = 0.5  # part of the rest over which the horizon grows to the whole window
SEEN = 2048  # frames that the chart starts from
STATES = 32768  # clips whose states the prior is fitted to at the end
RATES = {  # times --lr, of parts of a compact model: a decoder is small; filters that change fast
    "decoder": 3.0,  # leave what is made of their features behind
    "encoder.filters": 0.1,
    "encoder.shapes": 0.1,
}
PATIENCE = 5  # looks at a loss that is not finite before a run stops


# ------------------------------------------------------------------ command line


def refuse(message):
    raise ValueError(f"{message} (--help lists the options)")


def parse(**defaults):
    """The command line as a namespace. Raises: ValueError."""
    parser = argparse.ArgumentParser("python train.py", "%(prog)s [options]")
    parser.error = refuse
    count, many, positive = number(1, 1000), number(1, 10**9), number(1e-9, 1e6, float)
    flag, default = {"action": "store_true"}, "default: " + ", ".join(f"{k} {{}}" for k in DEFAULTS)
    group = parser.add_argument_group("data")
    add = group.add_mutually_exclusive_group().add_argument
    add("--system", choices=SYSTEMS, metavar="NAME", help=", ".join(SYSTEMS))
    add("--density", choices=DENSITIES, metavar="NAME", help="learn this with a flow instead")
    add("--data", metavar="PATH", help="recordings, or points (N, D), of your own")
    add = group.add_argument
    add("--size", type=number(16, 128), help="pixels a side (default: 32)")
    add("--dt", type=positive, help="time between frames (default: 0.125, or the film's)")
    add("--fps", type=positive, help="frames a second of recordings, instead of --dt")
    add("--stride", type=count, default=1, help="take every k-th frame of recordings")
    add("--clip", type=many, default=60, help="frames of a clip cut from recordings (default: 60)")
    add("--noise", type=noise, default=0.0, help="on every coordinate; or 'paper'")
    add("--window", type=count, default=30, help="frames to learn from (default: 30)")
    add("--targets", type=count, default=8, help="frames of it painted for the loss (default: 8)")
    add = parser.add_argument_group("model").add_argument
    models = [name for name in DEFAULTS if name != "paper"]
    add("--model", choices=models, help="default: hgn; of densities nhf")
    add("--arch", choices=ARCHITECTURES, default="compact", help="of hgn (default: compact)")
    add("--latent", type=number(1, 64), help="numbers in q; of the paper's, maps in q")
    add("--context", type=count, default=5, help="first frames the encoder sees (default: 5)")
    add("--integrator", choices=INTEGRATORS, help="default: that of --arch")
    add("--substeps", type=count, default=1, help="integrator steps a frame (default: 1)")
    add("--periodic", action=argparse.BooleanOptionalAction, help="q are angles")
    add("--friction", **flag, help="motion dies out, at a rate that is learnt")
    add("--no-f-psi", dest="f_psi", action="store_false", help="without f_psi (paper)")
    add("--deterministic", **flag, help="no sampling of z, no KL")
    add = parser.add_argument_group("flow").add_argument
    add("--hamiltonians", type=count, default=1, help="how many in a row (default: 1)")
    add("--leapfrog-steps", type=count, default=6, help="of each Hamiltonian (default: 6)")
    add("--kinetic", choices=("quadratic", "mlp"), default="quadratic", help="default: quadratic")
    add("--samples", type=count, default=1, help="draws of p in the bound (default: 1, ELBO)")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=many, help=default.format(*[v[0] for v in DEFAULTS.values()]))
    add("--batch-size", type=many, help="default: 16, of flows 512")
    add("--lr", type=positive, help=default.format(*[v[2] for v in DEFAULTS.values()]))
    add("--beta", type=number(0, 1e6, float), default=1e-3, help="of the KL (default: 0.001)")
    add("--geco", **flag, help="the paper's constraint, no fixed beta")
    add("--tolerance", type=positive, default=2e-4, help="MSE of --geco (default: 0.0002)")
    add("--seed", type=number(0, 2**20 - 1), default=0, help="(default: 0)")
    add = parser.add_argument_group("run").add_argument
    add("--name", help="folder under runs/ (default: the system's name)")
    add("--resume", nargs="?", const="", metavar="PATH", help="go on (default: the newest run)")
    add("--save-every", type=many, default=250, help="steps between checkpoints (default: 250)")
    add("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    add("--compile", **flag, help="fuse the step: a minute at first")
    add("--bench", **flag, help="measure the speed here; --compile adds rows")
    parser.set_defaults(**defaults)
    return parser.parse_args()


def noise(text):
    return text if text == "paper" else number(0, 1e3, float)(text)


def settle(args):
    """Fill in what depends on other options. Raises: ValueError for what does not go together."""
    flow = bool(args.density or (args.data and read_points(args.data) is not None))
    args.model = args.model or ("nhf" if flow else "hgn")
    if flow != (args.model in FLOWS):
        needs = "--system NAME or recordings" if flow else "--density NAME or points (N, D)"
        raise ValueError(f"--model {args.model} needs {needs}")
    if args.model == "hnn":  # the published networks, with another loss
        args.arch, args.context, args.deterministic = "paper", 2, True
    paper = args.arch == "paper"
    usual = DEFAULTS["paper" if args.model == "hgn" and paper else args.model]
    for name, value in zip(("steps", "batch_size", "lr"), usual):
        setattr(args, name, getattr(args, name) or value)
    if args.bench and (args.model != "hgn" or args.data):
        raise ValueError("--bench chooses the model itself: give a --system, or none")
    if flow:
        return
    if args.data and args.noise:
        raise ValueError("--noise is for simulated systems: --data is taken as it is")
    if not args.data:
        if args.fps or args.stride > 1:
            raise ValueError("--fps and --stride are for --data: a system takes --dt")
        args.system = args.system or "mass_spring"
        system = SYSTEMS[args.system]
        args.size, args.dt = args.size or 32, args.dt or 0.125
        args.latent = args.latent or (None if paper else initial_states(system, 1)[0].numel())
        periodic = system.periodic and args.arch == "compact"
        args.periodic = periodic if args.periodic is None else args.periodic
    args.periodic = bool(args.periodic)
    if args.model == "hgn" and args.context > args.window:
        raise ValueError(f"--context {args.context} is longer than a training clip: --window")
    if args.model != "hgn" and not 3 <= args.targets <= args.window:
        raise ValueError(f"--model {args.model} learns from --targets frames in a row, 3 or more")


def resumed(args):
    """The options of the run that --resume names, its model, its checkpoint and its folder."""
    path, model, checkpoint = open_run(args.resume or None)
    config = {k: v for k, v in checkpoint["config"].items() if k in vars(args) and k not in HERE}
    # As text, which the parser reads like a command line's: a stranger's file gets no further.
    args = parse(**{k: v if isinstance(v, bool | None) else str(v) for k, v in config.items()})
    if changed := [k for k, v in config.items() if k not in FREE and getattr(args, k) != v]:
        raise ValueError(f"--{changed[0].replace('_', '-')} cannot change in a resumed run")
    if path.name != "checkpoint.pt":
        raise ValueError(f"{path} is not in a run's folder: copy it to runs/NAME/checkpoint.pt")
    if args.steps <= checkpoint["step"]:
        raise ValueError(f"{path} has made {checkpoint['step']} steps: ask for more with --steps")
    return args, model, checkpoint, path.parent


def new_folder(args):
    """runs/<name>/, never one that holds a run already."""
    name = args.name or args.system or args.density or Path(args.data).resolve().stem or "run"
    if Path(name).name != name:
        raise ValueError(f"--name {name} is not the name of a folder")
    folder = Path("runs") / name
    while folder.exists() and not args.name:
        folder = folder.with_name(f"{name}-{int(folder.name[len(name) + 1 :] or 1) + 1}")
    if folder.exists():
        raise ValueError(f"{folder} exists: --resume {folder} goes on with it")
    folder.mkdir(parents=True)
    return folder


# ------------------------------------------------------------------ data and model


class Batches:
    """Batch number `step` of a run, the same whenever it is asked for: a resumed run sees what it
    would have seen. A system's is drawn, simulated and painted on the device; recordings (`data`)
    are read by threads, some batches ahead.

    A batch of the compact model is the frames that the encoder sees (B, context, C, S, S), frames
    to score (B, targets, C, S, S) and their times (B, targets), counted from the first that it
    sees. The paper's model and HNN take whole clips (B, T, C, S, S)."""

    def __init__(self, args, data, device):
        self.args, self.data, self.device, self.pool, self.ahead = args, data, device, None, {}
        whole = {"paper": args.window, "compact": 0}[args.arch]  # frames in a row, or 0
        self.whole = whole if args.model == "hgn" else args.targets
        longest = args.window
        if data:
            self.reader, lengths = ThreadPoolExecutor(READERS), data.lengths[data.train]
            longest = int(lengths.max())
            self.whole = min(self.whole, longest)
            self.clips, self.lengths = (x[lengths >= self.whole] for x in (data.train, lengths))
        self.most = min(args.window, longest) - 1  # the farthest time that is scored

    def __call__(self, step):
        if not self.data:
            return self.draw(step)
        steps = range(step, step + 1 + READERS)
        self.ahead = {i: self.ahead.get(i) or self.reader.submit(self.draw, i) for i in steps}
        return [x.to(self.device, non_blocking=True) for x in self.ahead[step].result()]

    def draw(self, step):
        args, shape = self.args, (self.args.batch_size, 1)
        device = "cpu" if self.data else self.device
        generator = torch.Generator(device).manual_seed((args.seed << 20) + step + 2**19)
        uniform = lambda *shape: torch.rand(shape, generator=generator, device=device)
        seen = torch.arange(self.whole or args.context, device=device)
        reach = 0 if self.whole else self.horizon(step)
        length = torch.full(shape, args.window, device=device)
        ahead = length.clamp(max=reach)
        if self.data:  # every frame counts: long clips are drawn more often, starts come late too
            ends = self.lengths.cumsum(0)
            clips = torch.searchsorted(ends, (uniform(len(length)) * ends[-1]).long(), right=True)
            length = self.lengths[clips].unsqueeze(1)
            ahead = (length // 2).clamp(max=reach)
        first = (uniform(*shape) * (length - ahead.clamp(min=len(seen) - 1))).long()
        at = first + seen
        if not self.whole:
            far = (length - 1 - first).clamp(max=reach)
            times = (uniform(len(first), args.targets) * (far + 1)).long()
            at = torch.cat((at, first + times), 1)
        if self.data:
            frames = self.data.read(self.clips[clips], at)
        else:
            q = self.trajectories(step)[torch.arange(len(at), device=device).unsqueeze(1), at]
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


def build(args, test):
    """The model that args describe, for data like those of the test set."""
    if args.model in FLOWS:
        options = {"kinetic": args.kinetic, "shift": test.shift, "scale": test.scale}
        flow = NHF(test.dim, args.hamiltonians, args.leapfrog_steps, **options)
        return flow if args.model == "nhf" else RealNVP.like(flow)
    frame = {"size": test.size, "channels": test.channels, "dt": test.dt}
    names = "context arch latent integrator substeps periodic f_psi deterministic friction".split()
    return HGN(**frame, **{k: getattr(args, k) for k in names})


# ------------------------------------------------------------------ optimisers and steps


def make_optimisers(model, lr, rates={}, muon=False):
    """Adam, with rates[prefix] times lr for the parameters that the prefix names. With muon, that
    for matrices elsewhere, which learns small and large directions alike."""
    groups, matrices = {prefix: [] for prefix in (None, *rates)}, []
    for name, w in model.named_parameters():
        prefix = next((p for p in rates if name.startswith(p)), None)
        (matrices if muon and not prefix and w.dim() == 2 else groups[prefix]).append(w)
    cuda = w.is_cuda  # where a graph replays steps, the rate is a tensor
    rate = lambda: torch.tensor(lr, device="cuda") if cuda else lr
    groups = [{"params": group, "lr": rate(), "times": rates.get(prefix, 1.0)}
              for prefix, group in groups.items() if group]  # fmt: skip
    adam = torch.optim.Adam(groups, lr, betas=(0.9, 0.99), eps=1e-12, fused=cuda, capturable=cuda)
    return [adam, Muon(matrices, rate())] if matrices else [adam]


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
        group["lr"] = group["lr"].fill_(rate) if torch.is_tensor(group["lr"]) else rate


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
            with torch.cuda.graph(self.graph, stream=self.stream):
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
    """What a run on clips learns: advance(step) makes a training step, look(folder) measures."""

    def __init__(self, args, model, test, device):
        self.args, self.model, self.test, self.device = args, model, test, device
        self.batches, cuda = Batches(args, test.data, device), device.type == "cuda"
        self.compact = args.model == "hgn" and args.arch == "compact"
        rates = RATES if self.compact else {}
        self.optimisers = make_optimisers(model, args.lr, rates, muon=self.compact)
        self.geco = GECO(args.tolerance, beta=args.beta, device=device)
        self.charted = int(CHART * args.steps) if self.compact else 0  # steps of the first stage
        self.fixed, self.reach = args.compile or cuda, self.batches.most
        fast = compiled if args.compile else lambda function: function
        graph = Graphed if cuda else lambda function: function
        self.steps = [graph(self.stepper(fast(f))) for f in (self.chart_loss, self.loss)]

    def start(self):
        """Fit what needs no learning to frames of batches after the last step."""
        frames = self.batches(self.args.steps)[-1 if self.batches.whole else 1].flatten(0, 1)
        batches = range(1, 1 + SEEN // len(frames))
        more = [self.batches(self.args.steps + i)[0].flatten(0, 1) for i in batches]
        self.model.fit(torch.cat([frames, *more])[:SEEN])

    def chart_loss(self, context, targets, times):
        loss, mse, _ = chart_loss(self.model, targets)
        return loss, mse, mse.new_zeros(())

    def loss(self, *batch):
        if self.compact:
            return charted_loss(self.model, *batch, self.reach, self.geco.beta)
        if self.args.model == "hnn":
            return hnn_loss(self.model, *batch)
        return self.model.loss(*batch, self.geco.beta)

    def stepper(self, loss):
        def step(*batch):
            values = loss(*batch)
            descend(self.model, values[0], self.optimisers)
            if self.args.geco:
                self.geco.update(values[1])
            return values

        return step

    def advance(self, step):
        torch.manual_seed((self.args.seed << 20) + step)  # of z: a resumed run draws the same
        self.reach = self.batches.most if self.fixed else self.batches.horizon(step)
        values = self.steps[0 if step < self.charted else 1](*self.batches(step))
        if self.compact and step + 1 == self.args.steps and not self.args.deterministic:
            fit_prior(self.model, self.args, self.device, self.test.data)
        return dict(zip(("loss", "mse", "kl"), values)) | {"beta": self.geco.beta}

    def look(self, folder):
        movies(self.model, self.test, folder)
        return measure(self.model, self.test)


def fit_prior(model, args, device, data=None):
    """The learnt prior alone and anew, at a run's end, on the states of many clips: in batches of
    hundreds it learns what sixteen states a step leave blurred. Anew, as one that followed the
    states while they moved stays folded as they were then."""
    torch.manual_seed(args.seed)
    model.prior.load_state_dict(Couplings(*model.prior.shape).state_dict())
    rounds = min(10000, 1 + args.steps // 2)
    size = min(512, rounds)
    few = argparse.Namespace(**vars(args) | {"targets": 1, "window": args.context})
    batches = Batches(few, data, device)
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

    def __init__(self, args, model, test, device):
        self.args, self.model, self.test, self.charted = args, model, test, 0
        self.optimisers, self.geco = make_optimisers(model, args.lr, muon=True), GECO()
        self.weights = compiled(model.log_weights) if args.compile else model.log_weights

    def start(self):
        """Points need no fit: the model knows their mean and scale."""

    def advance(self, step):
        generator = torch.Generator().manual_seed((self.args.seed << 20) + step)
        x = self.test.draw(self.args.batch_size, generator)
        log_w = self.weights(x, torch.randn(self.args.samples, *x.shape, generator=generator))
        nll = math.log(len(log_w)) - log_w.logsumexp(0).mean()
        descend(self.model, nll, self.optimisers)
        return {"loss": nll, "elbo": log_w.mean(), "nll": nll}

    def look(self, folder):
        return measure_flow(self.model, self.test, 2000, (1, 64))


# ------------------------------------------------------------------ a run


class Run:
    """The folder of a run: its checkpoint, its log, and what goes on as if uninterrupted."""

    def __init__(self, args, learner, folder, checkpoint=None):
        self.args, self.learner, self.folder = args, learner, folder
        self.config = {k: v for k, v in vars(args).items() if k not in HERE}
        self.done, self.start = 0, time.time()
        if checkpoint:
            self.restore(checkpoint)

    @property
    def seconds(self):
        return time.time() - self.start

    def restore(self, checkpoint):
        """Optimisers and beta of a checkpoint; what was logged after it is dropped."""
        self.done, self.start = checkpoint["step"], self.start - checkpoint["seconds"]
        geco = self.learner.geco
        try:
            pairs = zip(self.learner.optimisers, checkpoint["optimisers"], strict=True)
            for optimiser, state in pairs:
                optimiser.load_state_dict({**optimiser.state_dict(), "state": state["state"]})
                for w, kept in optimiser.state.items():
                    assert all(x.shape in ((), w.shape) for x in kept.values())
            for mine, kept in zip((geco.beta, geco.mse), checkpoint["geco"]):
                mine.fill_(kept)
        except Exception as error:  # torch checks little, and raises many kinds
            raise ValueError(f"{self.folder} is of another version: train again") from error
        log = self.folder / "metrics.jsonl"
        lines = log.read_text().splitlines(True) if log.exists() else []
        whole = [line for line in lines if line.endswith("}\n")]  # the last is cut by a kill
        write(log, "".join(x for x in whole if json.loads(x)["step"] <= self.done).encode())

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
        write(self.folder / "checkpoint.pt", file.getvalue())

    def log(self, **values):
        line = {"step": self.done, "seconds": round(self.seconds, 1), **values}
        with open(self.folder / "metrics.jsonl", "a") as log:
            log.write(json.dumps(line) + "\n")

    def evaluate(self):
        self.learner.model.eval()
        result = self.learner.look(self.folder)
        self.learner.model.train()
        self.log(**{k: v for k, v in result.items() if isinstance(v, float)})
        return result


def loop(run):
    """Train to the last step, or to a signal."""
    args, learner, stopped, bad = run.args, run.learner, [], 0
    split = learner.charted

    def heed(number, _):
        signal.signal(number, signal.SIG_DFL)  # asked twice, it stops at once
        stopped.append(number)

    for kind in (signal.SIGINT, signal.SIGTERM):  # heeded between two steps, when all agree
        signal.signal(kind, heed)
    with tqdm(initial=run.done, total=args.steps, unit="step") as bar:
        while run.done < args.steps:
            begin, end = (
                (0, split) if run.done < split else (split, args.steps)
            )  # stage of training
            set_rate(learner.optimisers, args.lr, run.done - begin, end - begin)
            values = learner.advance(run.done)
            run.done += 1
            bar.update()
            last = run.done == args.steps or stopped
            if run.done % 20 == 0 or last:
                values = dict(
                    zip(values, torch.stack([v.detach() for v in values.values()]).tolist())
                )
                bar.set_postfix({k: f"{v:.3g}" for k, v in values.items()})
                run.log(**values)
                bad = 0 if math.isfinite(values["loss"]) else bad + 1
                if bad == PATIENCE:
                    cure = f"try --lr {args.lr / 4:g}"
                    raise ValueError(f"the loss is not finite at step {run.done}: {cure}")
            if not bad and (run.done % args.save_every == 0 or last):
                run.save()
            if stopped:
                bar.close()
                print(f"stopped: python train.py --resume {run.folder} goes on")
                raise SystemExit(128 + stopped[0])
            if run.done % LOOK_EVERY == 0 and not last:
                run.evaluate()


def bench(args, device):
    """Time steps, rollout and data beside a large matmul: a table, and runs/bench-<device>.json."""
    cuda, rows, test = device.type == "cuda", [], test_set(vars(args), 2, device)
    wait = torch.cuda.synchronize if cuda else lambda: None

    def row(what, clips, call, flops=0):
        spent = []
        _ = cuda and torch.cuda.reset_peak_memory_stats()
        while len(spent) < 12 or sum(spent[5:]) < 2:  # the first five warm up and capture
            start = time.perf_counter()
            call()
            wait()
            spent.append(time.perf_counter() - start)
            gc.freeze()  # a million of the compiler's objects slow Python down
        s = statistics.median(spent[5:])
        cell = {"what": what, "first_s": spent[0], "ms": 1e3 * s, "clips_s": clips / s}
        cell["flop_s"] = flops / s
        rows.append(cell)
        cell["share_of_peak"] = cell["flop_s"] / rows[0]["flop_s"]
        cell["memory_mb"] = torch.cuda.max_memory_allocated() / 2**20 if cuda else 0.0
        print(f"{what:<40}", *(f"{k} {v:<9.4g}" for k, v in cell.items() if k != "what"))
        write(path, json.dumps(report, indent=1).encode())

    where = torch.cuda.get_device_name(device) if cuda else f"{torch.get_num_threads()} threads"
    report = {**provenance(), "config": vars(args), "machine": where, "table": rows}
    path, many = Path(f"runs/bench-{device.type}.json"), 8192 if cuda else 1024
    path.parent.mkdir(exist_ok=True)
    a = torch.randn(4096, 4096, device=device)
    row("matmul, 4096", 1, lambda: a @ a, 2 * 4096**3)
    for name, system in list(SYSTEMS.items())[:4]:  # the paper's
        draw = lambda: physics.clips(system, many, size=args.size, device=device)
        row(f"data, {many} clips of {name}", many, draw)
    model, z = build(args, test).to(device), torch.randn(2, args.batch_size, args.latent).to(device)
    rollout = torch.no_grad()(lambda: model.decode(model.rollout(*z, 29)[0]))
    row(f"rollout, {args.batch_size} x 30 frames", args.batch_size, rollout)
    for arch, size in (("compact", args.batch_size), ("paper", args.batch_size), ("compact", 512)):
        changes = {"arch": arch, "batch_size": size, "steps": 10**6}
        changes["latent"] = args.latent if arch == "compact" else None
        for compile in (False, True)[: 1 + args.compile]:
            options = argparse.Namespace(**vars(args) | changes | {"compile": compile})
            learner = Pixels(options, build(options, test).to(device), test, device)
            learner.start()
            batch, eager = learner.batches(0), learner.stepper(learner.loss)
            with FlopCounterMode(display=False) as counter:
                eager(*batch)
            ways = {"eager": eager} if not compile else {}
            ways["compiled " * compile + "graph" * cuda or "eager"] = learner.steps[1]
            for way, step in ways.items():
                call, flops = lambda: step(*batch), counter.get_total_flops()
                row(f"{arch} step, batch {size}, {way}", size, call, flops)
    print("wrote", path)


def train(args):
    """Train what the options ask for, measure it, and say where it is."""
    checkpoint = model = None
    if args.resume is not None:
        args, model, checkpoint, folder = resumed(args)
    else:
        settle(args)
    flow = args.model in FLOWS
    device = pick_device("cpu" if flow else args.device)
    if args.bench:
        return bench(args, device)
    test = test_set(vars(args), 100, device)
    torch.manual_seed(args.seed)
    model = (model or build(args, test)).to(device).train()
    learner = (Densities if flow else Pixels)(args, model, test, device)
    if not checkpoint:
        folder = new_folder(args)
        learner.start()
    run = Run(args, learner, folder, checkpoint)
    source = args.system or args.density or (args.data if flow else test.data.summary)
    if not checkpoint:
        run.log(config=run.config, **provenance())
        run.save()
    print(f"{folder}: step {run.done} of {args.steps}, {source}")
    try:
        loop(run)
        result = run.evaluate()
    except (OSError, torch.OutOfMemoryError) as error:  # disk or memory is full
        why = str(error).splitlines()[0]
        raise ValueError(f"{why}; the last checkpoint is whole: --resume {folder}") from error
    table(run.config, result)
    sample = "" if flow else " --sample 4"
    print(f"\n{run.seconds:.0f} s. Then: python eval.py --checkpoint {folder}{sample}")
    first = next((v for k, v in result.items() if k.startswith("mse_0_")), 0.0)
    if not first <= 0.5 * result.get("blank_mse", 0.0):
        print("The error is above half of a blank prediction's: little was learnt. Try more "
              "--steps, more --latent, a lower --lr, and check --dt.")  # fmt: skip


def main():
    try:
        train(parse())
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
