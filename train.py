"""Train a Hamiltonian Generative Network from pixels, or a Neural Hamiltonian Flow on points.

python train.py --system three_body         # writes runs/three_body/ and nothing else
python train.py --data film.mp4             # recordings of your own, see README
python train.py --density two_moons         # a flow; --data points.npy, (N, D), for your own
"""

import argparse
import io
import json
import math
import os
import signal
import time
from pathlib import Path

import torch
from torch.utils.benchmark import Timer
from tqdm import tqdm

from eval import FLOWS, measure, measure_flow, movies, number, open_run, pick_device
from eval import provenance, table, test_set, write
from hgn import ARCHITECTURES, FRAME, GECO, HGN, INTEGRATORS, charted_loss, euler
from nhf import DENSITIES, NHF, RealNVP
from physics import SYSTEMS, clips, initial_states, jitter, read_points, render, simulate

DEFAULTS = {  # of both --arch of hgn, and of the other models; realnvp's: the same time as nhf's
    "steps": {"compact": 4000, "paper": 5000, "hnn": 5000, "nhf": 4000, "realnvp": 10000},
    "batch_size": {"compact": 16, "paper": 16, "hnn": 16, "nhf": 256, "realnvp": 512},
    "lr": {"compact": 4e-3, "paper": 1.5e-4, "hnn": 4e-4, "nhf": 1e-2, "realnvp": 5e-3},
}
POOL = 64  # batches whose trajectories are simulated together
HERE = "device", "compile", "resume", "name", "bench"  # of the command alone, not of the run
FREE = "steps", "window", "save_every"  # what --resume may change
UNUSED = {  # options that a run of this kind would ignore, and so refuses
    "points": "fps size dt noise window targets latent context integrator substeps periodic arch "
    "f_psi friction clip stride deterministic geco beta bench", "--dt": "fps",
    "pictures": "hamiltonians leapfrog_steps kinetic", "simulated clips": "fps stride clip",
    "recordings": "noise bench", "--bench": "model arch", "--arch paper": "targets periodic",
    "--model hnn": "periodic arch context deterministic geco beta", "--deterministic": "geco beta",
    "--model realnvp": "hamiltonians leapfrog_steps kinetic",
}  # fmt: skip
SEEN = 163840  # frames of the clips whose states the prior is fitted to at the end
RATES = {"decoder.whole": 0.3, "decoder": 3.0, "encoder.filters": 0.1}  # times --lr: first to fit


def parse(words=None, **defaults):  # the command line, or other words -> a namespace
    parser = argparse.ArgumentParser("python train.py", "%(prog)s [options]")
    parser.print_usage = lambda file: None  # a mistake gets one line; --help says more
    count, many, positive = number(1, 1000), number(1, 10**9), number(1e-9, 1e6, float)
    usual = lambda name: ", ".join(f"{model} {v}" for model, v in DEFAULTS[name].items())
    add = parser.add_argument_group("data").add_mutually_exclusive_group().add_argument
    add("--system", choices=SYSTEMS, metavar="NAME", help="of pixels: " + ", ".join(SYSTEMS))
    add("--density", choices=DENSITIES, metavar="NAME", help="of a flow: " + ", ".join(DENSITIES))
    add("--data", metavar="PATH", type=os.path.abspath, help="recordings or points of your own")
    add = parser.add_argument_group("of pictures").add_argument
    add("--size", type=int, choices=range(16, 129, 8), metavar="N", help="pixels (default: 32)")
    add("--dt", type=positive, help="time between frames (default: 0.125, or the film's)")
    add("--fps", type=positive, help="frames a second of recordings, instead of --dt")
    add("--stride", type=count, default=1, help="take every k-th frame of recordings")
    add("--clip", type=many, default=60, help="frames of a clip cut from recordings (default: 60)")
    add("--noise", type=number(0, 1e3, float, "paper"), default=0.0, help="on positions or 'paper'")
    add("--window", type=count, default=30, help="frames to learn from (default: 30)")
    add("--targets", type=count, default=8, help="frames of it painted for the loss (default: 8)")
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=("hgn", "hnn", *FLOWS), help="default: hgn; of densities nhf")
    add("--arch", choices=ARCHITECTURES, default="compact", help="of hgn (default: compact)")
    add("--latent", type=number(1, 64), help="numbers in q; of the paper's, maps in q")
    add("--context", type=count, default=5, help="first frames the encoder sees (default: 5)")
    add("--integrator", choices=INTEGRATORS, help="default: that of --arch")
    add("--substeps", type=count, default=1, help="integrator steps a frame (default: 1)")
    add("--periodic", action=argparse.BooleanOptionalAction, help="q are angles (default: half)")
    add("--friction", action="store_true", help="motion dies out, at a rate that is learnt")
    add("--no-f-psi", dest="f_psi", action="store_false", help="without f_psi (paper)")
    add("--deterministic", action="store_true", help="no sampling of z, no KL")
    add("--hamiltonians", type=count, default=1, help="of a flow, in a row (default: 1)")
    add("--leapfrog-steps", type=count, default=6, help="of each of them (default: 6)")
    add("--kinetic", choices=("quadratic", "mlp"), default="quadratic", help="default: quadratic")
    add = parser.add_argument_group("run").add_argument
    add("--steps", type=many, help=f"default: {usual('steps')}")
    add("--batch-size", type=many, help=f"default: {usual('batch_size')}")
    add("--lr", type=positive, help=f"default: {usual('lr')}")
    add("--beta", type=number(0, 1e6, float), default=1e-3, help="of the KL (default: 0.001)")
    add("--geco", nargs="?", type=positive, const=2e-4, help="error that beta seeks (2e-4)")
    add("--seed", type=number(0, 2**20 - 1), default=0, help="(default: 0)")
    add("--save-every", type=many, default=250, help="steps between checkpoints (default: 250)")
    add("--device", help="cpu, cuda, cuda:1 (default: cuda if any; flows: cpu)")
    add("--compile", action="store_true", help="fuse the step: minutes at first")
    add = parser.add_argument_group("either").add_mutually_exclusive_group().add_argument
    add("--name", help="folder under runs/ (default: the system's name)")
    add("--resume", nargs="?", const="", metavar="PATH", help="go on (default: the newest run)")
    add("--bench", action="store_true", help="measure the speed here; --compile adds rows")
    parser.set_defaults(**{"digest": None} | defaults)
    return parser.parse_args(words)


def settle(args):
    """Fill in what depends on other options. Raises: ValueError for what does not go together."""
    fill = lambda **own: vars(args).update((k, v) for k, v in own.items() if vars(args)[k] is None)
    flow = bool(args.density or args.data and read_points(args.data) is not None)
    given = {k: v for (k, v), u in zip(vars(args).items(), vars(parse([])).values()) if v != u}
    kinds = ["points"] if flow else ["pictures", "recordings" if args.data else "simulated clips"]
    fill(model="nhf" if flow else "hgn")
    if flow != (args.model in FLOWS):
        raise ValueError(f"--model {args.model} is not for {kinds[0]}: see --density, --data")
    for kind in (*kinds, *(f"--{k}{end}" for k, v in given.items() for end in ("", f" {v}"))):
        for name in (name for name in UNUSED.get(kind, "").split() if name in given):
            option = "no_" * (given[name] is False) + name
            raise ValueError(f"--{option.replace('_', '-')} is of no use with {kind}: leave it out")
    if args.model == "hnn":  # the published networks, with another loss
        args.arch, args.context, args.deterministic = "paper", 2, True
    kind = args.arch if args.model == "hgn" else args.model
    fill(**{name: usual[kind] for name, usual in DEFAULTS.items()})
    if not (flow or args.data):
        fill(system="mass_spring", size=32, dt=0.125)
    if kind == "compact" and (system := SYSTEMS.get(args.system)):  # of recordings nobody knows
        free = initial_states(system, 1)[0].numel()  # but a number alone might fold
        fill(latent=free if system.periodic else max(2, free), periodic=system.periodic)
    if args.batch_size * (args.context + args.window) * (args.size or 32) ** 2 > 5e8:
        raise ValueError("batches are gigabytes: less of --batch-size, --context, --window, --size")


def opened(args):
    """All options; of the run that --resume names also its model, its checkpoint and its folder."""
    if args.resume is None:
        settle(args)
        return args, None, None, None
    path, model, checkpoint = open_run(args.resume or None)
    config = {k: v for k, v in checkpoint["config"].items() if k in vars(args) and k not in HERE}
    # As text, which the parser reads like a command line's: a stranger's file gets no further.
    args = parse(**{k: v if isinstance(v, bool | None) else str(v) for k, v in config.items()})
    if changed := [k for k, v in config.items() if k not in FREE and getattr(args, k) != v]:
        raise ValueError(f"--{changed[0].replace('_', '-')} cannot change in a resumed run")
    return args, model, checkpoint, path.parent


def new_folder(args):
    """runs/<name>/, never one that holds a run already."""
    name = args.name or args.system or args.density or Path(args.data).stem or "run"
    if Path(name).name != name:
        raise ValueError(f"--name {name} is not the name of a folder")
    for n in range(1, 2 if args.name else 10**6):
        folder = Path("runs") / (name if n == 1 else f"{name}-{n}")
        if not folder.exists():
            folder.mkdir(parents=True)
            return folder
    raise ValueError(f"{folder} exists: --resume {folder} goes on with it")


class Batches:
    """Batch number `step`, the same whenever asked for. Compact: frames to encode (B, context, C,
    S, S), to score (B, targets, C, S, S), and the times (B, targets) of these from its first.
    Paper's and HNN's: frames in a row (B, row, C, S, S)."""

    def __init__(self, args, data, device):
        self.args, self.data, self.device, self.pool = args, data, device, None
        self.lengths = data.lengths if data else torch.tensor([args.window], device=device)
        train = data.train if data else torch.zeros_like(self.lengths)
        longest = min(args.window, int(self.lengths[train].max()))
        row = min(longest, args.targets) if args.model == "hnn" else longest
        if row < max(3, args.context):
            raise ValueError(f"{row} frames are too few: more --window, --targets, less --context")
        self.most, self.row = longest - 1, 0 if args.arch == "compact" else row
        lengths = self.lengths[train]  # of every frame there is the clip: long ones come more often
        self.clips = train.repeat_interleave(lengths * (lengths >= self.row))

    def __call__(self, step):
        args, device = self.args, "cpu" if self.data else self.device
        generator = torch.Generator(device).manual_seed((args.seed << 20) + step + 2**19)
        uniform = lambda n: torch.rand(args.batch_size, n, generator=generator, device=device)
        clips = self.clips[(uniform(1) * len(self.clips)).long()]
        length, read = self.lengths[clips], lambda times: self.read(step, clips, times, generator)
        if self.row:
            first = (uniform(1) * (length - self.row + 1)).long()
            return [read(first + torch.arange(self.row, device=device))]
        reach = min(self.most, 3 + 2 * (self.most + 1) * step // args.steps)  # all after half a run
        self.reach = self.most if args.compile or self.device.type == "cuda" else reach  # one graph
        ahead = (length // 2 if self.data else length).clamp(max=reach)  # recordings start late too
        first = (uniform(1) * (length - ahead.clamp(min=args.context - 1))).long()
        times = (uniform(args.targets) * (length - first).clamp(max=reach + 1)).long()
        context = first + torch.arange(args.context, device=device)
        frames = read(torch.cat((context, first + times), 1))
        return [*frames.split([args.context, args.targets], 1), times.to(self.device)]

    def read(self, step, clips, times, generator):
        """Frames of clips (B, 1) at times (B, n). POOL batches are simulated at once."""
        if self.data:
            return self.data.read(clips.flatten(), times).to(self.device)
        args, system, pool = self.args, SYSTEMS[self.args.system], step // POOL
        if self.pool != pool:
            start = torch.Generator(self.device).manual_seed((args.seed << 20) + pool)
            start = initial_states(system, args.batch_size * POOL, start, self.device)
            self.pool, self.q = pool, simulate(system, *start, args.window, args.dt)[0]
        q = self.q.chunk(POOL)[step % POOL].take_along_dim(times[..., None, None], 1)
        return render(system, jitter(system, q, args.noise, generator), args.size)


def build(args, test):
    """The model that args describe, for data like those of the test set."""
    if args.model in FLOWS:
        options = {"kinetic": args.kinetic, "shift": test.shift, "scale": test.scale}
        flow = NHF(test.dim, args.hamiltonians, args.leapfrog_steps, **options)
        return flow if args.model == "nhf" else RealNVP.like(flow)
    names = "context arch latent integrator substeps periodic f_psi deterministic friction".split()
    return HGN(test.size, test.channels, dt=test.dt, **{k: getattr(args, k) for k in names})


def make_optimisers(model, lr, rates={}, muon=False):
    """Adam, with rates[prefix] times lr for the parameters that the prefix names; with muon, that
    for other matrices. Every rate is a tensor, which a graph that replays steps reads anew."""
    groups, matrices = {}, []
    for name, w in model.named_parameters():
        times = next((v for prefix, v in rates.items() if name.startswith(prefix)), 1.0)
        matrix = muon and times == 1.0 and w.dim() == 2
        (matrices if matrix else groups.setdefault(times, [])).append(w)
    rate, cuda = lambda: torch.tensor(lr, device=w.device), w.is_cuda
    groups = [{"params": v, "lr": rate(), "times": times} for times, v in groups.items()]
    adam = torch.optim.Adam(groups, lr, betas=(0.9, 0.99), eps=1e-12, fused=cuda, capturable=cuda)
    return [adam, Muon(matrices, {"lr": rate(), "times": 1.0})] if matrices else [adam]


class Muon(torch.optim.Optimizer):
    """Jordan et al. 2024, as torch.optim.Muon, "match_rms_adamw", but in float32: fast on CPUs."""

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        for w in (w for w in group["params"] if w.grad is not None):
            momentum = self.state[w].setdefault("momentum", torch.zeros_like(w))
            momentum.lerp_(w.grad, 0.05)
            x = torch.lerp(w.grad, momentum, 0.95)  # Nesterov's
            x = x / (x.norm() + 1e-12)
            for _ in range(5):
                a = x @ x.mT
                x = 3.4445 * x + (2.0315 * (a @ a) - 4.775 * a) @ x
            w.sub_(group["lr"] * 0.2 * max(w.shape) ** 0.5 * x)


def hnn_loss(model, frames):
    """The baseline, Greydanus et al. 2019, "Hamiltonian Neural Networks": an autoencoder of states
    that move from frame to frame by Euler's steps (their third term, p = dq/dt, is left out).
    frames: (B, T > context, C, S, S). Returns: loss, mse, zero."""
    clips = model.valid(frames, model.context + 1).unfold(1, model.context, 1).movedim(-1, 2)
    states = torch.stack(model.f_psi(model.encode(clips.flatten(0, 1))[0]))
    states = states.unflatten(1, clips.shape[:2])  # q and p, (2, B, n, dim)
    mse = (model.decode(states[0]) - clips[:, :, model.encoder.lead]).square().mean()
    now, ahead = states[:, :, :-1].flatten(1, 2), states[:, :, 1:].flatten(1, 2)
    moved = torch.stack(euler(model.H, *now, FRAME, 1, gamma=model.gamma))[:, :, 1]
    return mse + 0.2 / FRAME**2 * (moved - ahead).square().mean(), mse, mse.new_zeros(())


def set_rate(optimisers, lr, step, steps):
    """Warm up to lr over 50 steps, then down to zero along a cosine."""
    lr = lr * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in (group for optimiser in optimisers for group in optimiser.param_groups):
        group["lr"].fill_(lr * group["times"])


def stepper(model, losses, optimisers, geco=None, most=1.0):
    """step(*batch) -> losses(*batch), and a step down the gradient of "loss" among them, clipped to
    the norm `most`, or zero where it is not finite. On a GPU it waits for nothing: see Graphed."""

    def step(*batch):
        values = losses(*batch)
        model.zero_grad()
        values["loss"].backward()
        weights = [w for w in model.parameters() if w.grad is not None]
        good = torch.nn.utils.clip_grad_norm_(weights, most).isfinite()
        for w in weights:
            w.grad.masked_fill_(~good, 0.0)
        for optimiser in optimisers:
            optimiser.step()
        if geco:
            geco.update(values["mse"])
        return values

    return Graphed(step) if next(model.parameters()).is_cuda else step


class Graphed:
    """step(*tensors) on a GPU, on a stream of one's own: thrice as it is, then one CUDA graph that
    replays it. Inputs are copied from the first call: at new strides a step would compile again."""

    def __init__(self, step):
        self.step, self.calls, self.batch = step, 0, None

    def __call__(self, *batch):
        self.calls += 1
        self.batch = self.batch or [x.clone() for x in batch]
        for x, new in zip(self.batch, batch):
            x.copy_(new)
        if self.calls <= 3:
            return self.step(*self.batch)
        if self.calls == 4:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
                self.values = self.step(*self.batch)
        self.graph.replay()
        return self.values


def compiled(function):
    """`function` as one region, compiled for its shapes. Many recompilations are an error."""
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    # In nested regions torch 2.13 mistakes layouts that it chose, and overwrites states it needs.
    options = {"layout_optimization": False, "allow_buffer_reuse": False, "inplace_buffers": False}
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)


def fit_prior(prior, mean, logvar, rounds=4000, seed=0, lr=5e-3):
    """The prior at a run's end, to q(z|x) of many clips, (n, dim) twice, in large batches."""
    torch.manual_seed(seed)
    optimisers, size = make_optimisers(prior, lr), min(512, rounds)
    step = stepper(prior, lambda *z: {"loss": prior.kl(*z).mean()}, optimisers)
    for i in range(rounds):
        set_rate(optimisers, lr, i, rounds)
        at = torch.randint(len(mean), (size,), device=mean.device)
        step(torch.normal(mean[at], (0.5 * logvar[at]).exp()), mean[at], logvar[at])


class Run:
    """A model in training, and its folder with a checkpoint and a log."""

    def __init__(self, args, model, test, device):
        self.args, self.model, self.test, self.device = args, model, test, device
        args.digest = test.digest
        self.config = {k: v for k, v in vars(args).items() if k not in HERE}
        self.flow = args.model in FLOWS
        self.compact = args.model == "hgn" and args.arch == "compact"
        rates, muon = RATES if self.compact else {}, self.flow or self.compact
        self.optimisers = make_optimisers(model, args.lr, rates, muon)
        self.geco = GECO(args.geco or 1.0, beta=args.beta, device=device)
        self.batches = self.points if self.flow else Batches(args, test.data, device)
        losses = compiled(self.losses) if args.compile else self.losses
        self.step = stepper(model, losses, self.optimisers, self.geco if args.geco else None)
        self.done, self.logged, self.began = 0, 0, time.time()

    def points(self, step):  # x (B, D), and noise for four momenta of each (4, B, D)
        generator = torch.Generator().manual_seed((self.args.seed << 20) + step)
        x = self.test.draw(self.args.batch_size, generator)
        return x, torch.randn(4, *x.shape, generator=generator)

    def losses(self, *batch):
        if self.flow:  # half the ELBO, half the tighter IWAE, which alone neglects f(p|q)
            w = self.model.log_weights(*batch)
            return {"loss": math.log(len(w)) / 2 - (w.mean(0) + w.logsumexp(0)).mean() / 2}
        if self.compact:
            values = charted_loss(self.model, *batch, self.batches.reach, self.geco.beta)
        elif self.args.model == "hnn":
            values = hnn_loss(self.model, *batch)
        else:
            values = self.model.loss(*batch, self.geco.beta)
        return dict(zip(("loss", "mse", "kl", "beta"), (*values, self.geco.beta)))

    def start(self, folder, checkpoint=None):
        """Anew, or where the checkpoint was made: what was logged after it is dropped."""
        self.folder, pid, mine = folder, folder / "pid", str(os.getpid())
        if pid.exists() and pid.read_text() != mine and Path("/proc", pid.read_text()).exists():
            raise ValueError(f"process {pid.read_text()} trains {folder}: wait, or delete {pid}")
        if not checkpoint:
            if not self.flow:  # of batches after the last
                some = [self.batches(self.args.steps + i)[0] for i in range(5)]
                self.model.fit(torch.cat(some).flatten(0, 1)[:1024])
            self.log(config=self.config, **provenance())
            return self.save()
        try:
            self.done, self.logged = int(checkpoint["step"]), int(checkpoint["logged"])
            self.began -= checkpoint["seconds"]
            for mine, kept in zip(self.optimisers, checkpoint["optimisers"], strict=True):
                mine.load_state_dict({**mine.state_dict(), "state": kept["state"]})
            for mine, kept in zip((self.geco.beta, self.geco.mse), checkpoint["geco"]):
                mine.fill_(kept)
        except Exception as error:  # torch checks little, and raises many kinds
            raise ValueError(f"{folder} holds no run that can go on: train anew") from error
        with open(folder / "metrics.jsonl", "a") as log:
            log.truncate(min(self.logged, log.tell()))

    def fit_prior(self):
        """The prior, to the states of many clips from batches after the last step."""
        args, rounds = self.args, min(10000, self.args.steps)
        few = argparse.Namespace(**vars(args) | {"targets": 1, "window": max(3, args.context)})
        batches = Batches(few, self.test.data, self.device)
        n = max(1, min(SEEN // args.context, 64 * rounds) // args.batch_size)
        with torch.no_grad():
            states = [self.model.encode(batches(args.steps + i)[0]) for i in range(n)]
        fit_prior(self.model.prior, *(torch.cat(x) for x in zip(*states)), rounds, args.seed)

    def save(self):
        state = {"kind": self.args.model, "model": self.model.state_dict(), **provenance(),
                 "model_config": self.model.config, "config": self.config, "step": self.done,
                 "optimisers": [x.state_dict() for x in self.optimisers], "logged": self.logged,
                 "geco": (self.geco.beta.item(), self.geco.mse.item()),
                 "seconds": time.time() - self.began}  # fmt: skip
        torch.save(state, file := io.BytesIO())
        write(self.folder / "checkpoint.pt", file.getvalue())

    def log(self, **values):
        line = {"step": self.done, "seconds": round(time.time() - self.began, 1), **values}
        with open(self.folder / "metrics.jsonl", "a") as log:
            log.write(json.dumps(line) + "\n")
            self.logged = log.tell()

    def loop(self):
        """Train to the last step or to a signal, heeded between two steps; a second one at once."""
        args, stopped, bad = self.args, [], 0
        (self.folder / "pid").write_text(str(os.getpid()))
        heed = lambda number, _: stopped.append(number) or signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, heed)
        signal.signal(signal.SIGTERM, heed)
        with tqdm(initial=self.done, total=args.steps, unit="step") as bar:
            while self.done < args.steps and not stopped:
                torch.manual_seed((args.seed << 20) + self.done)  # of z: the same when resumed
                set_rate(self.optimisers, args.lr, self.done, args.steps)
                values = self.step(*self.batches(self.done))
                self.done += 1
                if self.done == args.steps and self.compact and not args.deterministic:
                    self.fit_prior()
                bar.update()
                last = self.done == args.steps or stopped
                if self.done % 20 == 0 or last:
                    values = {k: v.item() for k, v in values.items()}
                    bar.set_postfix({k: f"{v:.3g}" for k, v in values.items()})
                    self.log(**values)
                    bad = 0 if math.isfinite(values["loss"]) else bad + 1
                if bad == 5:  # looks, 100 steps: it does not come back
                    raise ValueError(f"the loss is not finite at step {self.done}: lower --lr")
                if not bad and (self.done % args.save_every == 0 or last):
                    self.save()
        if stopped:
            print(f"stopped: python train.py --resume {self.folder} goes on")
            raise SystemExit(128 + stopped[0])


def bench(args, device):
    """Time a matmul, data and training steps: a table, and runs/bench-<device>.json."""
    cuda, rows, threads = device.type == "cuda", [], torch.get_num_threads()
    path, test = Path(f"runs/bench-{device.type}.json"), test_set(vars(args), 2, device)
    path.parent.mkdir(exist_ok=True)
    machine = torch.cuda.get_device_name(device) if cuda else f"{threads} threads"
    report = {**provenance(), "config": vars(args), "machine": machine, "table": rows}

    def row(what, n, call):
        timer = Timer("call()", globals={"call": call}, num_threads=threads)
        cuda and torch.cuda.reset_peak_memory_stats()  # a CPU counts none
        begin = time.time()
        call()
        first = time.time() - begin  # compiles
        s, peak = timer.blocked_autorange(min_run_time=2).median, torch.cuda.max_memory_allocated()
        rows.append({"what": what, "first_s": first, "s": s, "per_s": n / s, "peak_bytes": peak})
        print(f"{what:<42}{1e3 * s:9.4g} ms{n / s:10.4g}/s, first {first:.3g} s, {peak >> 20} MB")
        write(path, json.dumps(report, indent=1).encode())

    a, many = torch.randn(4096, 4096, device=device), 8192 if cuda else 1024
    row("matmul of 4096, TFLOP", 2 * 4096**3 / 1e12, lambda: a @ a)
    for name, system in list(SYSTEMS.items())[:4]:  # the paper's
        row(f"clips of {name}", many, lambda: clips(system, many, size=args.size, device=device))
    paper, large = {"arch": "paper", "latent": None, "periodic": False}, {"batch_size": 512}
    for changes in ({}, paper, large, paper | large)[: 3 + cuda]:
        for compile in (False, True)[: 1 + args.compile]:
            own = argparse.Namespace(**vars(args) | changes | {"compile": compile})
            run = Run(own, build(own, test).to(device), test, device)
            batch = run.batches(own.steps)  # of the farthest horizon
            ways = {"eager": run.step.step, "graph": run.step} if cuda else {"": run.step}
            for way, call in ways.items():
                what = f"{own.arch} step, batch {own.batch_size} {way}{' compiled' * compile}"
                row(what, own.batch_size, lambda: call(*batch))


def main():
    """Train what the options ask for, measure it, and say where it is."""
    try:
        args, model, checkpoint, folder = opened(parse())
        device = pick_device("cpu" if args.model in FLOWS else args.device)
        if device.type == "cuda":
            torch.cuda.set_stream(torch.cuda.Stream(device))  # the default captures no graphs
        if args.bench:
            return bench(args, device)
        test = test_set(vars(args), 100, device)
        print(test.summary)
        torch.manual_seed(args.seed)
        model = (model or build(args, test)).to(device).train()
        run = Run(args, model, test, device)
        run.start(folder or new_folder(args), checkpoint)
        print(f"{run.folder}: step {run.done} of {args.steps}")
        run.loop()
        if not run.flow:
            movies(model.eval(), test, run.folder)
        result = measure_flow(model, test, 2000, (64,)) if run.flow else measure(model, test)
        run.log(**{k: v for k, v in result.items() if isinstance(v, float)})
        table(run.config, result)
        print(f"\n{time.time() - run.began:.0f} s. Then: python eval.py --checkpoint {run.folder}")
        first = next((v for k, v in result.items() if k.startswith("mse_0_")), 0.0)
        if not first <= 0.5 * result.get("blank_mse", 0.0):
            print("Above half of blank's error: little was learnt. Try more --steps, a lower --lr.")
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        argparse.ArgumentParser().exit(2, f"error: {(str(error) or 'no memory').splitlines()[0]}\n")


if __name__ == "__main__":
    main()
