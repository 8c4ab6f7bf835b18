"""Measure how well a trained model knows its system: SyMetric, and how true its samples are.

python results/measures.py runs/three_body          # or checkpoints/three_body.pt

eval.py measures errors; these two measures look at the states and at the samples. SyMetric passes
where symetric_r2, of the map from learnt to true states, is above 0.9 and symetric, how far that
map is from symplectic, is below 0.05. samples_valid is the share of samples that are pictures of
the system, samples_obey of those that also move as it does. The figures go to measures.json in the
folder that eval.py writes to.
"""

import argparse
import json
import sys
from itertools import combinations_with_replacement
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.func import jacrev, vmap

sys.path.insert(0, str(Path(__file__).parent.parent))

from eval import (
    CLIPS,
    TEST_SEED,
    WINDOW,
    find_run,
    load,
    measure,
    pixel_mse,
    provenance,
    run_main,
    test_set,
    wrap,
)
from nhf import seeded
from physics import BACKGROUND, along_x, render, rod_end, simulate, unchanged


def symplecticity(model, test, start, frames):
    """Return SyMetric between the model's states and the true ones, along the test clips."""
    dim = start[0].shape[1]
    least = 8 * dim  # a linear map of so many numbers fits anything
    if len(test.observed) < least:
        return {"symetric": f"left out: {dim} numbers in q need {least} clips"}
    q, p = test.path(WINDOW)
    true = state_rows(q, p, test.angles)
    q, p = model.rollout(*start, WINDOW - 1)
    latent = state_rows(q, p, model.angles)
    return symetric(latent, true)


def quality_of_samples(model, test, start, frames):
    """Return which shares of samples show the system and move as it does."""
    if model.deterministic:
        return {"samples_valid": "left out: a deterministic model has no prior to draw from"}
    generator = seeded(TEST_SEED + 4)
    samples = model.sample(len(test.observed), WINDOW - 1, generator=generator)
    valid, obey = judge(test.system, samples, test.dt)
    return {"samples_valid": valid, "samples_obey": obey}


def state_rows(q, p, angles):
    """Return every third state of paths q and p (B, T, ...) as rows (B * T / 3, 2 * dim).

    The first `angles` of the coordinates are counted from their mean at frame 0, by less than half
    a turn, so that no path starts beside the cut at pi.
    """
    q = q[:, ::3].flatten(2).double()  # (B, T / 3, dim)
    p = p[:, ::3].flatten(2).double()
    turning = q[..., :angles]
    start = turning[:, :1]
    mean_sin = start.sin().mean(0)
    mean_cos = start.cos().mean(0)
    mean = torch.atan2(mean_sin, mean_cos)
    turning = turning - start + wrap(start - mean)
    return torch.cat((turning, q[..., angles:], p), 2).flatten(0, 1)


def symetric(latent, true, orders=5):
    """Return SyMetric (Higgins et al. 2021, arXiv 2111.05986): is latent -> true state symplectic?

    The map is a regression on polynomials, by ridge where the authors have a lasso. It is
    symplectic, but for a constant factor, where the Poisson brackets of the true coordinates, as
    functions of the latent ones, are those of coordinates and their momenta.
    latent: (n, 2 d). true: (n, 2 D). Returns: a dict of R^2, SyMetric and the polynomials' order.
    """
    true = moving_directions(true)
    scale = latent.std(0).clamp(min=1e-9)
    true_scale = true.std(0)
    x = (latent - latent.mean(0)) / scale
    y = (true - true.mean(0)) / true_scale
    for order in range(1, orders + 1):
        w, r2 = fit_polynomial(x, y, order)
        next_terms = products(x[:1], order + 1).shape[1]
        if r2 >= 0.9 or next_terms > len(x) / 4:  # so many terms would fit noise
            break

    def fitted(x):
        return true_scale * (products(x, order) @ w)

    jacobian_of_each = vmap(jacrev(fitted))
    jacobian = jacobian_of_each(x) / scale  # (n, 2 D, 2 d)
    by_q, by_p = jacobian.chunk(2, 2)
    brackets = by_q @ by_p.mT - by_p @ by_q.mT  # Poisson brackets, (n, 2 D, 2 D)
    P = brackets @ brackets.mT  # the identity, where the map is symplectic
    largest = P.abs().amax((1, 2))
    P = P / largest.mean()
    identity = torch.eye(P.shape[1]).to(P)
    off = (P - identity).square().mean()
    return {"symetric_r2": r2, "symetric": off.item(), "symetric_order": order}


def moving_directions(states):
    """Return q and p of states (n, 2 D) along the principal directions in which p moves.

    That is where p spreads by a tenth of its largest spread or more: where a centre of mass hardly
    moves, no regression sees its Poisson brackets.
    """
    q, p = states.chunk(2, 1)
    deviation = p - p.mean(0)
    _, spread, directions = torch.linalg.svd(deviation, full_matrices=False)
    moves = spread > 0.1 * spread[0]
    moving = directions[moves].mT
    return torch.cat((q @ moving, p @ moving), 1)


def products(x, order):
    """Return all products of one to `order` coordinates of x (..., dim): (..., terms)."""
    terms = []
    for factors in range(1, order + 1):
        for term in combinations_with_replacement(x.unbind(-1), factors):
            product = torch.stack(term).prod(0)
            terms.append(product)
    return torch.stack(terms, -1)


def fit_polynomial(x, y, order):
    """Return the weights of a ridge regression of y (n, m) on products(x, order), and its R^2.

    It is fitted to the first half of the rows, and R^2 is that of the other half.
    """
    A = products(x, order)
    A = A - A.mean(0)
    A, A_unseen = A.tensor_split(2)
    y, y_unseen = y.tensor_split(2)
    identity = torch.eye(A.shape[1]).to(A)
    ridge = 1e-4 * len(A) * identity
    w = torch.linalg.solve(A.T @ A + ridge, A.T @ y)
    residual = (A_unseen @ w - y_unseen).square().sum()
    r2 = 1 - residual / y_unseen.square().sum()
    return w, r2.item()


def judge(system, frames, dt, seen=10):
    """Return which shares of clips (n, T, 3, S, S) show the system, and move as it does.

    A clip shows the system where painting the state read off every frame has a pixel MSE of 5e-4
    at most. It moves as the system does where it also stays within 0.15, in world units, of the
    true motion from the state that fits its `seen` first frames best.
    """
    q = torch.cat([infer_q(system, block) for block in frames.split(8)])
    painted = render(system, q, frames.shape[-1])
    error = pixel_mse(painted, frames)  # (n, T)
    valid = error.amax(1) <= 5e-4
    shown = system.position(q)  # (n, T, bodies, 2)

    def motion(start, steps=seen):
        path, _ = simulate(system, *start.unbind(1), steps, dt)
        return system.position(path)

    p = system.inertia * wrap(q[:, 1] - q[:, 0]) / dt  # a rough start for the fit
    start = torch.stack((q[:, 0], p), 1)  # (n, 2, bodies, dims)
    start = gauss_newton(motion, start, shown[:, :seen], 4, 1e-4, 0.5, 1e-9)
    off = motion(start, shown.shape[1]) - shown
    distance = off.norm(dim=-1).amax((1, 2))
    obey = valid & (distance <= 0.15)
    share_valid = valid.double().mean()
    share_obey = obey.double().mean()
    return share_valid.item(), share_obey.item()


def gauss_newton(f, x, target, steps, h, longest, damping):
    """x (n, ...) whose f(x) (n, ...) is nearest to target, by damped Gauss-Newton steps.

    h: of the central differences for the slopes of f. longest: how far a step moves a coordinate.
    """
    one = torch.eye(x[0].numel()).to(x)
    shifts = h * torch.cat((one, -one)).view(-1, 1, *x.shape[1:])  # (2 * dim, 1, ...)
    for _ in range(steps):
        values = f((x + shifts).flatten(0, 1)).to(x)
        ahead, behind = values.reshape(2, len(one), len(x), -1)
        J = (ahead - behind).permute(1, 2, 0) / (2 * h)  # (n, m, dim)
        error = (target - f(x)).to(x)
        slope = J.mT @ error.reshape(len(x), -1, 1)
        curvature = J.mT @ J + damping * one
        step = torch.linalg.solve(curvature, slope).reshape(x.shape)
        x = x + step.clamp(-longest, longest)
    return x


def located(system, centre):
    """The q (n, bodies, dims) of discs centred at (n, bodies, 2). Raises: ValueError."""
    x, y = centre.split(1, -1)
    if system.position is unchanged:
        return centre
    if system.position is along_x:
        return x
    if system.position is rod_end:
        return torch.atan2(x, -y)
    raise ValueError("this system's places are not known here: add the inverse of its position")


def infer_q(system, frames):
    """The true system's q (n, T, bodies, dims) that frames (n, T, 3, S, S) show.

    It starts at the centroids of the pixels whose colour is nearest to that of each body.
    """
    size = frames.shape[-1]
    pictures = frames.flatten(0, 1)  # (n * T, 3, S, S)
    background = torch.tensor(BACKGROUND).to(frames)
    light = pictures - background.view(3, 1, 1)
    colours = torch.tensor(system.colours).to(frames)
    share = torch.einsum("ncyx,bc->nbyx", light, F.normalize(colours)).clamp(min=1e-9)
    largest = share.amax(1, keepdim=True)
    share = share * (share == largest)
    pixels = torch.arange(size).to(frames) - (size - 1) / 2
    line = pixels * 2 * system.half_width / size
    x, y = torch.meshgrid(line, -line, indexing="xy")  # y upward
    mass = share.sum((2, 3)) + 1e-9
    centre_x = (share * x).sum((2, 3)) / mass
    centre_y = (share * y).sum((2, 3)) / mass
    centre = torch.stack((centre_x, centre_y), 2)  # (n * T, bodies, 2)

    def painted(q):
        frames = render(system, q.unsqueeze(1), size)
        return frames.squeeze(1)

    start = located(system, centre).double()
    q = gauss_newton(painted, start, pictures, steps=2, h=0.01, longest=0.2, damping=1e-3)
    return q.unflatten(0, frames.shape[:2])


def look(given):
    """Measure the model whose run or checkpoint is named."""
    path = find_run(given["checkpoint"])
    model, run = load(path)
    options = run["options"]
    if not options["system"]:
        raise ValueError(f"{path} is of no named system, whose true states are known")
    test = test_set(options, CLIPS)
    figures = measure(model, test, WINDOW, (symplecticity, quality_of_samples))
    report = {**provenance(), "test_seed": TEST_SEED, "checkpoint": str(path), "metrics": figures}
    folder = path.parent if path.name == "checkpoint.pt" else Path("runs", f"{path.stem}-look")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "measures.json").write_text(json.dumps(report, indent=1))
    for name, value in figures.items():
        print(f"{name:<16}{value:.4g}" if isinstance(value, float) else f"{name:<16}{value}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="the folder of a run, or a checkpoint")
    run_main(look, vars(parser.parse_args()))
