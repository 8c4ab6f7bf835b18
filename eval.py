"""Look at a trained model and measure it.

    python eval.py --reverse --speed 2          # the newest run; or --system three_body, or --checkpoint PATH

Writes GIFs (truth above, model below; of a flow density.png and flow.gif) and metrics.json into the run's folder and prints
the same as a table.
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
PARTS = {
    "model",
    "model_config",
    "config",
    "step",
    "seconds",
    "command",
    "versions",
}  # of a checkpoint
WINDOW = 30  # frames of the paper's test clips


def fail(message):
    """A user's mistake: one line, exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


class Help(argparse.HelpFormatter):
    """Shows the defaults that are worth showing."""

    def _get_help_string(self, action):
        shown = action.choices or type(action.default) in (int, float)
        return (
            f"{action.help} (default: %(default)s)"
            if shown and action.default is not None
            else action.help
        )


def keep_memory():
    """glibc hands large freed blocks back to the system, and every tensor then pays for page faults: a tenth of a step
    on a CPU, half of the drawing of clips. Tell it to keep them."""
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
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {'a whole' if kind is int else 'a'} number"
            )
        if not math.isfinite(value) or value < low or (above and value == low):
            raise argparse.ArgumentTypeError(
                f"must be {'above' if above else 'at least'} {low}, not {text}"
            )
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
    return {
        "command": shlex.join(["python", *sys.argv]),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": np.__version__,
        },
    }


def newest_run(**wanted):
    """Path of the most recently written checkpoint under runs/ whose config has these values, where they are not None; where
    there is none, of the system's checkpoint that comes with this code."""
    wanted = {k: v for k, v in wanted.items() if v is not None}
    for path in sorted(Path("runs").glob("*/checkpoint.pt"), key=os.path.getmtime, reverse=True):
        if not wanted or wanted.items() <= read_checkpoint(path)["config"].items():
            return path
    shipped = Path(
        os.path.relpath(
            Path(__file__).parent / "checkpoints" / f"{wanted.get('system', 'mass_spring')}.pt"
        )
    )
    if shipped.is_file() and wanted.keys() <= {"system"}:
        return shipped
    options = " ".join(f"--{k} {v}" for k, v in (wanted or {"system": "mass_spring"}).items())
    fail(
        f"no run {'with ' + options + ' ' if wanted else ''}in ./runs: train one with python train.py {options}, "
        "or name a file with --checkpoint"
    )


def read_checkpoint(path):
    path = Path(path)
    if not path.is_file():
        fail(f"no checkpoint at {path}: train one with python train.py --system mass_spring")
    try:
        with zipfile.ZipFile(
            path
        ) as file:  # torch does not compress, so what would grow is not torch's
            if sum(part.file_size for part in file.infolist()) > path.stat().st_size:
                fail(
                    f"{path} is not a checkpoint written by train.py: its parts are larger than itself"
                )
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        fail(
            f"{path} cannot be read as a checkpoint, perhaps it is truncated ({type(error).__name__}): train again"
        )
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
    """Whether a checkpoint's config, which may come from a stranger, names what there is and has numbers in their ranges."""

    def number(key, low, high, kind=(int, float)):
        return isinstance(config.get(key), kind) and low <= config[key] <= high

    return (
        isinstance(config, dict)
        and config.get("system") in [None, *SYSTEMS]
        and config.get("density") in [None, *DENSITIES]
        and isinstance(config.get("data") or "", str)
        and any(config.get(k) for k in ("system", "density", "data"))
        and all(
            number(k, low, high, int)
            for k, low, high in (
                ("size", 16, 128),
                ("context", 1, 1000),
                ("window", 1, 1e6),
                ("batch_size", 1, 1e9),
                ("steps", 1, 1e12),
                ("seed", 0, 2**20),
            )
        )
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
        if {k: w.shape for k, w in plan.state_dict().items()} != {
            k: w.shape for k, w in checkpoint["model"].items()
        }:
            raise ValueError
        model = MODELS[checkpoint["kind"]](**options)
        model.load_state_dict(checkpoint["model"])
    except (
        RuntimeError,
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
        MemoryError,
        OverflowError,
        NotImplementedError,
    ):
        fail(f"{path} holds another model than this version of the code builds: train again")
    if not all(w.isfinite().all() for w in model.parameters()):
        fail(f"{path} holds weights that are not finite: train again, with a lower --lr")
    return model.to(device).eval(), checkpoint


@functools.lru_cache(1)
def read_data(path):
    """What --data names: an .npy file, which stays on disk; the first array of an .npz file; or a folder of clips, each a GIF, a
    video or a folder of pictures, cut to the shortest. Nothing in it is run."""
    path = Path(path)
    try:
        if path.is_dir():
            clips = [
                np.stack([iio.imread(picture) for picture in sorted(clip.iterdir())])
                if clip.is_dir()
                else iio.imread(clip)
                for clip in sorted(path.iterdir())
                if not clip.name.startswith(".")
            ]
            clips = [
                clip[..., None] if clip.ndim == 3 else clip for clip in clips
            ]  # (T, H, W) is grey
            length = min(map(len, clips))
            return np.stack([clip[:length, ..., :3] for clip in clips])
        if path.suffix != ".npz":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        packed = zipfile.ZipFile(path).infolist()[0]
        if (
            packed.file_size > max(1e9, 100 * packed.compress_size)
            or packed.file_size > free_memory() / 4
        ):
            fail(
                f"--data {path} unpacks to {packed.file_size / 1e9:.0f} GB: save it as .npy, which is read piece by piece"
            )
        with np.load(path, allow_pickle=False) as file:
            return file[file.files[0]]
    except Exception as error:  # numpy, zlib and imageio raise many kinds
        fail(
            f"--data {path} cannot be read ({type(error).__name__}): give an .npy file that numpy.save wrote, an .npz file, or a "
            "folder of GIFs or of folders of pictures (videos need pip install av)"
        )


def free_memory():
    """Bytes of this machine that no process uses."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows, macOS
        return math.inf


class Clips:
    """Clips of one's own, (N, T, H, W, C) or (N, T, C, H, W), uint8 or float in [0, 1], C 1 or 3; a tenth is held out by the seed."""

    def __init__(self, config):
        self.array, path = read_data(config["data"]), config["data"]
        shape = self.array.shape
        self.last = len(shape) == 5 and shape[4] in (1, 3)  # where the channels are
        if (
            len(shape) != 5
            or not (self.last or shape[2] in (1, 3))
            or not (self.array.dtype == np.uint8 or self.array.dtype.kind == "f")
        ):
            fail(
                f"--data {path} must hold clips, uint8 or float (N, T, H, W, C) or (N, T, C, H, W) with C 1 or 3, or points (N, D), "
                f"not {self.array.dtype} {shape}"
            )
        self.length, self.channels, (height, self.size) = (
            shape[1],
            shape[4 if self.last else 2],
            shape[2:4] if self.last else shape[3:],
        )
        if height != self.size or self.size % 8 or not 16 <= self.size <= 128:
            fail(
                f"--data {path}: pictures must be square, a multiple of 8 from 16 to 128 pixels, not {height} x {self.size}"
            )
        if shape[0] < 4 or self.length <= config["context"]:
            fail(
                f"--data {path} must hold at least four clips of more than --context {config['context']} frames, not {shape[0]} of {self.length}"
            )
        order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(config["seed"]))
        self.held_out, self.train = order.split([held := max(2, shape[0] // 10), shape[0] - held])
        some = self.frames(
            self.train[:64],
            torch.linspace(0, self.length - 1, 8).long().expand(len(self.train[:64]), -1),
        )
        if not some.isfinite().all() or some.min() < 0 or some.max() > 1:
            fail(
                f"--data {path} has values from {some.min():.3g} to {some.max():.3g}: floats must be finite and in [0, 1], "
                "as for uint8 values divided by 255"
            )
        self.background = some.movedim(2, 0).flatten(1).median(1).values.tolist()

    def read(self, clips, times):
        """Frames at times (B, n) of clips (B,), as they are stored: (B, n, C, H, W). Nothing else is read."""
        x = torch.from_numpy(self.array[clips.unsqueeze(1).numpy(), times.numpy()])
        return x.movedim(4, 2) if self.last else x

    def frames(self, clips, times):
        """The same in [0, 1]."""
        return unit(self.read(clips, times))


def unit(x):
    """Bytes or floats -> floats in [0, 1]."""
    return x.float() / 255 if x.dtype == torch.uint8 else x.float()


class HeldOut:
    """Held-out clips of one's own, used like TestClips; there is no true state, and no truth after their end."""

    system, noise = None, 0.0

    def __init__(self, config, n, device=None):
        self.data, self.device = Clips(config), device or "cpu"
        self.clips, self.size, self.length = (
            self.data.held_out[:n],
            self.data.size,
            self.data.length,
        )
        self.observed = next(self.truth(config["context"], block=n))

    def truth(self, frames, speed=1.0, block=32):
        for part in self.clips.split(block):
            yield self.data.frames(
                part, torch.arange(min(frames, self.length)).expand(len(part), -1)
            ).to(self.device)


class TestClips:
    """Fixed test clips: true states at frame 0 and what the encoder sees of them (noisy if trained with noise)."""

    def __init__(self, config, n, seed=TEST_SEED, device="cpu"):
        self.system, self.size, self.noise, self.dt = (
            SYSTEMS[config["system"]],
            config["size"],
            config["noise"],
            config["dt"],
        )
        generator = torch.Generator().manual_seed(seed)
        self.q, self.p = initial_states(self.system, n, generator, device)
        length = max(WINDOW, config["context"]) if self.noise else config["context"]
        q = simulate(self.system, self.q, self.p, length, self.dt)[0]
        self.observed, self.paths = (
            render(self.system, jitter(self.system, q, self.noise, generator), self.size),
            {},
        )
        self.length = math.inf

    def path(self, frames, speed=1.0):
        """The true q from frame 0 at `speed` (negative: backward); simulated once, as close encounters take long."""
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
    """Pixel MSE against the clean truth and mean square of the truth, each (clips, frames), from frame 0 at `speed`."""
    q = model.rollout(q0, p0, frames - 1, speed * model.dt)[0]
    pairs = [
        ((model.decode(part) - truth).square().mean((2, 3, 4)), truth.square().mean((2, 3, 4)))
        for part, truth in zip(q.split(32), clips.truth(frames, speed))
    ]
    return tuple(torch.cat(x) for x in zip(*pairs))


@torch.inference_mode()
def measure(model, clips, frames=90, steps=90):
    """Figures of metrics.json that are cheap enough for training. Errors are pixel MSEs against the clean truth, with the
    standard deviation over clips beside the mean; the model sees the first `context` frames only. H is followed along `steps`."""
    frames, (q0, p0) = min(frames, clips.length), model.infer(clips.observed)
    forward, window = errors(model, clips, q0, p0, frames)[0], min(WINDOW, frames)
    result = {
        "frames": frames,
        "clips": len(q0),
        "window": window,
        "mse_per_frame": forward.mean(0).tolist(),
        "blank_mse": next(clips.truth(frames)).var((0, 1)).mean().item(),
    }
    for start in range(0, frames, WINDOW):
        result[f"mse_{start}_{min(start + WINDOW, frames) - 1}"] = (
            forward[:, start : start + WINDOW].mean().item()
        )
    result["mse_std_over_clips"] = forward[:, :window].mean(1).std().item()
    for name, speed in (
        (("backward", -1.0), ("double_speed", 2.0), ("half_speed", 0.5)) if clips.system else ()
    ):
        error = errors(model, clips, q0, p0, window, speed)[0].mean(0)
        result[f"mse_{name}"] = error.mean().item()
        if speed > 1:  # the stretch of time that the normal ones show
            result[f"mse_{name}_same_time"] = error[: (window + 1) // 2].mean().item()
    if clips.noise:
        painted = model.decode(model.rollout(q0, p0, WINDOW - 1)[0])
        result["mse_noisy"] = (painted - clips.observed[:, :WINDOW]).square().mean().item()
    for name, finer in (
        ("_fine", 4),
        ("", 1),
    ):  # leapfrog itself lets H oscillate, 16 times less in quarter steps
        qs, ps = (
            x[:, ::finer] for x in model.rollout(q0, p0, finer * (steps - 1), model.dt / finer)
        )
        H = torch.stack(
            [model.energy(q, p) for q, p in zip(qs.unbind(1), ps.unbind(1))], 1
        )  # (clips, steps)
        along, across = H.std(1), H[:, 0].std()
        result[f"energy_std_ratio{name}"] = (along.median() / across).item()
    result["energy_variance"], result["energy_lost"] = (
        H.var(1).mean().item(),
        (~(along < across)).double().mean().item(),
    )
    back = torch.cat(
        [x[:, -1] for x in model.rollout(qs[:, -1], ps[:, -1], steps - 1, -model.dt)], 1
    )
    start = torch.cat((q0, p0), 1)
    result["reversal_error"] = ((back - start).norm(dim=1) / start.norm(dim=1)).median().item()
    return result


def first_bad(error, limit):
    """The first frame of each row of error (clips, frames) that is above the limit (or NaN), else their number."""
    bad = ~(error <= limit)
    return torch.where(bad.any(1), bad.float().argmax(1), error.shape[1]).float()


def wrapped(x):
    return torch.remainder(x + math.pi, 2 * math.pi) - math.pi


def inferred_and_true(model, clips, times=range(0, 30, 3)):
    """States inferred from clips that begin at several times of the trajectories, (n, 2 latent), and the true ones there."""
    generator, pairs = torch.Generator().manual_seed(TEST_SEED + 2), []
    q, p = simulate(clips.system, clips.q, clips.p, max(times) + model.context, clips.dt)
    for t in times:
        seen = jitter(clips.system, q[:, t : t + model.context], clips.noise, generator)
        latent, true = (
            model.infer(render(clips.system, seen, clips.size)),
            (q[:, t].flatten(1), p[:, t].flatten(1)),
        )
        if clips.system.periodic:  # compare angles away from the cut
            latent, true = ((wrapped(x), y) for x, y in (latent, true))
        pairs.append((torch.cat(latent, 1).flatten(1).double(), torch.cat(true, 1)))
    latent, true = (torch.cat(x) for x in zip(*pairs))
    near = (true[:, :1].abs() < 2.9).flatten() if clips.system.periodic else slice(None)
    return latent[near], true[near]


def lasso(A, y, alpha=1e-4, steps=2000):
    """w that minimises |A w - y|^2 / 2n + alpha |w|_1, by accelerated proximal gradient (Beck & Teboulle 2009)."""
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
    """SyMetric (Higgins et al. 2021, arXiv 2111.05986): is the map from latent to true states symplectic, up to scale? Lasso on
    polynomials of the latent (n, 2 d), order raised until R^2 >= 0.9, and its Jacobian J at every state. Returns R^2, Sym, order."""
    d, D = latent.shape[1] // 2, true.shape[1] // 2
    x, y = (
        (latent - latent.mean(0)) / latent.std(0).clamp(min=1e-9),
        (true - true.mean(0)) / true.std(0),
    )
    for order in range(1, orders + 1):
        terms = [
            list(c)
            for k in range(1, order + 1)
            for c in itertools.combinations_with_replacement(range(2 * d), k)
        ]
        if len(terms) > most:
            break
        features = lambda x: torch.stack([x[..., term].prod(-1) for term in terms], -1)
        A = features(x)
        w = lasso(A - A.mean(0), y)
        r2, used = (
            1
            - ((A - A.mean(0)) @ w - y).square().mean().item()
            / y.var(0, correction=0).mean().item(),
            order,
        )
        J = torch.func.vmap(torch.func.jacrev(lambda x: features(x) @ w))(x[:1000])  # (n, 2 D, 2 d)
        if r2 >= 0.9:
            break
    J = true.std(0)[:, None] * J / latent.std(0).clamp(min=1e-9)
    E = torch.kron(
        torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=J.dtype), torch.eye(d, dtype=J.dtype)
    ).to(J.device)
    P = (J @ E @ J.mT) @ (J @ E.T @ J.mT)
    P = P / P.abs().amax((1, 2)).mean()
    return {
        "symetric_r2": r2,
        "symetric": (P - torch.eye(2 * D, dtype=J.dtype, device=J.device)).square().mean().item(),
        "symetric_order": used,
    }


def read(system, frames, rounds=2, h=0.01):
    """The true system's q (n, T, bodies, dims) that frames (n, T, 3, S, S) show: by colour (a pixel belongs to the body whose
    colour explains it best) and centroid, then Gauss-Newton steps on the difference from the re-rendered picture."""
    size, light = (
        frames.shape[-1],
        frames - torch.tensor(BACKGROUND, device=frames.device).view(3, 1, 1),
    )
    colours = torch.tensor(system.colours, device=frames.device)  # (bodies, 3)
    share = (
        torch.einsum("ntcyx,bc->ntbyx", light, colours) / colours.square().sum(1).view(-1, 1, 1)
    ).clamp(0, 1)
    left = (light.unsqueeze(2) - share.unsqueeze(3) * colours.view(-1, 3, 1, 1)).square().sum(3)
    share = share * (left == left.amin(2, keepdim=True))
    place = (
        (torch.arange(size, device=frames.device) - (size - 1) / 2) * 2 * system.half_width / size
    )
    mass = share.sum((3, 4)) + 1e-9
    q = system.locate(
        torch.stack(
            ((share.sum(3) * place).sum(3) / mass, (share.sum(4) * -place).sum(3) / mass), -1
        )
    ).double()
    for _ in range(rounds):
        moves = h * torch.eye(q[0, 0].numel(), dtype=q.dtype, device=q.device).view(
            -1, 1, 1, *q.shape[2:]
        )
        J = torch.stack(
            [(render(system, q + m, size) - render(system, q - m, size)).flatten(2) for m in moves],
            3,
        ) / (2 * h)
        wrong = (frames - render(system, q, size)).flatten(2).unsqueeze(3)
        step = torch.linalg.solve(
            J.mT @ J + 1e-3 * torch.eye(J.shape[3], device=J.device), J.mT @ wrong
        )
        q = q + step.clamp(-0.2, 0.2).view_as(q)
    return q


def judge(system, frames, dt, seen=10):
    """Shares of clips (n, T, 3, S, S) whose every frame is a picture of the system (excess pixel MSE at most 5e-4), and that
    move as the true system does from the state that fits the first `seen` frames best (within 0.15 world units in all)."""
    q = torch.cat([read(system, part) for part in frames.split(32)])
    excess = (render(system, q, frames.shape[-1]) - frames).square().mean((2, 3, 4))
    shown = system.position(q)
    if system.periodic:
        q = torch.cat((q[:, :1], q[:, :1] + wrapped(q.diff(dim=1)).cumsum(1)), 1)
    velocity = (-25 * q[:, 0] + 48 * q[:, 1] - 36 * q[:, 2] + 16 * q[:, 3] - 3 * q[:, 4]) / (
        12 * dt
    )
    p = system.momentum(q[:, 0], velocity) if system.momentum else system.inertia * velocity
    state = torch.stack((q[:, 0], p), 1)  # (n, 2, bodies, dims)
    path = lambda s, T: system.position(simulate(system, *s.unbind(1), T, dt)[0])
    for _ in range(3):  # Gauss-Newton
        moves = 1e-4 * torch.eye(state[0].numel(), dtype=q.dtype, device=q.device).view(
            -1, 1, *state.shape[1:]
        )
        paths = path(
            torch.cat((state[None] + moves, state[None] - moves, state[None])).flatten(0, 1), seen
        )
        ahead, behind, now = (
            x.unflatten(0, (-1, len(q))).flatten(2)
            for x in paths.split([len(moves) * len(q)] * 2 + [len(q)])
        )
        J, wrong = (
            ((ahead - behind) / 2e-4).permute(1, 2, 0),
            (shown[:, :seen].flatten(1) - now[0]).unsqueeze(2),
        )
        state = state + torch.linalg.lstsq(J, wrong).solution.clamp(-0.5, 0.5).view_as(state)
    far = (path(state, shown.shape[1]) - shown).norm(dim=-1).amax((1, 2))
    return (excess.amax(1) <= 5e-4).double().mean().item(), (far <= 0.15).double().mean().item()


@torch.inference_mode()
def measure_physics(model, clips, window, frames=300):
    """What holds outside the window: valid prediction times and their ceiling, SyMetric, samples from the prior. VPT is Higgins et
    al.'s: share of the frames after the window before the error passes 0.025 of the picture's mean square; "strict" is the
    first frame whose error passes 0.1 of a blank prediction's."""
    q0, p0 = model.infer(clips.observed)
    blank, result, shares = next(clips.truth(WINDOW)).var((0, 1)).mean(), {}, []
    clips.path(frames)
    for name, sign in (("forward", 1.0), ("backward", -1.0)):
        mse, power = errors(model, clips, q0, p0, frames, sign)
        result[f"mse_per_frame_{name}"], strict = mse.mean(0).tolist(), first_bad(mse / blank, 0.1)
        result[f"strict_vpt_{name}"] = strict.median().item()
        result[f"strict_vpt_{name}_quartiles"] = strict.quantile(
            torch.tensor([0.25, 0.75], device=strict.device)
        ).tolist()
        shares.append(first_bad((mse / power)[:, window:], 0.025).mean().item() / (frames - window))
    result["vpt"] = sum(shares) / 2
    latent, true = inferred_and_true(model, clips)
    x = torch.cat((latent, latent.square(), torch.ones_like(latent[:, :1])), 1)
    left = (
        x @ torch.linalg.lstsq(x, true, driver="gelsd" if x.device.type == "cpu" else None).solution
        - true
    )
    precision = left[: len(q0)].std(0)  # at frame 0
    result["state_precision"] = precision.tolist()
    generator = torch.Generator().manual_seed(TEST_SEED + 3)
    off = (
        torch.randn(len(q0), len(precision), generator=generator, dtype=torch.float64).to(
            precision.device
        )
        * precision
    )
    q, p = (x + e.view_as(x) for x, e in zip((clips.q, clips.p), off.chunk(2, 1)))
    guess = simulate(clips.system, q, p, frames, clips.dt)[0]
    mse = torch.cat(
        [
            (render(clips.system, part, clips.size) - truth).square().mean((2, 3, 4))
            for part, truth in zip(guess.split(32), clips.truth(frames))
        ]
    )
    result["strict_vpt_ceiling"] = first_bad(mse / blank, 0.1).median().item()
    result |= symetric(latent, true)
    if hasattr(model, "sample"):  # HNN has no prior
        drawn = model.sample(
            2 * len(q0), WINDOW - 1, generator=torch.Generator().manual_seed(TEST_SEED + 4)
        )
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
    print(
        f"\n{config['system'] or config['data']}, {result['clips']} test clips, {config['context']} context frames, pixel MSE x 1e-4:"
    )
    for key, value in result.items():
        if isinstance(value, float):
            label = (
                UNSCALED.get(key)
                or LABELS.get(key)
                or "frames " + key.replace("mse_", "").replace("_", " ")
            )
            print(
                f"  {label:<42}"
                + (f"{value:>10.3g}" if key in UNSCALED else f"{value * 1e4:>10.3f}")
            )


def write_gif(path, rows, dt, scale=8):
    """An animated GIF of labelled rows of clips, {label: (n, T, 3, H, W)}, at the speed of the physics: dt seconds
    a frame. Every pixel of a clip is drawn at least `scale` wide."""
    images = []
    font = ImageFont.load_default(20)
    rows = {
        label: clip.clamp(0, 1).mul(255).round().byte().cpu().numpy()
        for label, clip in rows.items()
    }
    for t in range(max(clip.shape[1] for clip in rows.values())):
        strips = []
        for label, clip in rows.items():
            shown = clip[:, t] if t < clip.shape[1] else 0 * clip[:, 0]  # clips of one's own end
            frames = np.pad(
                shown.repeat(3 // clip.shape[2], 1).transpose(0, 2, 3, 1),
                ((0, 0), (0, 1), (0, 1), (0, 0)),
            )
            strip = np.concatenate(frames, 1).repeat(scale, 0).repeat(scale, 1)
            title = Image.new("RGB", (strip.shape[1], 28))
            ImageDraw.Draw(title).text((6, 2), f"{label}, frame {t}", fill="white", font=font)
            strips += [np.asarray(title), strip]
        images.append(np.concatenate(strips))
    iio.imwrite(path, np.stack(images), duration=1000 * dt, loop=0)


@torch.inference_mode()
def movies(
    model, clips, folder, frames, show=4, reverse=False, speeds=(), samples=0, seed=0, scale=8
):
    """Write rollout.gif and whichever of the others are asked for."""
    q0, p0 = (x[:show] for x in model.infer(clips.observed))
    dt = model.dt
    truth, (q, p) = next(clips.truth(frames, block=show)), model.rollout(q0, p0, frames - 1)
    write_gif(folder / "rollout.gif", {"truth": truth, "model": model.decode(q)}, dt, scale)
    if reverse:
        back = model.rollout(*(x[:, truth.shape[1] - 1] for x in (q, p)), frames - 1, -dt)[0]
        write_gif(
            folder / "reverse.gif",
            {
                "truth, backward from the last frame": truth.flip(1),
                "model, backward from its last state": model.decode(back),
            },
            dt,
            scale,
        )
    for speed in speeds:
        q = model.rollout(q0, p0, frames - 1, speed * dt)[0]
        true = (
            {f"truth at speed {speed:g}": next(clips.truth(frames, speed, block=show))}
            if clips.system
            else {}
        )
        write_gif(
            folder / f"speed_{speed:g}.gif",
            true | {f"model at speed {speed:g}": model.decode(q)},
            dt,
            scale,
        )
    if samples:
        frames = model.sample(samples, frames - 1, generator=torch.Generator().manual_seed(seed))
        write_gif(folder / "samples.gif", {"samples from the prior": frames}, dt, scale)


class Points:
    """What a flow learns from: a named density, or the rows of an .npy file, a tenth of them held out by the seed."""

    def __init__(self, config):
        self.density, self.rows = DENSITIES.get(config["density"]), None
        if self.density is None:
            path, rows = config["data"], read_data(config["data"])
            if rows.ndim != 2 or rows.dtype.kind not in "fiu" or len(rows) < 2 or rows.shape[1] < 1:
                fail(
                    f"--data {path} must hold at least two points, numbers of shape (N, D), not {rows.dtype} {rows.shape}"
                )
            rows = torch.from_numpy(rows.astype("float64"))
            if not rows.isfinite().all():
                fail(
                    f"--data {path} has {(~rows.isfinite()).sum()} values that are not finite: remove those rows"
                )
            if (rows.std(0) <= 1e-12 * rows.abs().amax(0)).any():
                fail(f"--data {path}: column {int(rows.std(0).argmin())} is constant: remove it")
            order = torch.randperm(
                len(rows), generator=torch.Generator().manual_seed(config["seed"])
            )
            self.rows, held = rows[order], max(1, len(rows) // 10)
            self.held_out, self.rows = self.rows[:held].float(), self.rows[held:].float()
        sample = (
            self.draw(20_000, torch.Generator().manual_seed(TEST_SEED - 1))
            if self.density
            else self.rows
        )
        self.shift, self.scale = sample.mean(0), sample.std(0, correction=0).clamp(min=1e-12)
        self.dim = sample.shape[1]

    def draw(self, n, generator):
        """n training points (n, dim)."""
        if self.density:
            return self.density.sample(n, generator)
        return self.rows[torch.randint(len(self.rows), (n,), generator=generator)]

    def test(self, n):
        """n fixed test points, never trained on; fewer if fewer were held out."""
        return (
            self.density.sample(n, torch.Generator().manual_seed(TEST_SEED))
            if self.density
            else self.held_out[:n]
        )


@torch.inference_mode()
def measure_flow(model, points, n=10_000, samples=(1, 16, 256)):
    """ELBO and log_prob, means over test points in nats; the gap of the NLL to the entropy; the modes; microseconds."""
    x, generator = points.test(n), torch.Generator().manual_seed(TEST_SEED)

    def mean(function, block=2000, **options):
        start = time.time()
        value = (
            torch.cat([function(part, generator=generator, **options) for part in x.split(block)])
            .mean()
            .item()
        )
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
            share = (
                torch.bincount(points.density.part_of(drawn), minlength=points.density.parts) / n
            )
            result["mode_weights"] = share.tolist()
            result["modes_found"] = int((share * points.density.parts >= 0.5).sum())
            if len(points.density.centres) == points.density.parts and hasattr(model, "H"):
                gaps = [torch.cdist(points.density.centres, minima(model, H)) for H in model.H]
                result["mode_to_well"] = [
                    gap.amin(1).max().item() if gap.numel() else None for gap in gaps
                ]
    return result


def minima(model, H, n=161, reach=2.5):
    """Where the potential V(q) of a plane flow has its local minima, in the user's units: (k, 2)."""
    side = torch.linspace(-reach, reach, n)
    grid = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1)
    V = H.V(grid)
    lowest = (V == -F.max_pool2d(-V[None], 3, 1, 1)[0])[1:-1, 1:-1]
    return grid[1:-1, 1:-1][lowest] * model.scale + model.shift


def heat(values, title, size=240):
    """A picture of a field (rows from low y to high y) in black, purple, orange, yellow, with its title."""
    values = torch.as_tensor(values).flip(0).numpy()
    low, high = values.min(), np.quantile(values, 0.999)  # one outlier shall not darken the rest
    level = np.clip((values - low) / (high - low + 1e-12), 0, 1)
    stops = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]])
    colour = np.stack(
        [np.interp(level, np.linspace(0, 1, 5), stops[:, i]) for i in range(3)], -1
    ).astype("uint8")
    image = Image.new("RGB", (size, size + 24))
    image.paste(Image.fromarray(colour).resize((size, size)), (0, 24))
    ImageDraw.Draw(image).text((6, 3), title, fill="white", font=ImageFont.load_default(15))
    return np.asarray(image)


def scatter(x, low, high, bins=120):
    """Points (n, 2) counted on a grid, square-rooted so that faint bridges show: (bins, bins)."""
    at = ((x[:, :2] - low) / (high - low) * bins).floor().long()
    at = at[((at >= 0) & (at < bins)).all(1)]
    return (
        torch.bincount(at[:, 1] * bins + at[:, 0], minlength=bins * bins)
        .view(bins, bins)
        .float()
        .sqrt()
    )


@torch.inference_mode()
def flow_pictures(model, points, folder, n=20_000, bins=96, seed=0):
    """density.png: target, learnt density, samples, and V(q) and K(p) of each Hamiltonian; flow.gif: base to data. Of data of
    more than two dimensions the first two, the others at their mean."""
    test, generator = points.test(n), torch.Generator().manual_seed(seed)
    drawn = model.sample(n, generator)
    if model.dim == 1:  # a line, drawn as a plane with noise in y
        test, drawn = (
            torch.cat((x, torch.randn(len(x), 1, generator=generator)), 1) for x in (test, drawn)
        )
    middle, half = test[:, :2].mean(0), 1.25 * (test[:, :2] - test[:, :2].mean(0)).abs().amax(0)
    low, high = middle - half, middle + half
    side = (torch.arange(bins) + 0.5) / bins

    def plane(low, high, dim, rest):
        y, x = torch.meshgrid(side, side, indexing="ij")
        xy = low + (high - low) * torch.stack((x, y), -1).flatten(0, 1)
        return torch.cat((xy[:, :dim], rest[2:].expand(len(xy), -1)), 1)

    rows = [
        [heat(scatter(test, low, high), "target"), None, heat(scatter(drawn, low, high), "samples")]
    ]
    grid = plane(low, high, model.dim, points.shift)
    learnt = (
        torch.cat([model.log_prob(part, 32, generator) for part in grid.split(2000)])
        .exp()
        .view(bins, bins)
    )
    rows[0][1] = heat(learnt.sqrt(), "learnt density")
    if hasattr(model, "H"):
        reach = torch.full((2,), 3.0)
        grid = plane(-reach, reach, model.dim, torch.zeros(model.dim))
        for i, H in enumerate(model.H):
            q = model.flow(*model.base.sample(2, n, model.dim, generator=generator))[0][
                :, (i + 1) * model.steps
            ]
            q = q if model.dim > 1 else torch.cat((q, torch.randn(n, 1, generator=generator)), 1)
            rows.append(
                [
                    heat(H.V(grid).view(bins, bins), f"V(q) of H {i + 1}"),
                    heat(H.K(grid).view(bins, bins), f"K(p) of H {i + 1}"),
                    heat(scatter(q, -reach, reach), f"q after H {i + 1}"),
                ]
            )
        qs = (
            model.flow(*model.base.sample(2, n, model.dim, generator=generator))[0] * model.scale
            + model.shift
        )
        if model.dim > 1:
            frames = [
                torch.lerp(qs[:, t], qs[:, t + 1], f / 4)
                for t in range(qs.shape[1] - 1)
                for f in range(4)
            ]
            frames += [qs[:, -1]] * 8
            iio.imwrite(
                folder / "flow.gif",
                np.stack([heat(scatter(x, low, high), "from base to data") for x in frames]),
                duration=100,
                loop=0,
            )
    iio.imwrite(folder / "density.png", np.concatenate([np.concatenate(row, 1) for row in rows]))


def flow_table(results):
    """Figures of one or more flows on the same test points, side by side."""
    print(
        f"\n{results[next(iter(results))]['points']} test points, nats:"
        + "".join(f"{name:>14}" for name in results)
    )
    for key in next(iter(results.values())):
        cells = [result.get(key) for result in results.values()]
        if all(isinstance(c, (int, float)) for c in cells):
            print(
                f"  {key:<24}"
                + "".join(f"{c:14d}" if isinstance(c, int) else f"{c:14.3f}" for c in cells)
            )


def eval_flow(model, checkpoint, folder, report, seed):
    """Pictures and figures of a flow; beside NHF's the newest RealNVP run on the same data, if there is one."""
    config, runs = checkpoint["config"], {checkpoint["kind"]: (model, checkpoint)}
    points = Points(config)
    if model.dim != points.dim:
        fail(
            f"{folder} holds a flow of dimension {model.dim}, the data have {points.dim}: train on them first"
        )
    same = {k: config[k] for k in ("density", "data")}
    for path in sorted(Path("runs").glob("*/checkpoint.pt"), key=os.path.getmtime):
        other = read_checkpoint(path)
        if (
            checkpoint["kind"] == "nhf"
            and other["kind"] == "realnvp"
            and same.items() <= other["config"].items()
        ):
            runs["realnvp"] = load(path)
    results = {
        name: measure_flow(m, points) | {"seconds_trained": c["seconds"]}
        for name, (m, c) in runs.items()
    }
    flow_pictures(model, points, folder, seed=seed)
    (folder / "metrics.json").write_text(json.dumps(report | {"metrics": results}, indent=1))
    flow_table(results)
    print(
        f"\nwrote density.png, {'flow.gif ' if (folder / 'flow.gif').exists() else ''}and metrics.json into {folder}"
    )


def main():
    parser = Parser(description=__doc__.split("\n")[0], formatter_class=Help)
    parser.add_argument(
        "--checkpoint", metavar="PATH", help="a checkpoint file (default: the newest run)"
    )
    parser.add_argument("--system", choices=SYSTEMS, help="take the newest run of this system")
    parser.add_argument("--density", choices=DENSITIES, help="take the newest run of this density")
    parser.add_argument(
        "--frames",
        type=at_least(2),
        default=90,
        help="frames to roll out; the paper's clips have 30",
    )
    parser.add_argument("--clips", type=at_least(2), default=256, help="test clips to measure on")
    parser.add_argument(
        "--reverse", action="store_true", help="write reverse.gif: from the last state to the first"
    )
    parser.add_argument(
        "--speed",
        type=at_least(0, float, above=True),
        action="append",
        default=[],
        help="write a GIF at this multiple of the training speed; may be given several times",
    )
    parser.add_argument(
        "--sample",
        type=at_least(0),
        default=0,
        metavar="N",
        help="write samples.gif: N rollouts from the prior",
    )
    parser.add_argument(
        "--show", type=at_least(1), default=4, help="test clips in a GIF, side by side"
    )
    parser.add_argument(
        "--scale", type=at_least(1), default=8, help="screen pixels for one pixel of a clip"
    )
    parser.add_argument(
        "--seed", type=at_least(0), default=0, help="of the samples; test clips are always the same"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    args = parser.parse_args()

    keep_memory()
    path = (
        Path(args.checkpoint)
        if args.checkpoint
        else newest_run(system=args.system, density=args.density)
    )
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
    for name in ("system", "density"):
        if getattr(args, name) not in (None, config.get(name)):
            fail(
                f"{path} was trained on {config['system'] or config['density'] or config['data']}, not {getattr(args, name)}"
            )
    if not os.access(folder, os.W_OK):
        fail(f"cannot write into {folder}: copy the checkpoint to a folder of your own")
    report = {
        **provenance(),
        "seed": args.seed,
        "test_seed": TEST_SEED,
        "checkpoint": str(path),
        "config": config,
        "training": {k: checkpoint[k] for k in ("command", "versions", "step", "seconds")},
    }
    if checkpoint["kind"] in ("nhf", "realnvp"):
        return eval_flow(model.cpu(), checkpoint, folder, report, args.seed)
    clips = test_clips(config, args.clips, device)
    result = measure(model, clips, args.frames, 1000)
    if clips.system:
        result |= measure_physics(
            model, TestClips(config, min(args.clips, 128), device=device), config["window"]
        )
    else:
        print(
            f"{config['data']}: no true system behind it, so no backward or other-speed errors, VPT, SyMetric or check of samples"
        )
    if clips.noise:
        generator = torch.Generator().manual_seed(TEST_SEED + 1)
        result["noise_floor"] = noise_floor(
            clips.system, clips.noise, clips.size, generator=generator
        )
    movies(
        model,
        test_clips(config, args.show, device),
        folder,
        args.frames,
        args.show,
        args.reverse,
        args.speed,
        args.sample,
        args.seed,
        args.scale,
    )
    (folder / "metrics.json").write_text(json.dumps(report | {"metrics": result}, indent=1))
    table(result, config)
    print(
        f"\nwrote {', '.join(sorted(p.name for p in folder.glob('*.gif')))} and metrics.json into {folder}"
    )


if __name__ == "__main__":
    main()
