"""Look at a trained model and measure it.

    python eval.py --reverse --speed 2      # the newest run; --system NAME, --checkpoint PATH

Writes movies (truth above, model below), phase.png and metrics.json into the run's folder.
"""

import argparse
import ctypes
import io
import itertools
import json
import math
import os
import platform
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from hgn import HGN
from nhf import DENSITIES, NHF, TEST_SEED, Points, RealNVP
from physics import BACKGROUND, SYSTEMS, Recordings, read_points
from physics import initial_states, jitter, noise_floor, render, simulate

FLOWS = {"nhf": NHF, "realnvp": RealNVP}
MODELS = {"hgn": HGN, "hnn": HGN, **FLOWS}
WINDOW = 30  # frames of the paper's test clips
STILLS = 0, 15, 30, 45, 59  # frames of rollout.png
READING = "size", "clip", "stride", "dt", "fps", "seed"  # options that say how to read recordings

# ------------------------------------------------------------------ runs


def number(low, high, kind=int):
    """An argparse type: a number of this kind from low to high."""

    def number(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, not {text}")
        return value

    return number


def pick_device(name=None):
    """The device called `name`, or the best there is. Raises: ValueError."""
    if platform.libc_ver()[0] == "glibc":  # keep freed blocks: page faults cost a tenth of a step
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, dtype=torch.float64, device=device)
        return device
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
    """A checkpoint file -> model in eval mode, the checkpoint's dict; no code in it is run. Raises:
    ValueError."""
    if not Path(path).is_file():
        raise ValueError(f"no checkpoint at {path}: train one with python train.py")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config, kind = checkpoint["config"], checkpoint["kind"]
        with torch.device("meta"):  # costs no memory, whatever the sizes are
            model = MODELS[kind](**checkpoint["model_config"])
        model.load_state_dict(checkpoint["model"], assign=True)
        known = config["density"] in DENSITIES if kind in FLOWS else config["system"] in SYSTEMS
        same = all(model.config.get(k, v) == v for k, v in config.items() if config["system"])
        noise = config["noise"] == "paper" or 0 <= config["noise"] <= 1e3
        if known == isinstance(config["data"], str) or config["model"] != kind or not same:
            raise ValueError
        if not (noise and 1 <= config["window"] <= 1000 and 1 <= config["context"] <= 1000):
            raise ValueError
        if not (0 <= config["seed"] < 2**20 and checkpoint["step"] + checkpoint["seconds"] >= 0):
            raise ValueError
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ValueError(f"{path} is no checkpoint of this version: train again") from error
    if not all(w.isfinite().all() for w in model.parameters()):
        raise ValueError(f"{path} has weights that are not finite: train again, lower --lr")
    return model.to(device).eval(), checkpoint


def open_run(where=None, device="cpu", **wanted):
    """A checkpoint's path, its model and its dict. where: a file, a run's folder, or None: the
    newest run with the options `wanted`, else the system's shipped model. Raises: ValueError."""
    wanted = {k: v for k, v in wanted.items() if v is not None}
    options, paths = " ".join(f"--{k} {v}" for k, v in wanted.items()), [Path(where or "")]
    if where is None:
        shipped = Path(__file__).parent / f"checkpoints/{wanted.get('system', 'mass_spring')}.pt"
        paths = sorted(Path("runs").glob("*/checkpoint.pt"), key=os.path.getmtime, reverse=True)
        paths.append(Path(os.path.relpath(shipped)))
    for path in paths:
        path = path / "checkpoint.pt" if path.is_dir() else path
        try:
            model, checkpoint = load(path, device)
            if wanted.items() <= checkpoint["config"].items():
                return path, model, checkpoint
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
        options = {k: config[k] for k in READING if k in config} | {"least": config["context"] + 1}
        self.data = data = data or Recordings(config["data"], **options)
        self.size, self.channels, self.dt = data.size, data.channels, data.dt
        lengths = data.lengths[data.held_out]
        self.length = max(lengths.tolist(), key=lambda length: length * (lengths >= length).sum())
        self.clips, self.device = data.held_out[lengths >= self.length][:n], device
        self.observed = next(self.truth(config["context"], block=n))

    def truth(self, frames, speed=1.0, block=32):
        """Frames from the first on, `block` clips at a time."""
        times = torch.arange(min(frames, self.length))
        for part in self.clips.split(block):
            yield self.data.read(part, times.expand(len(part), -1)).to(self.device)


class TestClips:
    """Fixed test clips of a system: true states at frame 0, and what the encoder sees of them (with
    the noise of training)."""

    data, channels, length = None, 3, math.inf

    def __init__(self, config, n, seed=TEST_SEED, device="cpu"):
        self.system, self.size = SYSTEMS[config["system"]], config["size"]
        self.noise, self.dt, self.paths = config["noise"], config["dt"], {}
        generator = torch.Generator().manual_seed(seed)
        self.q, self.p = initial_states(self.system, n, generator, device)
        length = max(WINDOW, config["context"]) if self.noise else config["context"]
        q = simulate(self.system, self.q, self.p, length, self.dt)[0]
        seen = jitter(self.system, q, self.noise, generator)
        self.observed = render(self.system, seen, self.size)

    def truth(self, frames, speed=1.0, block=32):
        """Clean frames from frame 0 on at `speed` (negative: backward), `block` clips at a time."""
        if len(self.paths.get(speed, ((),))[0]) < frames:  # kept: close encounters take long
            self.paths[speed] = simulate(self.system, self.q, self.p, frames, speed * self.dt)[0]
        for part in self.paths[speed][:, :frames].split(block):
            yield render(self.system, part, self.size)


def test_set(config, n, device="cpu", data=None):
    """What a run is tested on: n clips (of recordings `data` if those are read), or Points."""
    if config["model"] in FLOWS:
        return Points(config["density"] or read_points(config["data"]), config["seed"])
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
    forward, window = errors(model, clips, q0, p0, frames)[0], min(WINDOW, frames)
    blank = next(clips.truth(frames)).var((0, 1)).mean().item()
    result = {"frames": frames, "clips": len(q0), "window": window, "blank_mse": blank}
    result["mse_per_frame"] = forward.mean(0).tolist()
    for start in range(0, frames, WINDOW):
        part = forward[:, start : start + WINDOW].mean().item()
        result[f"mse_{start}_{min(start + WINDOW, frames) - 1}"] = part
    several = len(q0) > 1  # of one clip there is no spread
    if several:
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
    for name, finer in {"_fine": 4, "": 1}.items():  # in quarter steps leapfrog itself lets H
        path = model.rollout(q0, p0, finer * (steps - 1), model.dt / finer)  # oscillate 16 times
        qs, ps = (x[:, ::finer] for x in path)  # less
        H = energies(model, qs, ps)
        if several:
            along, across = H.std(1), H[:, 0].std()
            result[f"energy_std_ratio{name}"] = (along.median() / across).item()
            result["energy_lost"] = (~(along < across)).double().mean().item()
    result["energy_variance"] = H.var(1).mean().item()
    back = model.rollout(qs[:, -1], ps[:, -1], steps - 1, -model.dt)
    back, start = torch.cat([x[:, -1] for x in back], 1), torch.cat((q0, p0), 1)
    if getattr(model, "gamma", None) is not None:
        result["friction"] = model.gamma.item()
    result["reversal_error"] = ((back - start).norm(dim=1) / start.norm(dim=1)).median().item()
    return result


def first_bad(error, limit):
    """The first frame of each row of error (clips, T) above the limit or NaN, else T."""
    return (error <= limit).cumprod(1).sum(1).float()


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
        states = model.infer(render(system, seen, clips.size)), (q[:, t], p[:, t])
        if system.periodic:  # compare angles away from the cut
            states = [(wrapped(x), y) for x, y in states]
        pairs.append([torch.cat([x.flatten(1) for x in s], 1).double() for s in states])
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
    E = torch.kron(turn, torch.eye(d)).to(J)
    P = (J @ E @ J.mT) @ (J @ E.T @ J.mT)
    P = P / P.abs().amax((1, 2)).mean() - torch.eye(2 * D).to(J)
    return {"symetric_r2": r2, "symetric": P.square().mean().item(), "symetric_order": used}


def gauss_newton(f, x, target, rounds, h, most, damping):
    """x (n, dim) such that f(x) (n, m) is close to target (n, m); slopes by central differences of
    step h, steps of each number of at most `most`."""
    one = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    for _ in range(rounds):
        tried = torch.cat([x + move for move in (*h * one, *-h * one, 0 * x[0])])
        ahead, behind, now = f(tried).unflatten(0, (-1, len(x))).split((len(one), len(one), 1))
        J = ((ahead - behind) / (2 * h)).permute(1, 2, 0)  # (n, m, dim)
        wrong = (target - now[0]).unsqueeze(2)
        step = torch.linalg.solve(J.mT @ J + damping * one.to(J), J.mT @ wrong.to(J))
        x = x + step.squeeze(2).clamp(-most, most)
    return x


def read(system, frames):
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
    painted = lambda x: render(system, x.view(-1, 1, *q.shape[2:]), size).flatten(1)
    x = q.flatten(0, 1).flatten(1)
    return gauss_newton(painted, x, frames.flatten(0, 1).flatten(1), 2, 0.01, 0.2, 1e-3).view_as(q)


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

    def path(x, T=seen):
        q, p = x.view(-1, *state.shape[1:]).unbind(1)
        return system.position(simulate(system, q, p, T, dt)[0]).flatten(1)

    x = gauss_newton(path, state.flatten(1), shown[:, :seen].flatten(1), 3, 1e-4, 0.5, 1e-9)
    far = (path(x, shown.shape[1]).view_as(shown) - shown).norm(dim=-1).amax((1, 2))
    return (excess.amax(1) <= 5e-4).double().mean().item(), (far <= 0.15).double().mean().item()


@torch.no_grad()
def measure_physics(model, clips, window, frames=300):
    """What holds outside the window: valid prediction times, SyMetric, samples from the prior. VPT
    is Higgins et al.'s: share of the frames after the window before the error passes 0.025 of the
    picture's mean square; "strict" is the first frame whose error passes 0.1 of blank's."""
    (q0, p0), result, shares = model.infer(clips.observed), {}, []
    frames = max(frames, window + WINDOW)
    for name, sign in (("forward", 1.0), ("backward", -1.0)):
        mse, power = errors(model, clips, q0, p0, frames, sign)
        blank = next(clips.truth(WINDOW)).var((0, 1)).mean()
        strict, quarters = first_bad(mse / blank, 0.1), torch.tensor([0.25, 0.75]).to(mse)
        result[f"mse_per_frame_{name}"] = mse.mean(0).tolist()
        result[f"strict_vpt_{name}"] = strict.median().item()
        result[f"strict_vpt_{name}_quartiles"] = strict.quantile(quarters).tolist()
        shares.append(first_bad((mse / power)[:, window:], 0.025).mean().item() / (frames - window))
    result["vpt"] = sum(shares) / 2
    result |= symetric(*inferred_and_true(model, clips))
    judged = {"real": torch.cat(list(clips.truth(WINDOW)))}
    if not getattr(model, "deterministic", False):  # else it has no prior
        generator = torch.Generator().manual_seed(TEST_SEED + 4)
        judged["samples"] = model.sample(2 * len(q0), WINDOW - 1, generator=generator)
    for name, shown in judged.items():
        result[f"{name}_valid"], result[f"{name}_obey"] = judge(clips.system, shown, clips.dt)
    return result


@torch.no_grad()
def measure_flow(model, points, n=10_000, samples=(1, 16, 256)):
    """ELBO and log_prob, means over test points in nats; the gap of the NLL to the entropy and the
    standard error of both; the modes; microseconds. Raises: ValueError for another dimension."""
    if model.dim != points.dim:
        raise ValueError(f"a flow of {model.dim} dimensions, data of {points.dim}: train on them")
    x, generator = points.held_out[:n], torch.Generator().manual_seed(TEST_SEED)
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
        if parts := density.parts:
            centres = density.centres
            nearest = torch.cdist(drawn.to(centres), centres).argmin(1) * parts // len(centres)
            share = torch.bincount(nearest, minlength=parts) / n
            result["mode_weights"] = share.tolist()
            result["modes_found"] = int((share * parts >= 0.5).sum())
            if len(getattr(model, "H", ())) == 1:
                result |= wells(model, centres)
    return result


def wells(model, centres, n=161, reach=2.5):
    """How well the one V(q) of a plane flow shows the modes, whose centres are (m, 2): the largest
    distance from a centre to the nearest minimum of V, in the user's units; the share of the
    picture where V is below its mean over the centres."""
    side = torch.linspace(-reach, reach, n)
    grid = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1)
    V, on = model.H[0].V(grid), model.H[0].V(model.standard(centres)[0])
    lowest = (V == -F.max_pool2d(-V[None], 3, 1, 1)[0])[1:-1, 1:-1]
    far = torch.cdist(centres, model.user(grid[1:-1, 1:-1][lowest]))
    off = far.amin(1).max().item() if far.numel() else None
    return {"mode_to_well": off, "V_below_modes": (V < on.mean()).double().mean().item()}


LABELS = {
    "blank_mse": "error of a blank prediction, the mean picture",
    "mse_noisy": "error against the noisy frames",
    "noise_floor": "  which no model can pass",
    "mse_std_over_clips": "error in the first of these, std over clips",
    "mse_double_speed_same_time": "  at double speed, the same stretch of time",
    "energy_std_ratio": "std of H along a rollout / across clips (0: conserved)",
    "energy_std_ratio_fine": "std of H along / across, in quarter steps",
    "energy_lost": "share of clips along which H varies more than across",
    "friction": "friction gamma, of p -> exp(-gamma t) p",
    "reversal_error": "return error: distance after going there and back",
    "strict_vpt_forward": "first frame with a tenth of blank's error, median",
    "strict_vpt_backward": "  the same backward",
    "real_valid": "  the same of true clips: pictures",
    "real_obey": "  the same of true clips: motion",
    "vpt": "VPT: share of the frames after the window (Higgins)",
    "symetric_r2": "SyMetric: R^2, latent to true state (passes above 0.9)",
    "symetric": "SyMetric: distance from symplectic (passes below 0.05)",
    "samples_valid": "share of samples that are pictures of the system",
    "samples_obey": "share of samples that move as the system does",
}


def table(config, result):
    """Print the figures of `measure` (and `measure_physics`) or of `measure_flow`."""
    tests = "{points} points, nats" if "points" in result else "{clips} clips, errors: MSE x 1e-4"
    source = config["system"] or config["density"] or config["data"]
    print(f"\n{source}, tested on {tests.format(**result)}:")
    for key, value in result.items():
        if isinstance(value, float):
            pixels = key in ("blank_mse", "noise_floor") or key.startswith("mse_")
            words = key.replace("mse", "error").replace("_", " ")
            if key[4:5].isdigit():
                words = "error in frames {}-{}".format(*key.split("_")[1:])
            shown = value * 1e4 if pixels else value
            print(f"  {LABELS.get(key, words):<58}{shown:>10.4g}")


# ------------------------------------------------------------------ pictures


def colours(level):
    """Levels in [0, 1] -> black, purple, orange, yellow: bytes (..., 3)."""
    stops = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]])
    channels = [np.interp(level, np.linspace(0, 1, 5), stops[:, i]) for i in range(3)]
    return np.stack(channels, -1).astype("uint8")


def panel(title, picture):
    """A picture (h, w, 3) under its title, which is written smaller where it would not fit."""
    bar = Image.new("RGB", (picture.shape[1], 28))
    fonts = (ImageFont.load_default(size) for size in range(20, 0, -1))
    font = next(x for x in fonts if x.getlength(title) <= bar.width - 12 or x.size == 1)
    ImageDraw.Draw(bar).text((6, 2), title, fill="white", font=font)
    return np.concatenate((np.asarray(bar), picture))


def save_picture(path, *arrays, delays=None):
    """Write arrays (h, w, 3) of bytes as a picture or, with delays in ms, as a GIF that repeats."""
    images, file = [Image.fromarray(x) for x in arrays], io.BytesIO()
    movie = {"save_all": True, "append_images": images[1:], "duration": delays, "loop": 0}
    images[0].save(file, path.suffix[1:], **(movie if delays else {}))
    return write(path, file.getvalue())


def pace(frames, dt):
    """Which frames to show, and for how many ms each, so that a GIF runs at the true speed: delays
    are hundredths of a second, and players take those below two for ten. Only what would be over in
    ten such frames is slowed down."""
    stride = min(max(1, math.ceil(0.02 / dt - 1e-9)), max(1, frames // 10))
    shown = range(0, frames, stride)
    ends = [round(100 * dt * t) for t in (*shown, shown[-1] + stride)]
    return shown, [10 * min(max(2, b - a), 65535) for a, b in zip(ends, ends[1:])]


def strip(title, frames, scale):
    """Frames (n, C, H, W) side by side under a title: an array (h, w, 3) of bytes."""
    frames = frames.clamp(0, 1).mul(255).round().byte().cpu()
    frames = frames.repeat(1, 3 // frames.shape[1], 1, 1).permute(0, 2, 3, 1).numpy()
    frames = np.pad(frames, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=96)
    return panel(title, np.concatenate(frames, 1).repeat(scale, 0).repeat(scale, 1))


def write_gif(path, rows, dt, scale=8, seen=0):
    """A GIF, at the true speed, of labelled rows of clips, {label: (n, T, C, H, W)}; `seen` frames
    are marked as the encoder's, every pixel is drawn `scale` wide."""
    shown, delays = pace(max(clip.shape[1] for clip in rows.values()), dt)

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
    q0, p0 = (x[:show] for x in model.infer(clips.observed))
    q, p = model.rollout(q0, p0, frames - 1)
    truth = next(clips.truth(frames, block=show))
    films = {"rollout": {"truth": truth, "model": model.decode(q)}}
    times = [t for t in STILLS if t < truth.shape[1]]
    title = f"{folder.name}: truth above model, frames {', '.join(map(str, times))}"
    stills = [strip(title, x[0, times], scale) for x in films["rollout"].values()]
    if reverse:
        back = model.rollout(*(x[:, truth.shape[1] - 1] for x in (q, p)), frames - 1, -model.dt)[0]
        rows = {"truth, backward from its last frame": truth.flip(1)}
        films["reverse"] = rows | {"model, backward from there": model.decode(back)}
    for speed in speeds:
        rows, q = {}, model.rollout(q0, p0, frames - 1, speed * model.dt)[0]
        if clips.system:
            rows[f"truth at speed {speed:g}"] = next(clips.truth(frames, speed, block=show))
        films[f"speed_{speed:g}"] = rows | {f"model at speed {speed:g}": model.decode(q)}
    if samples:
        drawn = model.sample(samples, frames - 1, generator=torch.Generator().manual_seed(seed))
        films["samples"] = {"samples from the prior": drawn}
    wrote = [save_picture(folder / "rollout.png", np.concatenate((stills[0], stills[1][28:])))]
    for name, rows in films.items():
        seen = model.context if name == "rollout" else 0
        wrote.append(write_gif(folder / f"{name}.gif", rows, model.dt, scale, seen))
    return wrote


def plot(x, y, level, title, size=144):
    """A picture of points y over x, each in the colour of its level; arrays of one shape."""
    unit = lambda v: np.nan_to_num((v - v.min()) / (v.max() - v.min() + 1e-12))
    image = np.full((size, size, 3), 24, "uint8")
    row, column = ((2 + (size - 5) * unit(v)).astype(int) for v in (-y, x))
    image[row, column] = colours(0.25 + 0.75 * unit(level))
    return panel(title, image.repeat(2, 0).repeat(2, 1))


@torch.no_grad()
def phase(model, clips, folder, frames=90, n=24):
    """phase.png: p over q of the coordinate that moves most, and H over time, of n rollouts; of a
    known system the true ones beside. Returns the file's name."""
    q, p = model.rollout(*(x[:n] for x in model.infer(clips.observed)), frames - 1)
    H = energies(model, q, p)
    states = {"learnt": (q, p, H)}
    if clips.system:
        q, p = simulate(clips.system, clips.q[:n], clips.p[:n], frames, clips.dt)
        states["true"] = q, p, clips.system.energy(q, p)
    panels = []
    for name, state in states.items():
        q, p, H = (x.flatten(2).cpu().numpy() if x.dim() > 2 else x.cpu().numpy() for x in state)
        i, time = q.var((0, 1)).argmax(), np.broadcast_to(np.arange(frames), H.shape)
        panels.append(plot(q[..., i], p[..., i], H, f"{name}: p{i + 1} over q{i + 1}, colour H"))
        ends = f"{H.min():.3g} to {H.max():.3g}"
        panels.append(plot(time, H, H, f"{name}: H over {frames} frames, {ends}"))
    return save_picture(folder / "phase.png", np.concatenate(panels, 1))


def gather(out, *folders):
    """One table, out.json, and one picture, out.png, of runs that `eval.py` has looked at: their
    errors over that of a blank prediction."""
    rows, pictures = {}, [Image.open(Path(folder) / "rollout.png") for folder in folders]
    for folder in map(Path, folders):
        report = json.loads((folder / "metrics.json").read_text())
        metrics, blank = report["metrics"], report["metrics"]["blank_mse"]
        over = {f"{k}_over_blank": v / blank for k, v in metrics.items() if k[4:5].isdigit()}
        rows[folder.name] = over | {"blank_mse": blank, **report["training"]}
    wide, high = (8 + max(picture.size[i] for picture in pictures) for i in (0, 1))
    sheet = Image.new("RGB", (3 * wide, -(-len(pictures) // 3) * high))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % 3 * wide, i // 3 * high))
    sheet.save(f"{out}.png")
    command = f"eval.gather({out!r}, {', '.join(map(repr, folders))})"
    report = {**provenance(), "command": command, "runs": rows}
    Path(f"{out}.json").write_text(json.dumps(report, indent=1))


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
    note = f", x1, x2 of {model.dim}" * (model.dim > 2)
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
        V = V.clamp(max=V.quantile(0.7))  # walls shall not darken the wells
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
    parser.error = lambda message: stop(f"{message} (--help lists the options)")
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


def look_at_clips(args, model, config, folder, device):
    """Measure and show a model of clips: its figures, the names of the files."""
    clips = test_set(config, args.clips, device)
    print(f"{clips.data.summary if clips.data else f'{args.clips} simulated clips'}; measuring")
    result = measure(model, clips, args.frames, 1000)
    if clips.system:
        some = TestClips(config, min(args.clips, 128), device=device)
        result |= measure_physics(model, some, config["window"])
    if clips.noise:
        generator = torch.Generator().manual_seed(TEST_SEED + 1)
        floor = noise_floor(clips.system, clips.noise, clips.size, generator=generator)
        result["noise_floor"] = floor
    shown = test_set(config, args.show, device, clips.data)
    asked = args.reverse, args.speed, args.sample, args.seed, args.scale
    wrote = movies(model, shown, folder, args.frames, args.show, *asked)
    return result, [*wrote, phase(model, clips, folder, args.frames)]


def look(args):
    """Measure and show a run."""
    device = pick_device(args.device)
    wanted = {"system": args.system, "density": args.density}
    path, model, checkpoint = open_run(args.checkpoint, device, **wanted)
    config, folder = checkpoint["config"], path.parent
    if folder.name == "checkpoints":  # of all systems: each gets a folder of its own
        folder = Path("runs") / f"{path.stem}-shipped"
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ValueError(f"cannot write into {folder}: copy the run to a folder of your own")
    if checkpoint["kind"] in FLOWS:
        points, model = test_set(config, 0), model.cpu()
        result = measure_flow(model, points)
        wrote = flow_pictures(model, points, folder, seed=args.seed)
    else:
        result, wrote = look_at_clips(args, model, config, folder, device)
    table(config, result)
    training = {k: checkpoint.get(k) for k in ("command", "versions", "step", "seconds")}
    report = {**provenance(), "seed": args.seed, "test_seed": TEST_SEED, "checkpoint": str(path),
              "config": config, "training": training, "metrics": result}  # fmt: skip
    wrote.append(write(folder / "metrics.json", json.dumps(report, indent=1).encode()))
    print(f"\nwrote {', '.join(wrote)} into {folder}")


def stop(error):
    """A user's mistake: one line, exit status 2."""
    print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
    raise SystemExit(2)


def main():
    try:
        look(parse())
    except (ValueError, OSError) as error:
        stop(error)


if __name__ == "__main__":
    main()
