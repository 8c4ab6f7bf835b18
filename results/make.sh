#!/usr/bin/env bash
# Make figures and pictures that README.md and results/README.md show, from nothing.
#
#   bash results/make.sh                  all parts, one after the other
#   bash results/make.sh scenes flows     some parts, by their names below
#
# Runs are runs/made-NAME. A run that is measured is skipped, and one that was stopped goes on, so the
# script may be stopped by Ctrl-C and started again. Remove runs/made-NAME to make a run anew, and
# runs/scenes to draw the scenes anew. What takes a GPU is of gpu.sh.
set -euo pipefail
cd "$(dirname "$0")/.."

parts="systems drawing others noise paper scenes seeds film flows unequal bench"
look=()  # options of eval.py, which each part sets

# learn NAME OPTIONS...: train and measure the run of this name.
learn() {
  local run=runs/made-$1
  if [ -e "$run/metrics.json" ]; then
    return
  fi
  if [ -e "$run/checkpoint.pt" ]; then
    python train.py --resume "$run"
  else
    rm -rf "$run"  # it was stopped before its first checkpoint
    python train.py --name "made-$1" "${@:2}"
  fi
  python eval.py --checkpoint "$run" "${look[@]}"
}

# gather FILE RUN...: what was measured of these runs, by their names, as results/FILE.json.
gather() {
  python - "$@" <<'PYTHON'
import json
import sys
from pathlib import Path

file, *runs = sys.argv[1:]
reports = {}
for run in runs:
    folder = Path(f"runs/made-{run}")
    report = json.loads((folder / "metrics.json").read_text())
    measures = folder / "measures.json"  # of test_hgn.py measures
    if measures.exists():
        found = json.loads(measures.read_text())
        report["metrics"] |= found.pop("metrics")
        report["measures"] = {"command": found["command"], "versions": found["versions"]}
    if report["config"]["data"]:
        report["config"]["data"] = Path(report["config"]["data"]).name
    reports[run] = report
Path(f"results/{file}.json").write_text(json.dumps(reports, indent=1))
PYTHON
}

# ship RUN: its model comes with the code, as checkpoints/RUN.pt.
ship() {
  python - "runs/made-$1" "checkpoints/$1.pt" <<'PYTHON'
import sys

from eval import load

model, run = load(sys.argv[1])
del run["optimisers"]  # they are half of the file, and only a resumed run needs them
model.save(sys.argv[2], run=run)
PYTHON
}

# The models that come with the code, and their movies.
systems() {
  look=(--clips 256 --reverse --speed 2 --speed 0.5 --sample 4)
  local name options
  for name in mass_spring pendulum two_body three_body; do
    case "$name" in
      mass_spring) options=(--substeps 3) ;;
      pendulum) options=(--steps 3000 --substeps 3) ;;
      two_body) options=(--steps 8000 --substeps 2) ;;
      three_body) options=(--steps 3000 --substeps 2) ;;
    esac
    learn "$name" --system "$name" "${options[@]}"
    if [ ! -e "runs/made-$name/measures.json" ]; then
      python test_hgn.py measures "runs/made-$name"
    fi
    ship "$name"
    gather "$name" "$name"
    cp "runs/made-$name/rollout.gif" "results/$name.gif"
  done
}

# How the model works, drawn with frames of three_body.
drawing() {
  python - <<'PYTHON'
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from eval import TestClips, load

model, run = load("checkpoints/three_body.pt")
test = TestClips(run["options"], 1)
with torch.no_grad():
    q, _ = model.rollout(*model.infer(test.observed), 24)
    painted = model.decode(q[:, ::8]).clamp(0, 1)[0]

figure = Figure((9, 3.3), dpi=110)
ax = figure.add_axes((0, 0, 1, 1))
ax.set_axis_off()
BLUE = "#dbe7f3"
ORANGE = "#f7e3cf"
GREY = "#e6e6e6"


def box(x, y, width, height, text, colour):
    """Draw a box with its lower left corner at (x, y)."""
    shape = "round,pad=0,rounding_size=0.8"
    ax.add_patch(FancyBboxPatch((x, y), width, height, shape, fc=colour, ec="black", lw=0.8))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)


def arrow(start, end):
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, lw=0.9))


def picture(frame, x, y, side=7):
    extent = (x, x + side, y, y + side)
    ax.imshow(frame.movedim(0, 2), extent=extent, interpolation="nearest")


for i, frame in enumerate(test.observed[0, :5]):
    picture(frame, 1 + 0.9 * i, 7.5 - 0.9 * i)
ax.text(6.4, 15.4, "five frames x", ha="center", fontsize=9)
arrow((13, 9), (16.5, 9))
box(16.5, 6, 9, 6, "encoder\nq(z|x)", BLUE)
arrow((25.5, 9), (30.5, 9))
ax.text(28, 9.9, "z", ha="center", fontsize=9)
box(30.5, 6, 7, 6, r"$f_\psi$", BLUE)
box(50.5, 0.8, 28, 3.4, r"leapfrog on the learnt scalar $H(q, p)$", BLUE)
for i, frame in enumerate(painted):
    x = 41.5 + 12.5 * i
    t = 8 * i
    arrow((x - 4, 9), (x, 9))
    box(x, 6.5, 8, 5, f"$q_{{{t}}},\\ p_{{{t}}}$", GREY)
    arrow((x + 4, 11.5), (x + 4, 15))
    box(x, 15, 8, 4, "decoder", ORANGE)
    arrow((x + 4, 19), (x + 4, 22))
    picture(frame, x + 0.5, 22.2)
    ax.text(x + 4, 30.4, f"frame {t}", ha="center", fontsize=9)
    if t > 0:
        arrow((x - 2.25, 4.2), (x - 2.25, 8.7))
ax.set(xlim=(0, 90), ylim=(0, 33))  # imshow has changed them
figure.savefig("results/model.png")
PYTHON
}

# Friction.
others() {
  look=()
  local name
  learn damped_spring --system damped_spring --friction
  learn damped_pendulum --system damped_pendulum --friction
  for name in damped_spring damped_pendulum; do
    gather "$name" "$name"
  done
}

# The paper's noise, and an encoder that sees all thirty frames.
noise() {
  look=()
  local name runs=()
  for name in mass_spring pendulum two_body three_body; do
    learn "noisy_$name" --system "$name" --noise paper --context 30
    runs+=("noisy_$name")
  done
  gather noisy "${runs[@]}"
}

# The paper's networks, one to four hours for each run. A step paints eight random frames of a clip.
paper() {
  look=(--clips 64 --reverse --speed 2 --sample 4)
  local how=(--targets 8 --lr 4e-4)
  local clean=(--arch paper --geco 5e-5)
  learn paper_mass_spring "${clean[@]}" --system mass_spring --window 60 --steps 1000 "${how[@]}"
  learn paper_window_30_mass_spring "${clean[@]}" --system mass_spring --steps 1600 "${how[@]}"
  learn paper_pendulum "${clean[@]}" --system pendulum --steps 1600 "${how[@]}"
  learn paper_two_body "${clean[@]}" --system two_body --steps 1600 "${how[@]}"
  learn paper_noisy_mass_spring --protocol paper --system mass_spring --steps 1600 "${how[@]}"
  learn paper_noisy_pendulum --protocol paper --system pendulum --steps 1600 "${how[@]}"
  learn paper_noisy_two_body --protocol paper --system two_body --steps 5000 "${how[@]}"
  # From 0.001, GECO would take most of the run to lower beta, and nothing is learnt until then.
  learn paper_noisy_three_body --protocol paper --system three_body --beta 1e-5 --steps 1600 \
    "${how[@]}"
  ship paper_mass_spring
  ship paper_noisy_two_body
  gather paper-cpu paper_mass_spring paper_window_30_mass_spring paper_pendulum paper_two_body \
    paper_noisy_mass_spring paper_noisy_pendulum paper_noisy_two_body paper_noisy_three_body
}

# draw_scenes: write the clips of all scenes, unless they are there.
draw_scenes() {
  if [ ! -e runs/scenes ]; then
    python -c "import test_hgn; test_hgn.write_scenes('runs/scenes.new')"
    mv runs/scenes.new runs/scenes
  fi
}

# Pictures that are not discs on a plain ground; the coarse ones of grid also with longer contexts.
scenes() {
  look=(--scale 4)
  local name dt frames names=(rod photo twins string bar depth rods grid guise)
  draw_scenes
  for name in "${names[@]}"; do
    dt=0.125
    if [ "$name" = rods ]; then
      dt=0.0625
    fi
    learn "$name" --data "runs/scenes/$name.npy" --dt "$dt"
  done
  for frames in 10 30; do
    learn "grid-$frames" --data runs/scenes/grid.npy --dt 0.125 --context "$frames"
  done
  gather scenes "${names[@]}" grid-10 grid-30
  python - "${names[@]}" <<'PYTHON'
import sys

import imageio.v3 as iio
import numpy as np

pictures = [iio.imread(f"runs/made-{name}/rollout.png") for name in sys.argv[1:]]
rows = [np.concatenate(pictures[i : i + 3], 1) for i in (0, 3, 6)]
iio.imwrite("results/scenes.png", np.concatenate(rows))
PYTHON
}

# How much runs differ: the default run with three seeds; seed 0 of rod and twins is of scenes.
seeds() {
  look=(--quick)
  local name seed runs=()
  draw_scenes
  for seed in 0 1 2; do
    for name in pendulum two_body three_body; do
      learn "$name-$seed" --system "$name" --seed "$seed"
      runs+=("$name-$seed")
    done
  done
  for seed in 1 2; do
    for name in rod twins; do
      learn "$name-$seed" --data "runs/scenes/$name.npy" --dt 0.125 --seed "$seed"
      runs+=("$name-$seed")
    done
  done
  gather seeds "${runs[@]}"
}

# One film of 600 frames: a pendulum with friction before a textured ground, with camera noise.
film() {
  look=(--scale 4)
  python - <<'PYTHON'
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from physics import SYSTEMS, simulate

g = torch.Generator().manual_seed(21)
system = replace(SYSTEMS["pendulum"], friction=0.03)
q = simulate(system, torch.full((1, 1, 1), 2.2), torch.zeros(1, 1, 1), 600, 0.1)[0]
pixels = 45  # of one unit of length
x = (torch.arange(120) - 59.5) / pixels
y = (44.5 - torch.arange(90)[:, None]) / pixels
ground = F.interpolate(torch.rand(1, 3, 12, 16, generator=g), (90, 120), mode="bicubic")[0]
ground = 0.8 * ground.clamp(0, 1) + 0.1 * torch.rand(3, 90, 120, generator=g)
angle = q.float().view(-1, 1, 1)
far = ((x - 0.6 * angle.sin()) ** 2 + (y + 0.6 * angle.cos()) ** 2).sqrt()
ball = ((0.18 - far) * pixels + 0.5).clamp(0, 1).unsqueeze(1)
film = ground * (1 - ball) + ball * torch.tensor([0.95, 0.2, 0.1]).view(3, 1, 1)
film = (film + 0.02 * torch.randn(film.shape, generator=g)).clamp(0, 1)
np.save("runs/film.npy", (film * 255).round().byte().movedim(1, 3).numpy())
PYTHON
  learn film --data runs/film.npy --dt 0.1 --friction
  gather film film
}

# Nine densities beside RealNVP, five of them with three seeds.
flows() {
  look=()
  local name seed model seeds runs=()
  for name in eight_gaussians nine_gaussians two_moons crescents circles rings pinwheel \
    two_spirals checkerboard; do
    seeds="0 1 2"
    if [[ " eight_gaussians nine_gaussians crescents circles " == *" $name "* ]]; then
      seeds=0
    fi
    for seed in $seeds; do
      for model in nhf realnvp; do
        learn "$name-$model-$seed" --density "$name" --model "$model" --seed "$seed"
        runs+=("$name-$model-$seed")
      done
    done
  done
  gather flows "${runs[@]}"
  cp runs/made-eight_gaussians-nhf-0/density.png results/eight_gaussians.png
  cp runs/made-eight_gaussians-nhf-0/flow.gif results/eight_gaussians.gif
}

# What one H costs where wells have unequal weights: nine Gaussians on a grid, of weights 1 to 9.
unequal() {
  look=()
  local n
  python - <<'PYTHON'
import numpy as np

g = np.random.default_rng(0)
places = np.array([(x, y) for y in (-2, 0, 2) for x in (-2, 0, 2)])
which = g.choice(9, 50_000, p=np.arange(1, 10) / 45)
np.save("runs/unequal.npy", places[which] + 0.3 * g.standard_normal((50_000, 2)))
PYTHON
  for n in 1 2; do
    learn "unequal-$n" --data runs/unequal.npy --hamiltonians "$n"
  done
  gather unequal unequal-1 unequal-2
  python - <<'PYTHON'
import json
from pathlib import Path

import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from eval import load, test_set

places = torch.tensor([(x, y) for y in (-2.0, 0.0, 2.0) for x in (-2.0, 0.0, 2.0)])
weights = Categorical(torch.arange(1.0, 10.0))
truth = MixtureSameFamily(weights, Independent(Normal(places, 0.3), 1))
path = Path("results/unequal.json")
reports = json.loads(path.read_text())
for name, report in reports.items():
    _, run = load(f"runs/made-{name}")
    points = test_set(run["options"], 0).held_out[: report["metrics"]["points"]]
    best = truth.log_prob(points).mean().item()
    report["metrics"]["gap"] = best - report["metrics"]["log_prob_256"]
path.write_text(json.dumps(reports, indent=1))
PYTHON
}

# The training step of the compact model, on the CPU of this machine.
bench() {
  python test_hgn.py bench --device cpu
  cp runs/bench.json results/bench-cpu.json
  python test_hgn.py bench --device cpu --compile
  cp runs/bench.json results/bench-cpu-compiled.json
}

main() {
  local part
  for part in "$@"; do
    if [[ " $parts " != *" $part "* ]]; then
      echo "there is no part $part: take some of $parts"
      exit 2
    fi
  done
  mkdir -p runs
  for part in ${*:-$parts}; do
    SECONDS=0
    "$part"
    echo "$part: $SECONDS seconds in this call"
  done
}

main "$@"
exit
