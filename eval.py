"""Look at a trained model and measure it.

    python eval.py --reverse --speed 2          # the newest run; or --system three_body, or --checkpoint PATH

Writes GIFs (truth above, model below; of a flow density.png and flow.gif) and metrics.json into the run's folder and prints
the same as a table.
"""
import argparse
import ctypes
import json
import math
import os
import platform
import shlex
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from hgn import HGN
from nhf import DENSITIES, NHF, RealNVP
from physics import SYSTEMS, initial_states, jitter, noise_floor, render, simulate

TEST_SEED = 2 ** 40                 # training draws from seeds below 2 ** 40 only (train.py), so never these clips
MODELS = {"hgn": HGN, "nhf": NHF, "realnvp": RealNVP}
WINDOW = 30                         # frames of the paper's test clips


def fail(message):
    """A user's mistake: one line, exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


class Help(argparse.HelpFormatter):
    """Shows the defaults that are worth showing."""
    def _get_help_string(self, action):
        shown = action.choices or type(action.default) in (int, float)
        return f"{action.help} (default: %(default)s)" if shown and action.default is not None else action.help


def keep_memory():
    """glibc hands large freed blocks back to the system, and every tensor then pays for page faults: a tenth of a step
    on a CPU, half of the drawing of clips. Tell it to keep them."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 2 ** 30)                           # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2 ** 31 - 1)                       # M_TRIM_THRESHOLD
    except (OSError, AttributeError):                       # another C library
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
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number")
        if not math.isfinite(value) or value < low or (above and value == low):
            raise argparse.ArgumentTypeError(f"must be {'above' if above else 'at least'} {low}, not {text}")
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
    return {"command": shlex.join(["python", *sys.argv]),
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}}


def newest_run(**wanted):
    """Path of the most recently written checkpoint under runs/ whose config has these values, where they are not None."""
    wanted = {k: v for k, v in wanted.items() if v is not None}
    for path in sorted(Path("runs").glob("*/checkpoint.pt"), key=os.path.getmtime, reverse=True):
        if not wanted or wanted.items() <= read_checkpoint(path)["config"].items():
            return path
    options = " ".join(f"--{k} {v}" for k, v in (wanted or {"system": "mass_spring"}).items())
    fail(f"no run {'with ' + options + ' ' if wanted else ''}in ./runs: train one with python train.py {options}, "
         "or name a file with --checkpoint")


def read_checkpoint(path):
    path = Path(path)
    if not path.is_file():
        fail(f"no checkpoint at {path}: train one with python train.py --system mass_spring")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                              # torch raises many kinds for a damaged file
        fail(f"{path} cannot be read as a checkpoint, perhaps it is truncated ({type(error).__name__}): train again")
    if not isinstance(checkpoint, dict) or checkpoint.get("kind") not in MODELS:
        fail(f"{path} is not a checkpoint written by train.py")
    return checkpoint


def load(path, device="cpu"):
    """Checkpoint file -> model in eval mode, the checkpoint's dict."""
    checkpoint = read_checkpoint(path)
    try:
        model = MODELS[checkpoint["kind"]](**checkpoint["model_config"])
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, TypeError, ValueError, KeyError):
        fail(f"{path} holds another model than this version of the code builds: train again")
    return model.to(device).eval(), checkpoint


class TestClips:
    """Fixed test clips: true states at frame 0 and what the encoder sees of them (noisy if trained with noise)."""
    def __init__(self, config, n, seed=TEST_SEED, device="cpu"):
        self.system, self.size, self.noise, self.dt = SYSTEMS[config["system"]], config["size"], config["noise"], 0.125
        generator = torch.Generator().manual_seed(seed)
        self.q, self.p = initial_states(self.system, n, generator, device)
        length = max(WINDOW, config["context"]) if self.noise else config["context"]
        q = simulate(self.system, self.q, self.p, length, self.dt)[0]
        self.observed = render(self.system, jitter(self.system, q, self.noise, generator), self.size)

    def truth(self, frames, speed=1.0, block=32):
        """The true system's clean frames from frame 0 at `speed` (negative: backward), `block` clips at a time."""
        for part in simulate(self.system, self.q, self.p, frames, speed * self.dt)[0].split(block):
            yield render(self.system, part, self.size)


@torch.inference_mode()
def measure(model, clips, frames=90):
    """Every figure of metrics.json but the noise floor. Errors are pixel MSEs against the clean truth, with the
    standard deviation over clips beside the mean; the model sees the first `context` frames only."""
    q0, p0 = model.infer(clips.observed)

    def error(length, speed=1.0):                                                        # (clips, length)
        q = model.rollout(q0, p0, length - 1, speed * model.dt)[0]
        return torch.cat([(model.decode(part) - truth).square().mean((2, 3, 4))
                          for part, truth in zip(q.split(32), clips.truth(length, speed))])

    forward, window = error(frames), min(WINDOW, frames)
    result = {"frames": frames, "clips": len(q0), "window": window, "mse_per_frame": forward.mean(0).tolist(),
              "blank_mse": next(clips.truth(frames)).var((0, 1)).mean().item()}
    for start in range(0, frames, WINDOW):
        result[f"mse_{start}_{min(start + WINDOW, frames) - 1}"] = forward[:, start:start + WINDOW].mean().item()
    result["mse_std_over_clips"] = forward[:, :window].mean(1).std().item()
    for name, speed in (("backward", -1.0), ("double_speed", 2.0), ("half_speed", 0.5)):
        result[f"mse_{name}"] = error(window, speed).mean().item()
    if frames > window:
        result[f"mse_0_back_to_{1 - frames}"] = error(frames, -1.0).mean().item()
    if clips.noise:
        painted = model.decode(model.rollout(q0, p0, WINDOW - 1)[0])
        result["mse_noisy"] = (painted - clips.observed[:, :WINDOW]).square().mean().item()
    qs, ps = model.rollout(q0, p0, frames - 1)
    H = torch.stack([model.energy(qs[:, t], ps[:, t]) for t in range(frames)], 1)        # (clips, frames)
    result["energy_std_ratio"] = (H.std(1).mean() / H.mean(1).std()).item()
    back = torch.cat([x[:, -1] for x in model.rollout(qs[:, -1], ps[:, -1], frames - 1, -model.dt)], 1)
    start = torch.cat((q0, p0), 1)
    result["reversal_error"] = ((back - start).norm() / start.norm()).item()
    return result


LABELS = {"blank_mse": "a blank prediction", "mse_noisy": "against the noisy frames", "noise_floor": "its floor",
          "mse_std_over_clips": "spread over clips, first frames", "mse_backward": "backward",
          "mse_double_speed": "at double speed", "mse_half_speed": "at half speed",
          "energy_std_ratio": "std of H: along a rollout / across clips", "reversal_error": "return error, relative"}


def table(result, config):
    """The metrics as a small aligned table."""
    print(f"\n{config['system']}, {result['clips']} test clips, {config['context']} context frames, pixel MSE x 1e-4:")
    for key, value in result.items():
        if isinstance(value, float):
            label = LABELS.get(key) or "frames " + key.replace("mse_", "").replace("_", " ")
            shown = f"{value:.1e}" if key in ("energy_std_ratio", "reversal_error") else f"{value * 1e4:.3f}"
            print(f"  {label:<42}{shown:>10}")


def write_gif(path, rows, dt, scale=8):
    """An animated GIF of labelled rows of clips, {label: (n, T, 3, H, W)}, at the speed of the physics: dt seconds
    a frame. Every pixel of a clip is drawn at least `scale` wide."""
    images = []
    font = ImageFont.load_default(20)
    rows = {label: clip.clamp(0, 1).mul(255).round().byte().cpu().numpy() for label, clip in rows.items()}
    for t in range(min(clip.shape[1] for clip in rows.values())):
        strips = []
        for label, clip in rows.items():
            frames = np.pad(clip[:, t].transpose(0, 2, 3, 1), ((0, 0), (0, 1), (0, 1), (0, 0)))
            strip = np.concatenate(frames, 1).repeat(scale, 0).repeat(scale, 1)
            title = Image.new("RGB", (strip.shape[1], 28))
            ImageDraw.Draw(title).text((6, 2), f"{label}, frame {t}", fill="white", font=font)
            strips += [np.asarray(title), strip]
        images.append(np.concatenate(strips))
    iio.imwrite(path, np.stack(images), duration=1000 * dt, loop=0)


@torch.inference_mode()
def movies(model, clips, folder, frames, show=4, reverse=False, speeds=(), samples=0, seed=0, scale=8):
    """Write rollout.gif and whichever of the others are asked for."""
    q0, p0 = (x[:show] for x in model.infer(clips.observed))
    dt = model.dt
    truth, (q, p) = next(clips.truth(frames, block=show)), model.rollout(q0, p0, frames - 1)
    write_gif(folder / "rollout.gif", {"truth": truth, "model": model.decode(q)}, dt, scale)
    if reverse:
        back = model.rollout(q[:, -1], p[:, -1], frames - 1, -dt)[0]
        write_gif(folder / "reverse.gif", {"truth, backward from the last frame": truth.flip(1),
                                           "model, backward from its last state": model.decode(back)}, dt, scale)
    for speed in speeds:
        q = model.rollout(q0, p0, frames - 1, speed * dt)[0]
        write_gif(folder / f"speed_{speed:g}.gif", {
            f"truth at speed {speed:g}": next(clips.truth(frames, speed, block=show)),
            f"model at speed {speed:g}": model.decode(q)}, dt, scale)
    if samples:
        frames = model.sample(samples, frames - 1, generator=torch.Generator().manual_seed(seed))
        write_gif(folder / "samples.gif", {"samples from the prior": frames}, dt, scale)


class Points:
    """What a flow learns from: a named density, or the rows of an .npy file, a tenth of them held out by the seed."""
    def __init__(self, config):
        self.density, self.rows = DENSITIES.get(config["density"]), None
        if self.density is None:
            path = Path(config["data"])
            try:
                rows = np.load(path, allow_pickle=False)
            except (OSError, ValueError, EOFError):
                fail(f"--data {path} cannot be read: save an array of shape (N, D) with numpy.save")
            if rows.ndim != 2 or rows.dtype.kind not in "fiu" or len(rows) < 2 or rows.shape[1] < 1:
                fail(f"--data {path} must hold at least two points, numbers of shape (N, D), not {rows.dtype} {rows.shape}")
            rows = torch.from_numpy(rows.astype("float64"))
            if not rows.isfinite().all():
                fail(f"--data {path} has {(~rows.isfinite()).sum()} values that are not finite: remove those rows")
            if (rows.std(0) <= 1e-12 * rows.abs().amax(0)).any():
                fail(f"--data {path}: column {int(rows.std(0).argmin())} is constant: remove it")
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config["seed"]))
            self.rows, held = rows[order], max(1, len(rows) // 10)
            self.held_out, self.rows = self.rows[:held].float(), self.rows[held:].float()
        sample = self.draw(20_000, torch.Generator().manual_seed(TEST_SEED - 1)) if self.density else self.rows
        self.shift, self.scale = sample.mean(0), sample.std(0, correction=0).clamp(min=1e-12)
        self.dim = sample.shape[1]

    def draw(self, n, generator):
        """n training points (n, dim)."""
        if self.density:
            return self.density.sample(n, generator)
        return self.rows[torch.randint(len(self.rows), (n,), generator=generator)]

    def test(self, n):
        """n fixed test points, never trained on; fewer if fewer were held out."""
        return self.density.sample(n, torch.Generator().manual_seed(TEST_SEED)) if self.density else self.held_out[:n]


@torch.inference_mode()
def measure_flow(model, points, n=10_000, samples=(1, 16, 256)):
    """ELBO and log_prob, means over test points in nats; the gap of the NLL to the entropy; the modes; microseconds."""
    x, generator = points.test(n), torch.Generator().manual_seed(TEST_SEED)

    def mean(function, block=2000, **options):
        start = time.time()
        value = torch.cat([function(part, generator=generator, **options) for part in x.split(block)]).mean().item()
        return value, 1e6 * (time.time() - start) / len(x)
    result = {"points": len(x), "elbo": mean(model.elbo)[0]}
    for k in samples:
        result[f"log_prob_{k}"], result[f"us_per_log_prob_{k}"] = mean(model.log_prob, max(1, 8192 // k), samples=k)
    start = time.time()
    drawn = model.sample(n, generator)
    result["us_per_sample"] = 1e6 * (time.time() - start) / n
    result["parameters"] = sum(w.numel() for w in model.parameters())
    if points.density:
        result["entropy"] = points.density.entropy
        result["gap"] = -result[f"log_prob_{samples[-1]}"] - result["entropy"]
        if points.density.parts is not None:
            share = torch.bincount(points.density.part_of(drawn), minlength=points.density.parts) / n
            result["mode_weights"] = share.tolist()
            result["modes_found"] = int((share * points.density.parts >= 0.5).sum())
            if len(points.density.centres) == points.density.parts and hasattr(model, "H"):
                gaps = [torch.cdist(points.density.centres, minima(model, H)) for H in model.H]
                result["mode_to_well"] = [gap.amin(1).max().item() if gap.numel() else None for gap in gaps]
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
    low, high = values.min(), np.quantile(values, 0.999)    # one outlier shall not darken the rest
    level = np.clip((values - low) / (high - low + 1e-12), 0, 1)
    stops = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]])
    colour = np.stack([np.interp(level, np.linspace(0, 1, 5), stops[:, i]) for i in range(3)], -1).astype("uint8")
    image = Image.new("RGB", (size, size + 24))
    image.paste(Image.fromarray(colour).resize((size, size)), (0, 24))
    ImageDraw.Draw(image).text((6, 3), title, fill="white", font=ImageFont.load_default(15))
    return np.asarray(image)


def scatter(x, low, high, bins=120):
    """Points (n, 2) counted on a grid, square-rooted so that faint bridges show: (bins, bins)."""
    at = ((x[:, :2] - low) / (high - low) * bins).floor().long()
    at = at[((at >= 0) & (at < bins)).all(1)]
    return torch.bincount(at[:, 1] * bins + at[:, 0], minlength=bins * bins).view(bins, bins).float().sqrt()


@torch.inference_mode()
def flow_pictures(model, points, folder, n=20_000, bins=96, seed=0):
    """density.png: target, learnt density, samples, and V(q) and K(p) of each Hamiltonian; flow.gif: base to data. Of data of
    more than two dimensions the first two, the others at their mean."""
    test, generator = points.test(n), torch.Generator().manual_seed(seed)
    drawn = model.sample(n, generator)
    if model.dim == 1:                                      # a line, drawn as a plane with noise in y
        test, drawn = (torch.cat((x, torch.randn(len(x), 1, generator=generator)), 1) for x in (test, drawn))
    middle, half = test[:, :2].mean(0), 1.25 * (test[:, :2] - test[:, :2].mean(0)).abs().amax(0)
    low, high = middle - half, middle + half
    side = (torch.arange(bins) + 0.5) / bins

    def plane(low, high, dim, rest):
        y, x = torch.meshgrid(side, side, indexing="ij")
        xy = low + (high - low) * torch.stack((x, y), -1).flatten(0, 1)
        return torch.cat((xy[:, :dim], rest[2:].expand(len(xy), -1)), 1)
    rows = [[heat(scatter(test, low, high), "target"), None, heat(scatter(drawn, low, high), "samples")]]
    grid = plane(low, high, model.dim, points.shift)
    learnt = torch.cat([model.log_prob(part, 32, generator) for part in grid.split(2000)]).exp().view(bins, bins)
    rows[0][1] = heat(learnt.sqrt(), "learnt density")
    if hasattr(model, "H"):
        reach = torch.full((2,), 3.0)
        grid = plane(-reach, reach, model.dim, torch.zeros(model.dim))
        for i, H in enumerate(model.H):
            q = model.flow(*model.base.sample(2, n, model.dim, generator=generator))[0][:, (i + 1) * model.steps]
            q = q if model.dim > 1 else torch.cat((q, torch.randn(n, 1, generator=generator)), 1)
            rows.append([heat(H.V(grid).view(bins, bins), f"V(q) of H {i + 1}"), heat(H.K(grid).view(bins, bins), f"K(p) of H {i + 1}"),
                         heat(scatter(q, -reach, reach), f"q after H {i + 1}")])
        qs = model.flow(*model.base.sample(2, n, model.dim, generator=generator))[0] * model.scale + model.shift
        if model.dim > 1:
            frames = [torch.lerp(qs[:, t], qs[:, t + 1], f / 4) for t in range(qs.shape[1] - 1) for f in range(4)]
            frames += [qs[:, -1]] * 8
            iio.imwrite(folder / "flow.gif", np.stack([heat(scatter(x, low, high), "from base to data") for x in frames]),
                        duration=100, loop=0)
    iio.imwrite(folder / "density.png", np.concatenate([np.concatenate(row, 1) for row in rows]))


def flow_table(results):
    """Figures of one or more flows on the same test points, side by side."""
    print(f"\n{results[next(iter(results))]['points']} test points, nats:" + "".join(f"{name:>14}" for name in results))
    for key in next(iter(results.values())):
        cells = [result.get(key) for result in results.values()]
        if all(isinstance(c, (int, float)) for c in cells):
            print(f"  {key:<24}" + "".join(f"{c:14d}" if isinstance(c, int) else f"{c:14.3f}" for c in cells))


def eval_flow(model, checkpoint, folder, report, seed):
    """Pictures and figures of a flow; beside NHF's the newest RealNVP run on the same data, if there is one."""
    config, runs = checkpoint["config"], {checkpoint["kind"]: (model, checkpoint)}
    points = Points(config)
    if model.dim != points.dim:
        fail(f"{folder} holds a flow of dimension {model.dim}, the data have {points.dim}: train on them first")
    same = {k: config[k] for k in ("density", "data")}
    for path in sorted(Path("runs").glob("*/checkpoint.pt"), key=os.path.getmtime):
        other = read_checkpoint(path)
        if checkpoint["kind"] == "nhf" and other["kind"] == "realnvp" and same.items() <= other["config"].items():
            runs["realnvp"] = load(path)
    results = {name: measure_flow(m, points) | {"seconds_trained": c["seconds"]} for name, (m, c) in runs.items()}
    flow_pictures(model, points, folder, seed=seed)
    (folder / "metrics.json").write_text(json.dumps(report | {"metrics": results}, indent=1))
    flow_table(results)
    print(f"\nwrote density.png, {'flow.gif ' if (folder / 'flow.gif').exists() else ''}and metrics.json into {folder}")


def main():
    parser = Parser(description=__doc__.split("\n")[0], formatter_class=Help)
    parser.add_argument("--checkpoint", metavar="PATH", help="a checkpoint file (default: the newest run)")
    parser.add_argument("--system", choices=SYSTEMS, help="take the newest run of this system")
    parser.add_argument("--density", choices=DENSITIES, help="take the newest run of this density")
    parser.add_argument("--frames", type=at_least(2), default=90, help="frames to roll out; the paper's clips have 30")
    parser.add_argument("--clips", type=at_least(2), default=256, help="test clips to measure on")
    parser.add_argument("--reverse", action="store_true", help="write reverse.gif: from the last state to the first")
    parser.add_argument("--speed", type=at_least(0, float, above=True), action="append", default=[],
                        help="write a GIF at this multiple of the training speed; may be given several times")
    parser.add_argument("--sample", type=at_least(0), default=0, metavar="N",
                        help="write samples.gif: N rollouts from the prior")
    parser.add_argument("--show", type=at_least(1), default=4, help="test clips in a GIF, side by side")
    parser.add_argument("--scale", type=at_least(1), default=8, help="screen pixels for one pixel of a clip")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the samples; test clips are always the same")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    args = parser.parse_args()

    keep_memory()
    path = Path(args.checkpoint) if args.checkpoint else newest_run(system=args.system, density=args.density)
    device = pick_device(args.device)
    model, checkpoint = load(path, device)
    config, folder = checkpoint["config"], path.parent
    for name in ("system", "density"):
        if getattr(args, name) not in (None, config.get(name)):
            fail(f"{path} was trained on {config['system'] or config['density'] or config['data']}, not {getattr(args, name)}")
    if not os.access(folder, os.W_OK):
        fail(f"cannot write into {folder}: copy the checkpoint to a folder of your own")
    report = {**provenance(), "seed": args.seed, "test_seed": TEST_SEED, "checkpoint": str(path), "config": config,
              "training": {k: checkpoint[k] for k in ("command", "versions", "step", "seconds")}}
    if checkpoint["kind"] != "hgn":
        return eval_flow(model.cpu(), checkpoint, folder, report, args.seed)
    clips = TestClips(config, args.clips, device=device)
    result = measure(model, clips, args.frames)
    if clips.noise:
        generator = torch.Generator().manual_seed(TEST_SEED + 1)
        result["noise_floor"] = noise_floor(clips.system, clips.noise, clips.size, generator=generator)
    movies(model, clips, folder, args.frames, args.show, args.reverse, args.speed, args.sample, args.seed, args.scale)
    (folder / "metrics.json").write_text(json.dumps(report | {"metrics": result}, indent=1))
    table(result, config)
    print(f"\nwrote {', '.join(sorted(p.name for p in folder.glob('*.gif')))} and metrics.json into {folder}")


if __name__ == "__main__":
    main()
