#!/usr/bin/env bash
# What only a GPU can tell: tests, speed, a profile, time to the paper's error, the paper's networks.
#
#   bash results/gpu.sh            some 40 minutes on one H100, but for the paper's networks at the
#                                  end, which take more: call it again until they are done
#   bash results/gpu.sh --small    the same in small, to try this script on a CPU
#
# Everything it finds goes to results/gpu/. A part whose file is there is skipped, and trainings go on
# from their checkpoints in runs/gpu-*, so it may be stopped by Ctrl-C and started again. LIMIT=560
# stops it after so many seconds.
set -uo pipefail
cd "$(dirname "$0")/.."
limit=${LIMIT:-2400}
to=results/gpu
devices=$(python -c "import torch; print(torch.cuda.device_count())")
batches="16 512"
small=""
context=""
prefix=gpu
quick="--steps 600"
paper="--steps 15000"
if [ "${1:-}" = --small ]; then
  batches="4"
  to=results/gpu-small
  prefix=gpu-small
  small="--size 16 --window 6 --targets 2"
  context="--context 6"
  quick="--steps 4 --batch-size 4"
  paper="--steps 4 --batch-size 2"
fi
mkdir -p "$to" runs

# part NAME COMMAND...: run it, and keep what it prints as NAME.txt when it has ended well.
part() {
  name=$1
  shift
  left=$((limit - SECONDS))
  if [ -e "$to/$name.txt" ] || [ "$left" -lt 10 ]; then
    return
  fi
  echo "$name: $*"
  timeout "$left" "$@" <&0 > "$to/$name.failed" 2>&1 &  # else a job has no standard input
  child=$!
  trap 'kill -TERM "$child"; wait "$child"; exit 130' INT TERM  # timeout hands it on
  if wait "$child"; then
    mv "$to/$name.failed" "$to/$name.txt"
  else
    echo "$name failed or ran out of time, see $to/$name.failed"
  fi
}

# learn NAME OPTIONS...: train, or go on with the training; its log is kept, and its model at the end.
learn() {
  name=$1
  shift
  run=$prefix-$name
  if [ -e "runs/$run/checkpoint.pt" ]; then
    $launch train.py --resume "runs/$run"
  else
    $launch train.py --name "$run" "$@"
  fi
  status=$?
  cp "runs/$run/metrics.jsonl" "$to/$name.jsonl"
  if [ "$status" = 0 ]; then
    cp "runs/$run/checkpoint.pt" "$to/$name.pt"
  fi
  return "$status"
}

# bench NAME OPTIONS...: its table is kept as NAME.json.
bench() {
  python test_hgn.py bench "${@:2}" && cp runs/bench.json "$to/$1.json"
}
export -f learn bench
export to prefix
export launch=python

in_part() {  # the same as part, for the functions above; a training that is stopped is waited for
  part "$1" bash -c 'trap : TERM; "$@"' -- "$2" "$1" "${@:3}"
}

# The tests that need a GPU.
part tests python -m pytest -q -k cuda test_hgn.py

# The training step, kernel by kernel and as a graph. Memory, the seconds to the first step and the
# speed of the simulator are in the same tables.
for batch in $batches; do
  for arch in compact paper; do
    in_part "bench-$arch-$batch" bench --arch "$arch" --batch-size "$batch" $small
  done
done

# What a step launches and waits for, and how many operations it is.
part profile python - $small <<'PYTHON'
import sys

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import train


class CountOperations(TorchDispatchMode):
    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        formula = flop_registry.get(function.overloadpacket)
        if formula:
            self.total += formula(*args, **(kwargs or {}), out_val=made)
        return made


device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
kinds = [ProfilerActivity.CPU]
if device.type == "cuda":
    kinds.append(ProfilerActivity.CUDA)
for arch in ("compact", "paper"):
    options = train.settle(train.parse(["--arch", arch, *sys.argv[1:]]))
    recipe = train.recipe_of(options, device)
    model = recipe.build().to(device)
    optimisers = train.make_optimisers(model, options.lr, recipe.lr_scales, recipe.muon)
    step = train.step_of(recipe, model, optimisers)
    with CountOperations() as count:
        step(*recipe.batch(0))
    print(f"{arch}: {count.total / 1e9:.4g} GFLOP a step")
    for i in range(1, 10):
        step(*recipe.batch(i))
    with profile(activities=kinds) as found:
        for i in range(10, 50):
            step(*recipe.batch(i))
    for event in found.key_averages():
        if event.key.startswith("cuda"):  # calls of the CUDA runtime
            print(f"{event.key:<40}{event.count / 40:9.3g} a step")
    by_time = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=by_time, row_limit=15))
PYTHON

# From the command to the end of a short run, one system after the other.
for system in mass_spring pendulum two_body three_body; do
  in_part "quick-$system" learn --system "$system" $quick $small
done

# The training step once more, compiled, which takes minutes at first.
for batch in $batches; do
  for arch in compact paper; do
    name="bench-$arch-$batch-compiled"
    in_part "$name" bench --arch "$arch" --batch-size "$batch" --compile $small
  done
done

# Two processes beside one, where there are two devices, or none.
if [ "$devices" -ge 2 ] || [ "$devices" = 0 ]; then
  together="python -m torch.distributed.run --standalone --nproc-per-node=2"
  steps="--steps 200 --batch-size ${batches##* }"
  in_part one-process learn $steps $small
  launch=$together in_part two-processes learn $steps $small
fi

# The paper's networks, all at once: what their logs say of seconds is not the time of one alone.
for system in mass_spring pendulum two_body three_body; do
  (in_part "paper-$system-clean" learn --system "$system" --arch paper --geco 5e-5 $paper $small) &
  (in_part "paper-$system-noisy" learn --system "$system" --protocol paper $paper $small $context) &
done
trap 'kill -TERM $(jobs -p); wait; exit 130' INT TERM
wait
ls "$to"
