"""Train a Hamiltonian Generative Network from pixels.

    python train.py --system three_body         # writes runs/three_body/
    python train.py --resume                    # goes on with the newest run

Every batch is simulated and rendered afresh: nothing but the run's folder is written.
"""
import argparse
import itertools
import json
import math
import os
import shutil
import time
from pathlib import Path

import torch
from tqdm import tqdm

from eval import (Help, Parser, TestClips, at_least, fail, load, measure, movies, newest_run, pick_device, provenance,
                  table)
from hgn import ARCHITECTURES, GECO, HGN, INTEGRATORS
from physics import BACKGROUND, SYSTEMS, initial_states, jitter, render, simulate

POOL = 64                           # batches whose trajectories are simulated together
KEPT = ("steps", "device", "compile", "resume", "name")     # options that --resume may change


def noise(text):
    return "paper" if text == "paper" else at_least(0, float)(text)


def parse():
    parser = Parser(description=__doc__.split("\n")[0], formatter_class=Help)
    data = parser.add_argument_group("data")
    data.add_argument("--system", choices=SYSTEMS, default="mass_spring", help="what to learn")
    data.add_argument("--size", type=int, default=32, help="pixels a side, a multiple of 8 from 16 to 128")
    data.add_argument("--noise", type=noise, default=0.0, help="sigma on every coordinate before painting, or 'paper'")
    data.add_argument("--window", type=at_least(1), default=30, help="frames to learn from, before and after frame 0")
    data.add_argument("--targets", type=at_least(1), default=8, help="random frames of the window painted for the loss")
    model = parser.add_argument_group("model")
    model.add_argument("--arch", choices=ARCHITECTURES, default="compact", help="paper: the published networks")
    model.add_argument("--latent", type=at_least(1), help="numbers in q (default: 4 per body), or maps in q (paper: 16)")
    model.add_argument("--context", type=at_least(1), default=5,
                       help="first frames that the encoder sees; 30: the paper's formula")
    model.add_argument("--integrator", choices=INTEGRATORS, default="leapfrog", help="euler: the paper's ablation")
    model.add_argument("--substeps", type=at_least(1), default=1, help="integrator steps from one frame to the next")
    model.add_argument("--no-f-psi", dest="f_psi", action="store_false", help="ablation: z itself is the initial state")
    model.add_argument("--deterministic", action="store_true", help="ablation: no sampling of z and no KL")
    train = parser.add_argument_group("training")
    train.add_argument("--steps", type=at_least(1), default=6000, help="training steps")
    train.add_argument("--batch-size", type=at_least(1), default=16, help="clips a step")
    train.add_argument("--lr", type=at_least(0, float, above=True), default=3e-3, help="highest learning rate")
    train.add_argument("--beta", type=at_least(0, float), default=1e-3, help="weight of the KL, see HGN.loss")
    train.add_argument("--geco", action="store_true", help="the paper's constrained loss instead of a fixed beta")
    train.add_argument("--tolerance", type=at_least(0, float, above=True), default=2e-4,
                       help="pixel MSE that --geco asks for")
    train.add_argument("--seed", type=at_least(0), default=0, help="of the weights, the data and the posterior samples")
    run = parser.add_argument_group("run")
    run.add_argument("--name", help="folder under runs/ (default: the system's name, with a number if it is taken)")
    run.add_argument("--resume", nargs="?", const="newest", metavar="CHECKPOINT",
                     help="go on with a run, by default the newest")
    run.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    run.add_argument("--compile", action=argparse.BooleanOptionalAction,
                     help="compile encoder and decoder; pays off on a GPU (default: there only)")
    args = parser.parse_args()
    if args.seed >= 2 ** 20:
        fail(f"--seed must be below {2 ** 20}, not {args.seed}")
    if not args.resume:
        if args.name and Path(args.name).name != args.name:
            fail(f"--name {args.name} is not the name of a folder")
        if args.latent is None and args.arch == "compact":
            args.latent = 4 * len(SYSTEMS[args.system].colours)
        if args.context > args.window + 1:
            fail(f"--context {args.context} is longer than the {args.window + 1} frames of a training clip: "
                 "raise --window or lower --context")
        return args, None, None
    # The run's own options, then those given on the command line, which may change only what KEPT names.
    path = newest_run() if args.resume == "newest" else Path(args.resume)
    model, checkpoint = load(path)
    config = checkpoint["config"]
    parser.set_defaults(**config)
    args = parser.parse_args()
    changed = [k for k in config if k not in KEPT and getattr(args, k) != config[k]]
    if changed:
        fail(f"--{changed[0].replace('_', '-')} cannot change in a resumed run: start another without --resume")
    if args.steps <= checkpoint["step"]:
        fail(f"{path} has already made {checkpoint['step']} steps: ask for more with --steps")
    if not os.access(path.parent, os.W_OK):
        fail(f"cannot write into {path.parent}: copy the run to a folder of your own")
    return args, path.parent, (model, checkpoint)


def new_folder(args):
    """runs/<name>/, never one that holds a run already."""
    numbered = (f"{args.system}-{i}" for i in itertools.count(2))
    for name in [args.name] if args.name else itertools.chain([args.system], numbered):
        folder = Path("runs") / name
        if not folder.exists():
            try:
                folder.mkdir(parents=True)
            except OSError as error:
                fail(f"cannot make {folder} ({error.strerror}): run from a folder that you may write to")
            return folder
    fail(f"{folder} exists: --resume {folder}/checkpoint.pt goes on with it, another --name starts afresh")


def save(path, checkpoint):
    """All or nothing: a crash while writing leaves the last checkpoint whole."""
    torch.save(checkpoint, f"{path}.new")
    os.replace(f"{path}.new", path)


class Batches:
    """Batch number `step` of a run, the same whenever it is asked for: a resumed run sees what it would have seen."""
    def __init__(self, args, device):
        self.args, self.system, self.device, self.pool = args, SYSTEMS[args.system], device, None

    def __call__(self, step):
        """Returns context frames, target frames, their times (B, targets), and the generator for this step."""
        args, B, number = self.args, self.args.batch_size, step // POOL
        if self.pool != number:                             # trajectories from -window to window round a random start
            generator = torch.Generator().manual_seed((args.seed << 20) + number)
            start = initial_states(self.system, B * POOL, generator, self.device)
            length = max(args.window + 1, args.context)
            before, after = (simulate(self.system, *start, length, dt)[0] for dt in (-0.125, 0.125))
            self.pool, self.q = number, torch.cat((before.flip(1)[:, :-1], after), 1)
            self.frame0 = length - 1
        generator = torch.Generator().manual_seed((args.seed << 20) + step + 2 ** 19)
        q = self.q[step % POOL * B:(step % POOL + 1) * B]
        # The horizon grows from 5 frames to the whole window over the first 30 % of the run.
        reach = min(args.window, 5 + int(args.window * step / (0.3 * args.steps)))
        times = torch.randint(-reach, reach + 1, (B, args.targets), generator=generator).to(self.device)
        rows = torch.arange(B, device=self.device).unsqueeze(1)
        seen = torch.cat((q[:, self.frame0:self.frame0 + args.context], q[rows, self.frame0 + times]), 1)
        frames = render(self.system, jitter(self.system, seen, args.noise, generator), args.size)
        return frames[:, :args.context], frames[:, args.context:], times, generator


def main():
    args, folder, resumed = parse()
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    if resumed:
        model, checkpoint = resumed
    else:
        try:
            model = HGN(size=args.size, context=args.context, arch=args.arch, latent=args.latent, integrator=args.integrator,
                        substeps=args.substeps, f_psi=args.f_psi, deterministic=args.deterministic, background=BACKGROUND)
        except ValueError as error:
            fail(str(error))
        checkpoint = {"step": 0, "seconds": 0.0}
        folder = new_folder(args)
    model.to(device).train()
    # Muon for matrices: what tells one orbit from the next is a hundredth of what the encoder sees, and Muon learns small
    # and large directions alike (40 % less error than Adam alone after 2,500 steps of two_body). Adam for the rest.
    matrices = [w for w in model.parameters() if w.dim() == 2]
    optimisers = [torch.optim.Adam([w for w in model.parameters() if w.dim() != 2], args.lr, betas=(0.9, 0.99))]
    if matrices:                                            # the paper's networks have none
        optimisers.append(torch.optim.Muon(matrices, args.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    geco = GECO(args.tolerance)
    if resumed:
        for optimiser, state in zip(optimisers, checkpoint["optimisers"]):
            optimiser.load_state_dict(state)
        geco.beta, geco.mse = checkpoint["geco"]
    if args.compile is None:
        args.compile = device.type == "cuda"
    if args.compile and not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        print("no C++ compiler found: running eagerly (install g++ for --compile)")
    elif args.compile:
        model.encoder.compile()
        model.decoder.compile()

    config = {k: v for k, v in vars(args).items() if k not in KEPT} | {"steps": args.steps}
    batches, start, before = Batches(args, device), time.time(), checkpoint["seconds"]
    test = TestClips(config, 100, device=device)
    log = open(folder / "metrics.jsonl", "a")

    def record(step, **values):
        log.write(json.dumps({"step": step, "seconds": round(before + time.time() - start, 1), **values}) + "\n")
        log.flush()

    def store(step):
        save(folder / "checkpoint.pt", {
            "kind": "hgn", "model": model.state_dict(), "model_config": model.config,
            "optimisers": [optimiser.state_dict() for optimiser in optimisers],
            "geco": (geco.beta, geco.mse), "step": step, "config": config, "seed": args.seed,
            "seconds": before + time.time() - start, **provenance()})

    def look(step):
        model.eval()
        movies(model, test, folder, 90)
        result = measure(model, test)
        record(step, **{k: v for k, v in result.items() if isinstance(v, float)})
        model.train()
        return result

    if not resumed:
        record(0, config=config, **provenance())
    bar = tqdm(range(checkpoint["step"], args.steps), initial=checkpoint["step"], total=args.steps, unit="step")
    done = checkpoint["step"]
    try:
        for step in bar:
            # Warm up over 100 steps, then down to zero along a cosine.
            scale = min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
            for group in (group for optimiser in optimisers for group in optimiser.param_groups):
                group["lr"] = args.lr * scale
            context, targets, times, generator = batches(step)
            loss, mse, kl = model.loss(context, targets, times, geco.beta if args.geco else args.beta, generator)
            model.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)    # a late frame gone wrong weighs no more
            for optimiser in optimisers:
                optimiser.step()
            done = step + 1
            if args.geco:
                geco.update(mse.item())
            if done % 20 == 0 or done == args.steps:
                if not math.isfinite(loss.item()):
                    fail(f"the loss is {loss.item()} at step {done}: try a lower --lr; the checkpoint is from before")
                rate = args.batch_size * (bar.format_dict["rate"] or 0)
                bar.set_postfix(loss=f"{loss.item():.2e}", mse=f"{mse.item():.2e}", kl=f"{kl.item():.1f}",
                                clips_s=f"{rate:.0f}")
                record(done, loss=loss.item(), mse=mse.item(), kl=kl.item(), beta=geco.beta if args.geco else args.beta)
            if done % 250 == 0 and done < args.steps:
                store(done)
            if done % 2000 == 0 and done < args.steps:
                look(done)
    except KeyboardInterrupt:
        store(done)
        bar.close()
        print(f"stopped after step {done}: go on with python train.py --resume {folder}/checkpoint.pt")
        raise SystemExit(130)
    store(args.steps)
    result = look(args.steps)
    table(result, config)
    print(f"\n{before + time.time() - start:.0f} s. Look at {folder}/rollout.gif, then: "
          "python eval.py --reverse --speed 2 --sample 4")


if __name__ == "__main__":
    main()
