"""Look at a trained model and measure it.

    python eval.py --reverse --speed 2      # the newest run; --system NAME, --checkpoint PATH

Writes movies (truth above, model below), phase.png and metrics.json into the run's folder.
"""

import argparse
import io
import json
import math
import os
import platform
import re
import shlex
import sys
import time
from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import physics
from hgn import HGN
from nhf import DENSITIES, NHF, TEST_SEED, Points, RealNVP
from physics import BACKGROUND, SYSTEMS, Recordings, render, simulate

FLOWS = {"nhf": NHF, "realnvp": RealNVP}
MODELS = {"hgn": HGN, "hnn": HGN, **FLOWS}
WINDOW = 30  # frames of the paper's test clips
READING = "size", "clip", "stride", "dt", "fps", "seed"  # options that say how to read recordings

# ------------------------------------------------------------------ runs


def number(low, high, kind=int):
    """An argparse type: a number of this kind from low to high."""

    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, not {text}")
        return kind(text)

    return number


def pick_device(name=None):
    """The device called `name`, or the best there is. Raises: ValueError."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(1, dtype=torch.float64, device=name).device
    except (RuntimeError, TypeError, AssertionError):
        raise ValueError(f"--device {name} does not work here: try --device cpu") from None


def provenance():
    """What a written result needs to be made again."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    command = shlex.join(["python", *sys.argv])
    return {"command": command, "versions": versions | {"numpy": np.__version__}}


def write(path, data):
    """Bytes to a file, all or nothing, on the disk before it gets its name. Returns the name."""
    new = path.with_name(f"{path.name}.new")
    with open(new, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    return path.name


def load(path, device="cpu"):
    """A checkpoint file -> model in eval mode, its dict; runs no code in it. Raises: ValueError."""
    if not Path(path).is_file():
        raise ValueError(f"no checkpoint at {path}: train first (python train.py --help)")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config, kind = checkpoint["config"], checkpoint["kind"]
        with torch.device("meta"):  # costs no memory, whatever the sizes are
            model = MODELS[kind](**checkpoint["model_config"])
        model.load_state_dict(checkpoint["model"], assign=True)
        same = all(model.config.get(k, v) == v for k, v in config.items() if config["system"])
        if not same or config["model"] != kind:
            raise ValueError("the options are another model's")
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ValueError(f"{path} is no checkpoint of train.py at this version") from error
    if not all(w.isfinite().all() for w in model.parameters()):
        raise ValueError(f"{path} has weights that are not finite: train again, lower --lr")
    return model.to(device).eval(), checkpoint


def open_run(where=None, device="cpu", **wanted):
    """A checkpoint's path, its model and its dict. where: a file, a run's folder, or None: the
    newest run with the options `wanted`, else the system's shipped model. Raises: ValueError."""
    wanted = {k: v for k, v in wanted.items() if v is not None}
    newest = sorted(Path("runs").glob("*/checkpoint.pt"), key=os.path.getmtime, reverse=True)
    shipped = Path(__file__).parent / f"checkpoints/{wanted.get('system', 'mass_spring')}.pt"
    for path in [Path(where)] if where else [*newest, shipped]:
        path = path / "checkpoint.pt" if path.is_dir() else path
        try:
            model, checkpoint = load(path, device)
            if wanted.items() <= checkpoint["config"].items():
                return path, model, checkpoint
            options = " ".join(f"--{k} {v}" for k, v in wanted.items())
            problem = f"{path} was not trained with {options}: python train.py {options}"
        except ValueError as error:  # perhaps an older one is whole
            problem = error
    raise ValueError(problem)


# ------------------------------------------------------------------ what a model is tested on


class HeldOut:
    """Held-out clips of recordings, used like TestClips, with no true state and no truth after
    their end. Of clips of several lengths, those of the length or more that keeps most frames."""

    system, noise = None, 0.0

    def __init__(self, config, n, device="cpu", data=None):
        how = {k: config[k] for k in READING}
        data = data or Recordings(config["data"], **how, least=config["context"] + 1)
        self.data, self.device, self.summary = data, device, data.summary
        self.size, self.channels, self.dt = data.size, data.channels, data.dt
        lengths = data.lengths[data.held_out]
        self.length = max(lengths.tolist(), key=lambda length: length * (lengths >= length).sum())
        self.clips = data.held_out[lengths >= self.length][:n]
        self.observed = next(self.truth(config["context"], block=n))

    def truth(self, frames, speed=1.0, block=32):
        """Frames from the first on at `speed`, to the end, `block` clips at a time."""
        times = (torch.arange(frames) * speed).long()
        times = times[times < self.length]
        for part in self.clips.split(block):
            yield self.data.read(part, times.expand(len(part), -1)).to(self.device)


class TestClips:
    """Fixed test clips of a system: true states q, p at frame 0, and, noisy, what is observed."""

    data, channels, length = None, 3, math.inf

    def __init__(self, config, n, device="cpu"):
        self.system, self.summary = SYSTEMS[config["system"]], config["system"]
        self.size, self.noise, self.dt = config["size"], config["noise"], config["dt"]
        length, generator = max(WINDOW, config["context"]), torch.Generator().manual_seed(TEST_SEED)
        how = length, self.dt, self.noise, self.size, generator, device
        self.observed, q, p = physics.clips(self.system, n, *how)
        self.q, self.p = q[:, 0], p[:, 0]

    def truth(self, frames, speed=1.0, block=32):
        """Clean frames from frame 0 on at `speed` (negative: backward), `block` clips at a time."""
        q = simulate(self.system, self.q, self.p, frames, speed * self.dt)[0]
        for part in q.split(block):
            yield render(self.system, part, self.size)


def test_set(config, n, device="cpu", data=None):
    """What a run is tested on: n clips (of recordings `data` if those are read), or Points."""
    if config["model"] in FLOWS:
        return Points(config["density"] or physics.read_points(config["data"]), config["seed"])
    if config["system"]:
        return TestClips(config, n, device=device)
    return HeldOut(config, n, device, data)


# ------------------------------------------------------------------ measures


def errors(model, clips, q0, p0, frames, speed=1.0):
    """Pixel MSE against the clean truth, and mean square of the truth: (clips, frames) each."""
    q = model.rollout(q0, p0, frames - 1, speed * model.dt)[0]
    mean = lambda x: x.square().mean((2, 3, 4))
    pairs = zip(q.split(32), clips.truth(frames, speed))
    pairs = [(mean(model.decode(part) - truth), mean(truth)) for part, truth in pairs]
    return tuple(torch.cat(x) for x in zip(*pairs))


def energies(model, q, p):
    """The learnt H along rollouts (B, T, ...): (B, T)."""
    return torch.stack([model.energy(*state) for state in zip(q.unbind(1), p.unbind(1))], 1)


@torch.no_grad()
def measure(model, clips, frames=90, steps=90):
    """Figures of metrics.json that are cheap enough for training: pixel MSEs against the clean
    truth, the model seeing the first `context` frames only. H is followed along `steps`."""
    frames, (q0, p0) = min(frames, clips.length), model.infer(clips.observed)
    error = errors(model, clips, q0, p0, frames)[0].mean(0)
    blank = next(clips.truth(frames)).var((0, 1)).mean().item()
    result = {"frames": frames, "clips": len(q0), "blank_mse": blank}
    result["mse_per_frame"] = error.tolist()
    for start, part in zip(range(0, frames, WINDOW), error.split(WINDOW)):
        result[f"mse_{start}_{start + len(part) - 1}"] = part.mean().item()
    speeds = {"backward": -1.0, "double_speed": 2.0, "half_speed": 0.5} if clips.system else {}
    for name, speed in speeds.items():
        error = errors(model, clips, q0, p0, min(WINDOW, frames), speed)[0]
        result[f"mse_{name}"] = error.mean().item()
    if clips.noise:
        painted = model.decode(model.rollout(q0, p0, WINDOW - 1)[0])
        result["mse_noisy"] = (painted - clips.observed[:, :WINDOW]).square().mean().item()
    q, p = model.rollout(q0, p0, steps - 1)
    H = energies(model, q, p)
    if len(q0) > 1:  # of one clip there is no spread
        result["energy_std_ratio"] = (H.std(1).median() / H[:, 0].std()).item()
    result["energy_variance"] = H.var(1).mean().item()
    back = model.rollout(q[:, -1], p[:, -1], steps - 1, -model.dt)
    back, start = torch.cat([x[:, -1] for x in back], 1), torch.cat((q0, p0), 1)
    result["reversal_error"] = ((back - start).norm(dim=1) / start.norm(dim=1)).median().item()
    if getattr(model, "gamma", None) is not None:
        result["friction"] = model.gamma.item()
    return result


def first_bad(error, limit):
    """The first frame of each row of error (clips, T) above the limit or NaN, else T."""
    return (error <= limit).cumprod(1).sum(1).float()


def wrapped(x):  # angles, into (-pi, pi]
    return torch.atan2(x.sin(), x.cos())


def symetric(latent, true, orders=5):
    """SyMetric (Higgins et al. 2021, arXiv 2111.05986): is the map from latent to true states
    symplectic, up to scale? Regression (theirs is a lasso, this one ridge) on polynomials of the
    latent (n, 2 d), order raised until R^2 >= 0.9, and its Jacobian J. Returns R^2, Sym, order."""
    d, scale, terms = latent.shape[1] // 2, latent.std(0).clamp(min=1e-9), []
    x, y = (latent - latent.mean(0)) / scale, (true - true.mean(0)) / true.std(0)
    features = lambda x: torch.stack([x[..., term].prod(-1) for term in terms], -1)
    for order in range(1, orders + 1):
        terms += map(list, combinations_with_replacement(range(2 * d), order))
        A = features(x) - features(x).mean(0)
        w = torch.linalg.solve(A.T @ A + 1e-4 * len(A) * torch.eye(len(terms)).to(A), A.T @ y)
        r2 = 1 - ((A @ w - y).square().sum() / y.square().sum()).item()
        if r2 >= 0.9 or math.comb(2 * d + order + 1, order + 1) > len(x) / 2:  # would fit noise
            break
    J = torch.func.vmap(torch.func.jacrev(lambda x: features(x) @ w))(x[:1000])  # (n, 2 D, 2 d)
    Jq, Jp = (true.std(0)[:, None] * J / scale).split(d, 2)
    brackets = Jq @ Jp.mT - Jp @ Jq.mT  # Poisson brackets of the true coordinates
    P = brackets @ brackets.mT
    P = P / P.abs().amax((1, 2)).mean() - torch.eye(true.shape[1]).to(P)
    return {"symetric_r2": r2, "symetric": P.square().mean().item(), "symetric_order": order}


def gauss_newton(f, x, target, rounds, h, most, damping):
    """x (n, dim) such that f(x) (n, m) is close to target (n, m); slopes by central differences of
    step h, steps of each number of at most `most`."""
    one = torch.eye(x.shape[1]).to(x)
    moves = h * torch.stack((one, -one)).unsqueeze(2)  # (2, dim, 1, dim)
    for _ in range(rounds):
        ahead, behind = f((x + moves).flatten(0, 2)).to(x).unflatten(0, (2, -1, len(x)))
        J = (ahead - behind).permute(1, 2, 0) / (2 * h)  # (n, m, dim)
        wrong = (target - f(x)).to(x).unsqueeze(2)
        step = torch.linalg.solve(J.mT @ J + damping * one, J.mT @ wrong)
        x = x + step.squeeze(2).clamp(-most, most)
    return x


def read(system, frames):
    """The true system's q (n, T, bodies, dims) that frames (n, T, 3, S, S) show: by colour (a pixel
    belongs to the body whose colour is nearest) and centroid, then Gauss-Newton steps on the
    difference from the re-rendered picture."""
    size, pictures = frames.shape[-1], frames.flatten(0, 1)
    light = pictures - torch.tensor(BACKGROUND).to(frames).view(3, 1, 1)
    colours = F.normalize(torch.tensor(system.colours).to(frames), dim=1)
    share = torch.einsum("ncyx,bc->nbyx", light, colours).clamp(min=1e-9)
    share = share * (share == share.amax(1, keepdim=True))
    side = (torch.arange(size).to(frames) - (size - 1) / 2) * 2 * system.half_width / size
    grid = torch.stack(torch.meshgrid(side, -side, indexing="xy"))  # (2, S, S), y upward
    centre = torch.einsum("nbyx,dyx->nbd", share, grid) / (share.sum((2, 3)) + 1e-9).unsqueeze(2)
    q = system.locate(centre).double()
    painted = lambda x: render(system, x.view(-1, 1, *q.shape[1:]), size).flatten(1)
    x = gauss_newton(painted, q.flatten(1), pictures.flatten(1), 2, 0.01, 0.2, 1e-3)
    return x.view(*frames.shape[:2], *q.shape[1:])


def judge(system, frames, dt, seen=10):
    """Shares of clips (n, T, 3, S, S) whose every frame is a picture of the system (excess pixel
    MSE at most 5e-4), and that move as the true system does from the state that fits the first
    `seen` frames best (within 0.15 world units in all)."""
    q = torch.cat([read(system, part) for part in frames.split(8)])
    excess = (render(system, q, frames.shape[-1]) - frames).square().mean((2, 3, 4))
    shown = system.position(q)
    v = wrapped(q[:, 1] - q[:, 0]) / dt  # roughly: where the fit starts
    p = system.momentum(q[:, 0], v) if system.momentum else system.inertia * v
    state = torch.stack((q[:, 0], p), 1)  # (n, 2, bodies, dims)

    def path(x, T=seen):
        q = simulate(system, *x.view(-1, *state.shape[1:]).unbind(1), T, dt)[0]
        return system.position(q).flatten(1)

    x = gauss_newton(path, state.flatten(1), shown[:, :seen].flatten(1), 4, 1e-4, 0.5, 1e-9)
    far = (path(x, shown.shape[1]).view_as(shown) - shown).norm(dim=-1).amax((1, 2))
    return (excess.amax(1) <= 5e-4).double().mean().item(), (far <= 0.15).double().mean().item()


@torch.no_grad()
def measure_physics(model, clips, window, frames=300):
    """What holds outside the window: valid prediction times, SyMetric, samples from the prior. VPT
    is Higgins et al.'s: share of the frames after the window before the error passes 0.025 of the
    picture's mean square; "strict" is the first frame whose error passes 0.1 of blank's."""
    (q0, p0), result = model.infer(clips.observed), {"vpt": 0.0}
    frames = max(frames, window + WINDOW)
    blank = next(clips.truth(WINDOW)).var((0, 1)).mean()
    for name, speed in (("forward", 1.0), ("backward", -1.0)):
        mse, power = errors(model, clips, q0, p0, frames, speed)
        result[f"strict_vpt_{name}"] = first_bad(mse / blank, 0.1).median().item()
        good = first_bad((mse / power)[:, window:], 0.025).mean().item()
        result["vpt"] += good / (frames - window) / 2
    turn = wrapped if clips.system.periodic else lambda q: q  # compare angles away from the cut
    states = [[turn(q).flatten(1), p.flatten(1)] for q, p in ((q0, p0), (clips.q, clips.p))]
    latent, true = (torch.cat(x, 1).double() for x in states)
    near = (true[:, 0].abs() < 2.9) if clips.system.periodic else slice(None)
    if latent.shape[1] <= len(latent) / 4:  # of so many numbers a linear map fits anything
        result |= symetric(latent[near], true[near])
    if not getattr(model, "deterministic", False):  # else it has no prior
        generator = torch.Generator().manual_seed(TEST_SEED + 4)
        drawn = model.sample(2 * len(q0), WINDOW - 1, generator=generator)
        result["samples_valid"], result["samples_obey"] = judge(clips.system, drawn, clips.dt)
    return result


@torch.no_grad()
def measure_flow(model, points, n=10_000, samples=(1, 16, 256)):
    """ELBO and log_prob, means over test points in nats; the gap of the NLL to the entropy and the
    standard error of both; the modes; microseconds. Raises: ValueError for another dimension."""
    if model.dim != points.dim:
        raise ValueError(f"a flow of {model.dim} dimensions, data of {points.dim}: train on them")
    x, generator = points.held_out[:n], torch.Generator().manual_seed(TEST_SEED + 5)
    result = {"points": len(x), "elbo": model.elbo(x, generator).mean().item()}
    for k in samples:
        start = time.time()
        log_p = model.log_prob(x, k, generator)
        result[f"us_per_log_prob_{k}"] = 1e6 * (time.time() - start) / len(x)
        result[f"log_prob_{k}"] = log_p.mean().item()
    start = time.time()
    drawn = model.sample(n, generator)
    result["us_per_sample"] = 1e6 * (time.time() - start) / n
    result["parameters"] = sum(w.numel() for w in model.parameters())
    result["standard_error"] = log_p.std(correction=0).item() / len(x) ** 0.5
    if density := points.density:
        result |= {"entropy": density.entropy, "gap": -log_p.mean().item() - density.entropy}
        if density.parts:
            result |= modes(model, density, drawn)
    return result


def modes(model, density, drawn, n=161, reach=2.5):
    """Each mode's share of the points drawn, (n, 2). Of a flow with one V: the farthest point of a
    mode from the nearest minimum, in the user's units; the share of the picture where V is below
    its mean on the modes."""
    parts, centres = density.parts, density.centres
    nearest = torch.cdist(drawn.to(centres), centres).argmin(1) * parts // len(centres)
    share = torch.bincount(nearest, minlength=parts) / len(drawn)
    result = {"mode_weights": share.tolist(), "modes_found": int((share * parts >= 0.5).sum())}
    if len(getattr(model, "H", ())) != 1:
        return result
    side = torch.linspace(-reach, reach, n)
    grid = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1)
    V, on = model.H[0].V(grid), model.H[0].V(model.standard(centres)[0])
    lowest = (V == -F.max_pool2d(-V[None], 3, 1, 1)[0])[1:-1, 1:-1]
    far = torch.cdist(centres, model.user(grid[1:-1, 1:-1][lowest]))
    result["mode_to_well"] = far.amin(1).max().item() if far.numel() else None
    return result | {"V_below_modes": (V < on.mean()).double().mean().item()}


LABELS = {
    "blank_mse": "mse of a blank prediction, the mean picture",
    "energy_std_ratio": "std of H along a rollout / across clips (0: conserved)",
    "strict_vpt_forward": "first frame with a tenth of blank's error, median",
    "vpt": "VPT: share of the frames after the window (Higgins)",
    "symetric_r2": "SyMetric: R^2, latent to true state (passes above 0.9)",
    "symetric": "SyMetric: distance from symplectic (passes below 0.05)",
    "samples_valid": "share of samples that are pictures of the system",
    "samples_obey": "share of samples that move as the system does",
    "gap": "gap: entropy - log prob of the most draws",
    "mode_to_well": "farthest point of a mode from the nearest minimum of V",
    "V_below_modes": "share of the picture where V is below its mean on modes",
}


def table(config, result):
    """Print the figures of `measure` (and `measure_physics`) or of `measure_flow`."""
    tests = "{points} points, nats" if "points" in result else "{clips} clips, MSE x 1e-4"
    source = config["system"] or config["density"] or config["data"]
    print(f"\n{source}, tested on {tests.format(**result)}:")
    for key, value in result.items():
        if isinstance(value, float):
            words = LABELS.get(key) or re.sub(r"(\d+)_(\d+)", r"of frames \1-\2", key)
            value *= 1e4 if "mse" in key or key == "noise_floor" else 1
            print(f"  {words.replace('_', ' '):<58}{value:>10.4g}")


# ------------------------------------------------------------------ pictures


def colours(level):
    """Levels in [0, 1] -> black, purple, orange, yellow: bytes (..., 3)."""
    stops = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]])
    channels = [np.interp(level, np.linspace(0, 1, 5), stops[:, i]) for i in range(3)]
    return np.stack(channels, -1).astype("uint8")


def panel(title, picture):
    """A picture (h, w, 3) under its title, which is written smaller where it would not fit."""
    bar = Image.new("RGB", (picture.shape[1], 28))
    wide = ImageFont.load_default(20).getlength(title)
    font = ImageFont.load_default(max(1, int(20 * min(1, (bar.width - 12) / wide))))
    ImageDraw.Draw(bar).text((6, 2), title, fill="white", font=font)
    return np.concatenate((np.asarray(bar), picture))


def save_picture(path, *arrays, delays=None):
    """Write arrays (h, w, 3) of bytes as a picture or, with delays in ms, as a GIF that repeats."""
    images, file = [Image.fromarray(x) for x in arrays], io.BytesIO()
    movie = {"save_all": True, "append_images": images[1:], "duration": delays, "loop": 0}
    images[0].save(file, path.suffix[1:], **(movie if delays else {}))
    return write(path, file.getvalue())


def strip(title, frames, scale):
    """Frames (n, C, H, W) side by side under a title: an array (h, w, 3) of bytes."""
    frames = frames.clamp(0, 1).mul(255).round().byte().cpu()
    frames = frames.repeat(1, 3 // frames.shape[1], 1, 1).permute(0, 2, 3, 1).numpy()
    frames = np.pad(frames, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=96)
    return panel(title, np.concatenate(frames, 1).repeat(scale, 0).repeat(scale, 1))


def write_gif(path, rows, dt, scale=8, seen=0):
    """A GIF, at the true speed, of labelled rows of clips, {label: (n, T, C, H, W)}; `seen` frames
    are marked as the encoder's, every pixel is drawn `scale` wide. A GIF's delays are hundredths of
    a second, two at least: of faster clips frames are left out, but ten are shown."""
    frames = max(clip.shape[1] for clip in rows.values())
    stride = min(math.ceil(max(0.02 / dt, 1) - 1e-9), max(1, frames // 10))
    shown = range(0, frames, stride)
    ends = [round(100 * dt * t) for t in (*shown, shown[-1] + stride)]
    delays = [10 * min(max(2, b - a), 65535) for a, b in zip(ends, ends[1:])]

    def row(label, clip, t):
        if t >= clip.shape[1]:
            return strip(f"{label} ends", torch.full_like(clip[:, 0], 0.4), scale)
        note = ", last context frame" if t == seen - 1 else ", context" * (t < seen)
        return strip(f"{label}, frame {t}{note}", clip[:, t], scale)

    images = [np.concatenate([row(*item, t) for item in rows.items()]) for t in shown]
    return save_picture(path, *images, delays=delays)


@torch.no_grad()
def movies(
    model, clips, folder, frames=90, show=4, reverse=False, speeds=(), samples=0, seed=0, scale=8
):
    """Write rollout.png, rollout.gif and the movies asked for. Returns the names of the files."""
    roll = lambda q, p, speed: model.decode(model.rollout(q, p, frames - 1, speed * model.dt)[0])
    q, p = (x[:show] for x in model.infer(clips.observed))
    truth, painted = next(clips.truth(frames, block=show)), roll(q, p, 1)
    films = {"rollout": {"truth": truth, "model": painted}}
    for speed in speeds:
        rows = {f"truth at speed {speed:g}": next(clips.truth(frames, speed, block=show))}
        films[f"speed_{speed:g}"] = rows | {f"model at speed {speed:g}": roll(q, p, speed)}
    if reverse:
        end = (x[:, -1] for x in model.rollout(q, p, truth.shape[1] - 1))
        rows = {"truth, backward from its last frame": truth.flip(1)}
        films["reverse"] = rows | {"model, backward from its last frame": roll(*end, -1)}
    if samples:
        drawn = model.sample(samples, frames - 1, generator=torch.Generator().manual_seed(seed))
        films["samples"] = {"samples from the prior": drawn}
    times = [t for t in (0, 15, 30, 45, 59) if t < truth.shape[1]]
    title = f"{folder.name}: truth above model, frames {', '.join(map(str, times))}"
    above, below = (strip(title, x[0, times], scale) for x in (truth, painted))
    wrote = [save_picture(folder / "rollout.png", np.concatenate((above, below[28:])))]
    for name, rows in films.items():
        seen = model.context if name == "rollout" else 0
        wrote.append(write_gif(folder / f"{name}.gif", rows, model.dt, scale, seen))
    return wrote


def plot(title, size=144, **axes):
    """A picture of points over two of three axes, tensors of one shape; the third is their colour.
    A line under the title says from where to where each axis goes."""
    unit = lambda v: ((v - v.min()) / (v.max() - v.min() + 1e-12)).nan_to_num().cpu().numpy()
    scales = ", ".join(f"{name} {v.min():.2g} to {v.max():.2g}" for name, v in axes.items())
    x, y, level = axes.values()
    image = np.full((size, size, 3), 24, "uint8")
    row, column = ((2 + (size - 5) * unit(v)).astype(int) for v in (-y, x))
    image[row, column] = colours(0.25 + 0.75 * unit(level))
    return panel(title, panel(scales, image.repeat(2, 0).repeat(2, 1)))


@torch.no_grad()
def phase(model, clips, folder, frames=90, n=24):
    """phase.png: p over q of the coordinate that moves most, and H over time, of n rollouts; of a
    known system the true ones beside. Returns the file's name."""
    q, p = model.rollout(*(x[:n] for x in model.infer(clips.observed)), frames - 1)
    states, panels = {"learnt": (q, p, energies(model, q, p))}, []
    if clips.system:
        q, p = simulate(clips.system, clips.q[:n], clips.p[:n], frames, clips.dt)
        states["true"] = q, p, clips.system.energy(q, p)
    for name, (q, p, H) in states.items():
        q, p, frame = q.flatten(2), p.flatten(2), torch.arange(frames).to(H).expand_as(H)
        i = q.var((0, 1)).argmax().item()
        axes = {f"q{i + 1}": q[..., i], f"p{i + 1}": p[..., i]}
        panels.append(plot(f"{name}: {n} orbits, colour H", **axes, H=H))
        panels.append(plot(f"{name}: H along them", frame=frame, H=H, colour=H))
    return save_picture(folder / "phase.png", np.concatenate(panels, 1))


def gather(out, *folders):
    """out.json: errors of runs that `eval.py` has looked at, over that of a blank prediction.
    out.png: their rollout.png, of one size, three a row without gaps."""
    runs, pictures = {}, [np.asarray(Image.open(Path(x) / "rollout.png")) for x in folders]
    for folder in map(Path, folders):
        report = json.loads((folder / "metrics.json").read_text())
        metrics, blank = report["metrics"], report["metrics"]["blank_mse"]
        over = {f"{k}_over_blank": v / blank for k, v in metrics.items() if k[4:5].isdigit()}
        runs[folder.name] = over | {"blank_mse": blank, **report["training"]}
    rows = [np.concatenate(pictures[i : i + 3], 1) for i in range(0, len(pictures), 3)]
    save_picture(Path(f"{out}.png"), np.concatenate(rows))
    report = {**provenance(), "command": f"eval.gather{(out, *folders)}", "runs": runs}
    write(Path(f"{out}.json"), json.dumps(report, indent=1).encode())


def heat(values, title, low, high, marks=None, size=288):
    """A picture of a field (rows from low y to high y) over the box from low to high, (2,) each,
    with points `marks` (n, 2) in white and a colour bar."""
    bottom, top = values.min().item(), values.quantile(0.999).item()  # an outlier darkens no rest
    level = F.interpolate(values[None, None], (size, size), mode="bilinear")[0, 0]
    picture = colours(((level - bottom) / (top - bottom + 1e-12)).clamp(max=1).numpy())
    if marks is not None:
        picture[scatter(marks, low, high, size).numpy() > 0] = 255
    bar = colours(np.linspace(0, 1, size)[:, None].repeat(12, 1))
    x, y = (f"{a:.2g} to {b:.2g}" for a, b in zip(low, high))
    scales = f"x {x}, y {y}, colour {bottom:.2g} to {top:.2g}"
    return panel(title, panel(scales, np.concatenate((picture, bar), 1)[::-1]))


def scatter(x, low, high, bins=96):
    """Points (n, 2) counted on a grid, square-rooted so that faint bridges show: (bins, bins)."""
    at = ((x[:, :2] - low) / (high - low) * bins).floor().long()
    at = at[((at >= 0) & (at < bins)).all(1)]
    count = torch.bincount(at[:, 1] * bins + at[:, 0], minlength=bins * bins)
    return count.view(bins, bins).float().sqrt()


@torch.no_grad()
def flow_pictures(model, points, folder, n=20_000, bins=96, seed=0):
    """density.png: target, learnt density, samples; of each Hamiltonian V(q) with the data's
    contour, K(p), and V with paths from base to data. flow.gif: points on V. Of more dimensions the
    first two, the others at their mean; of one nothing. Returns the names of the files."""
    if model.dim < 2:
        return []
    test, generator = points.held_out, torch.Generator().manual_seed(seed)
    middle, three = test[:, :2].mean(0), torch.full((2,), 3.0)
    half = 1.25 * (test[:, :2] - middle).abs().amax(0)
    user, inner = (middle - half, middle + half), (-three, three)

    def grid(low, high, others, bins=bins):
        side = (torch.arange(bins) + 0.5) / bins
        plane = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1).flatten(0, 1)
        plane = torch.lerp(low, high, plane.to(low))
        return torch.cat((plane, others[2:].expand(len(plane), -1).to(low)), 1)

    learnt = model.log_prob(grid(*user, points.shift), 32, generator).div(2).exp()
    shown = {"target": scatter(test, *user), "learnt density": learnt.view(bins, bins)}
    shown["samples"] = scatter(model.sample(n, generator), *user)
    note = f", x1, x2 of {model.dim}" * (model.dim > 2) + ", its square root"
    rows, movie = [[heat(x, title + note, *user) for title, x in shown.items()]], []
    if hasattr(model, "H"):
        dense = scatter(model.standard(test)[0], *inner)[None, None]
        dense = F.interpolate(F.avg_pool2d(dense, 5, 1, 2), (288, 288), mode="bilinear").flatten()
        edge = ((dense / dense.max() - 0.3).abs() < 0.03).nonzero()[:, 0]
        edge = grid(*inner, three, 288)[edge]
        path = model.flow(*model.noise(2, n, model.dim, generator=generator))[0][..., :2]
    for i, H in enumerate(getattr(model, "H", ())):
        show = lambda x, what, marks=None: heat(x, f"H{i + 1}: {what}", *inner, marks)
        V, K = (f(grid(*inner, torch.zeros(model.dim))).view(bins, bins) for f in (H.V, H.K))
        wall = H.V(model.standard(test)[0]).quantile(0.999)  # what data reach: half the colours
        V = V.clamp(max=2 * wall - V.min())
        times = range(i * model.steps, (i + 1) * model.steps + 1)
        lines = F.interpolate(path[:24, : times[-1] + 1].mT, 1000, mode="linear")
        row = show(V, "V(q), data's contour", edge), show(K, "K(p)")
        rows.append([*row, show(V, "paths, base to data", lines.mT.flatten(0, 1))])
        movie += [show(V, "q on V", path[:2000, t]) for t in times]
    wrote = [save_picture(folder / "flow.gif", *movie, delays=150)] if movie else []
    picture = np.concatenate([np.concatenate(row, 1) for row in rows])
    return [save_picture(folder / "density.png", picture), *wrote]


# ------------------------------------------------------------------ command line


def parse():
    """The command line as a namespace."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.print_usage = lambda file: None  # a mistake gets one line; --help says more
    add = parser.add_argument
    add("--checkpoint", metavar="PATH", help="a file or a run's folder (default: the newest run)")
    add("--system", choices=SYSTEMS, help="take the newest run of this system")
    add("--density", choices=DENSITIES, help="take the newest run of this density")
    add("--frames", type=number(2, 10_000), default=90, help="to roll out (default: 90)")
    add("--clips", type=number(2, 10_000), default=256, help="to measure on (default: 256)")
    add("--reverse", action="store_true", help="reverse.gif: from the last state to the first")
    speed = number(1e-3, 1e3, float)
    add("--speed", type=speed, action="append", default=[], help="a GIF at this speed; repeatable")
    add("--sample", type=number(0, 1000), default=0, metavar="N", help="samples.gif: N of them")
    add("--show", type=number(1, 100), default=4, help="clips in a GIF (default: 4)")
    add("--scale", type=number(1, 64), default=8, help="screen pixels a pixel (default: 8)")
    add("--seed", type=number(0, 2**63 - 1), default=0, help="of samples (default: 0)")
    add("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    return parser.parse_args()


def look(args):
    """Show and measure a run."""
    device = pick_device(args.device)
    wanted = {"system": args.system, "density": args.density}
    path, model, checkpoint = open_run(args.checkpoint, device, **wanted)
    config, folder = checkpoint["config"], path.parent
    if folder.name == "checkpoints":  # of all systems: each gets a folder of its own
        folder = Path("runs") / f"{path.stem}-shipped"
        folder.mkdir(parents=True, exist_ok=True)
    test = test_set(config, args.clips, device)
    source = getattr(test, "summary", config["density"] or config["data"])
    print(f"{path}: {source}\nmovies and pictures ...")
    if config["model"] in FLOWS:
        model = model.cpu()
        wrote = flow_pictures(model, test, folder, seed=args.seed)
        print("likelihoods ...")
        result = measure_flow(model, test)
    else:
        shown = test_set(config, args.show, device, test.data)
        asked = args.reverse, args.speed, args.sample, args.seed, args.scale
        wrote = movies(model, shown, folder, args.frames, args.show, *asked)
        wrote.append(phase(model, test, folder, args.frames))
        print("errors and energies ...")
        result = measure(model, test, args.frames, 1000)
        if test.system:
            print("prediction times, SyMetric, samples ...")
            result |= measure_physics(model, test, config["window"])
        if test.noise:
            source = torch.Generator().manual_seed(TEST_SEED + 1)
            floor = physics.noise_floor(test.system, test.noise, test.size, generator=source)
            result["noise_floor"] = floor
    table(config, result)
    training = {k: checkpoint.get(k) for k in ("command", "versions", "step", "seconds")}
    report = {**provenance(), "seed": args.seed, "test_seed": TEST_SEED, "checkpoint": str(path),
              "config": config, "training": training, "metrics": result}  # fmt: skip
    wrote.append(write(folder / "metrics.json", json.dumps(report, indent=1).encode()))
    print(f"\nwrote {', '.join(wrote)} into {folder}")


def main():
    try:
        look(parse())
    except (ValueError, OSError) as error:  # a user's mistake
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
