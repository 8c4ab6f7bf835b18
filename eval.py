"""Look at a trained model and measure it.

    python eval.py --reverse --speed 2          # the newest run; or --system three_body, or --checkpoint PATH

Writes GIFs (truth above, model below) and metrics.json into the run's folder and prints the same as a table.
"""
import argparse
import json
import math
import os
import platform
import shlex
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from hgn import HGN
from physics import SYSTEMS, initial_states, jitter, noise_floor, render, simulate

TEST_SEED = 2 ** 40                 # training draws from seeds below 2 ** 40 only (train.py), so never these clips
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


def newest_run(system=None):
    """Path of the most recently written checkpoint under runs/, of one system if named."""
    for path in sorted(Path("runs").glob("*/checkpoint.pt"), key=os.path.getmtime, reverse=True):
        if system is None or read_checkpoint(path)["config"]["system"] == system:
            return path
    wanted = f"of {system} " if system else ""
    fail(f"no run {wanted}in ./runs: train one with python train.py --system {system or 'mass_spring'}, "
         "or name a file with --checkpoint")


def read_checkpoint(path):
    path = Path(path)
    if not path.is_file():
        fail(f"no checkpoint at {path}: train one with python train.py --system mass_spring")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                              # torch raises many kinds for a damaged file
        fail(f"{path} cannot be read as a checkpoint, perhaps it is truncated ({type(error).__name__}): train again")
    if not isinstance(checkpoint, dict) or checkpoint.get("kind") != "hgn":
        fail(f"{path} is not an HGN checkpoint written by train.py")
    return checkpoint


def load(path, device="cpu"):
    """Checkpoint file -> model in eval mode, the checkpoint's dict."""
    checkpoint = read_checkpoint(path)
    try:
        model = HGN(**checkpoint["model_config"])
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, TypeError, ValueError, KeyError):
        fail(f"{path} holds another model than this version of hgn.py builds: train again")
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


def main():
    parser = Parser(description=__doc__.split("\n")[0], formatter_class=Help)
    parser.add_argument("--checkpoint", metavar="PATH", help="a checkpoint file (default: the newest run)")
    parser.add_argument("--system", choices=SYSTEMS, help="take the newest run of this system")
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

    path = Path(args.checkpoint) if args.checkpoint else newest_run(args.system)
    device = pick_device(args.device)
    model, checkpoint = load(path, device)
    config, folder = checkpoint["config"], path.parent
    if args.system not in (None, config["system"]):
        fail(f"{path} was trained on {config['system']}, not {args.system}")
    if not os.access(folder, os.W_OK):
        fail(f"cannot write into {folder}: copy the checkpoint to a folder of your own")
    clips = TestClips(config, args.clips, device=device)
    result = measure(model, clips, args.frames)
    if clips.noise:
        generator = torch.Generator().manual_seed(TEST_SEED + 1)
        result["noise_floor"] = noise_floor(clips.system, clips.noise, clips.size, generator=generator)
    movies(model, clips, folder, args.frames, args.show, args.reverse, args.speed, args.sample, args.seed, args.scale)
    report = {**provenance(), "seed": args.seed, "test_seed": TEST_SEED, "checkpoint": str(path), "config": config,
              "training": {k: checkpoint[k] for k in ("command", "versions", "step", "seconds")}, "metrics": result}
    (folder / "metrics.json").write_text(json.dumps(report, indent=1))
    table(result, config)
    print(f"\nwrote {', '.join(sorted(p.name for p in folder.glob('*.gif')))} and metrics.json into {folder}")


if __name__ == "__main__":
    main()
