"""Look at a trained model and measure it: movies, charts and figures, written into its folder.

python eval.py --reverse --speed 2                         # the newest run
python eval.py --system three_body                         # the newest run of this system
python eval.py --checkpoint mine.pt --system two_body      # a model of your own, on this test data

The parts, from top to bottom: what train.py shares with this file; checkpoints (`find_run`,
`load`); test data (`test_set`); measures (`measure`, where a new figure is a function of its own in
QUICK, SLOW or OF_SYSTEMS; `measure_flow`); movies; charts; command.
"""

import argparse
import ctypes
import json
import math
import os
import shlex
import sys
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.animation import FuncAnimation
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from hgn import FRAME_TIME, HGN, __version__, read_checkpoint
from nhf import DENSITIES, NHF, TEST_SEED, Points, RealNVPFlow, seeded
from physics import (
    SYSTEMS,
    Recordings,
    clips,
    initial_states,
    jitter,
    read_points,
    render,
    simulate,
)

MODELS = {"hgn": HGN, "nhf": NHF, "realnvp": RealNVPFlow}
FLOWS = ("nhf", "realnvp")  # the models that learn from points
WINDOW = 30  # frames of the paper's test clips
FRAMES = 90  # of a rollout
CLIPS = 64  # to measure on
FEW = 32  # clips that `valid_frames` follows
BLOCK = 16  # clips that `errors` paints at a time, for memory
DRAWS = 16  # of z for a mean picture


# ------------------------------------------------------------------ shared with train.py
def run_main(function, given):
    """Call function(given); a user's mistake ends the program with one line, and exit status 2."""
    keep_freed_memory()
    try:
        function(given)
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "to allocate" not in str(error):
            raise  # it is a fault of the code, not a lack of memory
        message = str(error) or "there is not enough memory"
        print(f"error: {message.splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)  # as shells have it


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
            raise argparse.ArgumentTypeError(
                f"must be {kind.__name__} from {low} to {high}, not {text}"
            )
        return value

    return convert


def device_of(model, name=None):
    """Return the device called `name`, by default the GPU if there is one. Raises: ValueError.

    model: its name in MODELS; flows, which are small, run on the CPU. Of several processes each
    has a GPU of its own.
    """
    if model in FLOWS:
        if name not in (None, "cpu"):
            raise ValueError("flows are small and run on the CPU: leave --device out")
        name = "cpu"
    elif name in (None, "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.zeros(1, dtype=torch.float64, device=name).device
    except (RuntimeError, TypeError, AssertionError):
        raise ValueError(f"--device {name} does not work here: try --device cpu") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of new streams and graphs
    return device


def provenance():
    """Return what is needed to make a written result again: the command and the versions."""
    versions = {
        "hgn": __version__,
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }
    return {"command": shlex.join(["python", *sys.argv]), "versions": versions}


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
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: return nothing at the top of the heap
    libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: map only what is larger, block by block


# ------------------------------------------------------------------ checkpoints
def find_run(where=None, name=None):
    """Return the path of a checkpoint.

    where: a checkpoint or the folder of a run. By default it is the newest run below runs/, or the
    newest of the system, density or data called `name` if that is given; without one, the model
    that comes with the code.
    Raises: ValueError.
    """
    if where is not None:
        path = Path(where)
        return path / "checkpoint.pt" if path.is_dir() else path
    runs = Path("runs").glob("*/checkpoint.pt")
    for path in sorted(runs, key=os.path.getmtime, reverse=True):
        options = read_run(path)["options"]
        if name in (None, options["system"], options["density"], options["data"]):
            return path
    path = Path(__file__).parent / "checkpoints" / f"{name or 'mass_spring'}.pt"
    if not path.is_file():
        raise ValueError(f"there is no run of {name}: train one by train.py first")
    return path


OWN_ARGUMENT = {"hgn": "arch", "nhf": "hamiltonians", "realnvp": "layers"}  # tells models apart
REQUIRED = {"model", "system", "density", "data", "digest"}  # options that a run must have
# Options of a run that are taken for a model without one, such as that of `HGN.save`.
OF_NO_RUN = {"clip": 60, "stride": 1, "seed": 0}
OF_NO_DATA = {"system": None, "density": None, "data": None, "digest": None, "noise": 0.0,
              "steps": None}  # fmt: skip


def options_of(config, run, **data):
    """Return the options by which a model of this config is measured on other data than a run's.

    run: the options that it had, which say how recordings are cut into clips and held out.
    """
    (model,) = [name for name, argument in OWN_ARGUMENT.items() if argument in config]
    return {**OF_NO_RUN, **run, **config, **OF_NO_DATA, "model": model, **data}


def read_run(path):
    """Return what train.py saved beside a model, a dict of its run.

    It has "options", "command", "versions", "step" and "seconds"; of a model that was saved by its
    method `save` alone it has "options" only. Raises: ValueError.
    """
    checkpoint = read_checkpoint(path)
    try:
        if "run" in checkpoint:
            run = checkpoint["run"]
        else:
            run = {"options": options_of(checkpoint["config"], {})}
        if run["options"].keys() >= REQUIRED:
            return run
    except (AttributeError, KeyError, TypeError, ValueError):
        pass
    raise ValueError(f"{path} is no model of this version: train anew, or delete it")


def load(path, device="cpu"):
    """Return a model, in evaluation mode, and its run (see `read_run`).

    path: a file that train.py or the model's method `save` wrote, or the folder of a run.
    Raises: ValueError.
    """
    path = find_run(path)
    run = read_run(path)
    return MODELS[run["options"]["model"]].load(path, device), run


# ------------------------------------------------------------------ test data
class TestClips:
    """Test clips of a simulated system: the same for every model of equal options, and of equal n.

    Attributes: `observed`, what a model sees, noisy, (n, T, 3, size, size); q and p, the true
    states at frame 0, (n, bodies, dims); `angles`, how many of q are angles, all or none; `length`,
    how many frames have a known truth.
    """

    channels = 3
    length = math.inf
    digest = None  # what the clips are follows from the options

    def __init__(self, options, n, device="cpu"):
        self.summary = options["system"]
        self.system = SYSTEMS[self.summary]
        self.size = options["size"]
        self.noise = options["noise"]
        self.dt = options["dt"]
        frames = max(WINDOW, options["context"])
        self.observed, q, p = clips(
            self.system, n, frames, self.dt, self.noise, self.size, seeded(TEST_SEED), device
        )
        self.q = q[:, 0]
        self.p = p[:, 0]
        self.angles = self.q[0].numel() if self.system.periodic else 0

    def path(self, frames, speed=1.0, n=None):
        """Return the true q and p of the first n clips, (n, frames, bodies, dims) each."""
        return simulate(self.system, self.q[:n], self.p[:n], frames, speed * self.dt)

    def truth(self, frames, speed=1.0, n=None):
        """Return clean frames (n, frames, 3, size, size) of the first n clips, from frame 0 on.

        A negative speed runs backward.
        """
        q, _ = self.path(frames, speed, n)
        return render(self.system, q, self.size)


class HeldOut(Recordings):
    """Held-out clips of recordings, with the attributes of `TestClips` except q, p and angles.

    Their truth ends: the clips to test on are those that are at least as long as the median of all
    that are held out, which is `length`.
    """

    system = None
    noise = 0.0

    def __init__(self, options, n, device="cpu"):
        how = [options[name] for name in ("data", "size", "clip", "stride", "dt", "seed")]
        super().__init__(*how, least=options["context"] + 1)
        self.device = device
        lengths = self.lengths[self.held_out]
        self.length = lengths.median().item()
        self.tested = self.held_out[lengths >= self.length][:n]
        self.observed = self.truth(options["context"])

    def truth(self, frames, speed=1.0, n=None):
        """Return frames (n, T, C, size, size) at `speed`; T < frames where clips have ended."""
        times = (speed * torch.arange(frames) + 1e-3).long()  # a frame is shown until the next
        times = times[times < self.length]
        tested = self.tested[:n]
        return self.frames(tested, times.expand(len(tested), -1)).to(self.device)


def test_set(options, n, device="cpu"):
    """Return what a run is tested on: Points, or n TestClips or HeldOut clips.

    Raises: ValueError where the files are not those that the run learnt from.
    """
    path = options["data"]
    if options["model"] in FLOWS:
        source = read_points(path) if path else options["density"]
        if source is None:
            raise ValueError("a flow needs --density or a file of points")
        test = Points(source, options["seed"], path)
    elif path:
        test = HeldOut(options, n, device)
    elif options["system"]:
        test = TestClips(options, n, device)
    else:
        raise ValueError("a model of pictures needs --system or recordings")
    if options["digest"] not in (None, test.digest):
        raise ValueError(f"{path} is not what the run learnt from: put that back")
    return test


# ------------------------------------------------------------------ measures of models of pictures
# A measure is a function of the model, the test clips, the states (q, p) that were inferred at
# frame 0, and how many frames to follow, which `picture_errors` and `averaged_errors` heed. It
# returns figures by name. Pixels are in [0, 1], and errors but mse_noisy are against the clean
# truth of simulated clips.


def picture_errors(model, test, start, frames):
    """Return the mean squared errors of all frames, of windows of 30, and of a blank prediction."""
    per_frame = errors(model, test, start, frames).mean(0)
    figures = {
        "frames": frames,
        "clips": len(test.observed),
        "mse_per_frame": per_frame.tolist(),
        "blank_mse": blank_error(test, frames).item(),
    }
    return figures | by_window("mse", per_frame)


def by_window(name, per_frame):
    """Return the means of errors (frames,) over windows of 30 frames."""
    figures = {}
    for first in range(0, len(per_frame), WINDOW):
        part = per_frame[first : first + WINDOW]
        figures[f"{name}_{first}_{first + len(part) - 1}"] = part.mean().item()
    return figures


def averaged_errors(model, test, start, frames):
    """Return the errors of the mean picture over DRAWS draws of z, each rolled out.

    It is blurred where the state is uncertain. Its error is at most the mean error of the draws.
    """
    mean, logvar = model.encode(test.observed)
    truth = test.truth(frames)
    total = torch.zeros_like(truth)
    generator = seeded(TEST_SEED + 6)
    for _ in range(DRAWS):
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        z = model.prior.draw(mean, logvar, noise)
        path, _ = model.rollout(*model.state(z), frames - 1)
        total += paint(model, path)
    return by_window("averaged_mse", pixel_mse(total / DRAWS, truth).mean(0))


def errors(model, test, start, frames, speed=1.0):
    """Return the pixel MSE of rollouts of the first clips against the truth, (clips, frames).

    start: q and p of these clips at frame 0.
    """
    path, _ = model.rollout(*start, frames - 1, speed * model.dt)
    truth = test.truth(frames, speed, len(path))
    blocks = zip(path.split(BLOCK), truth.split(BLOCK), strict=True)
    return torch.cat([pixel_mse(paint(model, q), true) for q, true in blocks])


def paint(model, q):
    """Return the model's frames as a screen shows them, in [0, 1]."""
    return model.decode(q).clamp(0, 1)


def pixel_mse(a, b):
    """Return the mean squared error of every frame of a and b (B, T, C, H, W): (B, T)."""
    return (a - b).square().mean((2, 3, 4))


def blank_error(test, frames):
    """Return the pixel MSE of a blank prediction, the mean picture of all clips."""
    return test.truth(frames).var((0, 1), correction=0).mean()


def errors_at_other_speeds(model, test, start, frames):
    """Return the errors of 30 frames backward in time and at other speeds."""
    figures = {}
    speeds = {"backward": -1.0, "double_speed": 2.0, "half_speed": 0.5}
    for name, speed in speeds.items():
        figures[f"mse_{name}"] = errors(model, test, start, WINDOW, speed).mean().item()
    return figures


def errors_under_noise(model, test, start, frames):
    """Return the error of 30 frames against noisy pictures, and its floor."""
    if not test.noise:
        return {}
    path, _ = model.rollout(*start, WINDOW - 1)
    noisy = pixel_mse(paint(model, path), test.observed[:, :WINDOW]).mean()
    floor = noise_floor(test.system, test.noise, test.size, generator=seeded(TEST_SEED + 1))
    return {"mse_noisy": noisy.item(), "noise_floor": floor}


def noise_floor(system, noise="paper", size=32, n=2000, generator=None):
    """Return the pixel MSE of the best prediction under observation noise that it has not seen.

    It is the mean variance of a pixel given the true state, by Monte Carlo over n random states
    with 32 noisy pictures each. A model may go below it on frames that its encoder sees.
    """
    q, p = initial_states(system, n, generator)
    path, _ = simulate(system, q, p, 8, dt=0.5)
    q = path[:, -1:].expand(-1, 32, -1, -1)  # away from the start: (n, 32, bodies, dims)
    q = jitter(system, q, noise, generator)
    # All pictures at once would take 13 GB at 128 pixels.
    return fmean(render(system, part, size).var(1).mean().item() for part in q.split(50))


def learnt_friction(model, test, start, frames):
    """Return the friction gamma of p -> exp(-gamma t) p, if the model learns one."""
    if model.gamma is None:
        return {}
    return {"friction": model.gamma.item() * FRAME_TIME / model.dt}


def kept_energy(model, test, start, frames):
    """Return how much H varies along 1,000 frames, in units of its spread and as a variance."""
    H = model.energy(*model.rollout(*start, 999))  # (clips, 1000)
    figures = {"energy_variance": H.var(1).mean().item()}
    if len(H) > 1:  # one clip has no spread
        figures["energy_std_ratio"] = (H.std(1).median() / H[:, 0].std()).item()
    return figures


def valid_frames(model, test, start, frames):
    """Return how many of 300 frames are valid, the median over clips.

    The frames of a clip are valid until the first whose error exceeds a tenth of a blank
    prediction's. This is stricter than the VPT of Higgins et al. (2021).
    """
    limit = 0.1 * blank_error(test, WINDOW)
    few = [x[:FEW] for x in start]
    error = errors(model, test, few, 300)
    valid = (error <= limit).cumprod(1)  # (clips, 300); NaN is not valid
    return {"strict_vpt": valid.sum(1).double().median().item()}


QUICK = (picture_errors, errors_under_noise, learnt_friction)
SLOW = (averaged_errors, kept_energy)
OF_SYSTEMS = (errors_at_other_speeds, valid_frames)


@torch.no_grad()
def measure(model, test, frames=FRAMES, measures=QUICK):
    """Return the figures of all the measures, a dict, under a bar of progress.

    The encoder sees only the first `context` frames of each clip.
    """
    frames = min(frames, test.length)
    start = model.infer(test.observed)
    figures = {}
    for function in tqdm(measures, "measuring"):
        figures |= function(model, test, start, frames)
    return figures


def wrap(angle):
    """Return angles in (-pi, pi]."""
    return torch.atan2(angle.sin(), angle.cos())


# ------------------------------------------------------------------ measures of flows
@torch.no_grad()
def measure_flow(model, points, n=10_000, samples=(16, 256)):
    """Return the figures of a flow on n held-out points, a dict.

    Means of the ELBO and of log p by importance weighting with each number of `samples`, in nats,
    and the gap of the last to the entropy where that is known.
    """
    x = points.held_out[:n]
    generator = seeded(TEST_SEED + 5)
    elbo = model.elbo(x, generator).mean().item()
    by_samples = {}
    for k in samples:
        log_p = model.log_prob(x, k, generator)
        by_samples[f"log_prob_{k}"] = log_p.mean().item()
    result = {
        "points": len(x),
        "elbo": elbo,
        **by_samples,
        "parameters": sum(w.numel() for w in model.parameters()),
        "standard_error": log_p.std().item() / len(x) ** 0.5,
    }
    if points.density:
        result["entropy"] = points.density.entropy
        result["gap"] = -log_p.mean().item() - points.density.entropy
    return result


# ------------------------------------------------------------------ the printed table
NOTES = {
    "mse": "mean squared error of pixels in these frames",
    "blank_mse": "of a blank prediction, the mean picture of these clips",
    "averaged_mse": "the same of the mean picture over draws of z",
    "mse_noisy": "against noisy pictures, frames 0 to 29",
    "noise_floor": "mse_noisy of the best prediction that has not seen the noise",
    "friction": "gamma of p -> exp(-gamma t) p, one over the unit of --dt",
    "energy_std_ratio": "std of H along 1,000 frames, over that across clips; friction counts",
    "strict_vpt": "frames until a tenth of blank_mse of 30 frames, median of (at most 32) clips",
    "energy_variance": "of H along 1,000 frames, in the model's own units",
    "mse_backward": "of 30 frames back in time",
    "mse_double_speed": "of 30 frames, twice as fast",
    "mse_half_speed": "of 30 frames, half as fast",
    "log_prob": "of log p(x), nats; of NHF a lower bound by so many draws of p",
    "standard_error": "of log_prob, as the points are a sample",
    "entropy": "of the true density: the least -log_prob of any model",
    "elbo": "of log p(x), nats; of NHF a lower bound by one draw of p",
    "gap": "of -log p to the entropy, nats: 0 is the best, but for standard_error",
}  # on figures of metrics.json, whose names may go on with numbers


def print_table(result):
    """Print the figures that `measure` or `measure_flow` returned."""
    print("\nOn test data:")
    for name, value in result.items():
        if isinstance(value, float):
            print(f"  {name:<22}{value:<11.4g}", NOTES.get(name.rstrip("_0123456789"), ""))


# ------------------------------------------------------------------ movies
GREY = 0.6  # of the lines between clips
CAPTION_SIZE = 15  # of letters, in screen pixels
CAPTION_WIDTH = 370  # screen pixels that the longest caption needs
STILLS = (0, 0.07, 0.2, 0.5, 1)  # shares of a movie; unequal, so that no period hides motion


@torch.no_grad()
def save_movies(
    model, test, folder, frames=FRAMES, show=4, reverse=False, speed=(), sample=0, seed=0, scale=8
):
    """Write rollout.png, rollout.gif and the movies asked for.

    frames: to roll out, or as many as the truth has. show: clips beside each other. reverse:
    reverse.gif, from the last state back. speed: speed_X.gif of each of these. sample: samples.gif
    of so many rollouts from the prior, by the seed. scale: screen pixels of a pixel.
    Raises: ValueError for samples of a model that has no prior.
    """
    start = model.infer(test.observed[:show])
    truth = test.truth(frames, n=show)
    steps = truth.shape[1] - 1  # from the first frame to the last
    movies = {"rollout": two_rows(truth, model, start)}
    for factor in speed:
        faster = test.truth(frames, factor, show)
        movies[f"speed_{factor:g}"] = two_rows(faster, model, start, factor)
    if reverse:
        q, p = model.rollout(*start, steps)
        last = (q[:, -1], p[:, -1])
        movies["reverse"] = two_rows(truth.flip(1), model, last, -1.0)
    if sample:
        drawn = model.sample(sample, steps, generator=seeded(seed))
        movies["samples"] = drawn.cpu().unsqueeze(0)
    times = [round(share * steps) for share in STILLS]
    stills = movies["rollout"][:, 0, times]  # of the first clip: (2, 5, C, size, size)
    draw_frames(stills, f"truth above model, frames {times}", scale).save(folder / "rollout.png")
    for name, movie in movies.items():
        save_movie(folder / f"{name}.gif", movie, model.dt, scale)


def two_rows(truth, model, start, speed=1.0):
    """Return true frames (n, T, C, size, size) above those of a rollout from start = (q, p)."""
    path, _ = model.rollout(*start, truth.shape[1] - 1, speed * model.dt)
    return torch.stack((truth, paint(model, path))).cpu()  # (2, n, T, C, size, size)


def save_movie(path, movie, dt, scale):
    """Write a movie (rows, clips, T, C, size, size) as a GIF that runs as fast as the physics.

    GIF counts in hundredths of a second, and browsers slow down what is shown for less than two of
    them: such fast frames are shown for 0.02 s each. Rounding the times at which frames end, not
    the delays, keeps the whole movie at its true speed.
    """
    title = "truth above model" if len(movie) == 2 else "drawn from the prior"
    if path.stem not in ("rollout", "samples"):
        title = f"{path.stem}: {title}"  # which way and how fast time runs
    frames = range(movie.shape[2])
    ends = dt * np.arange(len(frames) + 1)
    delays = np.diff(np.rint(100 * ends)).clip(2, 65535)  # 65535: what GIF can store
    first, *others = [draw_frames(movie[:, :, t], f"{title}, frame {t}", scale) for t in frames]
    milliseconds = (10 * delays).tolist()
    first.save(path, save_all=True, append_images=others, duration=milliseconds, loop=0)


def draw_frames(frames, caption, scale):
    """Return frames (rows, columns, C, size, size) in [0, 1] below a caption, as one picture."""
    frames = frames.expand(-1, -1, 3, -1, -1)  # grey ones become RGB
    frames = F.pad(frames, (0, 1, 0, 1), value=GREY)
    sheet = frames.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (height, width, 3)
    sheet = Image.fromarray((255 * sheet).round().byte().numpy())
    sheet = ImageOps.scale(sheet, scale, Image.Resampling.NEAREST)
    right = max(0, CAPTION_WIDTH - sheet.width)
    page = ImageOps.expand(sheet, (0, 2 * CAPTION_SIZE, right, 0), "white")
    ImageDraw.Draw(page).text((6, 6), caption, "black", font_size=CAPTION_SIZE)
    return page


# ------------------------------------------------------------------ charts
MOST_POINTS = 20_000  # of data, and of samples, in a histogram
GRID = 128  # points at which a density and an energy are drawn, along each axis
LEVELS = 12  # of an energy, about
STEPS_PER_SECOND = 2.5  # of flow.gif
MOST_PLANES = 4  # of q and p that phase.png shows


def charts(n):
    """Return a figure without a window, and its n charts beside each other."""
    figure = Figure((3.9 * n, 3.3), dpi=150, layout="constrained")
    return figure, figure.subplots(1, n, squeeze=False)[0]


@torch.no_grad()
def save_phase(model, test, path, frames, n=10):
    """Write a chart of n rollouts and, where the system is known, below it one of the truth.

    Ten is the number of colours that matplotlib has.
    """
    rows = 2 if test.system else 1
    figure = Figure((14, 3 * rows), dpi=100, layout="constrained")
    parts = figure.subfigures(rows, squeeze=False).flat
    title = "model: a colour for each test clip, a dot for each frame"
    q, p = model.rollout(*model.infer(test.observed[:n]), frames - 1)
    draw_states(parts[0], title, model, q, p, model.encoder.angles)
    if test.system:
        q, p = test.path(frames, n=n)
        draw_states(parts[1], "truth", test.system, q, p, test.angles)
    figure.savefig(path)


def draw_states(figure, title, source, q, p, angles):
    """Draw paths q and p (B, T, ...): H over time, and p over q for the coordinates that move.

    Where one or two coordinates move there is the potential V(q) = H(q, 0), too. source: has the
    method `energy`. angles: how many of the coordinates are angles, which come first.
    """
    H = source.energy(q, p).cpu()
    V = source.energy(q, torch.zeros_like(p)).cpu()
    q = q.flatten(2).cpu()
    p = p.flatten(2).cpu()
    q = torch.cat((wrap(q[..., :angles]), q[..., angles:]), 2)
    spread = q.std((0, 1))
    moving = (spread > 0.1 * spread.max()).nonzero()[:MOST_PLANES, 0].tolist()
    panels = [("H over frames", torch.arange(H.shape[1]).expand_as(H), H)]
    for i in moving:
        panels.append((f"p{i} over q{i}", q[..., i], p[..., i]))
    if len(moving) <= 2:
        panels += [(f"V over q{i}", q[..., i], V) for i in moving]
    figure.suptitle(title)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (name, x, y) in zip(axes, panels, strict=True):
        ax.plot(x.T, y.T, ".", markersize=1.5)
        ax.set_title(name)


@torch.no_grad()
def save_density(model, points, folder, seed):
    """Write density.png: histograms of data and samples, of their first two columns.

    In the plane there are the learnt density and, of NHF, each V, too, and flow.gif. Of points on
    a line there is no picture.
    """
    if model.dim == 1:
        return
    potentials = len(getattr(model, "H", []))  # RealNVP has none
    figure, axes = charts(3 + potentials if model.dim == 2 else 2)
    data = points.rows[:MOST_POINTS]
    samples = model.sample(len(data), seeded(seed))
    x, y, grid = grid_of(points)
    for ax, title, rows in ((axes[0], "data", data), (axes[1], "samples", samples)):
        ax.hist2d(*rows.T[:2], (x[::2], y[::2]))  # cells of two steps of the grid
        ax.set_title(title)
    if model.dim == 2:
        density = model.log_prob(grid, 32, seeded(seed)).exp()
        highest = density.quantile(0.999)  # of few samples some points are much too high
        image = axes[2].pcolormesh(x, y, density, vmax=highest)
        figure.colorbar(image, ax=axes[2])
        axes[2].set_title("learnt density")
    for i, ax in enumerate(axes[3:]):
        image = draw_potential(ax, model, i, points)
        figure.colorbar(image, ax=ax, label="in units of K(p)")
        ax.plot(*data[:500].T, ".", color="red", markersize=1)
        ax.set_title(f"V of H[{i}], cut off above the data (red)")
    figure.savefig(folder / "density.png")
    if len(axes) > 3:
        save_flow(model, points, folder / "flow.gif", seed)


def grid_of(points):
    """Return x and y (GRID,) that cover the first two columns, and the points they span.

    They reach 2.5 standard deviations to each side of the mean. Points: (GRID, GRID, 2).
    """
    line = torch.linspace(-2.5, 2.5, GRID).unsqueeze(1)
    x, y, *_ = (points.shift + line * points.scale.norm(dim=1)).T
    return x, y, torch.stack(torch.meshgrid(x, y, indexing="xy"), 2)


def draw_potential(ax, model, i, points):
    """Draw V of the flow's Hamiltonian i where the points lie, as colours and contour lines.

    It is cut off where it is higher than at 99 of 100 points. Returns: the colours.
    """

    def V(x):
        return model.H[i].potential(model.standardise(x)[0])

    x, y, grid = grid_of(points)
    values = V(grid).clamp(max=V(points.held_out).quantile(0.99))
    image = ax.contourf(x, y, values, LEVELS)
    ax.contour(x, y, values, LEVELS, colors="white", linewidths=0.5)
    ax.autoscale(False)  # points beyond it shall not widen the chart
    return image


def save_flow(model, points, path, seed):
    """Write a movie of 2,000 points that a flow moves from its base density to the data.

    Every picture shows them before a leapfrog step, on the V that takes it; the last after all.
    """
    q, _ = model.flow(*model.base_states(2000, seeded(seed)))
    path_of_points = model.unstandardise(q).permute(1, 2, 0)  # (steps + 1, 2, n)
    figure, (ax,) = charts(1)

    def draw(step):
        i = min(step // model.config["steps"], len(model.H) - 1)
        ax.clear()
        draw_potential(ax, model, i, points)
        ax.plot(*path_of_points[step], ".", color="red", markersize=2)
        ax.set_title(f"points on V of H[{i}], step {step}")

    movie = FuncAnimation(figure, draw, len(path_of_points))
    movie.save(path, writer="pillow", fps=STEPS_PER_SECOND)


def save_curves(folder):
    """Write curves.png, where there is a metrics.jsonl: loss, pixel error and KL over the steps."""
    log = folder / "metrics.jsonl"
    if not log.is_file():
        return
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    if not lines:
        return
    names = [name for name in ("loss", "mse", "kl") if name in lines[0]]
    steps = [line["step"] for line in lines]
    figure, axes = charts(len(names))
    for ax, name in zip(axes, names, strict=True):
        ax.plot(steps, [line[name] for line in lines], ".-")
        ax.set(title=name, xlabel="training step")
        if name == "mse":
            ax.set_yscale("log")
    figure.savefig(folder / "curves.png")


# ------------------------------------------------------------------ the command
OF_DATA = {
    "--system": {"choices": SYSTEMS, "metavar": "NAME",
                 "help": f"A system: {', '.join(SYSTEMS)}. Without a run: checkpoints/NAME.pt."},
    "--density": {"choices": DENSITIES, "metavar": "NAME",
                  "help": f"A density of points: {', '.join(DENSITIES)}."},
    "--data": {"type": os.path.abspath, "metavar": "PATH",
               "help": "Recordings or points of your own."},
}  # fmt: skip
OPTIONS = {
    "one of these: whose newest run to look at or, with --checkpoint, what to measure that on":
        OF_DATA,
    "of all models": {
        "--checkpoint": {"metavar": "PATH", "help": "A checkpoint or the folder of a run "
                                                    "(default: the newest run)."},
        "--seed": {"type": number(0, 2**32 - 1), "help": "Of samples (default: 0)."},
        "--device": {"help": "cpu, cuda, cuda:1 (default: a GPU if there is one; points: cpu)."},
    },
    "of pictures, not of points": {
        "--quick": {"action": "store_true", "help": "Movies, charts and errors alone."},
        "--frames": {"type": number(2, 10_000),
                     "help": "Frames to roll out (default: 90; of recordings at most their own)."},
        "--clips": {"type": number(2, 10_000), "help": f"To measure on (default: {CLIPS})."},
        "--reverse": {"action": "store_true", "help": "reverse.gif: from the last state back."},
        "--speed": {"type": number(1e-3, 1e3, float), "action": "append",
                    "help": "speed_X.gif: X times as fast; may be repeated."},
        "--sample": {"type": number(0, 16), "help": "samples.gif: so many motions from the prior."},
        "--show": {"type": number(1, 16), "help": "Clips beside each other (default: 4)."},
        "--scale": {"type": number(1, 16), "help": "Screen pixels of a pixel (default: 8)."},
    },
}  # fmt: skip


def look(given):
    """Show and measure the model that the options name; what is found goes into its folder."""
    where = given.pop("checkpoint", None)
    data = {name: given.pop(name) for name in ("system", "density", "data") if name in given}
    path = find_run(where, *data.values())
    model, run = load(path)
    options = run["options"]
    if run.get("step") != options.get("steps"):
        print("This run has not ended: of a compact HGN the end fits prior and variance of z.")
    in_run = path.name == "checkpoint.pt"
    name = path.parent.name if in_run else path.stem
    if where and any(options[key] != value for key, value in data.items()):
        options = options_of(model.config, options, **data)
        in_run = False
        (source,) = data.values()
        name = f"{name}-on-{Path(source).stem}"
    folder = path.parent if in_run else Path("runs", f"{name}-look")
    print(f"{path}: pictures and figures go to {folder}")
    model.to(device_of(options["model"], given.pop("device", None)))
    look_at = look_at_flow if options["model"] in FLOWS else look_at_pictures
    result = look_at(model, options, folder, given)
    report = {
        **provenance(),
        "seed": given.get("seed", 0),
        "test_seed": TEST_SEED,
        "checkpoint": str(path),
        "config": options,
        "training": {key: run.get(key) for key in ("command", "versions", "step", "seconds")},
        "metrics": result,
    }
    (folder / "metrics.json").write_text(json.dumps(report, indent=1))
    print_table(result)
    save_curves(folder)


def look_at_pictures(model, options, folder, given):
    """Write movies and charts of a model of pictures, then measure it. Returns: the figures."""
    test = test_set(options, given.pop("clips", CLIPS), next(model.parameters()).device)
    print(test.summary)
    folder.mkdir(parents=True, exist_ok=True)
    quick = given.pop("quick", False)
    frames = min(given.pop("frames", FRAMES), test.length)
    save_movies(model, test, folder, frames, **given)
    save_phase(model, test, folder / "phase.png", frames)
    measures = QUICK
    if not quick:
        measures += SLOW
        if test.system:
            measures += OF_SYSTEMS
    return measure(model, test, frames, measures)


def look_at_flow(model, options, folder, given):
    """Write charts of a flow. Returns: the figures. Raises: ValueError for options of pictures."""
    unused = given.keys() - {"seed"}
    if unused:
        raise ValueError(
            f"--{unused.pop()} is of no use with points: leave it out, or name a run of pictures "
            "by --checkpoint"
        )
    points = test_set(options, 0)
    print(points.summary)
    if points.dim != model.dim:
        raise ValueError(f"the flow is of {model.dim} columns, and these points of {points.dim}")
    folder.mkdir(parents=True, exist_ok=True)
    save_density(model, points, folder, given.get("seed", 0))
    return measure_flow(model, points)


def main():
    run_main(look, parse_options("Look at a trained model and measure it.", OPTIONS))


if __name__ == "__main__":
    main()
