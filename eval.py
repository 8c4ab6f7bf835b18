"""Look at a trained model and measure it: movies, pictures and figures, into the run's folder.

python eval.py --reverse --speed 2      # the newest run; --system NAME, --checkpoint PATH
"""

import argparse
import ctypes
import io
import json
import math
import os
import re
import shlex
import sys
import time
from functools import partial
from itertools import combinations, combinations_with_replacement
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from hgn import FRAME, HGN
from nhf import DENSITIES, NHF, TEST_SEED, Points, RealNVP
from physics import SYSTEMS, Recordings, clips, gauss_newton, initial_states, jitter, read_points
from physics import read_q, render, simulate

FLOWS = {"nhf": NHF, "realnvp": RealNVP}
if hasattr(libc := ctypes.CDLL(None) if sys.platform == "linux" else None, "mallopt"):  # glibc
    [libc.mallopt(*x) for x in ((-1, 2**31 - 1), (-3, 2**25))]  # keep what is freed: no page faults
WINDOW = 30  # frames of the paper's test clips
SIZE = 288  # pixels of a chart's side
OF_PICTURES = "frames", "clips", "reverse", "speed", "sample", "show", "scale"  # options
PLAIN = str | float | int | None  # what options are
wrapped = lambda x: torch.atan2(x.sin(), x.cos())  # angles, into (-pi, pi]


def number(low, high, kind=int, word=None):  # an argparse type: from low to high, or the word
    def number(text):
        if text != word and not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, not {text}")
        return text if text == word else kind(text)

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
    versions = {"python": sys.version.split()[0], "torch": str(torch.__version__)}
    command = shlex.join(["python", *sys.argv])
    return {"command": command, "versions": versions | {"numpy": np.__version__}}


def write(path, data):
    """Bytes to a file, all or nothing, on the disk before it gets its name. Returns the name."""
    new = path.with_name(f"{path.name}.new")
    try:
        with open(new, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # a full disk gets back what was written
        new.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error.strerror}. Make room, go on") from error
    return new.replace(path).name


def load(path, device="cpu", **wanted):
    """A checkpoint file of a run with the options `wanted` that are not None -> model in eval mode,
    its dict; runs no code in it. Raises: ValueError."""
    cure = " ".join(["python train.py", *(f"--{k} {v}" for k, v in wanted.items() if v)])
    if not Path(path).is_file():
        raise ValueError(f"no checkpoint file at {path}: {cure}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config, kind = checkpoint["config"], checkpoint["kind"]
        with torch.device("meta"):  # costs no memory, whatever the sizes are
            model = ({"hgn": HGN, "hnn": HGN} | FLOWS)[kind](**checkpoint["model_config"])
        model.load_state_dict(checkpoint["model"], assign=True)
        same = all(model.config.get(k, v) == v for k, v in config.items() if config["system"])
        plain = *config.values(), *map(checkpoint.get, ("command", "step", "seconds", "logged"))
        if not same or config["model"] != kind or not all(isinstance(v, PLAIN) for v in plain):
            raise ValueError("the options are another model's")
        other = any(v not in (None, config[k]) for k, v in wanted.items())
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ValueError(f"{path} is no checkpoint of train.py at this version") from error
    if not all(w.isfinite().all() for w in model.parameters()):
        raise ValueError(f"{path} has weights that are not finite: train again, lower --lr")
    if other:
        raise ValueError(f"{path} was not trained like that: {cure}")
    return model.to(device).eval(), checkpoint


def open_run(where=None, device="cpu", **wanted):
    """A checkpoint's path, its model and its dict. where: a file, a run's folder, or None: the
    newest run with the options `wanted`, else the system's shipped model. Raises: ValueError."""
    newest = sorted(Path("runs").glob("*/checkpoint.pt"), key=os.path.getmtime, reverse=True)
    name = next(filter(None, wanted.values()), "mass_spring")
    shipped = Path(__file__).parent / f"checkpoints/{name}.pt"
    for path in [Path(where)] if where else [*newest, shipped]:
        path = path / "checkpoint.pt" if path.is_dir() else path
        try:
            return path, *load(path, device, **wanted)
        except ValueError as error:  # perhaps an older one is whole
            problem = error
    raise problem


class TestClips:
    """Fixed test clips of a system: true states q, p at frame 0, and, noisy, what is observed."""

    def __init__(self, config, n, device="cpu"):
        self.data, self.digest, self.channels, self.length = None, None, 3, math.inf
        self.system, self.summary = SYSTEMS[config["system"]], config["system"]
        self.size, self.noise, self.dt = config["size"], config["noise"], config["dt"]
        length, generator = max(WINDOW, config["context"]), torch.Generator().manual_seed(TEST_SEED)
        how = length, self.dt, self.noise, self.size, generator, device
        self.observed, q, p = clips(self.system, n, *how)
        self.q, self.p = q[:, 0], p[:, 0]

    def truth(self, frames, speed=1.0, block=32):
        """Clean frames from frame 0 on at `speed` (negative: backward), `block` clips at a time."""
        for q in simulate(self.system, self.q, self.p, frames, speed * self.dt)[0].split(block):
            yield render(self.system, q, self.size)


class HeldOut:
    """The same of recordings, whose truth ends: held-out clips as long as keeps most frames."""

    def __init__(self, config, n, device="cpu", data=None):
        how = {k: config[k] for k in ("size", "clip", "stride", "dt", "fps", "seed")}
        data = data or Recordings(config["data"], **how, least=config["context"] + 1)
        self.data, self.device, self.system, self.noise = data, device, None, 0.0
        self.size, self.channels, self.dt = data.size, data.channels, data.dt
        self.summary, self.digest, lengths = data.summary, data.digest, data.lengths[data.held_out]
        self.length = max(lengths.tolist(), key=lambda length: length * (lengths >= length).sum())
        self.clips = data.held_out[lengths >= self.length][:n]
        self.observed = next(self.truth(config["context"], block=n))

    def truth(self, frames, speed=1.0, block=32):
        times = torch.tensor([int(speed * t) for t in range(frames) if speed * t < self.length])
        for part in self.clips.split(block):
            yield self.data.read(part, times.expand(len(part), -1)).to(self.device)


def test_set(config, n, device="cpu", data=None):
    """What a run is tested on. Raises: ValueError where it is not what the run learnt from."""
    if config["model"] in FLOWS:
        source = config["density"] or read_points(config["data"])
        test = None if source is None else Points(source, config["seed"], config["data"])
    elif config["system"]:
        test = TestClips(config, n, device)
    else:
        test = HeldOut(config, n, device, data)
    if test is None or config.get("digest") not in (None, test.digest):
        raise ValueError(f"{config['data']} is not what the run learnt from: put that back")
    return test


def noise_floor(system, noise="paper", size=32, n=2000, draws=32, generator=None):
    """Smallest pixel MSE any model can reach under `noise`: the mean variance of a pixel given the
    true state, by Monte Carlo over n random states with `draws` noisy pictures each."""
    q, _ = simulate(system, *initial_states(system, n, generator), 8, dt=0.5)
    q = q[:, -1:].expand(-1, draws, -1, -1)  # away from the start
    return render(system, jitter(system, q, noise, generator), size).var(1).mean().item()


def errors(model, clips, q0, p0, frames, speed=1.0):
    """Pixel MSE against the clean truth, (clips, frames)."""
    q = model.rollout(q0, p0, frames - 1, speed * model.dt)[0].split(32)
    q = tqdm(q, f"{frames} frames at speed {speed:g}", leave=False)
    pairs = zip(q, clips.truth(frames, speed))
    return torch.cat([(model.decode(x) - truth).square().mean((2, 3, 4)) for x, truth in pairs])


@torch.no_grad()
def measure(model, clips, frames=90, steps=90):
    """Figures of metrics.json that are cheap enough for training: pixel MSEs against the clean
    truth, the model seeing the first `context` frames only. H is followed along `steps`."""
    frames, (q0, p0) = min(frames, clips.length), model.infer(clips.observed)
    error = errors(model, clips, q0, p0, frames).mean(0)
    result = {"frames": frames, "clips": len(q0), "mse_per_frame": error.tolist()}
    result["blank_mse"] = next(clips.truth(frames)).var((0, 1)).mean().item()
    for start, part in zip(range(0, frames, WINDOW), error.split(WINDOW)):
        result[f"mse_{start}_{start + len(part) - 1}"] = part.mean().item()
    speeds = {"backward": -1.0, "double_speed": 2.0, "half_speed": 0.5} if clips.system else {}
    for name, speed in speeds.items():
        result[f"mse_{name}"] = errors(model, clips, q0, p0, WINDOW, speed).mean().item()
    if clips.noise:
        painted = model.decode(model.rollout(q0, p0, WINDOW - 1)[0])
        result["mse_noisy"] = (painted - clips.observed[:, :WINDOW]).square().mean().item()
        how, generator = (clips.noise, clips.size), torch.Generator().manual_seed(TEST_SEED + 1)
        result["noise_floor"] = noise_floor(clips.system, *how, generator=generator)
    q, p = model.rollout(q0, p0, steps - 1)
    H = torch.stack([*map(model.energy, q.unbind(1), p.unbind(1))], 1)
    if len(q0) > 1:  # of one clip there is no spread
        result["energy_std_ratio"] = (H.std(1).median() / H[:, 0].std()).item()
    result["energy_variance"] = H.var(1).mean().item()
    if getattr(model, "gamma", None) is not None:
        result["friction"] = model.gamma.item() * FRAME / model.dt
    return result


def symetric(latent, true, orders=5):
    """SyMetric (Higgins et al. 2021, arXiv 2111.05986): is latent -> true state symplectic, up to
    scale? By the Jacobian of a regression (ridge, theirs is a lasso) on polynomials of (n, 2 d).
    True states (n, 2 D) count along directions of p of a tenth of the largest spread or more: where
    a centre of mass hardly moves, no regression sees its brackets."""
    d, scale, terms = latent.shape[1] // 2, latent.std(0).clamp(min=1e-9), []
    p = true.chunk(2, 1)[1]
    spread, along = torch.linalg.svd(p - p.mean(0), full_matrices=False)[1:]
    true = torch.cat([x @ along[spread > 0.1 * spread[0]].mT for x in true.chunk(2, 1)], 1)
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


def judge(system, frames, dt, seen=10):
    """Shares of clips (n, T, 3, S, S) that show the system (excess pixel MSE at most 5e-4 in every
    frame), and that stay within 0.15 of its motion from the state that fits `seen` frames best."""
    q = torch.cat([read_q(system, part) for part in tqdm(frames.split(8), "samples", leave=False)])
    excess = (render(system, q, frames.shape[-1]) - frames).square().mean((2, 3, 4))
    shown = system.position(q)
    p = system.inertia * wrapped(q[:, 1] - q[:, 0]) / dt  # roughly: where the fit starts
    path = lambda x, T=seen: system.position(simulate(system, *x.unbind(1), T, dt)[0])
    start = torch.stack((q[:, 0], p), 1)  # (n, 2, bodies, dims)
    start = gauss_newton(path, start, shown[:, :seen], 4, 1e-4, 0.5, 1e-9)
    far = (path(start, shown.shape[1]) - shown).norm(dim=-1).amax((1, 2))
    return (excess.amax(1) <= 5e-4).double().mean().item(), (far <= 0.15).double().mean().item()


@torch.no_grad()
def measure_physics(model, clips, frames=300):
    """Valid prediction times, forward and backward: frames until the error passes a tenth of that
    of a blank prediction (Higgins et al.'s VPT, more strictly); SyMetric; samples."""
    (q0, p0), result = model.infer(clips.observed), {}
    blank = next(clips.truth(WINDOW)).var((0, 1)).mean()
    for name, speed in (("forward", 1.0), ("backward", -1.0)):
        good = errors(model, clips, q0, p0, frames, speed) <= 0.1 * blank  # NaN is not
        result[f"strict_vpt_{name}"] = good.cumprod(1).sum(1).float().median().item()
    if q0.shape[1] <= len(q0) / 8:  # of so many numbers a linear map fits anything
        truth = simulate(clips.system, clips.q, clips.p, WINDOW, clips.dt)
        paths = model.rollout(q0, p0, WINDOW - 1), truth  # ten points of each
        paths = [[x[:, ::3].flatten(2).double() for x in path] for path in paths]
        for (q, _), angles in zip(paths, (model.config["periodic"], clips.system.periodic)):
            if angles:  # that start away from the cut
                first = q[:, :1] - torch.atan2(q[:, 0].sin().mean(0), q[:, 0].cos().mean(0))
                q += wrapped(first) - q[:, :1]
        result |= symetric(*(torch.cat(path, 2).flatten(0, 1) for path in paths))
    if not getattr(model, "deterministic", False):  # else it has no prior
        generator = torch.Generator().manual_seed(TEST_SEED + 4)
        drawn = model.sample(min(256, 2 * len(q0)), WINDOW - 1, generator=generator)
        result["samples_valid"], result["samples_obey"] = judge(clips.system, drawn, clips.dt)
    return result


@torch.no_grad()
def measure_flow(model, points, n=10_000, samples=(16, 256)):
    """Means over test points: nats, of ELBO, log_prob and its gap to the entropy; microseconds."""
    x, generator = points.held_out[:n], torch.Generator().manual_seed(TEST_SEED + 5)
    result = {"points": len(x), "elbo": model.elbo(x, generator).mean().item()}
    for k in samples:
        start = time.time()
        log_p = model.log_prob(x, k, generator)
        result[f"us_per_log_prob_{k}"] = 1e6 * (time.time() - start) / len(x)
        result[f"log_prob_{k}"] = log_p.mean().item()
    result["parameters"] = sum(w.numel() for w in model.parameters())
    result["standard_error"] = log_p.std(correction=0).item() / len(x) ** 0.5
    if density := points.density:
        result |= {"entropy": density.entropy, "gap": -log_p.mean().item() - density.entropy}
    return result


LABELS = {
    "blank_mse": "mse of a blank prediction, the mean picture",
    "energy_std_ratio": "std of H along a rollout over that across clips (0: kept)",
    "strict_vpt_forward": "strict VPT forward: median first frame at 0.1 of blank's",
    "symetric_r2": "SyMetric: R^2, latent to true state (passes above 0.9)",
    "symetric": "SyMetric: what moves is this far from symplectic (< 0.05)",
    "samples_valid": "share of samples that are pictures of the system",
    "samples_obey": "share of samples that move as the system does",
}


def table(config, result):
    """Print the figures of `measure` (and `measure_physics`) or of `measure_flow`."""
    tests = "points: {points}; nats" if "points" in result else "clips: {clips}; MSE x 1e-4"
    source = config["system"] or config["density"] or config["data"]
    print(f"\n{source}, tested on {tests.format(**result)}")
    for key, value in result.items():
        if isinstance(value, float):
            words = LABELS.get(key) or re.sub(r"(\d+)_(\d+)", r"of frames \1-\2", key)
            value *= 1e4 if "mse" in key or key == "noise_floor" else 1
            print(f"  {words.replace('us_', 'microseconds_').replace('_', ' '):<58}{value:>10.4g}")


def panel(title, picture):
    """A picture (h, w, 3) under its title, which is written smaller where it would not fit."""
    bar = Image.new("RGB", (picture.shape[1], 28))
    size = 19 * (bar.width - 12) / ImageFont.load_default(20).getlength(title)  # 19: small is wide
    font = ImageFont.load_default(min(20, max(1, int(size))))
    ImageDraw.Draw(bar).text((6, 2), title, fill="white", font=font)
    return np.concatenate((np.asarray(bar), picture))


def save_picture(path, *arrays, delays=None):
    """Write arrays (h, w, 3) of bytes as a picture or, with delays in ms, as a GIF that repeats."""
    images, file = [Image.fromarray(x) for x in arrays], io.BytesIO()
    movie = {"save_all": True, "append_images": images[1:], "duration": delays, "loop": 0}
    images[0].save(file, path.suffix[1:], **(movie if delays else {}))
    return write(path, file.getvalue())


def strip(title, frames, scale):
    """Frames (rows, columns, C, H, W) as one picture under a title: an array (h, w, 3) of bytes."""
    frames = frames.clamp(0, 1).mul(255).round().byte().cpu().expand(-1, -1, 3, -1, -1)
    frames = F.pad(frames, (0, 1, 0, 1), value=96).permute(0, 3, 1, 4, 2)
    frames = frames.flatten(2, 3).flatten(0, 1).numpy()
    return panel(title, frames.repeat(scale, 0).repeat(scale, 1))


@torch.no_grad()
def movies(
    model, clips, folder, frames=90, show=4, reverse=False, speeds=(), samples=0, seed=0, scale=8
):
    """Write rollout.png, rollout.gif and the GIFs asked for, at the true speed: of clips above 50
    frames a second some are left out, but ten are shown. Returns the names of the files."""
    roll = lambda q, p, speed: model.decode(model.rollout(q, p, frames - 1, speed * model.dt)[0])
    q, p = (x[:show] for x in model.infer(clips.observed))
    truth, painted = next(clips.truth(frames, block=show)), roll(q, p, 1)
    title = "truth above model"
    films = {"rollout": (title, truth, painted)}
    for speed in speeds:
        both = next(clips.truth(frames, speed, block=show)), roll(q, p, speed)
        films[f"speed_{speed:g}"] = f"{title}, speed {speed:g}", *both
    if reverse:
        end = (x[:, -1] for x in model.rollout(q, p, truth.shape[1] - 1))
        films["reverse"] = f"{title}, backward from the last", truth.flip(1), roll(*end, -1)
    if samples:
        drawn = model.sample(samples, frames - 1, generator=torch.Generator().manual_seed(seed))
        films["samples"] = "samples from the prior", drawn
    times = [math.ceil(i * (truth.shape[1] - 1) / 4) for i in range(5)]
    still = torch.stack((truth[0, times], painted[0, times]))
    still = strip(f"{folder.name}: {title}, frames {', '.join(map(str, times))}", still, scale)
    wrote = [save_picture(folder / "rollout.png", still)]
    stride = min(math.ceil(max(0.02 / model.dt, 1) - 1e-9), max(1, frames // 10))
    ends = [round(100 * model.dt * t) for t in range(0, frames + stride, stride)]
    delays = [10 * min(max(2, b - a), 65535) for a, b in zip(ends, ends[1:])]  # ms
    for name, (title, *rows) in films.items():
        images = []
        for t in range(0, frames, stride):
            left = model.context - t if name == "rollout" else 0
            note = ", context" * (left > 0) + ", its last frame" * (left == 1)
            note += ", truth has ended" * (t >= rows[0].shape[1])
            row = [x[:, t] if t < x.shape[1] else 0 * x[:, 0] + 0.4 for x in rows]  # grey: ended
            images.append(strip(f"{title}, frame {t}{note}", torch.stack(row), scale))
        wrote.append(save_picture(folder / f"{name}.gif", *images, delays=delays))
    return wrote


def chart(title, level, box, marks=False, ends=None):
    """A picture of values on a grid, NaN where there are none, rows from low to high y, over a box
    {axis: its two ends}, white where `marks` (SIZE, SIZE); beside it the colours between `ends`."""
    low, high = ends or (np.nanmin(level), np.nanquantile(level, 0.999))  # outliers darken no rest
    above = ">" * bool(np.nanmax(level) > high)
    level = Image.fromarray(((level - low) / max(high - low, 1e-99)).astype("float32"))
    bar = np.linspace(0, 1, SIZE)[:, None].repeat(12, 1)
    level = np.concatenate((level.resize((SIZE, SIZE)), bar), 1).clip(0, 1)
    picture = np.stack((level**0.5, level**2, 0.7 - 0.6 * level), 2)  # blue, purple, orange, yellow
    picture = np.rint(210 * np.nan_to_num(picture)).astype("uint8")  # less than white marks
    picture[:, :SIZE][marks] = 255
    sheet = Image.new("RGB", (SIZE + 180, SIZE + 24))  # room for words left, below and right
    sheet.paste(Image.fromarray(picture[::-1]), (80, 0))
    pen, font, middle = ImageDraw.Draw(sheet), ImageFont.load_default(14), SIZE / 2
    (x, (left, right)), (y, (bottom, top)) = box.items()
    for at, anchor, word in (
        ((80, SIZE + 4), "la", f"{left:.3g}"), ((80 + middle, SIZE + 4), "ma", x),
        ((80 + SIZE, SIZE + 4), "ra", f"{right:.3g}"), ((74, SIZE), "rd", f"{bottom:.3g}"),
        ((74, middle), "rm", y), ((74, 0), "ra", f"{top:.3g}"),
        ((98 + SIZE, SIZE), "ld", f"{low:.3g}"), ((98 + SIZE, 0), "la", f"{above}{high:.3g}"),
    ):  # fmt: skip
        pen.text(at, word, "white", font, anchor)
    return panel(title, np.asarray(sheet))


@torch.no_grad()
def phase(model, clips, folder, frames=90, n=24):
    """phase.png, its name: p over the q that moves most, H over time; of systems the true too."""
    q, p = model.rollout(*(x[:n] for x in model.infer(clips.observed)), frames - 1)
    H = torch.stack([*map(model.energy, q.unbind(1), p.unbind(1))], 1)
    states, panels = {"learnt": (q, p, H)}, []
    if clips.system:
        q, p = simulate(clips.system, clips.q[:n], clips.p[:n], frames, clips.dt)
        states["true"] = q, p, clips.system.energy(q, p)
    for name, (q, p, H) in states.items():
        frame, i = torch.arange(frames).to(H).expand_as(H), q.flatten(2).var((0, 1)).argmax().item()
        orbits = {f"q{i + 1}": q.flatten(2)[..., i], f"p{i + 1}": p.flatten(2)[..., i]}
        for what, axes in {"p over q": orbits, "H over time": {"frame": frame, "H": H}}.items():
            points = torch.stack((*axes.values(), H), 2).flatten(0, 1).double().cpu()
            points = points[points.isfinite().all(1)].numpy()
            x, y, energy = points.T
            more = max(0, 0.1 * abs(y).max() - np.ptp(y))  # what hardly changes shows as a line
            box = dict(zip(axes, ((x.min(), x.max()), (y.min() - more, y.max() + more))))
            n, total = (count(points, box, SIZE // 2, weights) for weights in (None, energy))
            level = np.kron(total / np.where(n, n, np.nan), np.ones((2, 2)))
            panels.append(chart(f"{name}: {what}, colour H", level, box))
    return save_picture(folder / "phase.png", np.concatenate(panels, 1))


def count(x, box, k=SIZE, weights=None):  # of points (n, >= 2), in each of k x k cells of a box
    return np.histogram2d(x[:, 1], x[:, 0], k, [*box.values()][::-1], weights=weights)[0]


@torch.no_grad()
def flow_pictures(model, points, folder, n=20_000, seed=0):
    """density.png: data, learnt density, samples, and `landscapes`; of more than two dimensions
    data and samples alone, over the three pairs of (64) columns where these differ most. flow.gif:
    points on V. In the user's units, but for p; outliers lie outside. Returns names."""
    test, shift, generator = points.rows[:n], points.shift, torch.Generator().manual_seed(seed)
    drawn, far = model.sample(len(test), generator), (test - shift).abs().sort(0).values
    half = 1.5 * torch.maximum(far[-1 - len(far) // 1000], points.scale.norm(dim=1))
    ends = torch.stack((shift - half, shift + half), 1).tolist()
    pairs = combinations(range(min(model.dim, 64)), 2)
    boxes = {pair: {f"x{k + 1}": ends[k] for k in pair} for pair in pairs}
    both = lambda pair, k: [count(x[:, pair], boxes[pair], k) for x in (test, drawn)]
    rows, movie = [[], []], []  # of data and of samples
    for pair in sorted(boxes, key=lambda pair: -abs(np.subtract(*both(pair, 16))).sum())[:3]:
        cell = 4 * half[[*pair]].prod().item() / 96**2
        data, samples = (x / len(test) / cell for x in both(pair, 96))
        show = partial(chart, box=boxes[pair], ends=(0.0, np.quantile(data[data > 0], 0.99)))
        rows[0].append(show("density of data", data))
        rows[1].append(show("density of samples", samples))
    if model.dim == 2:
        side = (2 * torch.arange(96) + 1) / 96 - 1
        grid = torch.stack(torch.meshgrid(side, side, indexing="xy"), 2)
        at = shift + half * grid
        learnt = show("learnt density", model.log_prob(at, 32, generator).exp().numpy())
        more, movie = landscapes(model, test, at, 3 * grid, boxes[pair], generator)
        rows = [[*rows[0], learnt, *rows[1]], *more]
    wrote = [save_picture(folder / "flow.gif", *movie, delays=150)] if movie else []
    picture = np.concatenate([np.concatenate(row, 1) for row in rows])
    return [save_picture(folder / "density.png", picture), *wrote]


def landscapes(model, test, at, p, box, generator):
    """Of each Hamiltonian three charts: V on the grid `at` (k, k, 2) with the data's contour, K on
    p (k, k, 2), V with paths of points; and a chart of each leapfrog step: points on V."""
    dense = F.avg_pool2d(torch.from_numpy(count(test, box) ** 0.5)[None], 21, 1, 10)[0].numpy()
    edge, rows, movie = abs(dense / dense.max() - 0.3) < 0.03, [], []
    noise = model.noise(2, 2000, 2, generator=generator)
    path = model.user(model.flow(*noise)[0]) if hasattr(model, "H") else None
    for i, H in enumerate(getattr(model, "H", ())):
        V, reached = (H.V(model.standard(x)[0]) for x in (at, test))
        ends = V.min().item(), (2 * reached.quantile(0.999) - V.min()).item()  # data's: half of it
        show = lambda what, marks: chart(f"H{i + 1}: {what}", V.numpy(), box, marks, ends)
        leg = path[:, i * model.config["steps"] :][:, : model.config["steps"] + 1]
        lines = count(F.interpolate(leg[:24].mT, 1000, mode="linear").mT.flatten(0, 1), box) > 0
        lines |= np.kron(count(leg[:24, -1], box, SIZE // 6) > 0, np.ones((6, 6), bool))
        K = chart(f"H{i + 1}: K(p)", H.K(p).numpy(), {"p1": (-3, 3), "p2": (-3, 3)})
        rows.append([show("V(q), data's contour", edge), K, show("paths, dots: ends", lines)])
        movie += [show(f"q on V, step {k}", count(q, box) > 0) for k, q in enumerate(leg.unbind(1))]
    return rows, movie


def look(args):
    """Show and measure a run."""
    device = pick_device(args.device)
    path, model, run = open_run(args.checkpoint, device, system=args.system, density=args.density)
    config, folder = run["config"], path.parent
    if args.given and config["model"] in FLOWS:
        raise ValueError(f"--{args.given[0]} is of no use with points: leave it out")
    if folder.name == "checkpoints":  # of all systems: each gets a folder of its own
        folder = Path("runs") / f"{path.stem}-shipped"
    folder.mkdir(parents=True, exist_ok=True)
    test = test_set(config, args.clips, device)
    print(f"{path}: {test.summary}\nlooking ...")
    if config["model"] in FLOWS:
        result = measure_flow(model.cpu(), test)
        wrote = flow_pictures(model, test, folder, seed=args.seed) if test.dim > 1 else []
    else:
        shown = test_set(config, args.show, device, test.data)
        how = args.frames, args.show, args.reverse, args.speed, args.sample, args.seed, args.scale
        wrote = [*movies(model, shown, folder, *how), phase(model, test, folder, args.frames)]
        result = measure(model, test, args.frames, 1000)
        if test.system:
            some = TestClips(config, min(args.clips, 128), device)  # of whose samples many are read
            result |= measure_physics(model, some)
    table(config, result)
    training = {k: run.get(k) for k in ("command", "versions", "step", "seconds")}
    report = {**provenance(), "seed": args.seed, "test_seed": TEST_SEED, "checkpoint": str(path),
              "config": config, "training": training, "metrics": result}  # fmt: skip
    wrote.append(write(folder / "metrics.json", json.dumps(report, indent=1).encode()))
    print(f"\nwrote {', '.join(wrote)} into {folder}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.print_usage = lambda file: None  # a mistake gets one line; --help says more
    add = parser.add_argument
    add("--checkpoint", metavar="PATH", help="a file or a run's folder (default: the newest run)")
    add("--system", choices=SYSTEMS, help="take the newest run of this system")
    add("--density", choices=DENSITIES, help="take the newest run of this density")
    add("--seed", type=number(0, 2**63 - 1), default=0, help="of samples (default: 0)")
    add("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    add = parser.add_argument_group("of pictures, not of points").add_argument
    add("--frames", type=number(2, 10_000), default=90, help="to roll out (default: 90)")
    add("--clips", type=number(2, 10_000), default=256, help="to measure on (default: 256)")
    add("--reverse", action="store_true", help="reverse.gif: from the last state to the first")
    add("--speed", type=number(1e-3, 1e3, float), action="append", default=[], help="repeatable")
    add("--sample", type=number(0, 1000), default=0, metavar="N", help="samples.gif: N of them")
    add("--show", type=number(1, 100), default=4, help="clips in a GIF (default: 4)")
    add("--scale", type=number(1, 64), default=8, help="screen pixels a pixel (default: 8)")
    args = parser.parse_args()
    args.given = [k for k in OF_PICTURES if getattr(args, k) != parser.get_default(k)]
    try:
        look(args)
    except (ValueError, OSError, MemoryError) as error:  # a user's mistake
        parser.exit(2, f"error: {(str(error) or 'no memory').splitlines()[0]}\n")


if __name__ == "__main__":
    main()
