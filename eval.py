"""Look at a trained model and measure it: movies, charts and figures, written into its folder.

python eval.py --reverse --speed 2      # the newest run; --system NAME or --checkpoint PATH: others

The parts, from top to bottom: what train.py shares with this file; checkpoints (`find_run`,
`load`); test data (`test_set`); measures (`measure`, `measure_physics`, `measure_flow`, where a new
figure is one more entry of the result); movies; charts; the command.
"""

import argparse
import ctypes
import json
import math
import os
import shlex
import sys
import time
from itertools import combinations, combinations_with_replacement
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from torch.func import jacrev, vmap

from hgn import FRAME_TIME, HGN, read_checkpoint, write_file
from nhf import DENSITIES, NHF, TEST_SEED, Points, RealNVPFlow, seeded
from physics import (
    SYSTEMS,
    Recordings,
    clips,
    gauss_newton,
    infer_q,
    initial_states,
    jitter,
    read_points,
    render,
    simulate,
)

MODELS = {"hgn": HGN, "hnn": HGN, "nhf": NHF, "realnvp": RealNVPFlow}
FLOWS = ("nhf", "realnvp")  # the models that learn from points
WINDOW = 30  # frames of the paper's test clips
BLOCK = 32  # clips that are decoded and compared at a time


# ------------------------------------------------------------------ shared with train.py
def run_main(function, given):
    """Call function(given); a user's mistake ends the program with one line, and exit status 2."""
    keep_freed_memory()
    try:
        function(given)
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        message = str(error) or "there is not enough memory"
        print(f"error: {message.splitlines()[0]}", file=sys.stderr)
        sys.exit(2)


def parse_options(description, groups, words=None):
    """Return the options given in the command line (or in `words`), and no others, as a dict.

    groups: by title, what argparse is told of the options of each group, by their names. Those of a
    group whose title begins with "one of" exclude each other.
    """
    # Without a usage text a mistake is answered with one line; --help says more.
    parser = argparse.ArgumentParser(
        description=description, usage=argparse.SUPPRESS, argument_default=argparse.SUPPRESS
    )
    for title, options in groups.items():
        group = parser.add_argument_group(title)
        if title.startswith("one of"):
            group = group.add_mutually_exclusive_group()
        for name, how in options.items():
            group.add_argument(name, **how)
    return vars(parser.parse_args(words))


def number(low, high, kind=int, word=None):
    """Return an argparse type: a number from low to high, or the given word."""

    def convert(text):
        if text == word:
            return text
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, not {text}")
        return value

    return convert


def pick_device(name=None):
    """Return the device called `name`, by default the GPU if there is one. Raises: ValueError."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, dtype=torch.float64, device=name).device
    except (RuntimeError, TypeError, AssertionError):
        raise ValueError(f"--device {name} does not work here: try --device cpu") from None


def provenance():
    """Return what is needed to make a written result again: the command and the versions."""
    versions = {
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }
    return {"command": shlex.join(["python", *sys.argv]), "versions": versions}


def write(path, data):
    """Write bytes to a file, in one piece, and say so. A folder that is missing is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, data)
    print(f"wrote {path}")


def keep_freed_memory():
    """Let glibc keep the memory that tensors free instead of returning it to the system.

    By default glibc returns large blocks at once and asks for them again in the next step. Every
    page of such a block costs a page fault when it is first touched. With this setting a training
    step of the compact model has some 300 page faults, not 12,000 to 21,000, and takes 0.8 of the
    time (the median of four pairs of runs on one core; of the paper's model 0.7 and 0.8).
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # other C libraries than glibc may not have it
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: return nothing at the top of the heap
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: map only what is larger, block by block


# ------------------------------------------------------------------ checkpoints
def find_run(where=None, system=None, density=None):
    """Return the path of a checkpoint.

    where: a checkpoint or the folder of a run; by default the newest run below runs/, of the system
    or density if one is named, or else the model that comes with the code. Raises: ValueError.
    """
    if where is not None:
        path = Path(where)
        return path / "checkpoint.pt" if path.is_dir() else path
    name = system or density
    runs = Path("runs").glob("*/checkpoint.pt")
    for path in sorted(runs, key=os.path.getmtime, reverse=True):
        try:
            _, run = read_run(path)
        except ValueError as error:
            print(f"passed over: {error}")
            continue
        if name in (None, run["options"]["system"], run["options"]["density"]):
            return path
    path = Path(__file__).parent / "checkpoints" / f"{name or 'mass_spring'}.pt"
    if not path.is_file():
        option = "--system" if system else "--density"
        raise ValueError(f"there is no run of {name}: python train.py {option} {name}")
    return path


def read_run(path):
    """Return the class of the model in a checkpoint, and what train.py saved beside the model.

    The latter is a dict of the run's "options", "command", "versions", "step" and "seconds".
    Raises: ValueError.
    """
    checkpoint = read_checkpoint(path)
    try:
        run = checkpoint["run"]
        return MODELS[run["options"]["model"]], run
    except (KeyError, TypeError):
        raise ValueError(f"{path} is no run of this version: python train.py makes one") from None


def load(path, device="cpu"):
    """Return the model of a run, in evaluation mode, and the run itself (see `read_run`).

    path: a checkpoint, or the folder of a run. Raises: ValueError.
    """
    path = find_run(path)
    kind, run = read_run(path)
    return kind.load(path, device), run


# ------------------------------------------------------------------ test data
class TestClips:
    """Fixed test clips of a simulated system.

    Attributes: `observed`, what a model sees, noisy, (n, T, 3, size, size); q and p, the true
    states at frame 0, (n, bodies, dims); `length`, how many frames have a known truth.
    """

    channels = 3
    length = math.inf
    data = None
    digest = None

    def __init__(self, options, n, device="cpu"):
        self.summary = options["system"]
        self.system = SYSTEMS[self.summary]
        self.size = options["size"]
        self.noise = options["noise"]
        self.dt = options["dt"]
        frames = max(WINDOW, options["context"])
        how = (self.dt, self.noise, self.size, seeded(TEST_SEED), device)
        self.observed, q, p = clips(self.system, n, frames, *how)
        self.q = q[:, 0]
        self.p = p[:, 0]

    def truth(self, frames, speed=1.0):
        """Yield clean frames (BLOCK, frames, 3, size, size), from frame 0 on; speed < 0: back."""
        path, _ = simulate(self.system, self.q, self.p, frames, speed * self.dt)
        for q in path.split(BLOCK):
            yield render(self.system, q, self.size)


class HeldOut:
    """Held-out clips of recordings, with the attributes of TestClips but for the true states.

    Their truth ends: the clips are those at least as long as the length that keeps most frames.
    """

    system = None
    noise = 0.0

    def __init__(self, options, n, device="cpu"):
        how = [options[name] for name in ("data", "size", "clip", "stride", "dt", "fps", "seed")]
        data = Recordings(*how, least=options["context"] + 1)
        self.data = data
        self.device = device
        self.size = data.size
        self.channels = data.channels
        self.dt = data.dt
        self.summary = data.summary
        self.digest = data.digest
        lengths = data.lengths[data.held_out]
        frames_kept = [length * (lengths >= length).sum() for length in lengths]
        self.length = lengths[np.argmax(frames_kept)].item()
        self.clips = data.held_out[lengths >= self.length][:n]
        self.observed = torch.cat(list(self.truth(options["context"])))

    def truth(self, frames, speed=1.0):
        """Yield frames (BLOCK, T, C, size, size) at `speed`; T < frames where clips have ended."""
        times = (speed * torch.arange(frames)).long()
        times = times[times < self.length]
        for part in self.clips.split(BLOCK):
            yield self.data.frames(part, times.expand(len(part), -1)).to(self.device)


def test_set(options, n, device="cpu"):
    """Return what a run is tested on: Points, or n TestClips or HeldOut clips.

    Raises: ValueError where the files are not those that the run learnt from.
    """
    path = options["data"]
    if options["system"]:
        test = TestClips(options, n, device)
    elif options["density"]:
        test = Points(options["density"])
    elif options["model"] in FLOWS:
        points = read_points(path)
        test = None if points is None else Points(points, options["seed"], path)
    else:
        test = HeldOut(options, n, device)
    if test is None or options["digest"] not in (None, test.digest):
        raise ValueError(f"{path} is not what the run learnt from: put that back")
    return test


# ------------------------------------------------------------------ measures of models of pictures
@torch.no_grad()
def measure(model, test, frames=90, steps=90):
    """Return the figures that are cheap enough for the end of a training run, a dict.

    Pixel errors but mse_noisy are against the clean truth; the model sees the first `context`
    frames only. H is followed along `steps` frames. A new figure is one more entry here, or in
    `measure_physics` if it needs the true system; the printed table and metrics.json show what
    these return.
    """
    frames = min(frames, test.length)
    start = model.infer(test.observed)
    per_frame = errors(model, test, start, frames).mean(0)
    return {
        "frames": frames,
        "clips": len(test.observed),
        "mse_per_frame": per_frame.tolist(),
        "blank_mse": blank_error(test, frames).item(),
        **window_figures(per_frame),
        **speed_figures(model, test, start),
        **noise_figures(model, test, start),
        **energy_figures(model, start, steps),
        **friction_figures(model),
    }


@torch.no_grad()
def measure_physics(model, test, frames=300):
    """Return the figures for which the true system is needed, a dict; `test` must be TestClips.

    They are valid prediction times, forward and backward, SyMetric and the quality of samples.
    """
    start = model.infer(test.observed)
    return {
        "strict_vpt_forward": valid_time(model, test, start, frames, 1.0),
        "strict_vpt_backward": valid_time(model, test, start, frames, -1.0),
        **symetric_figures(model, test, start),
        **sample_figures(model, test),
    }


def errors(model, test, start, frames, speed=1.0):
    """Return the pixel MSE of rollouts from start = (q, p) against the truth, (clips, frames)."""
    path, _ = model.rollout(*start, frames - 1, speed * model.dt)
    result = []
    for q, truth in zip(path.split(BLOCK), test.truth(frames, speed), strict=True):
        result.append(pixel_mse(paint(model, q), truth))
    return torch.cat(result)


def paint(model, q):
    """Return the model's frames as a screen shows them, in [0, 1]."""
    return model.decode(q).clamp(0, 1)


def pixel_mse(a, b):
    """Return the mean squared error of every frame of a and b (B, T, C, H, W): (B, T)."""
    return (a - b).square().mean((2, 3, 4))


def blank_error(test, frames):
    """Return the pixel MSE of a blank prediction, the mean picture, of all clips."""
    n = 0
    total = 0.0
    squares = 0.0
    for truth in test.truth(frames):
        pictures = truth.flatten(0, 1).double()
        n = n + len(pictures)
        total = total + pictures.sum(0)
        squares = squares + pictures.square().sum(0)
    return (squares / n - (total / n).square()).mean()


def window_figures(per_frame):
    """Return the mean errors of windows of 30 frames, of which the first is that of training."""
    figures = {}
    for start in range(0, len(per_frame), WINDOW):
        part = per_frame[start : start + WINDOW]
        figures[f"mse_{start}_{start + len(part) - 1}"] = part.mean().item()
    return figures


def speed_figures(model, test, start):
    """Return the errors of rollouts backward in time and at other speeds, if the truth is known."""
    figures = {}
    speeds = {"backward": -1.0, "double_speed": 2.0, "half_speed": 0.5}
    for name, speed in speeds.items():
        if test.system:
            figures[f"mse_{name}"] = errors(model, test, start, WINDOW, speed).mean().item()
    return figures


def noise_figures(model, test, start):
    """Return the error against noisy pictures, and its floor, if what is observed is noisy."""
    if not test.noise:
        return {}
    path, _ = model.rollout(*start, WINDOW - 1)
    noisy = pixel_mse(paint(model, path), test.observed[:, :WINDOW]).mean()
    how = {"noise": test.noise, "size": test.size, "generator": seeded(TEST_SEED + 1)}
    return {"mse_noisy": noisy.item(), "noise_floor": noise_floor(test.system, **how)}


def energies(model, q, p):
    """Return H along paths q and p (B, T, ...): (B, T)."""
    return torch.stack([model.energy(q[:, t], p[:, t]) for t in range(q.shape[1])], 1)


def energy_figures(model, start, steps):
    """Return how much H varies along rollouts: to its spread across clips, and as a variance."""
    H = energies(model, *model.rollout(*start, steps - 1))
    figures = {}
    if len(H) > 1:  # one clip has no spread
        figures["energy_std_ratio"] = (H.std(1).median() / H[:, 0].std()).item()
    figures["energy_variance"] = H.var(1).mean().item()
    return figures


def friction_figures(model):
    """Return the friction gamma of p -> exp(-gamma t) p, if the model learns one."""
    if getattr(model, "gamma", None) is None:
        return {}
    return {"friction": model.gamma.item() * FRAME_TIME / model.dt}


def noise_floor(system, noise="paper", size=32, n=2000, draws=32, generator=None):
    """Return the smallest pixel MSE that any model can reach under observation noise.

    It is the mean variance of a pixel given the true state, by Monte Carlo over n random states
    with `draws` noisy pictures each.
    """
    q, p = initial_states(system, n, generator)
    path, _ = simulate(system, q, p, 8, dt=0.5)
    q = path[:, -1:].expand(-1, draws, -1, -1)  # away from the start: (n, draws, bodies, dims)
    frames = render(system, jitter(system, q, noise, generator), size)
    return frames.var(1).mean().item()


def valid_time(model, test, start, frames, speed):
    """Return how many frames are valid: the error is at most a tenth of a blank prediction's.

    It is a median over clips, and stricter than the VPT of Higgins et al. (2021).
    """
    valid = errors(model, test, start, frames, speed) <= 0.1 * blank_error(test, WINDOW)
    valid_frames = valid.cumprod(1).sum(1).float()  # until the first that is not, as NaN is not
    return valid_frames.median().item()


def symetric_figures(model, test, start):
    """Return SyMetric between the model's states and the true ones, along the test clips."""
    q, _ = start
    if q.shape[1] > len(q) / 8:  # a linear map of so many numbers fits anything
        return {}
    true_path = simulate(test.system, test.q, test.p, WINDOW, test.dt)
    true = state_rows(true_path, test.system.periodic)
    latent = state_rows(model.rollout(*start, WINDOW - 1), model.config["periodic"])
    return symetric(latent, true)


def sample_figures(model, test):
    """Return which shares of samples show the system and move as it does, if there is a prior."""
    if model.deterministic:
        return {}
    count = min(256, 2 * len(test.observed))
    samples = model.sample(count, WINDOW - 1, generator=seeded(TEST_SEED + 4))
    valid, obey = judge(test.system, samples, test.dt)
    return {"samples_valid": valid, "samples_obey": obey}


def wrap(angle):
    """Return angles in (-pi, pi]."""
    return torch.atan2(angle.sin(), angle.cos())


def state_rows(path, periodic):
    """Return every third state of a path, q and p (B, T, ...), as rows (B * T / 3, 2 * dim).

    Angles are counted from their mean at frame 0, so that no path starts beside the cut at pi.
    """
    q, p = [x[:, ::3].flatten(2).double() for x in path]
    if periodic:
        start = q[:, :1]
        mean = torch.atan2(start.sin().mean(0), start.cos().mean(0))
        q = q + (wrap(start - mean) - start)
    return torch.cat((q, p), 2).flatten(0, 1)


def symetric(latent, true, orders=5):
    """Return SyMetric (Higgins et al. 2021, arXiv 2111.05986): is latent -> true state symplectic?

    The map is a regression on polynomials, by ridge where the authors have a lasso; a constant
    factor is allowed. Only directions count in which p spreads by a tenth of the largest spread or
    more: where a centre of mass hardly moves, no regression sees its Poisson brackets.
    latent: (n, 2 d). true: (n, 2 D). Returns: a dict of R^2, SyMetric and the polynomials' order.
    """
    d = latent.shape[1] // 2
    true = moving_directions(true)
    scale = latent.std(0).clamp(min=1e-9)
    x = (latent - latent.mean(0)) / scale
    y = (true - true.mean(0)) / true.std(0)
    terms = []
    for order in range(1, orders + 1):
        terms += map(list, combinations_with_replacement(range(2 * d), order))
        w, r2 = fit_polynomial(x, y, terms)
        next_terms = math.comb(2 * d + order + 1, order + 1)
        if r2 >= 0.9 or next_terms > len(x) / 4:  # more terms would fit noise
            break

    def fitted(x):
        return polynomial(x, terms) @ w

    jacobian = vmap(jacrev(fitted))(x[:1000])  # (n, 2 D, 2 d)
    jacobian = true.std(0)[:, None] * jacobian / scale
    by_q, by_p = jacobian.split(d, 2)
    brackets = by_q @ by_p.mT - by_p @ by_q.mT  # Poisson brackets of the true coordinates
    P = brackets @ brackets.mT
    P = P / P.abs().amax((1, 2)).mean()
    off = (P - torch.eye(true.shape[1])).square().mean()
    return {"symetric_r2": r2, "symetric": off.item(), "symetric_order": len(terms[-1])}


def moving_directions(states):
    """Return q and p of states (n, 2 D) along the principal directions in which p moves."""
    q, p = states.chunk(2, 1)
    _, spread, directions = torch.linalg.svd(p - p.mean(0), full_matrices=False)
    moving = directions[spread > 0.1 * spread[0]].mT
    return torch.cat((q @ moving, p @ moving), 1)


def polynomial(x, terms):
    """Return products of the coordinates that each of the terms names: (..., len(terms))."""
    return torch.stack([x[..., term].prod(-1) for term in terms], -1)


def fit_polynomial(x, y, terms):
    """Return the weights of a ridge regression of y (n, m) on polynomial(x, terms), and its R^2.

    It is fitted to the first half of the rows, and R^2 is that of the other half.
    """
    A = polynomial(x, terms)
    A = A - A.mean(0)
    seen, unseen = A.tensor_split(2)
    y_seen, y_unseen = y.tensor_split(2)
    ridge = 1e-4 * len(seen) * torch.eye(len(terms)).to(A)
    w = torch.linalg.solve(seen.T @ seen + ridge, seen.T @ y_seen)
    residual = (unseen @ w - y_unseen).square().sum() / y_unseen.square().sum()
    return w, 1 - residual.item()


def judge(system, frames, dt, seen=10):
    """Return which shares of clips (n, T, 3, S, S) show the system, and move as it does.

    A clip shows the system where painting the state read off every frame has a pixel MSE of 5e-4
    at most. It moves as the system does where it stays within 0.15, in world units, of the true
    motion from the state that fits its `seen` first frames best.
    """
    q = torch.cat([infer_q(system, block) for block in frames.split(8)])
    excess = pixel_mse(render(system, q, frames.shape[-1]), frames)
    shown = system.position(q)  # (n, T, bodies, 2)

    def positions(start, steps=seen):
        q, p = start.unbind(1)
        return system.position(simulate(system, q, p, steps, dt)[0])

    p = system.inertia * wrap(q[:, 1] - q[:, 0]) / dt  # a rough start for the fit
    start = torch.stack((q[:, 0], p), 1)  # (n, 2, bodies, dims)
    start = gauss_newton(positions, start, shown[:, :seen], 4, 1e-4, 0.5, 1e-9)
    distance = (positions(start, shown.shape[1]) - shown).norm(dim=-1).amax((1, 2))
    valid = (excess.amax(1) <= 5e-4).double().mean()
    obey = (distance <= 0.15).double().mean()
    return valid.item(), obey.item()


# ------------------------------------------------------------------ measures of flows
@torch.no_grad()
def measure_flow(model, points, n=10_000, samples=(16, 256)):
    """Return the figures of a flow on n held-out points, a dict.

    Means of the ELBO and of log p by importance weighting with each number of `samples`, in nats,
    the gap of the last to the entropy where that is known, and microseconds a point.
    """
    x = points.held_out[:n]
    generator = seeded(TEST_SEED + 5)
    elbo = model.elbo(x, generator).mean().item()
    by_samples = {}
    for k in samples:
        start = time.time()
        log_p = model.log_prob(x, k, generator)
        by_samples[f"us_per_log_prob_{k}"] = 1e6 * (time.time() - start) / len(x)
        by_samples[f"log_prob_{k}"] = log_p.mean().item()
    result = {
        "points": len(x),
        "elbo": elbo,
        **by_samples,
        "parameters": sum(w.numel() for w in model.parameters()),
        "standard_error": log_p.std(correction=0).item() / len(x) ** 0.5,
    }
    if points.density:
        result["entropy"] = points.density.entropy
        result["gap"] = -log_p.mean().item() - points.density.entropy
    return result


# ------------------------------------------------------------------ the printed table
NOTES = {
    "blank_mse": "of a blank prediction, the mean picture",
    "energy_std_ratio": "std of H along a rollout over that across clips: 0 where H is kept",
    "strict_vpt_forward": "frames until the error exceeds a tenth of blank_mse, median",
    "symetric_r2": "R^2 of the map from latent to true states; SyMetric passes above 0.9",
    "symetric": "how far that map is from symplectic; SyMetric passes below 0.05",
    "samples_valid": "share of samples that are pictures of the system",
    "samples_obey": "share of samples that move as the system does",
    "gap": "of -log p to the entropy: 0 is the best, but for the standard error",
}  # on figures of metrics.json


def print_table(options, result):
    """Print the figures that `measure` (and `measure_physics`) or `measure_flow` returned."""
    print(f"\n{options['system'] or options['density'] or options['data']}, test data:")
    for name, value in result.items():
        if isinstance(value, float):
            print(f"  {name:<22}{value:<12.4g}{NOTES.get(name, '')}")


# ------------------------------------------------------------------ movies
SEPARATOR = 2  # screen pixels between clips
GREY = 0.6  # of separators, and where the truth of a recording has ended
CAPTION_SIZE = 15  # of letters, in screen pixels
CAPTION_WIDTH = 440  # screen pixels that the longest caption needs


@torch.no_grad()
def save_movies(
    model, test, folder, frames=90, show=4, reverse=False, speed=(), sample=0, seed=0, scale=8
):
    """Write rollout.png, rollout.gif and the movies asked for.

    frames: to roll out. show: clips beside each other. reverse: reverse.gif, from the last state
    back. speed: speed_X.gif of each of these. sample: samples.gif of so many rollouts from the
    prior, by the seed. scale: screen pixels of a pixel. Raises: ValueError for samples of a model
    that has no prior.
    """

    def truth(speed=1.0):
        return next(test.truth(frames, speed))[:show]

    def rollout(q, p, speed=1.0):
        path, _ = model.rollout(q, p, frames - 1, speed * model.dt)
        return paint(model, path)

    q, p = model.infer(test.observed[:show])
    movies = {"rollout": two_rows(truth(), rollout(q, p))}
    for times in speed:
        movies[f"speed_{times:g}"] = two_rows(truth(times), rollout(q, p, times))
    if reverse:
        backward = truth().flip(1)
        last = [x[:, -1] for x in model.rollout(q, p, backward.shape[1] - 1)]
        movies["reverse"] = two_rows(backward, rollout(*last, -1.0))
    if sample:
        drawn = model.sample(sample, frames - 1, generator=seeded(seed))
        movies["samples"] = drawn.cpu().unsqueeze(0)
    step = max(1, frames // 5)
    stills = movies["rollout"][:, 0, ::step]  # of the first clip: (2, 5, C, H, W)
    caption = f"{folder.name}: truth above model, one frame in {step}"
    save_pictures(folder / "rollout.png", draw_frames(stills, caption, scale))
    for name, movie in movies.items():
        context = model.context if name == "rollout" else 0
        save_movie(folder / f"{name}.gif", movie, model.dt, scale, context)


def two_rows(truth, model):
    """Return clips (n, T, C, H, W) above each other, grey where the truth has ended."""
    rows = torch.full((2, *model.shape), GREY)
    rows[0, :, : truth.shape[1]] = truth
    rows[1] = model
    return rows


def save_movie(path, movie, dt, scale, context=0):
    """Write a movie (rows, clips, T, C, H, W) as a GIF, whose first frames are the context."""
    title = "truth above model" if len(movie) == 2 else "drawn from the prior"
    times, delays = movie_times(movie.shape[2], dt)
    pictures = []
    for t in times:
        caption = f"{path.stem}: {title}, frame {t}"
        if t < context:
            caption += ", context"
        pictures.append(draw_frames(movie[:, :, t], caption, scale))
    save_pictures(path, pictures, duration=delays, loop=0)


def movie_times(frames, dt):
    """Return which frames a GIF shows, and for how many milliseconds each.

    GIF counts in hundredths of a second, and browsers slow down what is shown for less than two of
    them, so of fast clips only every k-th frame is shown. Rounding the times at which frames end,
    not the delays, keeps the whole movie at its true speed.
    """
    stride = max(1, math.ceil(0.02 / dt - 1e-9))
    ends = np.arange(0, frames + stride, stride)
    delays = np.diff(np.rint(100 * dt * ends)).clip(2, 65535)  # 65535: what GIF can store
    return ends[:-1].tolist(), (10 * delays).tolist()


def draw_frames(frames, caption, scale):
    """Draw frames (rows, columns, C, H, W) in [0, 1] below a caption: (h, w, 3) bytes."""
    frames = frames.expand(-1, -1, 3, -1, -1)  # grey ones become RGB
    frames = frames.repeat_interleave(scale, 3).repeat_interleave(scale, 4)
    frames = F.pad(frames, (0, SEPARATOR, 0, SEPARATOR), value=GREY)
    sheet = frames.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (h, w, 3)
    right = max(0, CAPTION_WIDTH - sheet.shape[1])
    sheet = F.pad(sheet, (0, 0, 0, right, 2 * CAPTION_SIZE, 0), value=1.0)
    image = Image.fromarray((255 * sheet).round().byte().numpy())
    font = ImageFont.load_default(CAPTION_SIZE)
    ImageDraw.Draw(image).text((6, 6), caption, "black", font)
    return np.asarray(image)


def save_pictures(path, pictures, **options):
    """Write a picture (h, w, 3) of bytes, or a list of them as a GIF."""
    kind = {"extension": path.suffix, "plugin": "pillow"}
    write(path, iio.imwrite("<bytes>", pictures, **kind, **options))


# ------------------------------------------------------------------ charts
CELLS = 64  # of a histogram of many points, along each axis
GRID = 128  # points at which an energy is drawn, along each axis
STEP_DELAY = 400  # ms that flow.gif shows a leapfrog step


def charts(rows, columns):
    """Return a figure without a window, and its charts, an array (rows, columns)."""
    figure = Figure((3.9 * columns, 3.3 * rows), dpi=180, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def finish(ax, image, title, labels=("x1", "x2"), unit="relative units"):
    """Give a chart its title, the labels of its axes and its colour bar."""
    ax.figure.colorbar(image, ax=ax, label=unit)
    ax.set(title=title, xlabel=labels[0], ylabel=labels[1])


def pixels(figure):
    """Return a figure as a picture (h, w, 3) of bytes."""
    FigureCanvasAgg(figure).draw()
    return np.array(figure.canvas.buffer_rgba())[..., :3]


def robust_limits(x, least=1e-6):
    """Return limits (2,) or (dim, 2) for x (n,) or (n, dim) that a few outliers do not move.

    least: room on each side, as a share of x, so that what hardly changes shows as a line.
    """
    low, high = np.quantile(x, (0.005, 0.995), axis=0)
    room = 0.2 * (high - low) + least * np.abs(high)
    return np.stack((low - room, high + room), -1)


@torch.no_grad()
def save_phase(model, test, folder, frames=90, n=24):
    """Write phase.png: p over q coloured by H, and H over time, of n rollouts.

    Of q and p the coordinate is shown whose q moves most. Below, the same of the true system.
    """
    q, p = model.rollout(*model.infer(test.observed[:n]), frames - 1)
    figure, axes = charts(2 if test.system else 1, 2)
    draw_phase(axes[0], "learnt, relative units", q, p, energies(model, q, p), test.dt)
    if test.system:
        q, p = simulate(test.system, test.q[:n], test.p[:n], frames, test.dt)
        draw_phase(axes[1], "true", q, p, test.system.energy(q, p), test.dt)
    save_pictures(folder / "phase.png", pixels(figure))


def draw_phase(axes, name, q, p, H, dt):
    """Draw p over q, and H over time, of paths q and p (B, T, ...) and their H (B, T)."""
    q = q.flatten(2)
    i = q.var((0, 1)).argmax()
    draw_dots(axes[0], q[..., i], p.flatten(2)[..., i], H, f"{name}: p over q", "qp")
    time = dt * torch.arange(H.shape[1]).expand_as(H)
    draw_dots(axes[1], time, H, H, f"{name}: H over time", ("time", "H"))


def draw_dots(ax, x, y, H, title, labels):
    """Draw y over x, (B, T) each, coloured by H."""
    y = y.cpu()
    dots = ax.scatter(x.cpu(), y, c=H.cpu(), s=3)
    ax.set_ylim(robust_limits(y[y.isfinite()], 0.05))
    finish(ax, dots, title, labels, "H")


@torch.no_grad()
def save_density(model, points, folder, seed=0, n=20_000):
    """Write density.png, histograms of data and samples, and flow.gif.

    Of two columns density.png shows the learnt density too and, of NHF, V and K; flow.gif shows
    points that move on V step by step. Of more columns there are the pairs of the first three; of
    one there is no picture.
    """
    if model.dim == 1:
        return
    data = points.rows[:n]
    samples = model.sample(len(data), seeded(seed))
    movie = []
    if model.dim > 2:
        figure, axes = charts(2, 3)
        for column, pair in enumerate(combinations(range(3), 2)):
            draw_histograms(axes[:, column], data, samples, pair)
    else:
        hamiltonians = getattr(model, "H", [])  # RealNVP has none
        figure, axes = charts(1 + len(hamiltonians), 3)
        norm = draw_histograms(axes[0], data, samples, (0, 1))
        x, y, grid = grid_of(data)
        learnt = model.log_prob(grid, 32, seeded(seed)).exp()
        image = axes[0, 2].pcolormesh(x, y, learnt, norm=norm)
        finish(axes[0, 2], image, "learnt density", unit="density")
        for i in range(len(hamiltonians)):
            movie += draw_hamiltonian(axes[1 + i], model, i, data, seed)
    save_pictures(folder / "density.png", pixels(figure))
    if movie:
        save_pictures(folder / "flow.gif", movie, duration=STEP_DELAY, loop=0)


def draw_histograms(axes, data, samples, pair):
    """Draw two columns of data and of samples. Returns their scale of colours.

    The lowest colour is that of a single point of the data in a cell: a histogram tells no less.
    """
    norm = LogNorm(clip=True)
    limits = robust_limits(data[:, pair])
    cells = min(CELLS, 8 + len(data) // 200)  # a cell of few points tells little
    labels = [f"x{i + 1}" for i in pair]
    for ax, title, points in ((axes[0], "data", data), (axes[1], "samples", samples)):
        x, y = points[:, pair].T
        *_, image = ax.hist2d(x, y, cells, range=limits, density=True, norm=norm)
        finish(ax, image, title, labels, "density")
    return norm


def grid_of(points):
    """Return x and y (GRID,) and the points (GRID, GRID, 2) they span, where `points` lie."""
    x, y = [np.linspace(*limits, GRID) for limits in robust_limits(points)]
    return x, y, torch.from_numpy(np.stack(np.meshgrid(x, y), 2))


def draw_energy(ax, energy, points, title="", labels=("x1", "x2")):
    """Draw an energy with contour lines where `points` (n, 2) lie, above its minimum there."""
    x, y, grid = grid_of(points)
    values = energy(grid.float())
    lowest = values.min()
    highest = (energy(points.float()).quantile(0.99) - lowest).item()
    levels = MaxNLocator(12).tick_values(0, 2 * highest)  # points take half of the colours
    image = ax.contourf(x, y, values - lowest, levels, extend="max")
    ax.contour(x, y, values - lowest, levels, colors="white", linewidths=0.5)
    finish(ax, image, title, labels)
    ax.autoscale(False)  # points beyond it shall not widen the chart


def draw_hamiltonian(axes, model, i, data, seed):
    """Draw V with the data's contour, K, and V with paths. Returns pictures of points on V."""
    H = model.H[i]
    steps = model.config["steps"]
    name = f"H{i + 1}"

    def V(x):
        return H.V(model.standardise(x)[0])

    noise = model.noise(2, 2000, 2, generator=seeded(seed))
    q, p = model.flow(*noise)[:, :, i * steps :]
    path = model.unstandardise(q[:, : steps + 1]).permute(2, 1, 0)  # (2, steps + 1, n)
    draw_energy(axes[0], V, data, f"{name}: V(q), red: contour of the data")
    limits = robust_limits(data)
    density, _, _ = np.histogram2d(*data.T, 32, limits)
    where = {"origin": "lower", "extent": limits.flatten()}
    axes[0].contour(density.T, [0.1 * density.max()], colors="red", **where)
    draw_energy(axes[1], H.K, p[:, 0], f"{name}: K(p)", ("p1", "p2"))
    draw_energy(axes[2], V, data, f"{name}: paths on V, red: ends")
    axes[2].plot(*path[..., :24], ".-", color="white", linewidth=1, markersize=3)
    axes[2].plot(*path[:, -1, :24], ".", color="red")
    figure, ((ax,),) = charts(1, 1)
    draw_energy(ax, V, data)
    (dots,) = ax.plot([], [], ".", color="white", markersize=2)
    pictures = []
    for step in range(steps + 1):
        dots.set_data(*path[:, step])
        ax.set_title(f"{name}: points on V, step {step} of {steps}")
        pictures.append(pixels(figure))
    return pictures


CURVES = {"loss": "loss", "mse": "pixel error (MSE)", "kl": "KL (nats)"}


def save_curves(folder):
    """Write curves.png, the loss, error and KL of metrics.jsonl, if there is one."""
    log = folder / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.is_file() else []
    logged = [line for line in map(json.loads, lines) if "loss" in line]
    if not logged:
        return
    names = [name for name in CURVES if name in logged[0]]
    figure, axes = charts(1, len(names))
    for i, name in enumerate(names):
        ax = axes[0, i]
        values = [line[name] for line in logged]
        ax.plot([line["step"] for line in logged], values, ".-")
        ax.set(title=CURVES[name], xlabel="training step")
        if max(values) > 10 * min(values) > 0:
            ax.set_yscale("log")
    save_pictures(folder / "curves.png", pixels(figure))


# ------------------------------------------------------------------ the command
OPTIONS = {
    "one of these runs (default: the newest)": {
        "--checkpoint": {"metavar": "PATH", "help": "a checkpoint or the folder of a run"},
        "--system": {"choices": SYSTEMS, "metavar": "NAME", "help": ", ".join(SYSTEMS)},
        "--density": {"choices": DENSITIES, "metavar": "NAME", "help": ", ".join(DENSITIES)},
    },
    "of all models": {
        "--seed": {"type": number(0, 2**63 - 1), "help": "of samples (default: 0)"},
        "--device": {"help": "cpu, cuda, cuda:1 (default: a GPU if any; points: cpu)"},
    },
    "of pictures, not of points": {
        "--frames": {"type": number(2, 10_000), "help": "to roll out (default: 90)"},
        "--clips": {"type": number(2, 10_000), "help": "to measure on (default: 256)"},
        "--reverse": {"action": "store_true", "help": "reverse.gif: from the last state back"},
        "--speed": {"type": number(1e-3, 1e3, float), "action": "append",
                    "help": "speed_X.gif: X times as fast; may be repeated"},
        "--sample": {"type": number(0, 16), "help": "samples.gif: so many from the prior"},
        "--show": {"type": number(1, 16), "help": "clips in a movie (default: 4)"},
        "--scale": {"type": number(1, 16), "help": "screen pixels of a pixel (default: 8)"},
    },
    # All options of pictures but --clips are arguments of save_movies.
}  # fmt: skip


def look(given):
    """Show and measure the run that the options name; what is found goes into its folder."""
    device = pick_device(given.pop("device", None))
    seed = given.pop("seed", 0)
    which = [given.pop(name, None) for name in ("checkpoint", "system", "density")]
    path = find_run(*which)
    model, run = load(path)
    options = run["options"]
    folder = path.parent
    if folder.name == "checkpoints":  # the models that come with the code share it
        folder = Path("runs") / f"{path.stem}-shipped"
    print(f"{path}: looking ...")
    if options["model"] in FLOWS:
        result = look_at_flow(model, options, folder, seed, given)
    else:
        result = look_at_pictures(model, device, options, folder, seed, given)
    save_curves(folder)
    report = {
        **provenance(),
        "seed": seed,
        "test_seed": TEST_SEED,
        "checkpoint": str(path),
        "config": options,
        "training": {key: run[key] for key in ("command", "versions", "step", "seconds")},
        "metrics": result,
    }
    write(folder / "metrics.json", json.dumps(report, indent=1).encode())
    print_table(options, result)


def look_at_pictures(model, device, options, folder, seed, given):
    """Write movies and charts of a model of pictures. Returns: the figures."""
    model.to(device)
    count = given.pop("clips", 256)
    frames = given.get("frames", 90)
    test = test_set(options, count, device)
    print(test.summary)
    save_movies(model, test, folder, seed=seed, **given)
    save_phase(model, test, folder, frames)
    result = measure(model, test, frames, steps=1000)
    if test.system:
        few = test_set(options, min(count, 128), device)  # reading the states of samples takes long
        result |= measure_physics(model, few)
    return result


def look_at_flow(model, options, folder, seed, given):
    """Write charts of a flow. Returns: the figures. Raises: ValueError for options of pictures."""
    if given:
        raise ValueError(f"--{min(given)} is of no use with points: leave it out")
    points = test_set(options, 0)
    print(points.summary)
    save_density(model, points, folder, seed)
    return measure_flow(model, points)


def main():
    run_main(look, parse_options("Look at a trained model and measure it.", OPTIONS))


if __name__ == "__main__":
    main()
