"""Look at a trained model and measure it.

    python eval.py --reverse --speed 2      # the newest run; --system NAME, --checkpoint PATH

Writes GIFs (truth above, model below; of a flow density.png and flow.gif) and metrics.json into the
run's folder and prints the same as a table.
"""

import argparse
import ctypes
import functools
import itertools
import json
import math
import os
import platform
import shlex
import sys
import time
import zipfile
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from hgn import HGN, HNN
from nhf import DENSITIES, NHF, RealNVP
from physics import BACKGROUND, SYSTEMS, initial_states, jitter, noise_floor, render, simulate

TEST_SEED = 2**40  # training draws from seeds below 2 ** 40 only (train.py), so never these clips
MODELS = {"hgn": HGN, "hnn": HNN, "hnn_conv": HNN, "nhf": NHF, "realnvp": RealNVP}
PARTS = {*"model model_config config step seconds command versions".split()}  # of a checkpoint
WINDOW = 30  # frames of the paper's test clips
STILLS = 0, 15, 30, 45, 59  # frames of rollout.png


def fail(message):
    """A user's mistake: one line, exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


class Help(argparse.HelpFormatter):
    """Shows the defaults that are worth showing."""

    def _get_help_string(self, action):
        shown = action.choices or type(action.default) in (int, float)
        return action.help + " (default: %(default)s)" * bool(shown and action.default is not None)


def keep_memory():
    """glibc hands large freed blocks back to the system, and every tensor then pays for page
    faults: a tenth of a step on a CPU, half of the drawing of clips. Tell it to keep them."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):  # another C library
        pass


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (--help lists the options)")


def at_least(low, kind=int, above=False):
    """An argparse type: a finite number not below (or, with `above`, larger than) `low`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            kinds = {int: "a whole number"}
            raise argparse.ArgumentTypeError(f"{text!r} is not {kinds.get(kind, 'a number')}")
        if not math.isfinite(value) or value < low or (above and value == low):
            least = "above" if above else "at least"
            raise argparse.ArgumentTypeError(f"must be {least} {low}, not {text}")
        return value

    return parse


def pick_device(name):
    """The device called `name`, or the best there is."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, dtype=torch.float64, device=device)
        return device
    except (RuntimeError, TypeError, AssertionError, ValueError):
        fail(f"--device {name} does not work here: try --device cpu")


def provenance():
    """What a written result needs to be made again."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    command = shlex.join(["python", *sys.argv])
    return {"command": command, "versions": versions | {"numpy": np.__version__}}


def newest_run(**wanted):
    """Path of the most recently written checkpoint under runs/ whose config has these values, where
    they are not None; where there is none, of the system's checkpoint that comes with this code."""
    wanted = {k: v for k, v in wanted.items() if v is not None}
    for path in sorted(Path("runs").glob("*/checkpoint.pt"), key=os.path.getmtime, reverse=True):
        if not wanted or wanted.items() <= read_checkpoint(path)["config"].items():
            return path
    name = f"{wanted.get('system', 'mass_spring')}.pt"
    shipped = Path(os.path.relpath(Path(__file__).parent / "checkpoints" / name))
    if shipped.is_file() and wanted.keys() <= {"system"}:
        return shipped
    options = " ".join(f"--{k} {v}" for k, v in (wanted or {"system": "mass_spring"}).items())
    fail(f"no run with {options} in ./runs: train one with python train.py {options}, "
         "or name a file with --checkpoint")  # fmt: skip


def read_checkpoint(path):
    path = Path(path)
    if not path.is_file():
        fail(f"no checkpoint at {path}: train one with python train.py --system mass_spring")
    try:
        with zipfile.ZipFile(
            path
        ) as file:  # torch does not compress: what would grow is not torch's
            if sum(part.file_size for part in file.infolist()) > path.stat().st_size:
                fail(f"{path} is not a checkpoint written by train.py: parts larger than itself")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        fail(f"{path} cannot be read as a checkpoint, perhaps it is truncated "
             f"({type(error).__name__}): train again")  # fmt: skip
    if (
        not isinstance(checkpoint, dict)
        or checkpoint.get("kind") not in [*MODELS]
        or not PARTS <= checkpoint.keys()
        or not usable(checkpoint["config"])
        or not all(isinstance(checkpoint.get(k, 0), (int, float)) for k in ("step", "seconds"))
    ):
        fail(f"{path} is not a checkpoint written by train.py")
    return checkpoint


def usable(config):
    """Whether a checkpoint's config, which may come from a stranger, names what there is and has
    numbers in their ranges."""

    def number(key, low, high, kind=(int, float)):
        return isinstance(config.get(key), kind) and low <= config[key] <= high

    whole = {"size": (16, 128), "context": (1, 1000), "window": (1, 1e6), "batch_size": (1, 1e9),
             "steps": (1, 1e12), "seed": (0, 2**20)}  # fmt: skip
    return (
        isinstance(config, dict)
        and config.get("system") in [None, *SYSTEMS]
        and config.get("density") in [None, *DENSITIES]
        and isinstance(config.get("data") or "", str)
        and any(config.get(k) for k in ("system", "density", "data"))
        and all(number(k, *ends, int) for k, ends in whole.items())
        and (config.get("noise") == "paper" or number("noise", 0, 1e3))
        and number("dt", 1e-9, 1e9)
    )


def load(path, device="cpu"):
    """Checkpoint file -> model in eval mode, the checkpoint's dict."""
    checkpoint = read_checkpoint(path)
    options, config = checkpoint["model_config"], checkpoint["config"]
    try:
        if any(type(v) is int and v > 4096 for v in options.values()) or any(
            options.get(k, config[k]) != config[k] for k in ("size", "context", "dt")
        ):
            raise ValueError
        with torch.device("meta"):  # costs no memory, whatever the sizes are
            plan = MODELS[checkpoint["kind"]](**options)
        shapes = lambda weights: {k: w.shape for k, w in weights.items()}
        if shapes(plan.state_dict()) != shapes(checkpoint["model"]):
            raise ValueError
        model = MODELS[checkpoint["kind"]](**options)
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, MemoryError,
            OverflowError, NotImplementedError):  # fmt: skip
        fail(f"{path} holds another model than this version of the code builds: train again")
    if not all(w.isfinite().all() for w in model.parameters()):
        fail(f"{path} holds weights that are not finite: train again, with a lower --lr")
    return model.to(device).eval(), checkpoint


@functools.lru_cache(1)
def read_data(path):
    """What --data names: an .npy file, which stays on disk; the first array of an .npz file; or a
    folder of clips, each a GIF, a video or a folder of pictures, cut to the shortest. Nothing in it
    is run."""
    path = Path(path)
    try:
        if path.is_dir():
            read = lambda clip: (np.stack([iio.imread(x) for x in sorted(clip.iterdir())])
                                 if clip.is_dir() else iio.imread(clip))  # fmt: skip
            clips = [read(clip) for clip in sorted(path.iterdir()) if clip.name[0] != "."]
            clips = [x[..., None] if x.ndim == 3 else x for x in clips]  # (T, H, W) is grey
            length = min(map(len, clips))
            return np.stack([clip[:length, ..., :3] for clip in clips])
        if path.suffix != ".npz":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        packed = zipfile.ZipFile(path).infolist()[0]
        size = packed.file_size
        if size > max(1e9, 100 * packed.compress_size) or size > free_memory() / 4:
            fail(f"--data {path} unpacks to {size / 1e9:.0f} GB: save it as .npy, which is read "
                 "piece by piece")  # fmt: skip
        with np.load(path, allow_pickle=False) as file:
            return file[file.files[0]]
    except Exception as error:  # numpy, zlib and imageio raise many kinds
        fail(f"--data {path} cannot be read ({type(error).__name__}): give an .npy file that "
             "numpy.save wrote, an .npz file, or a folder of GIFs or of folders of pictures "
             "(videos need pip install av)")  # fmt: skip


def free_memory():
    """Bytes of this machine that no process uses."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows, macOS
        return math.inf


class Clips:
    """Clips of one's own, (N, T, H, W, C) or (N, T, C, H, W), uint8 or float in [0, 1], C 1 or 3; a
    tenth is held out by the seed."""

    def __init__(self, config):
        self.array, source = read_data(config["data"]), f"--data {config['data']}"
        shape, dtype = self.array.shape, self.array.dtype
        self.last = len(shape) == 5 and shape[4] in (1, 3)  # where the channels are
        clips = len(shape) == 5 and (self.last or shape[2] in (1, 3))
        if not clips or not (dtype == np.uint8 or dtype.kind == "f"):
            fail(f"{source} must hold clips, uint8 or float (N, T, H, W, C) or (N, T, C, H, W) "
                 f"with C 1 or 3, or points (N, D), not {dtype} {shape}")  # fmt: skip
        self.length, self.channels = shape[1], shape[4 if self.last else 2]
        height, self.size = shape[2:4] if self.last else shape[3:]
        if height != self.size or self.size % 8 or not 16 <= self.size <= 128:
            fail(f"{source}: pictures must be square, a multiple of 8 from 16 to 128 pixels, not "
                 f"{height} x {self.size}")  # fmt: skip
        if shape[0] < 4 or self.length <= config["context"]:
            fail(f"{source} must hold at least four clips of more than --context "
                 f"{config['context']} frames, not {shape[0]} of {self.length}")  # fmt: skip
        order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(config["seed"]))
        self.held_out, self.train = order.split([held := max(2, shape[0] // 10), shape[0] - held])
        times = torch.linspace(0, self.length - 1, 8).long()
        some = self.frames(self.train[:64], times.expand(len(self.train[:64]), -1))
        if not some.isfinite().all() or some.min() < 0 or some.max() > 1:
            fail(f"{source} has values from {some.min():.3g} to {some.max():.3g}: floats must be "
                 "finite and in [0, 1], as for uint8 values divided by 255")  # fmt: skip

    def read(self, clips, times):
        """Frames at times (B, n) of clips (B,), as they are stored: (B, n, C, H, W)."""
        x = torch.from_numpy(self.array[clips.unsqueeze(1).numpy(), times.numpy()])
        return x.movedim(4, 2) if self.last else x

    def frames(self, clips, times):
        """The same in [0, 1]."""
        return unit(self.read(clips, times))


def unit(x):
    """Bytes or floats -> floats in [0, 1]."""
    return x.float() / 255 if x.dtype == torch.uint8 else x.float()


class HeldOut:
    """Held-out clips of one's own, used like TestClips: there is no true state, and no truth after
    their end."""

    system, noise = None, 0.0

    def __init__(self, config, n, device=None):
        self.data, self.device = Clips(config), device or "cpu"
        self.clips, self.size = self.data.held_out[:n], self.data.size
        self.length = self.data.length
        self.observed = next(self.truth(config["context"], block=n))

    def truth(self, frames, speed=1.0, block=32):
        times = torch.arange(min(frames, self.length))
        for part in self.clips.split(block):
            yield self.data.frames(part, times.expand(len(part), -1)).to(self.device)


class TestClips:
    """Fixed test clips of a system: true states at frame 0, and what the encoder sees of them (with
    the noise of training)."""

    def __init__(self, config, n, seed=TEST_SEED, device="cpu"):
        self.system, self.size = SYSTEMS[config["system"]], config["size"]
        self.noise, self.dt, self.length = config["noise"], config["dt"], math.inf
        generator = torch.Generator().manual_seed(seed)
        self.q, self.p = initial_states(self.system, n, generator, device)
        length = max(WINDOW, config["context"]) if self.noise else config["context"]
        q = simulate(self.system, self.q, self.p, length, self.dt)[0]
        seen = jitter(self.system, q, self.noise, generator)
        self.observed, self.paths = render(self.system, seen, self.size), {}

    def path(self, frames, speed=1.0):
        """The true q from frame 0 at `speed` (negative: backward); simulated once, as close
        encounters take long."""
        if len(self.paths.get(speed, ((),))[0]) < frames:
            self.paths[speed] = simulate(self.system, self.q, self.p, frames, speed * self.dt)[0]
        return self.paths[speed][:, :frames]

    def truth(self, frames, speed=1.0, block=32):
        """Clean frames of the same, `block` clips at a time."""
        for part in self.path(frames, speed).split(block):
            yield render(self.system, part, self.size)


def test_clips(config, n, device=None):
    return (HeldOut if config["data"] else TestClips)(config, n, device=device)


def errors(model, clips, q0, p0, frames, speed=1.0):
    """Pixel MSE against the clean truth and mean square of the truth, each (clips, frames), from
    frame 0 at `speed`."""
    q = model.rollout(q0, p0, frames - 1, speed * model.dt)[0]
    mean = lambda x: x.square().mean((2, 3, 4))
    pairs = [(mean(model.decode(part) - truth), mean(truth))
             for part, truth in zip(q.split(32), clips.truth(frames, speed))]  # fmt: skip
    return tuple(torch.cat(x) for x in zip(*pairs))


@torch.inference_mode()
def measure(model, clips, frames=90, steps=90):
    """Figures of metrics.json that are cheap enough for training: pixel MSEs against the clean
    truth, the model seeing the first `context` frames only. H is followed along `steps`."""
    frames, (q0, p0) = min(frames, clips.length), model.infer(clips.observed)
    forward, window = errors(model, clips, q0, p0, frames)[0], min(WINDOW, frames)
    blank = next(clips.truth(frames)).var((0, 1)).mean().item()
    result = {"frames": frames, "clips": len(q0), "window": window, "blank_mse": blank,
              "mse_per_frame": forward.mean(0).tolist()}  # fmt: skip
    for start in range(0, frames, WINDOW):
        part = forward[:, start : start + WINDOW].mean().item()
        result[f"mse_{start}_{min(start + WINDOW, frames) - 1}"] = part
    result["mse_std_over_clips"] = forward[:, :window].mean(1).std().item()
    speeds = {"backward": -1.0, "double_speed": 2.0, "half_speed": 0.5} if clips.system else {}
    for name, speed in speeds.items():
        error = errors(model, clips, q0, p0, window, speed)[0].mean(0)
        result[f"mse_{name}"] = error.mean().item()
        if speed > 1:  # the stretch of time that the normal ones show
            result[f"mse_{name}_same_time"] = error[: (window + 1) // 2].mean().item()
    if clips.noise:
        painted = model.decode(model.rollout(q0, p0, WINDOW - 1)[0])
        result["mse_noisy"] = (painted - clips.observed[:, :WINDOW]).square().mean().item()
    for name, finer in {
        "_fine": 4,
        "": 1,
    }.items():  # leapfrog itself lets H oscillate, 16 times less
        path = model.rollout(q0, p0, finer * (steps - 1), model.dt / finer)  # in quarter steps
        qs, ps = (x[:, ::finer] for x in path)
        H = torch.stack([model.energy(q, p) for q, p in zip(qs.unbind(1), ps.unbind(1))], 1)
        along, across = H.std(1), H[:, 0].std()  # of H (clips, steps)
        result[f"energy_std_ratio{name}"] = (along.median() / across).item()
    result["energy_variance"] = H.var(1).mean().item()
    result["energy_lost"] = (~(along < across)).double().mean().item()
    back = model.rollout(qs[:, -1], ps[:, -1], steps - 1, -model.dt)
    back, start = torch.cat([x[:, -1] for x in back], 1), torch.cat((q0, p0), 1)
    result["reversal_error"] = ((back - start).norm(dim=1) / start.norm(dim=1)).median().item()
    return result


def first_bad(error, limit):
    """The first frame of each row of error (clips, frames) above the limit (or NaN), else their
    number."""
    bad = ~(error <= limit)
    return torch.where(bad.any(1), bad.float().argmax(1), error.shape[1]).float()


def wrapped(x):
    return torch.remainder(x + math.pi, 2 * math.pi) - math.pi


def inferred_and_true(model, clips, times=range(0, 30, 3)):
    """States inferred from clips that begin at several times of the trajectories, (n, 2 latent),
    and the true ones there."""
    system, pairs = clips.system, []
    generator = torch.Generator().manual_seed(TEST_SEED + 2)
    q, p = simulate(system, clips.q, clips.p, max(times) + model.context, clips.dt)
    for t in times:
        seen = jitter(system, q[:, t : t + model.context], clips.noise, generator)
        latent, true = model.infer(render(system, seen, clips.size)), (q[:, t], p[:, t])
        if system.periodic:  # compare angles away from the cut
            latent, true = ((wrapped(x), y) for x, y in (latent, true))
        pairs.append(
            [torch.cat([x.flatten(1) for x in state], 1).double() for state in (latent, true)]
        )
    latent, true = (torch.cat(x) for x in zip(*pairs))
    near = (true[:, :1].abs() < 2.9).flatten() if system.periodic else slice(None)
    return latent[near], true[near]


def lasso(A, y, alpha=1e-4, steps=2000):
    """w that minimises |A w - y|^2 / 2n + alpha |w|_1, by accelerated proximal gradient (Beck &
    Teboulle 2009)."""
    n, w, momentum = len(A), A.new_zeros(A.shape[1], y.shape[1]), 1.0
    gram, target = A.T @ A / n, A.T @ y / n
    rate, v = 1 / torch.linalg.matrix_norm(gram, 2), w
    for _ in range(steps):
        new = v - rate * (gram @ v - target)
        new = new.sign() * (new.abs() - rate * alpha).clamp(min=0)
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        w, v, momentum = new, new + (momentum - 1) / following * (new - w), following
    return w


def symetric(latent, true, orders=5, most=2000):
    """SyMetric (Higgins et al. 2021, arXiv 2111.05986): is the map from latent to true states
    symplectic, up to scale? Lasso on polynomials of the latent (n, 2 d), order raised until R^2 >=
    0.9, and its Jacobian J at every state. Returns R^2, Sym, order."""
    d, D, scale = latent.shape[1] // 2, true.shape[1] // 2, latent.std(0).clamp(min=1e-9)
    x, y = (latent - latent.mean(0)) / scale, (true - true.mean(0)) / true.std(0)
    chosen, terms = itertools.combinations_with_replacement, []
    for order in range(1, orders + 1):
        terms = terms + [list(c) for c in chosen(range(2 * d), order)]
        if len(terms) > most:
            break
        features = lambda x: torch.stack([x[..., term].prod(-1) for term in terms], -1)
        A = features(x)
        A = A - A.mean(0)
        w, used = lasso(A, y), order
        r2 = 1 - ((A @ w - y).square().mean() / y.var(0, correction=0).mean()).item()
        J = torch.func.vmap(torch.func.jacrev(lambda x: features(x) @ w))(x[:1000])  # (n, 2 D, 2 d)
        if r2 >= 0.9:
            break
    J = true.std(0)[:, None] * J / scale
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=J.dtype)
    E, one = (x.to(J.device) for x in (torch.kron(turn, torch.eye(d)), torch.eye(2 * D)))
    E = E.to(J.dtype)
    P = (J @ E @ J.mT) @ (J @ E.T @ J.mT)
    P = P / P.abs().amax((1, 2)).mean()
    return {"symetric_r2": r2, "symetric": (P - one).square().mean().item(), "symetric_order": used}


def read(system, frames, rounds=2, h=0.01):
    """The true system's q (n, T, bodies, dims) that frames (n, T, 3, S, S) show: by colour (a pixel
    belongs to the body whose colour explains it best) and centroid, then Gauss-Newton steps on the
    difference from the re-rendered picture."""
    size, device = frames.shape[-1], frames.device
    light = frames - torch.tensor(BACKGROUND, device=device).view(3, 1, 1)
    colours = torch.tensor(system.colours, device=device)  # (bodies, 3)
    share = torch.einsum("ntcyx,bc->ntbyx", light, colours)
    share = (share / colours.square().sum(1).view(-1, 1, 1)).clamp(0, 1)
    left = (light.unsqueeze(2) - share.unsqueeze(3) * colours.view(-1, 3, 1, 1)).square().sum(3)
    share = share * (left == left.amin(2, keepdim=True))
    place = (torch.arange(size, device=device) - (size - 1) / 2) * 2 * system.half_width / size
    x, y = (share.sum(3) * place).sum(3), (share.sum(4) * -place).sum(3)
    q = system.locate(torch.stack((x, y), -1) / (share.sum((3, 4)) + 1e-9).unsqueeze(-1)).double()
    dim = q[0, 0].numel()
    moves = h * torch.eye(dim, dtype=q.dtype, device=device).view(-1, 1, 1, *q.shape[2:])
    for _ in range(rounds):
        slopes = [render(system, q + m, size) - render(system, q - m, size) for m in moves]
        J = torch.stack([slope.flatten(2) for slope in slopes], 3) / (2 * h)
        wrong = (frames - render(system, q, size)).flatten(2).unsqueeze(3)
        step = torch.linalg.solve(J.mT @ J + 1e-3 * torch.eye(dim, device=device), J.mT @ wrong)
        q = q + step.clamp(-0.2, 0.2).view_as(q)
    return q


def judge(system, frames, dt, seen=10):
    """Shares of clips (n, T, 3, S, S) whose every frame is a picture of the system (excess pixel
    MSE at most 5e-4), and that move as the true system does from the state that fits the first
    `seen` frames best (within 0.15 world units in all)."""
    q = torch.cat([read(system, part) for part in frames.split(32)])
    excess = (render(system, q, frames.shape[-1]) - frames).square().mean((2, 3, 4))
    shown = system.position(q)
    if system.periodic:
        q = torch.cat((q[:, :1], q[:, :1] + wrapped(q.diff(dim=1)).cumsum(1)), 1)
    five = torch.tensor([-25.0, 48, -36, 16, -3], dtype=q.dtype, device=q.device) / (12 * dt)
    velocity = torch.einsum("t,nt...->n...", five, q[:, :5])
    p = system.momentum(q[:, 0], velocity) if system.momentum else system.inertia * velocity
    state = torch.stack((q[:, 0], p), 1)  # (n, 2, bodies, dims)
    path = lambda s, T: system.position(simulate(system, *s.unbind(1), T, dt)[0])
    dim, h = state[0].numel(), 1e-4
    moves = h * torch.eye(dim, dtype=q.dtype, device=q.device).view(-1, 1, *state.shape[1:])
    for _ in range(3):  # Gauss-Newton
        tried = torch.cat((state[None] + moves, state[None] - moves, state[None]))
        paths = path(tried.flatten(0, 1), seen).unflatten(0, (-1, len(q))).flatten(2)
        ahead, behind, now = paths.split((dim, dim, 1))
        J = ((ahead - behind) / (2 * h)).permute(1, 2, 0)
        wrong = (shown[:, :seen].flatten(1) - now[0]).unsqueeze(2)
        state = state + torch.linalg.lstsq(J, wrong).solution.clamp(-0.5, 0.5).view_as(state)
    far = (path(state, shown.shape[1]) - shown).norm(dim=-1).amax((1, 2))
    return (excess.amax(1) <= 5e-4).double().mean().item(), (far <= 0.15).double().mean().item()


@torch.inference_mode()
def measure_physics(model, clips, window, frames=300):
    """What holds outside the window: valid prediction times and their ceiling, SyMetric, samples
    from the prior. VPT is Higgins et al.'s: share of the frames after the window before the error
    passes 0.025 of the picture's mean square; "strict" is the first frame whose error passes 0.1 of
    a blank prediction's."""
    q0, p0 = model.infer(clips.observed)
    blank, result, shares = next(clips.truth(WINDOW)).var((0, 1)).mean(), {}, []
    clips.path(frames)
    for name, sign in (("forward", 1.0), ("backward", -1.0)):
        mse, power = errors(model, clips, q0, p0, frames, sign)
        strict = first_bad(mse / blank, 0.1)
        quarters = torch.tensor([0.25, 0.75], device=strict.device)
        result[f"mse_per_frame_{name}"] = mse.mean(0).tolist()
        result[f"strict_vpt_{name}"] = strict.median().item()
        result[f"strict_vpt_{name}_quartiles"] = strict.quantile(quarters).tolist()
        shares.append(first_bad((mse / power)[:, window:], 0.025).mean().item() / (frames - window))
    result["vpt"] = sum(shares) / 2
    latent, true = inferred_and_true(model, clips)
    x = torch.cat((latent, latent.square(), torch.ones_like(latent[:, :1])), 1)
    fit = torch.linalg.lstsq(x, true, driver="gelsd" if x.device.type == "cpu" else None).solution
    precision = (x @ fit - true)[: len(q0)].std(0)  # at frame 0
    result["state_precision"] = precision.tolist()
    seeded = lambda i: torch.Generator().manual_seed(TEST_SEED + i)
    off = torch.randn(len(q0), len(precision), generator=seeded(3), dtype=torch.float64)
    off = off.to(precision.device) * precision
    q, p = (x + e.view_as(x) for x, e in zip((clips.q, clips.p), off.chunk(2, 1)))
    guess = simulate(clips.system, q, p, frames, clips.dt)[0]
    mse = [(render(clips.system, part, clips.size) - truth).square().mean((2, 3, 4))
           for part, truth in zip(guess.split(32), clips.truth(frames))]  # fmt: skip
    result["strict_vpt_ceiling"] = first_bad(torch.cat(mse) / blank, 0.1).median().item()
    result |= symetric(latent, true)
    if hasattr(model, "sample"):  # HNN has no prior
        drawn = model.sample(2 * len(q0), WINDOW - 1, generator=seeded(4))
        result["samples_valid"], result["samples_obey"] = judge(clips.system, drawn, clips.dt)
    real = torch.cat(list(clips.truth(WINDOW)))
    result["real_valid"], result["real_obey"] = judge(clips.system, real, clips.dt)
    return result


LABELS = {
    "blank_mse": "a blank prediction",
    "mse_noisy": "against the noisy frames",
    "noise_floor": "its floor",
    "mse_std_over_clips": "spread over clips, first frames",
    "mse_backward": "backward",
    "mse_double_speed": "at double speed",
    "mse_double_speed_same_time": "  no further than the frames above",
    "mse_half_speed": "at half speed",
}
UNSCALED = {
    "energy_variance": "variance of H along a rollout",
    "energy_std_ratio": "std of H: along a rollout / across clips",
    "energy_std_ratio_fine": "std of H: the same in quarter steps",
    "energy_lost": "share of clips where it is above 1",
    "reversal_error": "return error, relative",
    "strict_vpt_forward": "strict VPT forward, median frame of 300",
    "strict_vpt_backward": "strict VPT backward",
    "strict_vpt_ceiling": "  what the precision of the start allows",
    "vpt": "VPT as Higgins et al., share",
    "symetric_r2": "SyMetric: R^2 (passes above 0.9)",
    "symetric": "SyMetric: Sym (passes below 0.05)",
    "samples_valid": "samples that are valid pictures",
    "samples_obey": "samples that obey the true system",
    "real_valid": "  the same of real clips",
    "real_obey": "  the same of real clips",
}


def table(result, config):
    """The metrics as a small aligned table."""
    source = config["system"] or config["data"]
    seen = f"{result['clips']} test clips, {config['context']} context frames"
    print(f"\n{source}, {seen}, pixel MSE x 1e-4:")
    for key, value in result.items():
        if isinstance(value, float):
            label = (UNSCALED | LABELS).get(key) or f"frames {key[4:].replace('_', ' ')}"
            shown = f"{value:>10.3g}" if key in UNSCALED else f"{value * 1e4:>10.3f}"
            print(f"  {label:<42}{shown}")


def strip(title, frames, scale):
    """Frames (n, C, H, W) side by side under a title: an array (h, w, 3) of bytes."""
    frames = frames.clamp(0, 1).mul(255).round().byte().cpu()
    frames = frames.repeat(1, 3 // frames.shape[1], 1, 1).permute(0, 2, 3, 1).numpy()
    frames = np.pad(frames, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=96)
    picture = np.concatenate(frames, 1).repeat(scale, 0).repeat(scale, 1)
    bar = Image.new("RGB", (picture.shape[1], 28))
    font = ImageFont.load_default(20)
    ImageDraw.Draw(bar).text((6, 2), title, fill="white", font=font)
    return np.concatenate((np.asarray(bar), picture))


def write_gif(path, rows, dt, scale=8):
    """An animated GIF of labelled rows of clips, {label: (n, T, C, H, W)}, at the speed of the
    physics: dt seconds a frame. Every pixel of a clip is drawn `scale` wide."""
    images = []
    for t in range(max(clip.shape[1] for clip in rows.values())):
        at = [(f"{label}, frame {t}", clip[:, t] if t < clip.shape[1] else 0 * clip[:, 0])
              for label, clip in rows.items()]  # fmt: skip
        images.append(np.concatenate([strip(title, frames, scale) for title, frames in at]))
    iio.imwrite(path, np.stack(images), duration=1000 * dt, loop=0)


@torch.inference_mode()
def movies(
    model, clips, folder, frames, show=4, reverse=False, speeds=(), samples=0, seed=0, scale=8
):
    """Write rollout.gif, rollout.png and whichever of the others are asked for."""
    q0, p0 = (x[:show] for x in model.infer(clips.observed))
    dt = model.dt
    truth, (q, p) = next(clips.truth(frames, block=show)), model.rollout(q0, p0, frames - 1)
    painted = model.decode(q)
    write_gif(folder / "rollout.gif", {"truth": truth, "model": painted}, dt, scale)
    times = [t for t in STILLS if t < truth.shape[1]]
    title = f"{folder.name}: truth above model, frames {', '.join(map(str, times))}"
    rows = strip(title, truth[0, times], scale), strip("", painted[0, times], scale)[28:]
    iio.imwrite(folder / "rollout.png", np.concatenate(rows))
    if reverse:
        back = model.rollout(*(x[:, truth.shape[1] - 1] for x in (q, p)), frames - 1, -dt)[0]
        rows = {"truth, backward from the last frame": truth.flip(1),
                "model, backward from its last state": model.decode(back)}  # fmt: skip
        write_gif(folder / "reverse.gif", rows, dt, scale)
    for speed in speeds:
        rows = {
            f"model at speed {speed:g}": model.decode(
                model.rollout(q0, p0, frames - 1, speed * dt)[0]
            )
        }
        if clips.system:
            rows = {
                f"truth at speed {speed:g}": next(clips.truth(frames, speed, block=show))
            } | rows
        write_gif(folder / f"speed_{speed:g}.gif", rows, dt, scale)
    if samples:
        frames = model.sample(samples, frames - 1, generator=torch.Generator().manual_seed(seed))
        write_gif(folder / "samples.gif", {"samples from the prior": frames}, dt, scale)


def gather(out, *folders):
    """One table, out.json, and one picture, out.png, of runs that `eval.py` has looked at: their
    errors over that of a blank prediction, which is the mean picture."""
    rows, pictures = {}, []
    for folder in map(Path, folders):
        report = json.loads((folder / "metrics.json").read_text())
        kept = {k: v for k, v in report["metrics"].items() if k[:4] == "mse_" and k[4].isdigit()}
        over = {f"{k}_over_blank": v / report["metrics"]["blank_mse"] for k, v in kept.items()}
        rows[folder.name] = over | {
            "blank_mse": report["metrics"]["blank_mse"],
            **report["training"],
        }
        pictures.append(iio.imread(folder / "rollout.png"))
    high, wide = (max(x.shape[i] for x in pictures) + 8 for i in (0, 1))
    pictures += [np.zeros((0, 0, 3), "uint8")] * (-len(pictures) % 3)  # in rows of three
    pad = [np.pad(x, ((0, high - len(x)), (0, wide - x.shape[1]), (0, 0))) for x in pictures]
    rows_of = [np.concatenate(pad[i : i + 3], 1) for i in range(0, len(pad), 3)]
    iio.imwrite(f"{out}.png", np.concatenate(rows_of))
    Path(f"{out}.json").write_text(json.dumps({**provenance(), "runs": rows}, indent=1))


class Points:
    """What a flow learns from: a named density, or the rows of an .npy file, a tenth of them held
    out by the seed."""

    def __init__(self, config):
        self.density, self.rows = DENSITIES.get(config["density"]), None
        if self.density is None:
            path, rows = config["data"], read_data(config["data"])
            if rows.ndim != 2 or rows.dtype.kind not in "fiu" or len(rows) < 2 or rows.shape[1] < 1:
                fail(f"--data {path} must hold at least two points, numbers of shape (N, D), not "
                     f"{rows.dtype} {rows.shape}")  # fmt: skip
            rows = torch.from_numpy(rows.astype("float64"))
            if not rows.isfinite().all():
                bad = (~rows.isfinite()).sum()
                fail(f"--data {path} has {bad} values that are not finite: remove those rows")
            if (rows.std(0) <= 1e-12 * rows.abs().amax(0)).any():
                fail(f"--data {path}: column {int(rows.std(0).argmin())} is constant: remove it")
            generator = torch.Generator().manual_seed(config["seed"])
            order = torch.randperm(len(rows), generator=generator)
            self.rows, held = rows[order], max(1, len(rows) // 10)
            self.held_out, self.rows = self.rows[:held].float(), self.rows[held:].float()
        seed = torch.Generator().manual_seed(TEST_SEED - 1)
        sample = self.draw(20_000, seed) if self.density else self.rows
        self.shift, self.scale = sample.mean(0), sample.std(0, correction=0).clamp(min=1e-12)
        self.dim = sample.shape[1]

    def draw(self, n, generator):
        """n training points (n, dim)."""
        if self.density:
            return self.density.sample(n, generator)
        return self.rows[torch.randint(len(self.rows), (n,), generator=generator)]

    def test(self, n):
        """n fixed test points, never trained on; fewer if fewer were held out."""
        if self.density:
            return self.density.sample(n, torch.Generator().manual_seed(TEST_SEED))
        return self.held_out[:n]


@torch.inference_mode()
def measure_flow(model, points, n=10_000, samples=(1, 16, 256)):
    """ELBO and log_prob, means over test points in nats; the gap of the NLL to the entropy; the
    modes; microseconds."""
    x, generator = points.test(n), torch.Generator().manual_seed(TEST_SEED)

    def mean(function, block=2000, **options):
        start = time.time()
        parts = [function(part, generator=generator, **options) for part in x.split(block)]
        value = torch.cat(parts).mean().item()
        return value, 1e6 * (time.time() - start) / len(x)

    result = {"points": len(x), "elbo": mean(model.elbo)[0]}
    for k in samples:
        result[f"log_prob_{k}"], result[f"us_per_log_prob_{k}"] = mean(
            model.log_prob, max(1, 8192 // k), samples=k
        )
    start = time.time()
    drawn = model.sample(n, generator)
    result["us_per_sample"] = 1e6 * (time.time() - start) / n
    result["parameters"] = sum(w.numel() for w in model.parameters())
    if points.density:
        result["entropy"] = points.density.entropy
        result["gap"] = -result[f"log_prob_{samples[-1]}"] - result["entropy"]
        if points.density.parts is not None:
            parts, which = points.density.parts, points.density.part_of(drawn)
            share = torch.bincount(which, minlength=parts) / n
            result["mode_weights"] = share.tolist()
            result["modes_found"] = int((share * parts >= 0.5).sum())
            if len(points.density.centres) == parts and hasattr(model, "H"):
                gaps = [torch.cdist(points.density.centres, minima(model, H)) for H in model.H]
                off = [gap.amin(1).max().item() if gap.numel() else None for gap in gaps]
                result["mode_to_well"] = off
    return result


def minima(model, H, n=161, reach=2.5):
    """Where the potential V(q) of a plane flow has its local minima, in the user's units: (k,
    2)."""
    side = torch.linspace(-reach, reach, n)
    grid = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1)
    V = H.V(grid)
    lowest = (V == -F.max_pool2d(-V[None], 3, 1, 1)[0])[1:-1, 1:-1]
    return grid[1:-1, 1:-1][lowest] * model.scale + model.shift


def heat(values, title, size=240):
    """A picture of a field (rows from low y to high y) in black, purple, orange, yellow, with its
    title."""
    values = torch.as_tensor(values).flip(0).numpy()
    low, high = values.min(), np.quantile(values, 0.999)  # one outlier shall not darken the rest
    level = np.clip((values - low) / (high - low + 1e-12), 0, 1)
    stops = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]])
    at = np.linspace(0, 1, 5)
    colour = np.stack([np.interp(level, at, stops[:, i]) for i in range(3)], -1).astype("uint8")
    image = Image.new("RGB", (size, size + 24))
    image.paste(Image.fromarray(colour).resize((size, size)), (0, 24))
    ImageDraw.Draw(image).text((6, 3), title, fill="white", font=ImageFont.load_default(15))
    return np.asarray(image)


def scatter(x, low, high, bins=120):
    """Points (n, 2) counted on a grid, square-rooted so that faint bridges show: (bins, bins)."""
    at = ((x[:, :2] - low) / (high - low) * bins).floor().long()
    at = at[((at >= 0) & (at < bins)).all(1)]
    count = torch.bincount(at[:, 1] * bins + at[:, 0], minlength=bins * bins)
    return count.view(bins, bins).float().sqrt()


@torch.inference_mode()
def flow_pictures(model, points, folder, n=20_000, bins=96, seed=0):
    """density.png: target, learnt density, samples, and V(q) and K(p) of each Hamiltonian;
    flow.gif: base to data. Of data of more than two dimensions the first two, the others at their
    mean."""
    test, generator = points.test(n), torch.Generator().manual_seed(seed)
    drawn = model.sample(n, generator)
    if model.dim == 1:  # a line, drawn as a plane with noise in y
        y = torch.randn(len(drawn), 1, generator=generator)
        test, drawn = (torch.cat((x, y[: len(x)]), 1) for x in (test, drawn))
    middle, half = test[:, :2].mean(0), 1.25 * (test[:, :2] - test[:, :2].mean(0)).abs().amax(0)
    low, high = middle - half, middle + half
    side = (torch.arange(bins) + 0.5) / bins

    def plane(low, high, dim, rest):
        y, x = torch.meshgrid(side, side, indexing="ij")
        xy = low + (high - low) * torch.stack((x, y), -1).flatten(0, 1)
        return torch.cat((xy[:, :dim], rest[2:].expand(len(xy), -1)), 1)

    grid = plane(low, high, model.dim, points.shift)
    learnt = [model.log_prob(part, 32, generator) for part in grid.split(2000)]
    learnt = (0.5 * torch.cat(learnt)).exp().view(bins, bins)
    rows = [[heat(scatter(test, low, high), "target"), heat(learnt, "learnt density"),
             heat(scatter(drawn, low, high), "samples")]]  # fmt: skip
    if hasattr(model, "H"):
        reach = torch.full((2,), 3.0)
        grid = plane(-reach, reach, model.dim, torch.zeros(model.dim))
        start = model.base.sample(2, n, model.dim, generator=generator)
        qs = model.flow(*start)[0]  # (n, steps, dim)
        for i, H in enumerate(model.H):
            q = qs[:, (i + 1) * model.steps]
            q = q if model.dim > 1 else torch.cat((q, torch.randn(n, 1, generator=generator)), 1)
            V, K = H.V(grid).view(bins, bins), H.K(grid).view(bins, bins)
            rows.append([heat(V, f"V(q) of H {i + 1}"), heat(K, f"K(p) of H {i + 1}"),
                         heat(scatter(q, -reach, reach), f"q after H {i + 1}")])  # fmt: skip
        qs = qs * model.scale + model.shift
        if model.dim > 1:
            quarters = [(t, f / 4) for t in range(qs.shape[1] - 1) for f in range(4)]
            frames = [torch.lerp(qs[:, t], qs[:, t + 1], f) for t, f in quarters] + [qs[:, -1]] * 8
            movie = [heat(scatter(x, low, high), "from base to data") for x in frames]
            iio.imwrite(folder / "flow.gif", np.stack(movie), duration=100, loop=0)
    iio.imwrite(folder / "density.png", np.concatenate([np.concatenate(row, 1) for row in rows]))


def flow_table(results):
    """Figures of one or more flows on the same test points, side by side."""
    first = next(iter(results.values()))
    print(f"\n{first['points']} test points, nats:" + "".join(f"{name:>14}" for name in results))
    for key in first:
        cells = [result.get(key) for result in results.values()]
        if all(isinstance(c, (int, float)) for c in cells):
            shown = (f"{c:14d}" if isinstance(c, int) else f"{c:14.3f}" for c in cells)
            print(f"  {key:<24}{''.join(shown)}")


def eval_flow(model, checkpoint, folder, report, seed):
    """Pictures and figures of a flow; beside NHF's the newest RealNVP run on the same data, if
    there is one."""
    config, runs = checkpoint["config"], {checkpoint["kind"]: (model, checkpoint)}
    points = Points(config)
    if model.dim != points.dim:
        fail(f"{folder} holds a flow of dimension {model.dim}, the data have {points.dim}: train "
             "on them first")  # fmt: skip
    same = {k: config[k] for k in ("density", "data")}
    for path in sorted(Path("runs").glob("*/checkpoint.pt"), key=os.path.getmtime):
        other = read_checkpoint(path)
        kinds = checkpoint["kind"], other["kind"]
        if kinds == ("nhf", "realnvp") and same.items() <= other["config"].items():
            runs["realnvp"] = load(path)
    results = {name: measure_flow(m, points) | {"seconds_trained": c["seconds"]}
               for name, (m, c) in runs.items()}  # fmt: skip
    flow_pictures(model, points, folder, seed=seed)
    (folder / "metrics.json").write_text(json.dumps(report | {"metrics": results}, indent=1))
    flow_table(results)
    movie = "flow.gif " if (folder / "flow.gif").exists() else ""
    print(f"\nwrote density.png, {movie}and metrics.json into {folder}")


def parse():
    parser = Parser(description=__doc__.split("\n")[0], formatter_class=Help)
    add = parser.add_argument
    add("--checkpoint", metavar="PATH", help="a checkpoint file (default: the newest run)")
    add("--system", choices=SYSTEMS, help="take the newest run of this system")
    add("--density", choices=DENSITIES, help="take the newest run of this density")
    add("--frames", type=at_least(2), default=90, help="to roll out; the paper's clips have 30")
    add("--clips", type=at_least(2), default=256, help="test clips to measure on")
    add(
        "--reverse", action="store_true", help="write reverse.gif: from the last state to the first"
    )
    add("--speed", type=at_least(0, float, above=True), action="append", default=[],
        help="write a GIF at this multiple of the training speed; may be given again")  # fmt: skip
    add("--sample", type=at_least(0), default=0, metavar="N", help="write samples.gif: N of them")
    add("--show", type=at_least(1), default=4, help="test clips in a GIF, side by side")
    add("--scale", type=at_least(1), default=8, help="screen pixels for one pixel of a clip")
    add("--seed", type=at_least(0), default=0, help="of the samples; test clips stay the same")
    add("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    return parser.parse_args()


def main():
    args = parse()
    keep_memory()
    wanted = {"system": args.system, "density": args.density}
    path = Path(args.checkpoint) if args.checkpoint else newest_run(**wanted)
    device = pick_device(args.device)
    model, checkpoint = load(path, device)
    config, folder = checkpoint["config"], path.parent
    if folder.name == "checkpoints":  # of all systems: each gets a folder of its own
        folder = Path("runs") / f"{path.stem}-shipped"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(
                f"cannot make {folder} ({error.strerror}): run from a folder that you may write to"
            )
    for name, value in wanted.items():
        if value not in (None, config.get(name)):
            own = config["system"] or config["density"] or config["data"]
            fail(f"{path} was trained on {own}, not {value}")
    if not os.access(folder, os.W_OK):
        fail(f"cannot write into {folder}: copy the checkpoint to a folder of your own")
    training = {k: checkpoint[k] for k in ("command", "versions", "step", "seconds")}
    report = {**provenance(), "seed": args.seed, "test_seed": TEST_SEED, "checkpoint": str(path),
              "config": config, "training": training}  # fmt: skip
    if checkpoint["kind"] in ("nhf", "realnvp"):
        return eval_flow(model.cpu(), checkpoint, folder, report, args.seed)
    clips = test_clips(config, args.clips, device)
    result = measure(model, clips, args.frames, 1000)
    if clips.system:
        some = TestClips(config, min(args.clips, 128), device=device)
        result |= measure_physics(model, some, config["window"])
    else:
        print(f"{config['data']}: no true system behind it, so no backward or other-speed errors, "
              "VPT, SyMetric or check of samples")  # fmt: skip
    if clips.noise:
        generator = torch.Generator().manual_seed(TEST_SEED + 1)
        floor = noise_floor(clips.system, clips.noise, clips.size, generator=generator)
        result["noise_floor"] = floor
    shown = test_clips(config, args.show, device)
    movies(model, shown, folder, args.frames, args.show, args.reverse, args.speed, args.sample,
           args.seed, args.scale)  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(report | {"metrics": result}, indent=1))
    table(result, config)
    wrote = ", ".join(sorted(p.name for p in folder.glob("*.gif")))
    print(f"\nwrote {wrote}, rollout.png and metrics.json into {folder}")


if __name__ == "__main__":
    main()
