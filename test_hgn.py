"""What the code promises, held against independent truths: the textbook's equations, closed forms,
a reference integrator, autograd, quadrature. Run: python -m pytest -q test_hgn.py"""

import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch._inductor.config
from PIL import Image
from torch.autograd.functional import jacobian
from torch.distributions import Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import eval as evaluation
import train
from eval import TestClips, judge, load, measure, measure_physics, noise_floor, symetric
from hgn import GECO, HGN, CompactHamiltonian, Hamiltonian, PaperHamiltonian, Space
from hgn import charted_loss, euler, explicit_leapfrog, leapfrog
from nhf import DENSITIES, NHF, Points, RealNVP, Separable, log_normal
from physics import BACKGROUND, SYSTEMS, Recordings, clips, initial_states, read_q
from physics import read_points, render, simulate

TestClips.__test__ = False  # by its name alone pytest takes it for a test
torch.set_num_threads(1)  # threads that wait for a busy core cost minutes
os.environ["OMP_NUM_THREADS"] = "1"  # the same for the processes started here
HERE = Path(__file__).parent
NAMES = [name for name, system in SYSTEMS.items() if not system.friction]
close = torch.testing.assert_close
each = pytest.mark.parametrize


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def alone():
    """The same numbers for every test, and Ctrl-C as it was before a run heeded it."""
    torch.manual_seed(0)
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in before:
        signal.signal(number, handler)


# ---------------------------------------------------------------- physics.py
def equations_of_motion(name, q, p):
    """dq/dt, dp/dt written from the textbook, body by body, not shared with physics.py."""
    if name == "mass_spring":
        return p / 0.5, -2.0 * q
    if name == "pendulum":
        return p / (0.5 * 1.0**2), -0.5 * 3.0 * 1.0 * torch.sin(q)
    if name == "spring_pendulum":
        r = torch.sqrt((q**2).sum(-1, keepdim=True))
        return p / 0.5, -4.0 * (r - 1.0) * q / r - 0.5 * 3.0 * torch.eye(2, dtype=q.dtype)[1]
    if name == "double_pendulum":  # Lagrange's, with L = T - V in angles and their velocities
        a = (q[:, 0] - q[:, 1])[:, 0]
        one = torch.ones_like(a)
        M = 0.5 * torch.stack((2 * one, a.cos(), a.cos(), one), 1).view(-1, 2, 2)
        v = torch.linalg.solve(M, p)
        twist = 0.5 * v[:, 0] * v[:, 1] * a.sin().unsqueeze(1)
        first, second = -3.0 * q[:, 0].sin() - twist, -1.5 * q[:, 1].sin() + twist
        return v, torch.stack((first, second), 1)
    force = torch.zeros_like(q)
    for i, j in itertools.permutations(range(q.shape[1]), 2):
        d = q[:, j] - q[:, i]
        force[:, i] += d / d.norm(dim=-1, keepdim=True) ** 3
    return p, force


def runge_kutta(field, q, p, dt, steps, substeps):
    """The classical method for dq/dt, dp/dt = field(q, p): q, p of shape (B, steps + 1, ...)."""
    h, state = dt / substeps, torch.stack((q, p))
    slope, states = lambda s: torch.stack(field(*s)), [state]
    for _ in range(steps):
        for _ in range(substeps):
            a = slope(state)
            b = slope(state + h / 2 * a)
            c = slope(state + h / 2 * b)
            state = state + h / 6 * (a + 2 * b + 2 * c + slope(state + h * c))
        states.append(state)
    return torch.stack(states, 2).unbind(0)


@each("name", NAMES)
def test_the_simulator_agrees_with_runge_kutta_in_both_directions(name):
    q, p = initial_states(SYSTEMS[name], 16, seeded())
    for dt, friction in ((0.25, 0.0), (-0.125, 0.05)):
        damped = lambda q, p, v, force: (v, force - friction * p)
        field = lambda q, p: damped(q, p, *equations_of_motion(name, q, p))
        path = simulate(replace(SYSTEMS[name], friction=friction), q, p, 21, dt)
        close(path, runge_kutta(field, q, p, dt, 20, 100), rtol=0, atol=2e-6)


@each("name", NAMES)
def test_the_energy_has_the_forces_as_gradients_and_is_kept(name):
    system = SYSTEMS[name]
    q, p = (x.requires_grad_() for x in initial_states(system, 50, seeded()))
    dH_dq, dH_dp = torch.autograd.grad(system.energy(q, p).sum(), (q, p))
    close((dH_dp, -dH_dq), equations_of_motion(name, q.detach(), p.detach()))
    H = system.energy(*simulate(system, *initial_states(system, 100, seeded(3)), 90))
    assert ((H - H[:, :1]) / H[:, :1]).abs().max() < 1e-7  # of three bodies that meet as well


STARTS = (  # nearest and farthest from the origin, and the speed of a circular orbit at 1
    ("mass_spring", 0.1, 1, None), ("pendulum", 1.3, 2.3, None), ("two_body", 0.5, 1.5, 0.5),
    ("three_body", 0.9, 1.2, 3**-0.25),
)  # fmt: skip


@each("name, low, high, circular", STARTS)
def test_initial_states(name, low, high, circular):
    q, p = initial_states(SYSTEMS[name], n := 100_000, seeded())
    x, y = q[:, 0].unbind(-1) if circular else (q[:, 0, 0], p[:, 0, 0])
    r, angle = torch.hypot(x, y), torch.atan2(y, x)
    assert low <= r.min() and r.max() <= high and abs(r.mean() - (low + high) / 2) < 0.01
    counts = torch.histc(angle, 64, -math.pi, math.pi)  # of a square it would peak at diagonals
    assert ((counts - n / 64) ** 2 / (n / 64)).sum() < 120  # chi squared, 63 degrees of freedom
    if circular:  # either way round, all bodies the same way, the speed jittered by 10 %
        spin = (q[..., 0] * p[..., 1] - q[..., 1] * p[..., 0]).sign()
        assert (spin == spin[:, :1]).all() and abs(spin.mean()) < 0.02
        speed = p.norm(dim=-1) * q.norm(dim=-1).sqrt() / circular
        assert 0.9 <= speed.min() and speed.max() <= 1.1 and abs(speed.mean() - 1) < 0.01


def test_rendering_is_sub_pixel():
    system, size = SYSTEMS["mass_spring"], 32
    pixel = 2 * system.half_width / size
    q = (torch.arange(60, dtype=torch.float64) * pixel / 10).view(60, 1, 1, 1)
    frames = render(system, q, size)[:, 0]
    ink = frames - torch.tensor(BACKGROUND).view(3, 1, 1)
    grid = (torch.arange(size) - (size - 1) / 2) * pixel
    centroid = (ink.sum((1, 2)) * grid).sum(1) / ink.sum((1, 2, 3))
    assert (centroid - q.flatten()).abs().max() < 0.02 * pixel
    assert (frames[1:] - frames[:-1]).abs().amax() < 0.11 * max(system.colours[0])  # no jumps


def test_rendering_conventions():
    system, background = SYSTEMS["two_body"], torch.tensor(BACKGROUND)
    q = torch.tensor([[[[1.5, 1.5], [-1.5, -1.5]]]])  # yellow up right, red down left
    colours = ((1.5, 1.5, (173, 146, 0)), (-1.5, -1.5, (173, 0, 0)), (-1.5, 1.5, (0, 0, 0)))
    for size, (x, y, colour) in itertools.product((32, 64, 128), colours):
        row, column = int((0.5 - y / 6) * size), int((0.5 + x / 6) * size)
        seen = render(system, q, size)[0, 0, :, row, column]
        close(seen, (background + torch.tensor(colour) / 255).clamp(max=1))
    overlap = render(system, torch.zeros(1, 1, 2, 2))
    assert overlap.max() == 1 and overlap.min() >= 0  # colours add and are clipped


@each("name", NAMES)
def test_the_floor_of_noise_is_the_error_of_the_best_guess(name):
    system = SYSTEMS[name]
    q = simulate(system, *initial_states(system, 200, seeded(5)), 10)[0][:, 9:]
    moved = lambda s: q + system.noise * torch.randn(200, 64, *q.shape[2:], generator=seeded(s))
    guess, seen = render(system, moved(7)).mean(1, keepdim=True), render(system, moved(8))
    floor = noise_floor(system, n=500, generator=seeded(6))
    assert (guess - seen).square().mean().item() == pytest.approx(floor * (1 + 1 / 64), rel=0.1)


FILM = clips(SYSTEMS["pendulum"], 1, 130, size=16, generator=seeded())[0][0]  # (130, 3, 16, 16)
BYTES = FILM.mul(255).round().byte().permute(0, 2, 3, 1).numpy()
CLIPS = BYTES[:120].reshape(6, 20, 16, 16, 3)
KINDS = {
    "bytes": CLIPS, "first": CLIPS.transpose(0, 1, 4, 2, 3), "f4": (CLIPS / 255).astype(">f4"),
    "int64": CLIPS.astype("int64"), "uint16": CLIPS.astype(">u2") * 257, "grey": CLIPS[..., 0],
}  # fmt: skip
REFUSED = "fifo.gif bomb.png bomb.npz py.npy few.npy two.npz nan.npy big.npy dark.tif no.npy empty"


@each("form", KINDS)
def test_arrays_of_every_kind_read_the_same(form, tmp_path):
    np.save(tmp_path / "x.npy", KINDS[form])
    data = Recordings(tmp_path / "x.npy")
    frames = data.read(torch.tensor([3]), torch.tensor([[4, 0]]))[0]
    close(frames, FILM[[64, 60], : data.channels], rtol=0, atol=0.5 / 255)
    assert data.size == 16 and data.lengths.tolist() == [20] * 6 and len(data.held_out) == 1


def test_one_film_is_cut_in_time_and_merged_frames_are_given_back(tmp_path):
    frames = [Image.fromarray(x) for x in BYTES[[*np.repeat(range(60), 2), *range(60, 66)]]]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:], duration=40)
    data = Recordings(tmp_path / "x.gif", clip=20)
    assert data.lengths.tolist() == [20] * 5 + [26] and data.held_out.tolist() == [5]
    assert data.dt == pytest.approx(0.04)


@each("mode", ("I;16", "P", "LA", "RGBA"))
def test_pictures_of_every_mode_in_the_order_of_their_numbers(mode, tmp_path):
    for i, x in enumerate(np.pad(BYTES[:12, :, :, 0], ((0, 0), (0, 0), (4, 4)))):  # 24 x 16
        picture = Image.fromarray(x.astype("uint16") * 257 if mode == "I;16" else x)
        picture = picture.quantize(256) if mode == "P" else picture.convert(mode)
        if mode[-1] == "A":
            picture.putalpha(0 if i == 0 else 255)
        picture.save(tmp_path / f"frame{i}.png")
    (tmp_path / ".DS_Store").write_text("x")
    data = Recordings(tmp_path, size=16)
    first, tenth = data.read(torch.tensor([0, 1]), torch.tensor([[0], [4]]))[:, 0]
    assert data.channels == 1 and "passed over: 1 file(s) .DS_Store" in data.summary
    assert (first == 1).all() == (mode[-1] == "A")  # what is transparent is white
    close(tenth, FILM[10, :1], rtol=0, atol=0.003)


def test_what_is_no_recording_is_refused_in_one_line(tmp_path):
    os.mkfifo(tmp_path / "fifo.gif")
    (tmp_path / "empty").mkdir()
    Image.new("1", (14_000, 14_000)).save(tmp_path / "bomb.png")
    np.savez_compressed(tmp_path / "bomb.npz", x=np.zeros((100, 100, 200, 200), "uint8"))
    np.savez(tmp_path / "two.npz", a=CLIPS, b=CLIPS)
    np.save(tmp_path / "py.npy", np.array([{}]), allow_pickle=True)
    np.save(tmp_path / "few.npy", BYTES[None, :11])
    first, *more = [Image.fromarray(x.astype("uint16")) for x in BYTES[:12, :, :, 0]]
    first.save(tmp_path / "dark.tif", save_all=True, append_images=more)
    x = CLIPS / 255
    for x[-1, -1, -1, -1, -1], name in ((math.nan, "nan.npy"), (1.5, "big.npy")):
        np.save(tmp_path / name, x)
    for name in REFUSED.split():
        with pytest.raises(ValueError, match=f"{name} [^\n]*$"):
            Recordings(tmp_path / name)
    np.save(tmp_path / "points.npy", np.ones((5, 2), ">f4"))
    assert read_points(tmp_path / "points.npy").dtype == float and read_points(tmp_path) is None


def test_friction_is_that_of_the_damped_oscillator():
    q, p = initial_states(SYSTEMS["damped_spring"], 5, seeded())
    w, t = math.sqrt(4 - 0.05**2), torch.arange(60).double().view(-1, 1, 1) * 0.125
    exact = q[:, None] * (w * t).cos() + (2 * p + 0.05 * q)[:, None] / w * (w * t).sin()
    path = simulate(SYSTEMS["damped_spring"], q, p, 60)[0]
    close(path, (-0.05 * t).exp() * exact, rtol=0, atol=1e-11)


# ---------------------------------------------------------------- hgn.py
class Twist(Hamiltonian):
    """((q^2 + p^2) / 2)^2 / 2: not separable; turns in phase space at the rate (q^2 + p^2) / 2."""

    def forward(self, q, p):
        return ((q.square() + p.square()) / 2).square().sum(1) / 2


HAMILTONIANS = {
    "twist": (Twist, 1), "separable": (lambda: Separable(3, 32), 3),
    "separable, a network for K": (lambda: Separable(3, 32, kinetic="mlp"), 3),
    "compact": (lambda: CompactHamiltonian(Space(3, 2), 32), 3),
    "the paper's": (lambda: PaperHamiltonian(6, 4, width=8), 96),
}  # fmt: skip


def shaken(module):
    """In float64, with every weight away from where it starts, which may be zero or symmetric."""
    with torch.no_grad():
        for w in module.parameters():
            w.add_(0.05 * torch.randn_like(w))
    return module.double().eval()


def start(*shape, size=0.7):
    return (size * torch.randn(2, *shape, dtype=torch.float64, generator=seeded())).unbind(0)


def last(integrate, H, q, p, dt, steps, **options):
    return torch.cat([x[:, -1] for x in integrate(H, q, p, dt, steps, **options)], 1)


@each("integrate, order", ((leapfrog, 2), (euler, 1), (explicit_leapfrog, 1)))
def test_order_of_convergence_where_H_is_not_separable(integrate, order):
    q, p = start(5, 1)
    a = q.square() + p.square()  # the angle turned by in a time of 2
    exact = torch.cat((q * a.cos() + p * a.sin(), p * a.cos() - q * a.sin()), 1)
    errors = [(last(integrate, Twist(), q, p, 2.0 / n, n) - exact).norm() for n in (75, 150)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)
    substeps = last(integrate, Twist(), q, p, 2.0, 1, substeps=150)
    assert (substeps - exact).norm() == pytest.approx(errors[1].item(), rel=1e-6)
    damped = lambda q, p, n: last(integrate, Twist(), q, p, 0.1, n, gamma=torch.tensor(0.5))
    close(damped(*damped(q, p, 1).chunk(2, 1), 1), damped(q, p, 2))  # a step forgets the last


@each("name", HAMILTONIANS)
def test_leapfrog_is_hamiltons_flow_symplectic_and_returns(name):
    """Of every H: the gradients of autograd; second order towards Runge-Kutta's;
    J^T Omega J = Omega; back at the start after many steps, and as many more."""
    make, dim = HAMILTONIANS[name]
    steps = 500 if name == "compact" else 100  # gradients by autograd are slow
    H, (q, p) = shaken(make()), start(4, dim)
    x, y = (x.requires_grad_() for x in start(4, dim))
    gradient = lambda q, p: (H.kick(H.at(q), p), H.drift(H.at(q), p))
    close(gradient(q, p), torch.autograd.grad(H(x, y).sum(), (x, y)))
    if name == "the paper's":  # which has an integrator of its own
        return
    field = lambda q, p: (H.drift(H.at(q), p), -H.kick(H.at(q), p))
    exact = torch.cat([x[:, -1] for x in runge_kutta(field, q, p, 1.0, 1, 50)], 1)
    with torch.no_grad():
        errors = [(last(leapfrog, H, q, p, 1.0 / n, n) - exact).norm() for n in (20, 40)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.2)
    explicit, exact = (last(f, H, q, p, 0.05, 20) for f in (explicit_leapfrog, leapfrog))
    assert torch.allclose(explicit, exact) == ("separable" in name)
    step = lambda s: last(leapfrog, H, s[None, :dim], s[None, dim:], 0.1, 20)[0]
    J = jacobian(step, torch.cat((q[0], p[0])))
    omega = torch.kron(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]).double(), torch.eye(dim).double())
    close(J.T @ omega @ J, omega, rtol=0, atol=1e-6)
    with torch.no_grad():
        there = last(leapfrog, H, q, p, 0.05, steps)
        back = last(leapfrog, H, *there.chunk(2, 1), -0.05, steps)
    close(back, torch.cat((q, p), 1), rtol=0, atol=1e-6)
    assert (there[:, :dim] - q).norm() > 0.1 < (J - torch.eye(2 * dim)).norm()


def test_a_separable_H_takes_one_force_a_step():
    H, (q, p), seen = Separable(3, 32), start(4, 3), []
    H.kick = lambda here, p, kick=H.kick: seen.append(p) or kick(here, p)
    leapfrog(H.double(), q, p, 0.1, 20)
    assert len(seen) == 20 + 1


def test_frames_depend_on_q_alone_and_faster_is_the_same_motion():
    """At double speed every second state: steps are never longer than in training."""
    model, (q, p) = shaken(HGN(size=16, latent=3)), start(4, 3)
    a, b = (model.decode(model.rollout(q, momentum, 3)[0]) for momentum in (p, -p))
    assert torch.equal(a[:, 0], b[:, 0]) and not torch.allclose(a[:, 3], b[:, 3])
    normal, fast = model.rollout(q, p, 20), model.rollout(q, p, 10, 2 * model.dt)
    close([x[:, ::2] for x in normal], list(fast))
    model.dt = 1e-3  # what is learnt does not depend on the unit of time
    assert torch.equal(model.rollout(q, p, 20)[0], normal[0])


@each("arch", ("compact", "paper"))
def test_the_loss_is_the_elbo(arch):
    """Every term by torch.distributions; the learnt prior's density by the change of variables."""
    model = HGN(arch=arch, latent=2, size=16)
    frames = clips(SYSTEMS["pendulum"], 3, 7, size=16, generator=seeded())[0]
    mean, logvar = model.encode(frames)
    noise = torch.randn(mean.shape, generator=seeded(1))
    posterior = Normal(mean, (0.5 * logvar).exp())
    z = posterior.mean + posterior.stddev * noise
    if arch == "paper":
        kl = kl_divergence(posterior, Normal(0.0, 1.0)).flatten(1).sum(1)
    else:
        u = model.prior.inverse(z)[0]
        J = [jacobian(model.prior, x[None]).squeeze() for x in u]
        log_p = [Normal(0.0, 1.0).log_prob(x).sum() - j.det().abs().log() for x, j in zip(u, J)]
        kl = posterior.log_prob(z).sum(1) - torch.stack(log_p)
    painted = model.decode(model.rollout(*model.state(z), 6)[0])
    pixel = Normal(painted, 0.05**0.5)  # the paper's p(x|q), of variance beta / 2
    log_p = pixel.log_prob(frames) - pixel.log_prob(painted)  # but for its constant
    elbo = log_p.sum((1, 2, 3, 4)).mean() / 7 - kl.mean()
    loss, mse, found = model.loss(frames, beta=0.1, noise=noise)
    close(found, kl.mean(), rtol=1e-4, atol=1e-3)
    close(mse, (painted - frames).square().mean())
    close(loss, -0.1 * elbo / frames[0, 0].numel(), rtol=1e-4, atol=1e-5)


def descend(model, loss, steps, lr=1e-3):
    """`steps` steps of Adam's on loss(step); the losses."""
    optimiser, losses = torch.optim.Adam(model.parameters(), lr), []
    for step in range(steps):
        value = loss(step)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        losses.append(value.item())
    return losses


ABLATED = {"f_psi": False}, {"integrator": "euler", "deterministic": True}
OPTIONS = ({}, {"arch": "paper"}, *({"arch": "paper"} | x for x in ABLATED))


@each("options", OPTIONS, ids=str)
def test_every_weight_learns(options):
    model = HGN(size=16, latent=4, context=3, **options)
    frames = clips(SYSTEMS["mass_spring"], 2, 4, size=16, generator=seeded())[0]
    model.fit(frames.flatten(0, 1))
    before = [w.clone() for w in model.parameters()]
    descend(model, lambda _: model.loss(frames)[0], 3)  # some last layers start at zero
    still = [w.numel() for w, old in zip(model.parameters(), before) if torch.equal(w, old)]
    assert still == ([1] if "arch" in options else [])  # a constant in H moves nothing


def test_the_papers_model_learns_to_reconstruct():
    model = HGN(arch="paper", size=16, context=3)
    frames = clips(SYSTEMS["mass_spring"], 4, 5, size=16, generator=seeded())[0]
    model.fit(frames.flatten(0, 1))
    descend(model, lambda _: model.loss(frames)[0], 100)
    assert model.loss(frames)[1] < 0.6 * frames.var((0, 1)).mean()  # of a blank prediction's


def test_geco_keeps_beta_bounded_and_pushes_the_right_way():
    for mse, end in ((1.0, 1e-5), (1e-9, 1.0)):
        geco, first = GECO(), GECO().beta.item()
        geco.update(torch.tensor(mse))
        assert (geco.beta < first) == (mse == 1.0)
        for _ in range(2000):
            geco.update(torch.tensor(mse))
        assert geco.beta.item() == pytest.approx(end)


def test_hnn_fits_h_to_the_change_of_its_states(monkeypatch):
    """Its loss is nothing where the states of single frames move as H says; and it learns."""
    model = HGN(arch="paper", size=16, context=2, deterministic=True)
    frames = clips(SYSTEMS["mass_spring"], 8, 6, size=16, generator=seeded())[0]
    model.fit(frames.flatten(0, 1))
    first, *_, end = descend(model, lambda _: train.hnn_loss(model, frames)[0], 30)
    assert end < 0.8 * first
    model = HGN(size=16, latent=1, context=2, friction=True)  # whose frames are its states
    path = torch.cat(leapfrog(Twist(), *start(3, 1), 1e-3, 20, gamma=model.gamma.detach()), 2)
    monkeypatch.setattr("train.FRAME", 1e-3)
    model.H, model.f_psi, model.valid = Twist(), lambda z: z.chunk(2, 1), lambda x, least: x
    model.encode, model.decode = lambda x: (x[:, 1], None), lambda q: 0 * q
    off = [loss - mse for loss, mse, _ in (train.hnn_loss(model, x) for x in (path, path.flip(1)))]
    assert off[0] < 1e-6 and off[1] > 0.01


def test_friction_is_the_damped_oscillator():
    """q'' = -w^2 q - gamma q' in its closed form; order 2, and back again."""
    spring = Hamiltonian()
    spring.forward = lambda q, p: (q.square() + p.square()).sum(1) / 2
    gamma, (q, p) = torch.tensor(0.3, dtype=torch.float64), start(5, 1)
    w, t = math.sqrt(1 - 0.15**2), 4.0
    exact = math.exp(-0.15 * t) * (q * math.cos(w * t) + (p + 0.15 * q) / w * math.sin(w * t))
    ends = [leapfrog(spring, q, p, t / n, n, gamma=gamma) for n in (40, 80)]
    errors = [(x[0][:, -1] - exact).norm() for x in ends]
    assert errors[1] < 1e-3 and math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.1)
    back = leapfrog(spring, *(x[:, -1] for x in ends[1]), -t / 80, 80, gamma=gamma)
    close(back[0][:, -1], q)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="no_grad"):
        leapfrog(spring, q, p, t, 1)  # by autograd, whose forces torch 2.11 would make zero


BAD = {
    HGN: {"size": 20, "channels": 0, "context": 0, "arch": "x", "latent": 65, "substeps": 0}
    | {"integrator": "rk4", "dt": -1.0, "f_psi": False},
    NHF: {"dim": 0, "hamiltonians": 0, "steps": 0, "width": 0, "kinetic": "x"},
    RealNVP: {"dim": 1, "layers": 0, "width": 0, "scale": -1.0, "shift": math.nan},
}  # fmt: skip


@each("model, option, value", [(m, k, v) for m in BAD for k, v in BAD[m].items()])
def test_a_bad_option_is_named(model, option, value):
    with pytest.raises(ValueError, match=option):
        model(**{option: value})


@each("shape", ((3, 3, 32, 32), (5, 1, 32, 32), (5, 3, 48, 48), (5, 3, 32, 32)))
def test_frames_of_another_kind_are_refused(shape):
    kind = torch.uint8 if shape == (5, 3, 32, 32) else torch.float
    with pytest.raises(ValueError, match="frames must be floats"):
        HGN().loss(torch.zeros(1, *shape, dtype=kind))
    with pytest.raises(ValueError, match="frames must be floats"):
        HGN().fit(torch.zeros(shape, dtype=kind)[:1])


# ---------------------------------------------------------------- nhf.py
def flow(dim=2, **options):
    """A flow with weights as large as training makes them, in float32."""
    model = NHF(dim, hamiltonians=3, steps=2, width=32, **options)
    with torch.no_grad():
        [w.mul_(1.5) for w in model.H.parameters()]
        model.log_dt[:, 0] += 0.5  # steps of unlike lengths
    return model


def plane(half, n):
    """Points of a square grid (n^2, 2) over [-half, half]^2, and the area of one."""
    side = torch.linspace(-half, half, n)
    grid = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1).view(-1, 2)
    return grid, (2 * half / (n - 1)) ** 2


@each("dim, kinetic", ((2, "mlp"), (16, "mlp"), (2, "quadratic")))
def test_the_flow_preserves_volume_and_inverts(dim, kinetic):
    model = flow(dim, kinetic=kinetic)
    q, p = torch.randn(2, 4, dim, generator=seeded()).unbind(0)
    qs, ps = model.flow(q, p)
    assert qs.shape == (4, 7, dim) and (qs[:, -1] - q).norm() > 0.5
    back = model.flow(qs[:, -1], ps[:, -1], reverse=True)
    close((back[0].flip(1), back[1].flip(1)), (qs, ps), rtol=0, atol=1e-5)
    end = lambda s: torch.cat([x[0, -1] for x in model.flow(s[None, :dim], s[None, dim:])])
    J = jacobian(end, torch.cat((q[0], p[0])))
    assert abs(J.double().det().abs() - 1) < 1e-5
    with pytest.raises(ValueError, match="points must be"):
        model.log_prob(q[:, :1])


def test_log_prob_is_the_density_of_the_samples():
    """In one dimension: against the marginal of the joint density by quadrature over p."""
    model, data = flow(1, shift=2.0, scale=3.0), 2 + 3 * torch.randn(100, 1, generator=seeded())
    descend(model, lambda step: -model.elbo(data, seeded(step)).mean(), 60, lr=1e-2)
    x, p = torch.linspace(-25, 29, 150), torch.linspace(-12, 12, 400)
    with torch.no_grad():
        q = ((x - 2) / 3).repeat_interleave(len(p)).unsqueeze(1)
        q0, p0 = (s[:, -1] for s in model.flow(q, p.repeat(len(x)).unsqueeze(1), reverse=True))
        joint = (log_normal(q0) + log_normal(p0)).view(len(x), -1)
        truth = joint.exp().sum(1) * (p[1] - p[0]) / 3
        assert truth.sum() * (x[1] - x[0]) == pytest.approx(1, abs=2e-3)
        near = truth > 0.01
        x, truth = x[near].unsqueeze(1), truth[near].log()
        mean = lambda f, n: torch.stack([f(seeded(i)) for i in range(n)]).mean(0)
        elbo = mean(lambda g: model.elbo(x, g), 50)
        few, many = (mean(lambda g: model.log_prob(x, k, g), 5) for k in (8, 2000))
        drawn = model.sample(20_000, seeded(1))
    assert elbo.mean() < few.mean() - 0.01  # a bound that tightens with samples
    assert few.mean() < truth.mean() + 0.01 and (many - truth).abs().mean() < 0.05
    assert drawn.mean() == pytest.approx((truth.exp() @ x / truth.exp().sum()).item(), abs=0.4)


@each("name", DENSITIES)
def test_densities_have_the_entropy_they_say(name):
    density = DENSITIES[name]
    a, b = density.sample(20_000, seeded(4)), density.sample(20_000, seeded(4))
    assert torch.equal(a, b) and a.shape == (20_000, 2) and a.isfinite().all()
    # Kozachenko and Leonenko's estimator: from the distances to the third neighbours alone.
    a = a[:5000].double()
    nearest = torch.cat([torch.cdist(part, a).kthvalue(4, 1).values for part in a.split(1000)])
    digamma = lambda n: torch.digamma(torch.tensor(float(n))).item()
    estimate = digamma(len(a)) - digamma(3) + math.log(math.pi) + 2 * nearest.log().mean().item()
    assert estimate == pytest.approx(density.entropy, abs=0.06)
    if density.sigma:
        square = lambda x: torch.cdist(x.double(), density.centres).square() / density.sigma**2
        norm = math.log(len(density.centres) * 2 * math.pi * density.sigma**2)
        log_prob = lambda x: (-0.5 * square(x)).logsumexp(1) - norm
        assert -log_prob(b).mean().item() == pytest.approx(density.entropy, abs=0.02)
        grid, area = plane(8, 201)
        total = sum(log_prob(part).exp().sum() for part in grid.split(10_000)) * area
        assert total.item() == pytest.approx(1, abs=0.02)


def test_realnvp_is_a_density_of_the_same_size():
    model = RealNVP.like(nhf := NHF())
    a, b = (sum(w.numel() for w in m.parameters()) for m in (nhf, model))
    assert a <= b < 1.05 * a
    grid, area = plane(12, 400)
    with torch.no_grad():
        [w.mul_(1.2) for w in model.parameters()]
        density = model.log_prob(grid).exp() * area
        drawn = model.sample(20_000, seeded())
    assert density.sum() == pytest.approx(1, abs=0.01)
    close(drawn.mean(0).float(), density @ grid, rtol=0, atol=0.1)


@each("shift, scale", ((1e7, 1.0), (0.0, 1e-20)))
def test_points_far_from_zero_keep_their_likelihood(shift, scale):
    points = Points(shift + scale * torch.randn(4000, 2, dtype=torch.float64, generator=seeded()))
    model = RealNVP(2, 2, 8, shift=points.shift, scale=points.scale)
    torch.nn.utils.vector_to_parameters(torch.zeros(10**4), model.parameters())  # the identity
    entropy = math.log(2 * math.pi * math.e) + 2 * math.log(scale)
    assert -model.log_prob(points.held_out).mean().item() == pytest.approx(entropy, abs=0.1)
    assert NHF().to("meta").sample(3).device.type == "meta"
    assert NHF().double().elbo(torch.randn(4, 2)).dtype == torch.double
    assert () == (f := NHF().float()).elbo(f.sample(1)[0]).shape == model.log_prob(f.shift).shape


def test_a_flow_learns_sixteen_correlated_columns():
    mix = torch.eye(16) + 0.25 * torch.randn(16, 16, generator=seeded(3))
    draw = lambda n, seed: torch.randn(n, 16, generator=seeded(seed)) @ mix.T
    entropy = 8 * math.log(2 * math.pi * math.e) + mix.det().abs().log()
    points = Points(draw(20_000, 1))
    model = NHF(16, width=32, shift=points.shift, scale=points.scale)
    descend(model, lambda i: -model.elbo(draw(256, i), seeded(9000 + i)).mean(), 200, lr=3e-3)
    assert abs(model.log_prob(draw(10_000, 10**6)).mean() + entropy) < 0.1


# ---------------------------------------------------------------- eval.py
class Perfect:
    """A model that reads the true state off the pictures, moves it by the true forces, paints it
    as the truth is painted and draws its samples from the truth."""

    dt, context = 0.125, 7

    def __init__(self, system):
        self.system, self.config = system, {"periodic": system.periodic}
        self.bodies = lambda x: x.unflatten(-1, initial_states(system, 1)[0].shape[1:])

    def infer(self, frames):
        q = read_q(self.system, frames[:, : self.context])
        moved = torch.remainder(q - q[:, :1] + math.pi, 2 * math.pi) - math.pi
        power = torch.arange(self.context, dtype=q.dtype)
        stencil = torch.linalg.inv((self.dt * power).unsqueeze(1) ** power)[1]  # the slope at 0
        v = torch.einsum("t,nt...->n...", stencil, moved)
        return q[:, 0].flatten(1), self.system.inertia * v.flatten(1)

    def decode(self, q):
        return render(self.system, self.bodies(q))

    def energy(self, q, p):
        return self.system.energy(self.bodies(q), self.bodies(p))

    def rollout(self, q, p, steps, dt=0.125):
        path = simulate(self.system, self.bodies(q), self.bodies(p), steps + 1, dt)
        return tuple(x.flatten(2) for x in path)

    def sample(self, n, steps, generator):
        return clips(self.system, n, steps + 1, generator=generator)[0]


def test_measures_of_a_perfect_model():
    config = {"system": "pendulum", "size": 32, "noise": 0.0, "context": 7, "dt": 0.125}
    test, model = TestClips(config, 8), Perfect(SYSTEMS["pendulum"])
    result = measure(model, test, 40)
    errors = [result[f"mse_{k}"] for k in "0_29 30_39 backward double_speed half_speed".split()]
    assert max(result["mse_per_frame"] + errors) < 5e-5
    assert result["energy_std_ratio"] < 1e-3 and result["blank_mse"] == pytest.approx(0.01, rel=0.3)
    result = measure_physics(model, test, frames=60)
    assert all(result[f"strict_vpt_{k}"] == 60 for k in ("forward", "backward"))
    assert result["symetric_r2"] > 0.999 and result["symetric"] < 0.01
    assert result["samples_valid"] == result["samples_obey"] == 1.0


def test_symetric_tells_symplectic_maps_from_others():
    true = torch.randn(600, 4, dtype=torch.float64, generator=seeded())
    M = torch.randn(2, 2, dtype=torch.float64, generator=seeded(1))
    q, p = 3 * true[:, :2] @ M, true[:, 2:] @ torch.linalg.inv(M).T
    scaled, bent = torch.cat((q, p), 1), torch.cat((q, p + 0.1 * q**2), 1)  # bent by a potential
    for latent in (scaled, bent):  # symplectic but for a factor
        result = symetric(latent, true)
        assert result["symetric_r2"] > 0.9 and result["symetric"] < 0.05
    true[:, 2] *= 3
    stretched = torch.cat((true[:, :1] * 3, true[:, 1:]), 1)  # two entries of P - 1 are -8 / 9
    assert symetric(stretched, true)["symetric"] == pytest.approx(2 * (8 / 9) ** 2 / 16, rel=0.05)


@each("name", NAMES)
def test_symetric_of_the_true_states_in_a_turned_chart(name):
    system, model = SYSTEMS[name], Perfect(SYSTEMS[name])
    config = {"system": name, "size": 32, "noise": 0.0, "context": 5, "dt": 0.125}
    test, turn, roll = TestClips(config, 48), 2.0 * system.periodic, model.rollout
    model.deterministic = True  # draws no samples
    model.infer = lambda frames: (test.q.flatten(1) + turn, test.p.flatten(1))
    model.rollout = lambda q, p, *how: (lambda q, p: (q + turn, p))(*roll(q - turn, p, *how))
    assert measure_physics(model, test, frames=2)["symetric"] < 1e-3


@each("name", NAMES)
def test_judging_clips(name):
    system = SYSTEMS[name]
    frames, q, _ = clips(system, 12, generator=seeded())
    seen = read_q(system, frames[:2])
    close(system.position(seen), system.position(q[:2]), rtol=0, atol=1e-3)
    assert judge(system, frames, 0.125) == (1.0, 1.0)
    stops = frames[:, [*range(10)] + [9] * 20]  # valid pictures, another motion
    valid, obey = judge(system, stops, 0.125)
    assert valid == 1.0 and obey < 0.3
    faint = frames.lerp(torch.tensor(BACKGROUND).view(3, 1, 1), 0.7)
    assert judge(system, faint, 0.125)[0] == 0.0


@each("name", NAMES[:4])
def test_shipped_checkpoints_are_used_where_nothing_was_trained(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, model, checkpoint = evaluation.open_run(system=name)
    assert path.resolve() == HERE / "checkpoints" / f"{name}.pt" and path.stat().st_size < 4e6
    test = TestClips(checkpoint["config"], 32)
    u = model.prior.inverse(model.encode(test.observed)[0])[0]  # the prior is that of the states
    assert u.mean(0).abs().max() < 0.6 and 0.3 < u.std(0).min() and u.std(0).max() < 1.6
    result = measure(model, test, 60)
    assert result["mse_0_29"] < 3e-4
    assert name == "three_body" or result["mse_30_59"] < 0.5 * result["blank_mse"]  # chaotic


# ---------------------------------------------------------------- pictures that are not discs

SCENES = "rod photo twins string bar depth rods grid guise".split()


def scene(name, n, frames, size=32, seed=3):
    """Clips (n, frames, C, size, size) in [0, 1] whose motion is exact and Hamiltonian, and whose
    pictures are not what physics.py paints. Time between frames: 0.125, of rods 0.0625."""
    generator, dt = seeded(seed), 0.0625 if name == "rods" else 0.125
    x = ((torch.arange(size) - (size - 1) / 2) / (size / 2)).view(1, 1, 1, size)
    y, zero, white = -x.transpose(2, 3), torch.zeros(1), torch.ones(3, 1, 1)
    start = lambda system: initial_states(system, n, generator)
    path = lambda name: simulate(SYSTEMS[name], *start(SYSTEMS[name]), frames, dt)[0]
    swing = lambda system: path(system)[:, :, 0, 0].float()[..., None, None]
    cover = lambda distance, radius: ((radius - distance) * size / 2 + 0.5).clamp(0, 1)
    disc = lambda cx, cy, radius: cover(((x - cx) ** 2 + (y - cy) ** 2).sqrt(), radius)

    def rod(ax, ay, bx, by, radius):
        dx, dy = bx - ax, by - ay
        t = (((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy + 1e-9)).clamp(0, 1)
        return disc(ax + t * dx, ay + t * dy, radius)

    def over(ground, share, *colour):
        share, colour = share.unsqueeze(2), torch.tensor(colour).view(-1, 1, 1)
        return ground * (1 - share) + share * colour

    if name == "rod":  # a pendulum drawn as a rod
        a = swing("pendulum")
        return over(white, rod(zero, zero, 0.8 * a.sin(), -0.8 * a.cos(), 0.13), 0.8, 0.3, 0.3)
    if name == "photo":  # a ball swings before a textured ground
        rough = torch.rand(1, 3, 9, 9, generator=generator)
        ground = torch.nn.functional.interpolate(rough, (size, size), mode="bicubic").clamp(0, 1)[0]
        ground = ground * (0.7 + 0.3 * torch.rand(1, size, size, generator=generator))
        a = swing("pendulum")
        return over(ground, disc(0.5 * a.sin(), -0.5 * a.cos(), 0.2), 1.0, 1.0, 1.0)
    if name == "twins":  # two bodies that look the same
        places = (path("two_body") / 3).float()[..., None, None].unbind(2)
        return sum(disc(*z.unbind(2), 0.13) for z in places).clamp(max=1).unsqueeze(2)
    if name == "string":  # two modes: nothing is anywhere, a shape changes
        r, t = torch.rand(n, 4, 1, generator=generator), torch.arange(frames) * dt
        one = (0.1 + 0.35 * r[:, 0]) * torch.cos(1.5 * t + 2 * math.pi * r[:, 1])
        two = (0.05 + 0.2 * r[:, 2]) * torch.cos(3.0 * t + 2 * math.pi * r[:, 3])
        (one, two), u = (z[..., None, None] for z in (one, two)), (x + 1) * math.pi / 2
        height = one * u.sin() + two * (2 * u).sin()
        slope = (one * u.cos() + 2 * two * (2 * u).cos()) * math.pi / 2
        away = (y - height).abs() / (1 + slope**2).sqrt()
        return cover(away, 0.09).unsqueeze(2)
    if name == "bar":  # turns about its middle, which never moves
        a = 1.2 * swing("mass_spring")
        c, s = 0.7 * a.cos(), 0.7 * a.sin()
        return rod(-c, -s, c, s, 0.15).unsqueeze(2)
    if name == "depth":  # only its size changes
        return disc(zero, zero, 0.45 + 0.25 * swing("mass_spring")).unsqueeze(2)
    if name == "grid":  # on whole pixels, as many renderers draw
        pixel = 2 * SYSTEMS["two_body"].half_width / size
        return render(SYSTEMS["two_body"], (path("two_body") / pixel).round() * pixel, size)
    if name == "guise":  # every clip has a colour and a height of its own
        look = torch.rand(n, 1, 4, 1, 1, generator=generator)
        c = disc(0.7 * swing("mass_spring"), 1.2 * look[:, :, 3] - 0.6, 0.25)
        return 0.1 + c.unsqueeze(2) * (0.2 + 0.7 * look[:, :, :3])
    z = SYSTEMS["double_pendulum"].position(path("double_pendulum")).float() / 2.3
    (ax, ay), (bx, by) = (z[:, :, i, :, None, None].unbind(2) for i in (0, 1))
    ground = over(white, rod(zero, zero, ax, ay, 0.08), 0.1, 0.2, 0.8)
    return over(ground, rod(ax, ay, bx, by, 0.08), 0.8, 0.1, 0.1)


def as_bytes(frames):
    """(N, T, C, H, W) in [0, 1] -> (N, T, H, W, C) as files hold them."""
    return frames.clamp(0, 1).mul(255).round().byte().movedim(2, 4).numpy()


def write_scenes(folder, n=800, frames=60):
    """What results/README.md's table of scenes was measured on: folder/NAME.npy of each."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name in SCENES:
        np.save(Path(folder) / f"{name}.npy", as_bytes(scene(name, n, frames)))


# ---------------------------------------------------------------- train.py and eval.py, as typed

TINY = "--steps 4 --batch-size 2 --window 6 --targets 2 --device cpu"
RUN = f"--noise paper --size 16 --geco {TINY} --steps 24 --save-every 2"


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """command(script, words): what it prints, typed in an empty folder. With the exit status 2 the
    one line of its error; with another what it printed before it stopped."""
    monkeypatch.chdir(tmp_path)

    def command(script, words, status=0):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *words.split()])
        try:
            code = {"train": train, "eval": evaluation}[script].main() or 0
        except SystemExit as stop:
            code = stop.code
        out, error = capsys.readouterr()
        assert code == status, (words, error)
        if status != 2:
            return out
        bar, name, message = error.strip().rpartition("error: ")
        assert name and "\n" not in message and ("\n" not in bar or "step" in bar), error
        return message

    return command


@pytest.fixture
def on_loss(monkeypatch):
    """on_loss(heed): before the loss of every training step heed(step, batch) is called, and the
    loss taken of the batch that it returns; with real=False the loss is zero, at once."""

    def on_loss(heed, real=True):
        steps = itertools.count()
        own = [(train, f"{name}_loss") for name in ("charted", "hnn")]
        for home, name in (*own, (HGN, "loss")):

            def loss(model, *batch, true=getattr(home, name), **options):
                batch = heed(next(steps), batch)
                zero = 0 * sum(w.sum() for w in model.parameters())
                return true(model, *batch, **options) if real else (zero, zero, zero)

            monkeypatch.setattr(home, name, loss)

    return on_loss


def stop_at(last):  # asks a run to stop in the middle of a step
    return lambda step, batch: step == last and signal.raise_signal(signal.SIGTERM) or batch


def saved(name, folder="."):
    return torch.load(Path(folder) / f"runs/{name}/checkpoint.pt", weights_only=True)


def logged(name, folder="."):
    return [*map(json.loads, open(Path(folder) / f"runs/{name}/metrics.jsonl"))]


def written(name):
    """The movies of a run, and the metrics that eval.py wrote."""
    report = json.loads(Path(f"runs/{name}/metrics.json").read_text())
    return {p.stem for p in Path(f"runs/{name}").glob("*.gif")}, report


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with runs/mass_spring, made by the command itself."""
    folder = tmp_path_factory.mktemp("trained")
    subprocess.run([sys.executable, HERE / "train.py", *RUN.split()], cwd=folder, check=True)
    return folder


def test_train_and_eval_write_what_they_say(trained, command):
    files = {p.name for p in (trained / "runs/mass_spring").iterdir()}
    assert files == {"checkpoint.pt", "metrics.jsonl", "pid", "rollout.gif", "rollout.png"}
    checkpoint, lines = saved("mass_spring", trained), logged("mass_spring", trained)
    assert checkpoint["step"] == 24 and checkpoint["config"]["noise"] == "paper"
    assert {"model", "optimisers", "versions", "command"} <= checkpoint.keys()
    assert lines[0]["config"] == checkpoint["config"] and math.isfinite(lines[-1]["mse_0_29"])
    shutil.copytree(trained / "runs", "runs")
    words = "--reverse --speed 2 --speed 0.5 --sample 2 --frames 12 --clips 4 --scale 1"
    assert "wrote" in command("eval", words)
    movies, report = written("mass_spring")
    assert movies == {"rollout", "reverse", "speed_2", "speed_0.5", "samples"}
    assert f"eval.py {words}" in report["command"]
    assert f"train.py {RUN}" in report["training"]["command"]
    metrics = report["metrics"]
    assert len(metrics["mse_per_frame"]) == 12 and metrics["noise_floor"] > 1e-4
    keys = "mse_0_11 mse_backward mse_double_speed mse_half_speed mse_noisy".split()
    assert all(math.isfinite(metrics[key]) for key in keys)
    with Image.open("runs/mass_spring/rollout.gif") as gif:
        spent = [gif.seek(i) or gif.info["duration"] for i in range(gif.n_frames)]
    assert sum(spent) == pytest.approx(12 * 125, rel=0.05)  # as fast as the physics


@each("killed", (False, True))
def test_an_interrupted_run_resumes_to_the_uninterrupted_one(killed, trained, command, on_loss):
    """Bit for bit: asked to stop in the middle of a step, or killed at any moment, twice."""
    step = lambda: saved("cut")["step"] if Path("runs/cut/checkpoint.pt").exists() else -1
    if not killed:
        on_loss(stop_at(13))
        said = command("train", f"{RUN} --name cut", status=143)
        assert "--resume runs/cut" in said and step() == 14
        assert "--latent cannot" in command("train", "--resume --latent 3", status=2)
        Path("runs/cut/pid").write_text("1")  # of a process that runs
        assert "process 1 trains" in command("train", "--resume", status=2)
        Path("runs/cut/pid").unlink()
    for words in (f"{RUN} --name cut", "--resume") if killed else ():
        before, script = step(), [sys.executable, HERE / "train.py", *words.split()]
        process = subprocess.Popen(script, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while step() <= before:
            assert process.poll() is None
        process.kill()
        process.wait()
    assert step() < 24 and "of 24" in command("train", "--resume")
    whole, cut = saved("mass_spring", trained), saved("cut")
    assert cut["step"] == 24 and whole["geco"] == cut["geco"]
    assert all(torch.equal(w, cut["model"][k]) for k, w in whole["model"].items())
    logs = logged("mass_spring", trained), logged("cut")
    whole, cut = ({(line["step"], line.get("loss")) for line in log} for log in logs)
    assert whole <= cut  # which has one more where it stopped


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Clips of users, and what they show. numbered.npy: frame t of clip i is grey 20 i + t."""
    folder = tmp_path_factory.mktemp("own")
    frames = clips(SYSTEMS["mass_spring"], 12, 20, size=16, generator=seeded(9))[0]
    last = as_bytes(frames)
    numbers = np.arange(240, dtype="uint8").reshape(12, 20, 1, 1, 1)
    arrays = {"bytes": last, "grey": last[..., :1], "numbered": numbers + 0 * last[..., :1]}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    np.savez_compressed(folder / "packed.npz", clips=last)
    for i, clip in enumerate(last[:5]):
        (folder / f"pictures/{i}").mkdir(parents=True)
        (folder / "gifs").mkdir(exist_ok=True)
        iio.imwrite(folder / f"gifs/{i}.gif", clip, duration=125, loop=0)
        for t, picture in enumerate(clip[: 20 - i]):
            iio.imwrite(folder / f"pictures/{i}/{t:03d}.png", picture)
    return folder, torch.from_numpy(last).permute(0, 1, 4, 2, 3) / 255


FORMS = {name: [20] * 12 for name in ("bytes.npy", "grey.npy", "packed.npz")}
FORMS |= {"gifs": [20] * 5, "pictures": [20, 19, 18, 17, 16]}


@each("name", FORMS)
def test_own_clips_in_every_form(name, own):
    folder, frames = own
    data, other = (Recordings(folder / name, seed=seed) for seed in (0, 1))
    assert data.lengths.tolist() == FORMS[name] and data.size == 16
    assert data.channels == (1 if name == "grey.npy" else 3)
    assert sorted([*data.held_out, *data.train]) == [*range(len(data.lengths))]
    assert len(data.held_out) and not data.held_out.equal(other.held_out)
    seen = data.read(torch.tensor([3, 0]), torch.tensor([[4, 0], [7, 7]]))
    expected = torch.stack((frames[3, [4, 0]], frames[0, [7, 7]]))[:, :, : data.channels]
    close(seen, expected, rtol=0, atol=0.02 if name == "gifs" else 1e-6)


def batches(command, on_loss, words, steps):
    """What a run's first steps are given to learn from."""
    seen = []

    def record(step, batch):
        if step == steps:
            raise KeyboardInterrupt
        return seen.append(batch) or batch

    on_loss(record, real=False)
    with pytest.raises(KeyboardInterrupt):
        command("train", words)
    return seen


def number(frames):
    """Of numbered.npy: which clip frames (B, n, ...) are of, and which frame of it, (B, n)."""
    grey = (255 * frames[:, :, 0, 0, 0]).round().long()
    return grey // 20, grey % 20


@each("words, frames", (("", 8), ("--model hnn", 8), ("--arch paper", 12)))
def test_batches_are_the_clips_at_the_times_they_say(words, frames, own, command, on_loss):
    held_out = Recordings(own[0] / "numbered.npy").held_out
    words = f"--data {own[0]}/numbered.npy {words} --batch-size 4 --window 12 --steps 12"
    once, again = (batches(command, on_loss, words, 10) for _ in range(2))
    for step, (batch, same) in enumerate(zip(once, again)):
        assert all(torch.equal(a, b) for a, b in zip(batch, same) if torch.is_tensor(a))
        if compact := len(batch) >= 3:
            context, targets, times = batch[:3]
            expected = torch.cat((torch.arange(5).expand(4, 5), times), 1)
            clip, at = number(torch.cat((context, targets), 1))
            assert times.min() >= 0 and times.max() <= min(11, 3 + 2 * step)
        else:
            expected, (clip, at) = torch.arange(frames).expand(4, -1), number(batch[0])
        assert torch.equal(at, at[:, :1] + expected)
        assert (clip == clip[:, :1]).all() and not torch.isin(clip, held_out).any()
    assert not torch.equal(once[8][0], once[9][0]) and (not compact or once[9][2].max() > 6)


def test_times_are_uniform(own, command, on_loss):
    """From the first frame that the encoder sees to the clip's end."""
    words = f"--data {own[0]}/numbered.npy --batch-size 256 --window 19 --steps 120"
    drawn = batches(command, on_loss, words, 119)[80:]
    first = torch.cat([number(batch[0])[1][:, 0] for batch in drawn])
    times = torch.cat([batch[2] for batch in drawn])
    for begin in (0, 4, 9):
        counts = times[first == begin].flatten().bincount(minlength=19).float()[: 20 - begin]
        assert (counts / counts.mean() - 1).abs().max() < 0.3


@each("name", SCENES)
def test_any_picture_is_learnt(name, command, on_loss):
    """In seconds: what single frames say paints them with half of a blank prediction's error."""
    np.save(f"{name}.npy", as_bytes(frames := scene(name, 24, 24, size=16).clamp(0, 1)))
    on_loss(stop_at(80))
    command("train", f"--data {name}.npy --steps 240 --device cpu", status=143)
    model, frames = load(f"runs/{name}/checkpoint.pt")[0], frames[:16]
    with torch.no_grad():
        painted = model.decode(q := model.encoder.read(frames))
    far = evaluation.wrapped(q[..., :3].diff(dim=1)).sum(1).abs().amax(0)  # the angles'
    assert name not in ("rod", "photo") or (far > 3).any()  # an angle goes round
    assert (painted - frames).square().mean() < 0.5 * frames.var((0, 1)).mean()


def test_own_clips_through_both_commands(own, command):
    shutil.copy(own[0] / "grey.npy", "grey.npy")
    assert "learnt. Try more --steps" in command("train", f"--data grey.npy {TINY} --dt 0.5")
    command("eval", "--frames 25 --reverse --speed 2 --sample 1 --show 1 --scale 1")
    movies, report = written("grey")
    assert movies == {"rollout", "reverse", "speed_2", "samples"}
    assert (metrics := report["metrics"])["frames"] == 20 and "mse_backward" not in metrics
    assert math.isfinite(metrics["mse_0_19"]) and load("runs/grey/checkpoint.pt")[0].dt == 0.5
    assert "step 4 of 6" in command("train", "--resume runs/grey/checkpoint.pt --steps 6")
    np.save("grey.npy", np.load("grey.npy")[::-1])  # of which others would be held out
    assert "grey.npy is not what" in command("eval", "", status=2)
    assert "grey.npy is not what" in command("train", "--resume --steps 7", status=2)


@each("name", NAMES[4:])
def test_a_new_system_is_one_entry(name, command, on_loss):
    on_loss(stop_at(3))
    command("train", f"--system {name} --window 6 --device cpu", status=143)
    model, checkpoint = load(f"runs/{name}/checkpoint.pt")
    result = measure(model, TestClips(checkpoint["config"], 6), 30)
    assert all(math.isfinite(v) for v in result.values() if isinstance(v, float))
    assert result["mse_0_29"] < 10 * result["blank_mse"]


def test_a_flow_through_both_commands(command):
    """On points in odd units, beside RealNVP. V is drawn in the plane only."""
    points = np.random.default_rng(0).normal(size=(500, 3)) * [1e3, 1e-3, 1] + [5e4, 0, -1]
    for model, dim, movies in (("nhf", 2, {"flow"}), ("realnvp", 3, set()), ("nhf", 3, set())):
        np.save("points.npy", points[:, :dim])
        words = f"--data points.npy --model {model} --steps 60 --batch-size 64 --name {model}{dim}"
        command("train", words)
        command("eval", f"--checkpoint runs/{model}{dim}/checkpoint.pt")
        made, report = written(f"{model}{dim}")
        assert made == movies and Path(f"runs/{model}{dim}/density.png").exists()
        metrics, truth = report["metrics"], dim / 2 * math.log(2 * math.pi * math.e)  # nats
        assert -metrics["log_prob_256"] == pytest.approx(truth, abs=0.5)
        assert metrics["points"] == 50 and metrics["elbo"] <= metrics["log_prob_256"] + 0.05
    assert "step 60 of 80" in command("train", "--resume runs/nhf3/checkpoint.pt --steps 80")
    assert "--reverse" in command("eval", "--checkpoint runs/nhf3 --reverse", status=2)
    np.save("points.npy", points[::-1])  # of which others would be held out
    for script, words in ("eval", "--checkpoint runs/nhf3"), ("train", "--resume runs/nhf3"):
        assert "points.npy is not what" in command(script, words, status=2)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def loss_and_batch(model, device):  # of a step of train.py
    shown, noise = torch.rand(4, 9, 3, 16, 16).to(device), torch.randn(4, *model.z_shape)
    if model.config["arch"] == "paper":
        return lambda *batch: model.loss(*batch)[0], (shown[:, :3], 1e-3, noise.to(device))
    batch = shown[:, :3], shown[:, 3:], torch.randint(4, (4, 6)).to(device), 3, 1e-3
    return lambda *batch: charted_loss(model, *batch)[0], (*batch, noise.to(device))


@each("device", ("cpu", pytest.param("cuda", marks=needs_cuda)))
@each("options", ({"latent": 2}, {"arch": "paper", "latent": 2}), ids=str)
def test_compiled_gradients_are_the_eager_ones(options, device):
    """The whole loss as one region, nested leapfrog steps included."""
    model = HGN(size=16, context=3, **options).to(device)
    model.fit(torch.rand(30, 3, 16, 16).to(device))  # else all q are alike, and off / spread is 0/0
    (loss, batch), gradients = loss_and_batch(model, device), []
    for function in (loss, train.compiled(loss)):
        model.zero_grad()
        torch.manual_seed(2)  # of what is drawn inside, by torch's own generator in both
        exact = torch.backends.cudnn.flags(allow_tf32=False)
        with exact, torch._inductor.config.patch(fallback_random=True):
            function(*batch).backward()
        gradients.append({k: w.grad for k, w in model.named_parameters() if w.grad is not None})
    for k, g in gradients[0].items():
        assert (gradients[1][k] - g).norm() <= 1e-4 * g.norm() + 1e-9, k


class OneDevice(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        assert all(x.is_meta for x in tree_leaves((args, made)) if torch.is_tensor(x)), function
        return made


@each("options", ({}, {"arch": "paper"}, {"periodic": True}), ids=str)
def test_a_step_makes_no_tensor_on_another_device(options):  # which a CUDA graph cannot hold
    loss, batch = loss_and_batch(HGN(size=16, context=3, **options).to("meta"), "meta")
    with OneDevice():
        loss(*batch).backward()


@each("shape", ((64, 32), (32, 64), (7, 7)))
def test_muon_is_torchs(shape):  # but for its rounding to bfloat16
    a, b = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
    theirs = torch.optim.Muon([b], 1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for optimiser, w in ((train.Muon([a], {"lr": 1e-2}), a), (theirs, b)):
        for step in range(5):
            w.grad = torch.randn(shape, generator=seeded(step))
            optimiser.step()
    assert (a - b).norm() < 0.03 * b.norm()


@needs_cuda
@each("words", ("", "--arch paper --geco", "--model hnn --targets 4"))
def test_cuda_graph_trains_as_eager_does(words, own, command, monkeypatch):
    words = f"--data {own[0]}/bytes.npy {TINY} --steps 12 {words} --device cuda"
    command("train", words)
    monkeypatch.setattr(train, "Graphed", lambda step: step)
    command("train", words)
    a, b = (saved(name)["model"] for name in ("bytes", "bytes-2"))
    for k in (k for k in a if not k.startswith("prior")):
        close(a[k], b[k], rtol=0.05, atol=2e-3)


@needs_cuda
def test_cuda_training_resume_and_movies(command):
    command("train", f"{TINY} --device cuda")
    command("train", "--resume runs/mass_spring/checkpoint.pt --steps 8 --device cuda")
    command("eval", "--frames 12 --clips 4 --reverse --sample 2")
    assert written("mass_spring")[0] == {"rollout", "reverse", "samples"}


# What goes wrong. A stranger's pickle would run this:
CODE = type("Code", (), {"__reduce__": lambda self: (os.system, ("touch hacked",))})()


@each("last, steps", ((7, 12), (10**6, 120)))
def test_a_loss_that_is_not_finite_does_no_harm(last, steps, own, command, on_loss):
    def poison(step, batch):
        bad = 7 <= step <= last
        return [x * math.nan if bad and torch.is_tensor(x) and x.dim() == 5 else x for x in batch]

    on_loss(poison)
    words = f"--data {own[0]}/grey.npy {TINY} --steps {steps} --save-every 5"
    said = command("train", words, status=0 if last == 7 else 2)
    assert last == 7 or "the loss is not finite at step 100" in said
    assert load("runs/grey/checkpoint.pt")[1]["step"] == (12 if last == 7 else 15)


def test_a_full_disk(own, command, on_loss):
    limits, path = resource.getrlimit(resource.RLIMIT_FSIZE), Path("runs/grey/checkpoint.pt")

    def fill(step, batch):
        if step == 3:
            shutil.copy(path, "first.pt")
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # of every file
        return batch

    on_loss(fill)
    try:
        error = command("train", f"--data {own[0]}/grey.npy {TINY}", status=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in error and path.read_bytes() == Path("first.pt").read_bytes()
    assert not [*path.parent.glob("*.new")]


def test_checkpoints_of_strangers_get_one_line_and_run_nothing(command, trained):
    good, path = trained / "runs/mass_spring/checkpoint.pt", Path("runs/crafted/checkpoint.pt")
    content = torch.load(good, weights_only=True)
    change = lambda part, **values: content | {part: content[part] | values}
    weights = content["model"]
    crafted = (
        content | {"seconds": CODE}, [1, 2], content | {"kind": "x"}, content | {"config": None},
        change("config", size=10**9), change("config", dt=math.nan), content | {"model": {}},
        change("model_config", latent=10**12), change("model_config", colour=1),
        content | {"model": {k: w * math.nan for k, w in weights.items()}},
        content | {"model": {k: torch.zeros(3) for k in weights}},
    )  # fmt: skip
    path.parent.mkdir(parents=True)
    for value in crafted:
        torch.save(value, path)
        command("eval", f"--checkpoint {path}", status=2)
        command("train", f"--resume {path} --steps 99", status=2)
    path.write_bytes(good.read_bytes()[:-1000])
    command("eval", f"--checkpoint {path}", status=2)
    assert not Path("hacked").exists() and [*path.parent.iterdir()] == [path]


def test_data_of_strangers_get_one_line_and_run_nothing(command):
    clips, points = np.zeros((6, 8, 16, 16, 3), "uint8"), np.ones((20, 2))
    arrays = {"objects": np.array([CODE] * 4, dtype=object), "words": np.array([["a"]])}
    arrays |= {"line": clips[0, 0, 0, 0], "short": clips[:, :4], "empty": clips[:0]}
    arrays |= {"bright": clips + 7.0, "not_finite": clips * math.nan}
    arrays |= {"nan_points": points * math.nan, "constant": points, "one_point": points[:1]}
    for name, array in arrays.items():
        np.save(f"{name}.npy", array, allow_pickle=True)
    Path("cut.npy").write_bytes(Path("bright.npy").read_bytes()[:5000])
    [Path(name).write_text("1, 2") for name in ("text.npz", "table.csv")]
    Path("odd").mkdir()
    Path("odd/clip.gif").write_text("not a picture")
    for path in [*Path().iterdir()]:
        assert path.name in command("train", f"--data {path}", status=2)
    assert not Path("hacked").exists() and not Path("runs").exists()
    Path("runs").write_text("a file where the folder should be")
    assert all("runs" in command(script, "--device cpu", status=2) for script in ("train", "eval"))


MISTAKES = {
    "train": """--system pluto; --density blob; --density rings --system pendulum; --model nhf;
        --density rings --model hgn; --density rings --hamiltonians 0; --data nowhere.npy;
        --size 20; --noise loud; --window 0; --context 50; --arch big; --latent 65; --steps 1.5;
        --lr nan; --beta -1; --seed -1; --name taken; --name ../up; --resume nowhere.pt;
        --device cuda:77; --colour red; --density rings --latent 3; --hamiltonians 2; --fps 9;
        --arch paper --targets 3; --model hnn --geco; --deterministic --geco 1e-3;
        --density rings --model realnvp --hamiltonians 2""",
    "eval": "--density rings; --checkpoint nowhere.pt; --frames 0; --speed inf; --device tpu",
}


@each("script, words", [(script, w) for script in MISTAKES for w in MISTAKES[script].split(";")])
def test_a_mistake_gets_one_line_and_status_2(script, words, command):
    Path("runs/taken").mkdir(parents=True)
    command(script, words, status=2)
    assert [*Path().rglob("*")] == [Path("runs"), Path("runs/taken")]


@each("names", ("hgn", "physics", "nhf hgn"))
def test_files_stand_alone(names, tmp_path):
    for name in names.split():
        shutil.copy(HERE / f"{name}.py", tmp_path)
    subprocess.run([sys.executable, f"{names.split()[0]}.py"], cwd=tmp_path, check=True)


def test_the_example_in_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S):
        exec(block, {})
