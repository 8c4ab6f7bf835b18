"""Train a Hamiltonian Generative Network from pixels, or a Neural Hamiltonian Flow on points.

python train.py --system three_body         # writes runs/three_body/, then three_body-2/ ...
python train.py --data film.mp4             # recordings of your own, see the README
python train.py --density two_moons         # a flow; --data points.npy, (N, D), for your own

This file reads from top to bottom: options, the four kinds of run (their data, model and loss),
optimisers, the training step, the run with its files, the loop.
"""

import argparse
import json
import math
import os
import signal
import time
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
import torch.distributed as dist
from tqdm import tqdm

from eval import (
    FLOWS,
    device_of,
    find_run,
    load,
    measure,
    measure_flow,
    noise_floor,
    number,
    parse_options,
    print_table,
    provenance,
    run_main,
    save_curves,
    save_movies,
    test_set,
)
from hgn import GECO, HGN, INTEGRATORS, TRAINING_ITERATIONS, averaged_picture_error, charted_loss
from nhf import DENSITIES, NHF, RealNVPFlow, seeded
from physics import SYSTEMS, initial_states, jitter, read_points, render, simulate

# ----------------------------------------------------------------------------------------- options
# The options of a run are those of every run, of its source of data and of its kind. A given option
# that is in none of the three is refused.

EVERY_RUN = {"system": None, "density": None, "data": None, "digest": None,
             "seed": 0, "save_every": 250}  # fmt: skip
OF_A_SYSTEM = {"system": "mass_spring", "size": 32, "dt": 0.125, "noise": 0.0, "window": 30}
OF_RECORDINGS = {"size": None, "dt": None, "stride": 1, "clip": 60, "window": 30}
OF_HGN = {"model": "hgn", "latent": None, "integrator": None, "substeps": 1, "friction": False,
          "context": 5, "deterministic": False, "geco": None, "beta": 1e-3}  # fmt: skip
OF_KINDS = {
    "compact": OF_HGN | {"arch": "compact", "targets": 8, "periodic": None, "steps": 2000,
                         "batch_size": 32, "lr": 4e-3},
    "paper": OF_HGN | {"arch": "paper", "f_psi": True, "targets": None, "steps": 5000,
                       "batch_size": 16, "lr": 1.5e-4},
    "nhf": {"model": "nhf", "hamiltonians": 1, "leapfrog_steps": 2, "kinetic": "quadratic",
            "steps": 8000, "batch_size": 256, "lr": 1e-2},
    "realnvp": {"model": "realnvp", "steps": 10000, "batch_size": 512, "lr": 5e-3},
}  # fmt: skip
# What --protocol paper stands for beside the target of GECO, where nothing else is given.
PAPER_PROTOCOL = OF_A_SYSTEM | {"model": "hgn", "arch": "paper", "noise": "paper", "context": 30}
ABOVE_FLOOR = 1.06  # GECO's target over the error of the noise alone
FLOOR_CLIPS = 500  # give the floor to within one per cent
CHANGEABLE = {"steps", "window", "save_every"}  # what --resume may change


def defaults_of(option):
    """The defaults of an option, kind by kind, for --help."""
    return ", ".join(f"{kind} {options[option]}" for kind, options in OF_KINDS.items())


MOST_STEPS = 500_000  # for each seed there are 2^19 numbers of batches, see FIRST_BATCH
count = number(1, 1000)
many = number(1, 10**9)
positive = number(1e-9, 1e6, float)
flag = {"action": "store_true"}

# What argparse is told of each option, in groups. Options of a group called "one of" exclude each
# other.
ARGUMENTS = {
    "one of these says what to learn from (default: --system mass_spring)": {
        "--system": {"choices": SYSTEMS, "metavar": "NAME",
                     "help": f"Simulate clips of this system: {', '.join(SYSTEMS)}."},
        "--density": {"choices": DENSITIES, "metavar": "NAME",
                      "help": f"Draw points from this density: {', '.join(DENSITIES)}."},
        "--data": {"type": os.path.abspath, "metavar": "PATH",
                   "help": "Read your own recordings (a film, a GIF, a folder, an array of clips) "
                           "or your own points (an array, N x D)."},
    },
    "data: pictures": {
        "--size": {"type": int, "choices": range(16, 129, 8), "metavar": "N",
                   "help": "Pictures have N x N pixels, N a multiple of 8 from 16 to 128 "
                           "(default: 32; of recordings their own size, or else 32)."},
        "--dt": {"type": positive,
                 "help": "Time from frame to frame, of recordings in seconds before --stride "
                         "(default: 0.125; of films their own)."},
        "--stride": {"type": count, "help": "Take every k-th frame of recordings (default: 1)."},
        "--clip": {"type": many,
                   "help": "Cut recordings into clips of so many frames or more (default: 60). "
                           "Shorter recordings are one clip each, a single one two."},
        "--noise": {"type": number(0, 1e3, float, "paper"),
                    "help": "Standard deviation of noise on q of simulated bodies, in units of the "
                            "world or radians, or 'paper' for the paper's (default: 0)."},
        "--window": {"type": count,
                     "help": "Learn from so many frames of a clip (default: 30). Of shorter "
                             "clips, the compact model takes all frames."},
    },
    "model": {
        "--model": {"choices": ("hgn", *FLOWS),
                    "help": "Learn pictures by hgn, points by nhf or by the baseline realnvp "
                            "(default: hgn; of points nhf)."},
    },
    "model: pictures": {
        "--protocol": {"choices": ("paper",),
                       "help": "The paper's networks, noise and frames: stands for --arch paper "
                               "--noise paper --context 30 and for --geco with 1.06 times the "
                               "error that the noise alone makes. It is for named systems only. "
                               "Options that are given beside it overrule it; with --deterministic "
                               "there is no GECO."},
        "--arch": {"choices": ("compact", "paper"),
                   "help": "Networks of hgn: small ones, or the published ones "
                           "(default: compact)."},
        "--context": {"type": count, "help": "The encoder sees so many first frames (default: 5)."},
        "--targets": {"type": count,
                      "help": "Paint so many random frames of a clip in a step (default: 8; with "
                              "--arch paper all)."},
        "--latent": {"type": number(1, 64),
                     "help": "Numbers in q (default: the system's coordinates, at least 2 unless "
                             "they are angles; of recordings 6). With the paper's networks: maps "
                             "in q (default: 16)."},
        "--integrator": {"choices": INTEGRATORS,
                         "help": "Method that follows H (default: implicit_leapfrog; with the "
                                 "paper's networks leapfrog)."},
        "--substeps": {"type": count,
                       "help": "Steps of the integrator from frame to frame (default: 1)."},
        "--periodic": {"action": argparse.BooleanOptionalAction,
                       "help": "All of q are angles, or none (default: as the system's are; of "
                               "recordings the first half of q)."},
        "--friction": flag | {"help": "Learn how fast motion dies out."},
        "--f-psi": {"action": argparse.BooleanOptionalAction,
                    "help": "Ablation of the paper's networks: without f_psi, z is the state "
                            "itself (default: with it)."},
        "--deterministic": flag | {"help": "Ablation of hgn: no sampling of z and no KL."},
        "--beta": {"type": number(0, 1e6, float),
                   "help": "Weight of the KL; with --geco its first value (default: 0.001)."},
        "--geco": {"type": positive, "nargs": "?", "const": 2e-4, "metavar": "ERROR",
                   "help": "Let GECO change beta for an MSE of pixels in [0, 1] of at most ERROR "
                           "(without a number: 0.0002)."},
    },
    "model: points": {
        "--hamiltonians": {"type": count, "help": "Hamiltonians of a flow in a row (default: 1)."},
        "--leapfrog-steps": {"type": count, "help": "Steps on each of them (default: 2)."},
        "--kinetic": {"choices": ("quadratic", "mlp"),
                      "help": "Kinetic energy K(p) (default: quadratic)."},
    },
    "run": {
        "--steps": {"type": number(1, MOST_STEPS),
                    "help": f"Training steps in all (default: {defaults_of('steps')})."},
        "--batch-size": {"type": many,
                         "help": "Clips or points of a step, of all processes together "
                                 f"(default: {defaults_of('batch_size')})."},
        "--lr": {"type": positive, "help": f"Learning rate (default: {defaults_of('lr')})."},
        # Seeds above 4094 would draw test data (TEST_SEED), and then repeat smaller seeds.
        "--seed": {"type": number(0, 4094), "help": "Of all random numbers (default: 0)."},
        "--save-every": {"type": many, "help": "Steps between checkpoints (default: 250)."},
        "--device": {"help": "cpu, cuda or cuda:1 (default: a GPU if there is one; flows always "
                             "run on the CPU)."},
        "--compile": flag | {"help": "Fuse the training step by torch.compile, which takes minutes "
                                     "at first."},
    },
    "one of these at most": {
        "--name": {"help": "Write into the new folder runs/NAME (default: the name of the data)."},
        "--resume": {"nargs": "?", "const": "", "metavar": "PATH",
                     "help": "Go on with the run at PATH, a folder or its checkpoint.pt (without "
                             "PATH: the newest run). Only --steps, --window, --save-every, "
                             "--device and --compile may be given beside it."},
    },
}  # fmt: skip


def parse(words=None):
    """The options given in the command line (or in `words`), and no others, as a dictionary."""
    return parse_options("Train a model and save it below runs/.", ARGUMENTS, words)


def follow_protocol(given):
    """The given options, and those that --protocol stands for. Raises: ValueError."""
    options = PAPER_PROTOCOL | given
    del options["protocol"]
    noise = options["noise"]
    elsewhere = "data" in given or "density" in given or options["model"] != "hgn"
    if elsewhere or noise == 0:
        raise ValueError("--protocol is of hgn and a named system with noise: leave it out")
    if "geco" in given or "deterministic" in given:
        return options
    floor = noise_floor(
        SYSTEMS[options["system"]], noise, options["size"], FLOOR_CLIPS, generator=seeded(0)
    )
    return options | {"geco": ABOVE_FLOOR * floor}


def kind_of_run(given, points):
    """The recipe that the given options ask for, a key of RECIPES. Raises: ValueError."""
    model = given.get("model", "nhf" if points else "hgn")
    if points != (model in FLOWS):
        raise ValueError(f"--model {model} does not learn from such data: see --density and --data")
    return given.get("arch", "compact") if model == "hgn" else model


def settle(given):
    """All options of a new run, from those given. Raises: ValueError where these do not fit."""
    if "protocol" in given:
        given = follow_protocol(given)
    path = given.get("data")
    points = "density" in given or (path is not None and read_points(path) is not None)
    source = OF_RECORDINGS if path else OF_A_SYSTEM
    if points:
        source = {}
    kind = kind_of_run(given, points)
    defaults = EVERY_RUN | source | OF_KINDS[kind]
    for name in given:
        if name not in defaults:
            raise ValueError(f"--{dashed(name)} is of no use for {kind} on such data: leave it out")
    if given.get("deterministic") and ("geco" in given or "beta" in given):
        raise ValueError("--geco and --beta are of no use with --deterministic, as there is no KL")
    options = argparse.Namespace(**defaults | given)
    RECIPES[kind].complete(options)
    return options


def resumed(given, saved):
    """The options of a run that goes on, from its checkpoint and those given. Raises: ValueError.

    saved: what the run saved beside the model.
    """
    options = saved["options"]
    changeable = CHANGEABLE & options.keys()
    for name, value in given.items():
        if name not in changeable and options.get(name) != value:
            raise ValueError(f"--{dashed(name)} cannot change in a run that is resumed")
    options = argparse.Namespace(**options | given)
    if options.steps < saved["step"]:
        raise ValueError("this run has taken more steps already: raise --steps")
    return options


def dashed(name):
    """An option's name as the command line has it."""
    return name.replace("_", "-")


# ------------------------------------------------------------------------------- several processes
# `torchrun` starts them. Each takes its part of every batch, and the first one alone writes files.

RANK = int(os.environ.get("RANK", 0))
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))


def join_processes(options, model):
    """Give all processes the weights of the first, and return the slice of a batch for this one."""
    if PROCESSES > 1:
        dist.init_process_group()  # gloo on the CPU, nccl on GPUs
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)
    size = options.batch_size // PROCESSES
    return slice(RANK * size, (RANK + 1) * size)


def leave_processes():
    """End what `join_processes` began: its threads may abort a process that ends with them."""
    if PROCESSES > 1:
        dist.destroy_process_group()


def average(x):
    """The mean of a tensor over all processes."""
    if PROCESSES == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total / PROCESSES


def average_together(tensors):
    """Replace each of the tensors by its mean over all processes, in one message."""
    if PROCESSES > 1:
        mean = average(torch.cat([tensor.flatten() for tensor in tensors]))
        parts = mean.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


# -------------------------------------------------------------------------------- sources of clips

POOL = 64  # batches whose trajectories are simulated together, which is faster


def generator_of(seed, index):
    """A generator of its own for each index, so that a resumed run draws what it would have."""
    return seeded((seed << 20) + index)


class SimulatedClips:
    """Clips of a named system, fresh ones for every batch."""

    def __init__(self, options, device):
        self.options = options
        self.system = SYSTEMS[options.system]
        self.device = device
        self.lengths = torch.tensor([options.window])
        # The first frame seen is drawn so that at least min(reach, horizon) frames follow it.
        self.reach = self.lengths
        # Indices into `lengths`: all simulated clips have the same length, so one entry is enough.
        self.train_clips = torch.zeros_like(self.lengths)
        self.pool = None

    def frames(self, step, clips, times, generator, part):
        """Frames (B, n, C, size, size) of batch `step` at times (B, n), those of a part of B."""
        options = self.options
        if self.pool != step // POOL:
            self.pool = step // POOL
            seeds = generator_of(options.seed, self.pool)
            q, p = initial_states(self.system, options.batch_size * POOL, seeds, self.device)
            self.q, _ = simulate(self.system, q, p, options.window, options.dt)
        q = self.q.chunk(POOL)[step % POOL]  # (B, window, bodies, dims)
        q = q.take_along_dim(times[..., None, None].to(self.device), 1)
        q = jitter(self.system, q, options.noise, generator)
        return render(self.system, q[part], options.size)


class RecordedClips:
    """Clips of recordings."""

    def __init__(self, recordings, device):
        self.recordings = recordings
        self.device = device
        self.lengths = recordings.lengths
        self.reach = self.lengths // 2  # the first frame seen is in the first half, mostly
        self.train_clips = recordings.train

    def frames(self, step, clips, times, generator, part):
        """Frames (B, n, C, size, size) of clips (B, 1) at times (B, n), those of a part of B."""
        return self.recordings.frames(clips[part].flatten(), times[part]).to(self.device)


# -------------------------------------------------------------------------- the four kinds of run
# A recipe is what one kind of run does. A new kind is a recipe with its names in RECIPES, in
# OF_KINDS and, for a new class of model, in --model, eval.MODELS and eval.OWN_ARGUMENT.

HGN_ARGUMENTS = ("arch", "context", "latent", "integrator", "substeps", "periodic", "f_psi",
                 "deterministic", "friction")  # fmt: skip
TEST_CLIPS = 100  # that a run is measured on at its end
MOST_PIXELS = 5e8  # of a batch: more would take gigabytes
FIRST_BATCH = 2**19  # numbers of generators: batches start here, pools of trajectories at zero


class Recipe:
    """What all kinds of run share.

    Each adds `build()`, a new model; `batch(step)`, the same whenever it is asked for;
    `losses(model, *batch)`, scalars by their names, of which "loss" goes down; `legend`, what
    these are; and `report(model, folder)`, the figures of the trained model.
    """

    lr_scales = ()
    muon = False
    geco = None
    geco_state = ()  # the tensors of it that change from step to step
    part = slice(None)  # of each batch, which this process takes

    def __init__(self, options, dataset, device, compile):
        self.options = options
        self.dataset = dataset  # what to train on, and what is held out
        self.device = device
        self.compile = compile

    @staticmethod
    def complete(options):
        """Fill in options that depend on others."""

    def prepare(self, model):
        """Set what training a new or a loaded model needs."""

    def finish(self, model):
        """What there is to do after the last step."""


class PictureRecipe(Recipe):
    """What the two kinds of run on pictures share.

    Each adds `frames_in_a_row`, which a clip must have; `horizon(step)`, how far other frames may
    lie from the first of them; `batch(step)`; and `terms`, the loss, pixel error and KL of a batch.
    """

    def __init__(self, options, dataset, device, compile):
        super().__init__(options, dataset, device, compile)
        if options.data:
            self.source = RecordedClips(dataset, device)
        else:
            self.source = SimulatedClips(options, device)
        self.beta = torch.tensor(options.beta, device=device)
        if options.geco:
            self.geco = GECO(options.geco, beta=options.beta, device=device)
            self.beta = self.geco.beta
            self.geco_state = [self.geco.beta, self.geco.mse]
        lengths = self.source.lengths[self.source.train_clips]
        self.longest = min(options.window, int(lengths.max()))
        self.row = self.frames_in_a_row()
        if self.longest < max(3, options.context):
            raise ValueError("too few frames: raise --window or --clip, or lower --context")
        short = (lengths < self.row).sum()
        if short and RANK == 0:
            print(f"{short} clips are shorter than {self.row} frames: lower --window to learn them")
        frames = options.batch_size * (self.row + (options.targets or 0))
        if frames * dataset.size**2 > MOST_PIXELS:
            raise ValueError("a batch takes gigabytes: lower --batch-size, --targets or --size")
        # Long clips are drawn more often, so that every frame is as likely as any other.
        self.clips = self.source.train_clips.repeat_interleave(lengths * (lengths >= self.row))

    def build(self):
        """A new model, in which what needs no learning is set from batches after the last one."""
        options = vars(self.options)
        arguments = {name: options[name] for name in HGN_ARGUMENTS if name in options}
        model = HGN(self.dataset.size, self.dataset.channels, dt=self.dataset.dt, **arguments)
        model.to(self.device)
        batches = [self.batch(self.options.steps + i)[0] for i in range(5)]
        model.init_from_data(torch.cat(batches).flatten(0, 1)[:1024])
        return model

    def draw(self, step):
        """What batch `step` is made of, for its recipe to put together.

        It is drawn on the CPU, so that it is the same on every device.
        Returns: the times (B, row) of frames in a row, other times (B, targets) counted from the
        first of the row, and a function of times (B, n) that gives the frames of this process.
        """
        source = self.source
        generator = generator_of(self.options.seed, FIRST_BATCH + step)

        def below(limits, n=1):  # random integers from 0 to limit - 1, (B, n)
            shape = (self.options.batch_size, n)
            return (torch.rand(shape, generator=generator) * limits).long()

        clips = self.clips[below(len(self.clips))]

        def frames(times):  # (B, n) -> (B, n, C, size, size)
            return source.frames(step, clips, times, generator, self.part)

        length = source.lengths[clips]
        horizon = self.horizon(step)
        ahead = source.reach[clips].clamp(max=horizon)
        first = below(length - ahead.clamp(min=self.row - 1))
        times = below((length - first).clamp(max=horizon + 1), self.options.targets or 0)
        return first + torch.arange(self.row), times, frames

    def noise(self, model):
        """Noise for z, (B, ...), of which each process takes its part."""
        noise = torch.randn(self.options.batch_size, *model.z_shape, device=self.device)
        return noise[self.part]

    def losses(self, model, *batch):
        """The loss to go down, its terms and the weight of the KL, scalars by their names."""
        loss, mse, kl = self.terms(model, *batch)
        return {"loss": loss, "mse": mse, "kl": kl, "beta": self.beta}

    def report(self, model, folder):
        """Figures of the trained model; its movie goes to the folder."""
        print("painting a movie ...")
        save_movies(model, self.dataset, folder)
        result = measure(model, self.dataset)
        window = result["mse_per_frame"][: self.options.window]
        if not fmean(window) < 0.5 * result["blank_mse"]:  # NaN is not
            print("More than half of a blank prediction's error: little was learnt. Raise --steps.")
        return result


class PaperRecipe(PictureRecipe):
    """The published networks; the loss is the negative ELBO of frames in a row, scaled."""

    legend = "loss: mse + beta kl / numbers in a picture; mse: of pixels in [0, 1]; kl: nats"

    def frames_in_a_row(self):
        return self.longest

    def horizon(self, step):
        return self.row - 1

    def batch(self, step):
        """Frames (B, row, C, size, size) from anywhere in a clip and, unless all are painted, the
        times (B, targets) of those to paint."""
        row, times, frames = self.draw(step)
        if not self.options.targets:
            return (frames(row),)
        return frames(row), times[self.part].to(self.device)

    def terms(self, model, frames, times=None):
        return model.loss(frames, self.beta, self.noise(model), times)


class CompactRecipe(PictureRecipe):
    """The compact model and `charted_loss`."""

    legend = "loss: relative to the variance of the pixels; mse: of pixels in [0, 1]; kl: nats"
    # Parameters whose name starts like this learn at so many times --lr; the first that fits.
    # The MLP of a path is slow, so that its linear map, which holds beyond training, does the most.
    lr_scales = (
        ("decoder.picture", 0.3), ("decoder.path", 0.3), ("decoder", 3.0), ("encoder.filters", 0.1),
    )  # fmt: skip
    muon = True
    batches_of_prior = 256  # at most, whose states the prior is fitted to
    first_horizon = 3  # frames that the first steps roll out
    batches_of_variance = 8  # with fewer, one clip that the model does not follow would decide

    @staticmethod
    def complete(options):
        """Of a named system, q has as many coordinates as the system, of numbers at least two."""
        if options.system is None:
            return
        system = SYSTEMS[options.system]
        if options.latent is None:
            q, _ = initial_states(system, 1)
            # A single number might fold onto itself, where two cannot.
            options.latent = q.numel() if system.periodic else max(2, q.numel())
        if options.periodic is None:
            options.periodic = system.periodic

    def prepare(self, model):
        model.H.iterations = TRAINING_ITERATIONS

    def frames_in_a_row(self):
        return max(3, self.options.context)

    def horizon(self, step):
        """The farthest frame to paint grows from `first_horizon` to the last, over half the run."""
        grown = self.first_horizon + 2 * self.longest * step // self.options.steps
        return min(self.longest - 1, grown)

    def batch(self, step):
        """Frames to encode (B, row, C, S, S), to paint (B, targets, C, S, S), and the times of
        these (B, targets), counted from the first to encode."""
        row, times, frames = self.draw(step)
        both = frames(torch.cat((row, row[:, :1] + times), 1))
        seen, targets = both.split([self.row, self.options.targets], 1)
        return seen, targets, times[self.part].to(self.device)

    def terms(self, model, seen, targets, times):
        horizon = self.longest - 1
        if not self.compile and self.device.type != "cuda":  # graphs are of one shape
            horizon = times.max().item()
        return charted_loss(
            model, seen, targets, times, horizon, self.beta, self.noise(model), average
        )

    def finish(self, model):
        """Fit the variance of z, then the prior to many states, by batches after the last one.

        The states are those that whole windows are rolled out from.
        """
        options = self.options
        if options.deterministic:
            return
        self.part = slice(None)  # every process does the same here
        batches = [self.batch(options.steps + i) for i in range(self.batches_of_variance)]
        fit_variance(model, batches, self.longest - 1, options.seed)
        n = min(self.batches_of_prior, options.steps)  # short runs take fewer
        states = []
        with torch.no_grad():
            for i in tqdm(range(n), "encoding clips for the prior", disable=RANK > 0):
                seen = self.batch(options.steps + i)[0]
                states.append(torch.stack(model.encode(seen)))
        mean, logvar = torch.cat(states, 1)
        fit_prior(model.prior, mean, logvar, min(1000, options.steps), options.seed)


class FlowRecipe(Recipe):
    """A Neural Hamiltonian Flow, on points."""

    legend = "loss: an upper bound of -log p(x), in nats"
    muon = True
    draws = 4  # of p for each point

    def build(self):
        options = self.options
        points = self.dataset
        return NHF(
            points.dim, options.hamiltonians, options.leapfrog_steps, kinetic=options.kinetic,
            shift=points.shift, scale=points.scale,
        )  # fmt: skip

    def batch(self, step):
        """Points x (B, D), noise for the momenta of each, (draws, B, D), and the share of the run
        that is done, a scalar."""
        generator = generator_of(self.options.seed, step)
        x = self.dataset.draw(self.options.batch_size, generator)
        noise = torch.randn(self.draws, *x.shape, generator=generator)
        return x[self.part], noise[:, self.part], torch.tensor(step / self.options.steps)

    def losses(self, model, x, noise, done):
        """Minus a bound of log p(x), which goes from the ELBO to the importance-weighted bound.

        The latter is tighter, but its gradients teach f(p|q) little (Rainforth et al. 2018,
        "Tighter variational bounds are not necessarily better"). Of RealNVP both are log p(x).
        """
        weights = model.log_weights(x, noise)  # (draws, B)
        elbo = weights.mean()
        iwae = weights.logsumexp(0).mean() - math.log(len(weights))
        return {"loss": -((1 - done) * elbo + done * iwae)}

    def report(self, model, folder):
        """Figures of the trained model, on fewer points than eval.py takes."""
        return measure_flow(model, self.dataset, 2000, (64,))


class RealNVPRecipe(FlowRecipe):
    """The paper's baseline, with about as many parameters as the default NHF."""

    legend = "loss: -log p(x), in nats"

    def build(self):
        points = self.dataset
        return RealNVPFlow(points.dim, shift=points.shift, scale=points.scale)


RECIPES = {
    "compact": CompactRecipe,
    "paper": PaperRecipe,
    "nhf": FlowRecipe,
    "realnvp": RealNVPRecipe,
}


def recipe_of(options, device, compile=False):
    """The recipe of a run with these options, with its data, on the device of this name."""
    if options.batch_size % PROCESSES:
        raise ValueError("--batch-size must be a multiple of the number of processes")
    kind = getattr(options, "arch", options.model)  # flows have no arch
    device = device_of(options.model, device)
    dataset = test_set(vars(options), TEST_CLIPS, device)
    options.digest = dataset.digest
    return RECIPES[kind](options, dataset, device, compile)


# -------------------------------------------------------------------------------------- optimisers


def make_optimisers(model, lr, lr_scales=(), muon=False):
    """Adam, and with `muon` Muon for the matrices whose learning rate is not scaled.

    lr_scales: pairs (prefix, scale) for the parameters whose names start with a prefix. Every
    learning rate is a tensor, which a CUDA graph of a step reads anew.
    """
    by_scale = {}
    matrices = {}  # by their shapes
    for name, weight in model.named_parameters():
        scale = next((s for prefix, s in lr_scales if name.startswith(prefix)), 1.0)
        if muon and scale == 1.0 and weight.dim() == 2:
            matrices.setdefault(weight.shape, []).append(weight)
        else:
            by_scale.setdefault(scale, []).append(weight)
    device = next(model.parameters()).device

    def group(weights, scale):
        return {"params": weights, "lr": torch.tensor(lr, device=device), "lr_scale": scale}

    groups = [group(weights, scale) for scale, weights in by_scale.items()]
    how = {
        "betas": (0.9, 0.99), "eps": 1e-12, "fused": True, "capturable": device.type == "cuda",
    }  # fmt: skip
    optimisers = [torch.optim.Adam(groups, lr, **how)]
    if matrices:
        optimisers.append(Muon([group(weights, 1.0) for weights in matrices.values()], {}))
    return optimisers


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum, made orthogonal by Newton and Schulz's iteration.

    Each group of parameters is matrices of one shape, which are changed together, as this takes
    fewer kernels. The steps are those of torch.optim.Muon with weight_decay=0 and
    adjust_lr_fn="match_rms_adamw", but in float32, which is fast on CPUs.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            weights = group["params"]
            gradients = torch.stack([weight.grad for weight in weights])  # (n, rows, columns)
            state = self.state[weights[0]]
            if "momenta" not in state:
                state["momenta"] = torch.zeros_like(gradients)
            momenta = state["momenta"]
            momenta.lerp_(gradients, 0.05)
            nesterov = gradients.lerp(momenta, 0.95)
            rms = 0.2 * max(weights[0].shape) ** 0.5  # as large as Adam's steps usually are
            steps = group["lr"] * rms * orthogonal(nesterov)
            for weight, step in zip(weights, steps, strict=True):
                weight.sub_(step)


def orthogonal(x):
    """Matrices x (n, rows, columns), made orthogonal by Newton and Schulz's iteration."""
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT).mT  # x x^T is the smaller of the two products
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-12)
    for _ in range(5):
        a = x @ x.mT
        b = 2.0315 * (a @ a) - 4.775 * a
        x = 3.4445 * x + b @ x
    return x


def set_rate(optimisers, lr, step, steps):
    """Warm up to lr over 50 steps, then go down to zero along a cosine."""
    warm_up = min(1, (step + 1) / 50)
    lr = lr * warm_up * 0.5 * (1 + math.cos(math.pi * step / steps))
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"].fill_(lr * group["lr_scale"])


# ------------------------------------------------------------------------------- the training step


def stepper(model, losses, optimisers, geco=None):
    """A function that takes a training step on a batch and returns losses(*batch).

    It goes down the gradient of "loss" among these, averaged over all processes and clipped to
    norm 1; where any of it is not finite, all of it counts as zero. On a GPU the step waits for
    nothing and runs as one graph, see `Graphed`.
    """

    def step(*batch):
        values = losses(*batch)
        model.zero_grad()
        values["loss"].backward()
        values = {name: value.detach().clone() for name, value in values.items()}
        weights = [weight for weight in model.parameters() if weight.grad is not None]
        average_together([*(weight.grad for weight in weights), *values.values()])
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        bad = ~norm.isfinite()
        for weight in weights:
            weight.grad.masked_fill_(bad, 0.0)
        for optimiser in optimisers:
            optimiser.step()
        if geco:
            geco.update(values["mse"])
        return values

    weight = next(model.parameters())
    return Graphed(step, weight.device) if weight.is_cuda else step


class Graphed:
    """A training step on a GPU, captured as a CUDA graph at its fourth call and then replayed.

    It takes tensors and returns scalars by name. It runs on a stream of its own, which the caller's
    stream waits for. Raises: ValueError for tensors of other shapes than the graph was made for.
    """

    warm_up = 3  # calls before the graph is captured, as torch asks for

    def __init__(self, step, device):
        self.step = step
        self.stream = torch.cuda.Stream(device)
        self.calls = 0

    def __call__(self, *batch):
        self.calls += 1
        callers_stream = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(callers_stream)
        with torch.cuda.stream(self.stream):
            values = self.run(batch)
        callers_stream.wait_stream(self.stream)
        return values

    def run(self, batch):
        """Run the step, at first, or capture it, once, or replay what was captured."""
        if self.calls <= self.warm_up:
            return self.step(*batch)
        if self.calls == self.warm_up + 1:
            self.capture(batch)
        for mine, new in zip(self.batch, batch, strict=True):
            if mine.shape != new.shape:
                raise ValueError(f"this step was captured for {mine.shape}, not {new.shape}")
            mine.copy_(new)
        self.graph.replay()
        return {name: value.clone() for name, value in self.values.items()}

    def capture(self, batch):
        """Record what the step launches, without running it, on a copy of the batch."""
        self.batch = [x.clone() for x in batch]
        self.graph = torch.cuda.CUDAGraph()
        # In this mode other threads may use the GPU meanwhile, as those of nccl do.
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            self.values = self.step(*self.batch)


def step_of(recipe, model, optimisers):
    """The training step of a recipe."""
    recipe.prepare(model)
    losses = partial(recipe.losses, model)
    if recipe.compile:
        losses = compiled(losses)
    return stepper(model, losses, optimisers, recipe.geco)


def compiled(function):
    """The function as one region that torch.compile fuses. Many recompilations are an error."""
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    # In nested regions torch 2.13 mistakes layouts that it chose, and overwrites states it needs.
    options = {"layout_optimization": False, "allow_buffer_reuse": False, "inplace_buffers": False}
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)


@torch.no_grad()
def fit_variance(model, batches, horizon, seed=0):
    """Widen q(z|x) of a compact model by powers of two while that makes the mean picture better.

    The ELBO makes it too narrow where the errors of pixels are not independent of each other.
    batches: what the encoder sees, targets and their times, as `charted_loss` takes them.
    """

    def error(scale):
        torch.manual_seed(seed)  # all scales see the same noise
        return sum(averaged_picture_error(model, *batch, horizon, scale) for batch in batches)

    best = 1
    least = error(best)
    for scale in tqdm([2, 4, 8, 16, 32, 64], "fitting the variance of z", disable=RANK > 0):
        new = error(scale)
        if not new < least:  # NaN is not either
            break
        best = scale
        least = new
    model.encoder.logvar += 2 * math.log(best) / model.encoder.logvar_scale


def fit_prior(prior, mean, logvar, rounds, seed=0, lr=2e-2):
    """Fit a learnt prior, by Muon, to q(z|x) of many clips, mean and log-variance (n, dim) each."""
    torch.manual_seed(seed)
    optimisers = make_optimisers(prior, lr, muon=True)

    def losses(mean, logvar):
        z = prior.draw(mean, logvar)
        return {"loss": prior.kl(z, mean, logvar).mean()}

    step = stepper(prior, losses, optimisers)
    for i in tqdm(range(rounds), "fitting the prior", disable=RANK > 0):
        set_rate(optimisers, lr, i, rounds)
        some = torch.randint(len(mean), (512,), device=mean.device)
        step(mean[some], logvar[some])


# ------------------------------------------------------------------------------ a run and its files


class Run:
    """A model in training and its folder: checkpoint.pt and metrics.jsonl.

    Of several processes the first one alone writes.
    """

    def __init__(self, folder, recipe, model):
        self.folder = folder
        self.recipe = recipe
        self.options = recipe.options
        self.model = model
        self.optimisers = make_optimisers(model, recipe.options.lr, recipe.lr_scales, recipe.muon)
        self.step = 0
        self.logged = 0  # bytes of metrics.jsonl
        self.began = time.time()

    def save(self):
        """Write the checkpoint, in one piece. `HGN.load` and `NHF.load` read the model in it."""
        if RANK > 0:
            return
        run = {
            "options": vars(self.options),
            "step": self.step,
            "seconds": time.time() - self.began,
            "logged": self.logged,
            "optimisers": [optimiser.state_dict()["state"] for optimiser in self.optimisers],
            "geco": [x.item() for x in self.recipe.geco_state],
            **provenance(),
        }
        self.model.save(self.folder / "checkpoint.pt", run=run)

    def restore(self, run):
        """Go on where the checkpoint was made; what was logged after it is dropped."""
        self.step = run["step"]
        self.logged = run["logged"]
        self.began -= run["seconds"]
        for optimiser, state in zip(self.optimisers, run["optimisers"], strict=True):
            # The learning rates stay tensors on this device.
            optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
        for tensor, value in zip(self.recipe.geco_state, run["geco"], strict=True):
            tensor.fill_(value)
        if RANK == 0:
            with open(self.folder / "metrics.jsonl", "a") as log:
                log.truncate(min(self.logged, log.tell()))

    def log(self, **values):
        """Append a line to metrics.jsonl."""
        if RANK > 0:
            return
        line = {"step": self.step, "seconds": time.time() - self.began, **values}
        with open(self.folder / "metrics.jsonl", "a") as log:
            log.write(json.dumps(line) + "\n")
            self.logged = log.tell()


def new_folder(options, name):
    """runs/NAME/, by default named after the data, never one that exists. Raises: ValueError."""
    stem = name or options.system or options.density or Path(options.data).stem
    folder = Path("runs", stem)
    if folder.name != stem:
        raise ValueError(f"--name {stem} is not the name of a folder")
    if name and folder.exists():
        raise ValueError(f"{folder} exists: --resume {folder} goes on, or choose another --name")
    suffix = 2
    while folder.exists():
        folder = Path("runs", f"{stem}-{suffix}")
        suffix += 1
    folder.mkdir(parents=True)
    return folder


def start(recipe, name):
    """A new run in a folder of its own."""
    model = recipe.build()
    folder = new_folder(recipe.options, name) if RANK == 0 else None
    run = Run(folder, recipe, model)
    run.log(config=vars(recipe.options), processes=PROCESSES, **provenance())
    run.save()
    return run


def resume(where, given, device, compile):
    """The run whose folder or checkpoint is at `where`, as it stopped. Raises: ValueError."""
    if PROCESSES > 1 and not where:
        raise ValueError("which run is the newest may change meanwhile: --resume runs/NAME")
    path = find_run(where or None)
    model, saved = load(path)
    if path.name != "checkpoint.pt" or not saved.get("optimisers"):
        raise ValueError(f"{path} is not the checkpoint.pt of a run that can go on: train anew")
    recipe = recipe_of(resumed(given, saved), device, compile)
    run = Run(path.parent, recipe, model.to(recipe.device))
    run.restore(saved)
    return run


# ---------------------------------------------------------------------------------------- the loop


SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Ctrl-C and SIGTERM stop a run between two steps.

    A second signal ends the process at once, but not under torchrun, which repeats signals and
    kills after 30 seconds.
    """

    def __init__(self):
        self.signal = 0
        for caught in SIGNALS:
            signal.signal(caught, self.on_signal)

    def end(self):
        """Let signals end the process at once."""
        for caught in SIGNALS:
            signal.signal(caught, signal.SIG_DFL)

    def on_signal(self, number, frame):
        self.signal = number
        if PROCESSES == 1:
            self.end()


LOG_EVERY = 20  # steps
MOST_BAD_LOGS = 5  # consecutive lines of the log with a loss that is not finite end the training


def train(run):
    """Train to the last step or to a signal, with a log and checkpoints on the way."""
    options = run.options
    recipe = run.recipe
    recipe.part = join_processes(options, run.model)
    take_step = step_of(recipe, run.model, run.optimisers)
    interruption = Interruption()
    bad_logs = 0
    stop = 0
    with tqdm(
        desc="training", total=options.steps, initial=run.step, unit="step", disable=RANK > 0
    ) as bar:
        while run.step < options.steps and not stop:
            # The noise of z is drawn from here: a resumed run draws what it would have drawn.
            torch.manual_seed((options.seed << 20) + run.step)
            set_rate(run.optimisers, options.lr, run.step, options.steps)
            values = take_step(*recipe.batch(run.step))
            run.step += 1
            bar.update()
            stop = average(torch.tensor(float(interruption.signal))).item()
            if run.step % LOG_EVERY == 0 or run.step == options.steps or stop:
                numbers = {name: value.item() for name, value in values.items()}
                bar.set_postfix(numbers)
                run.log(**numbers)
                bad_logs = 0 if math.isfinite(numbers["loss"]) else bad_logs + 1
            if bad_logs == MOST_BAD_LOGS:
                break
            if not bad_logs and run.step % options.save_every == 0 and run.step < options.steps:
                run.save()
    del take_step  # nccl ends only after the graph that holds its calls
    if not bad_logs:
        if run.step == options.steps:
            recipe.finish(run.model)
        run.save()
    leave_processes()
    if bad_logs:
        raise ValueError("the loss is not finite: lower --lr")
    interruption.end()
    if stop or interruption.signal:
        if RANK == 0:
            print(f"stopped: python train.py --resume {run.folder} goes on")
        raise SystemExit(128 + (interruption.signal or signal.SIGTERM))


# ------------------------------------------------------------------------------------ the command


def conclude(run):
    """Measure the model as it was saved, and say where it is."""
    model, _ = load(run.folder, run.recipe.device)
    result = run.recipe.report(model, run.folder)
    run.log(**result)
    save_curves(run.folder)
    print_table(result)
    print(f"\n{time.time() - run.began:.0f} s. Then: python eval.py --checkpoint {run.folder}")


def run_command(given):
    """Train what the given options ask for, measure it, and say where it is."""
    # These options are not saved with the run.
    device, compile, where, name = [
        given.pop(option, None) for option in ("device", "compile", "resume", "name")
    ]
    if where is None:
        options = settle(given)
        torch.manual_seed(options.seed)
        recipe = recipe_of(options, device, compile)
        run = start(recipe, name)
    else:
        run = resume(where, given, device, compile)
    if RANK == 0:
        print(run.recipe.dataset.summary)
        print(f"{run.folder}: step {run.step} of {run.options.steps}")
        print(run.recipe.legend)
    if run.step < run.options.steps:
        train(run)
    if RANK == 0:
        conclude(run)


def main():
    run_main(run_command, parse())


if __name__ == "__main__":
    main()
