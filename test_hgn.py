"""Physics and behaviour, each against an independent truth. Run: python -m pytest -q test_hgn.py
With LONG=1 in the environment the tests of faults run at their full length (README)."""

import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch._inductor.config

import eval as evaluation
import train
from hgn import (
    ARCHITECTURES, GECO, HGN, HNN, Energy, Hamiltonian, Natural, PaperHamiltonian, Separable,
    euler, explicit_leapfrog, leapfrog,
)  # fmt: skip
from nhf import BASES, DENSITIES, NHF, RealNVP
from physics import BACKGROUND, SYSTEMS, clips, initial_states, noise_floor, render, simulate

torch.set_num_threads(1)  # threads that wait for a busy core cost minutes
os.environ["OMP_NUM_THREADS"] = "1"  # the same for the processes started here
HERE = Path(__file__).parent
NAMES = list(SYSTEMS)
PAPER = NAMES[:4]
LONG = "LONG" in os.environ


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


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
        return v, torch.stack(
            (-twist - 2 * 0.5 * 3.0 * q[:, 0].sin(), twist - 0.5 * 3.0 * q[:, 1].sin()), 1
        )
    force = torch.zeros_like(q)
    for i in range(q.shape[1]):
        for j in range(q.shape[1]):
            if i != j:
                d = q[:, j] - q[:, i]
                force[:, i] += d / d.norm(dim=-1, keepdim=True) ** 3
    return p, force


def runge_kutta(name, q, p, frames, dt, substeps=100):
    """Classical RK4 in float64: the reference integrator of these tests."""
    h, out = dt / substeps, [q]
    for _ in range(frames - 1):
        for _ in range(substeps):
            a = equations_of_motion(name, q, p)
            b = equations_of_motion(name, q + h / 2 * a[0], p + h / 2 * a[1])
            c = equations_of_motion(name, q + h / 2 * b[0], p + h / 2 * b[1])
            d = equations_of_motion(name, q + h * c[0], p + h * c[1])
            q, p = (
                x + h / 6 * (k + 2 * l + 2 * m + n) for x, k, l, m, n in zip((q, p), a, b, c, d)
            )
        out.append(q)
    return torch.stack(out, 1)


@pytest.mark.parametrize("name", NAMES)
def test_simulator_agrees_with_runge_kutta_in_both_directions(name):
    q, p = initial_states(SYSTEMS[name], 16, seeded())
    for dt in (0.125, -0.125, 0.25):
        assert (
            simulate(SYSTEMS[name], q, p, 30, dt)[0] - runge_kutta(name, q, p, 30, dt)
        ).abs().max() < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_forces_and_energies(name):
    system = SYSTEMS[name]
    q, p = (x.requires_grad_() for x in initial_states(system, 50, seeded()))
    dH_dq, dH_dp = torch.autograd.grad(system.energy(q, p).sum(), (q, p))
    dq, dp = equations_of_motion(name, q.detach(), p.detach())
    torch.testing.assert_close(dH_dp, dq)
    torch.testing.assert_close(-dH_dq, dp)
    torch.testing.assert_close(
        -system.gradient(q, p)[0] if system.gradient else system.force(q), dp
    )
    if system.momentum:
        torch.testing.assert_close(system.momentum(q, dq), p)
    known = {
        "mass_spring": (1.0, 0.5, 0.25 / 1.0 + 1.0),
        "pendulum": (math.pi / 2, 1.0, 1.0 + 1.5),
        "two_body": ([[1.0, 0], [-1.0, 0]], 0.5, 0.5 - 0.5),
        "three_body": ([[0, 0], [3.0, 0], [0, 4.0]], 0.0, -1 / 3 - 1 / 4 - 1 / 5),
        "spring_pendulum": ([0, -2.0], 1.0, 2.0 + 2.0 - 3.0),
        "double_pendulum": ([math.pi / 2, math.pi / 2], 1.0, 1.0 + 4.5),
    }
    q, p, H = known[name]
    q = torch.tensor(q, dtype=torch.float64).view(1, len(system.colours), -1)
    assert system.energy(q, torch.full_like(q, p)).item() == pytest.approx(H)


@pytest.mark.parametrize("name, limit", tuple(zip(NAMES, (1e-9, 1e-9, 1e-6, 1e-6, 1e-9, 1e-8))))
def test_energy_is_conserved_over_300_frames(name, limit):
    q, p = simulate(SYSTEMS[name], *initial_states(SYSTEMS[name], 20, seeded()), 300)
    H = SYSTEMS[name].energy(q, p)
    assert ((H - H[:, :1]) / H[:, :1]).abs().amax(1).median() < limit


@pytest.mark.parametrize("name", PAPER)
def test_initial_states(name):
    system, n = SYSTEMS[name], 100_000
    q, p = initial_states(system, n, seeded())
    x, y = (q[:, 0, 0], p[:, 0, 0]) if q.shape[-1] == 1 else q[:, 0].unbind(-1)
    low, high = {
        "mass_spring": (0.1, 1),
        "pendulum": (1.3, 2.3),
        "two_body": (0.5, 1.5),
        "three_body": (0.9, 1.2),
    }[name]
    r, angle = torch.hypot(x, y), torch.atan2(y, x)
    assert low <= r.min() and r.max() <= high and abs(r.mean() - (low + high) / 2) < 0.01
    counts = torch.histc(
        angle, 64, -math.pi, math.pi
    )  # a square instead of a disc would peak at diagonals
    assert (
        (counts - n / 64).square() / (n / 64)
    ).sum() < 120  # chi squared with 63 degrees of freedom
    if q.shape[-1] == 2:
        spin = (q[..., 0] * p[..., 1] - q[..., 1] * p[..., 0]).sign()
        assert (spin == spin[:, :1]).all() and abs(spin.mean()) < 0.02
        speed = (
            p.norm(dim=-1) * q.norm(dim=-1).sqrt()
        )  # circular speed * sqrt(r), jittered by at most 10 %
        circular = {"two_body": 0.5, "three_body": 3**-0.25}[name]
        assert (
            0.9 * circular <= speed.min()
            and speed.max() <= 1.1 * circular
            and abs(speed.mean() / circular - 1) < 0.01
        )


@pytest.mark.parametrize("name", NAMES)
def test_no_nan_in_many_clips(name):
    q, p = simulate(
        SYSTEMS[name],
        *initial_states(SYSTEMS[name], 10_000 if name in PAPER else 1000, seeded(3)),
        30,
    )
    assert q.isfinite().all() and p.isfinite().all()


def test_rendering_is_sub_pixel():
    system, size = SYSTEMS["mass_spring"], 32
    pixel = 2 * system.half_width / size
    q = (torch.arange(60, dtype=torch.float64) * pixel / 10).view(60, 1, 1, 1)
    frames = render(system, q, size)[:, 0]
    ink = frames - torch.tensor(BACKGROUND).view(3, 1, 1)
    grid = (torch.arange(size) - (size - 1) / 2) * pixel
    centroid = (ink.sum((1, 2)) * grid).sum(1) / ink.sum((1, 2, 3))
    assert (centroid - q.flatten()).abs().max() < 0.02 * pixel
    steps = (frames[1:] - frames[:-1]).abs()
    assert steps.amax() < 0.11 * max(
        system.colours[0]
    )  # a tenth of a pixel moves an edge by a tenth of its height
    change = steps.sum((1, 2, 3))
    assert change.max() < 1.5 * change.min()


def test_rendering_conventions():
    system = SYSTEMS["two_body"]
    q = torch.tensor([[[[1.5, 1.5], [-1.5, -1.5]]]])  # yellow up right, red down left
    for size in (32, 64, 128):
        frame = render(system, q, size)[0, 0]
        at = lambda x, y: frame[:, int((0.5 - y / 6) * size), int((0.5 + x / 6) * size)]
        background = torch.tensor(BACKGROUND)
        torch.testing.assert_close(
            at(1.5, 1.5), (background + torch.tensor([173, 146, 0]) / 255).clamp(max=1)
        )
        torch.testing.assert_close(
            at(-1.5, -1.5), (background + torch.tensor([173, 0, 0]) / 255).clamp(max=1)
        )
        torch.testing.assert_close(at(-1.5, 1.5), background)
    overlap = render(system, torch.zeros(1, 1, 2, 2))
    assert overlap.max() == 1 and overlap.min() >= 0  # colours add and are clipped


@pytest.mark.parametrize("name", NAMES)
def test_clips_and_noise(name):
    system = SYSTEMS[name]
    a, b, c = (clips(system, 4, 6, noise="paper", generator=seeded(s))[0] for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.shape == (4, 6, 3, 32, 32)
    clean, q, _ = clips(system, 4, 6, generator=seeded(1))
    assert torch.equal(clean, render(system, q)) and q.shape[:2] == (4, 6)
    # The best possible guess, the mean noisy picture of the true state, errs by the floor.
    state = simulate(system, *initial_states(system, 200, seeded(5)), 10)[0][:, 9:]
    noisy = lambda seed: render(
        system,
        state + system.noise * torch.randn(200, 64, *state.shape[2:], generator=seeded(seed)),
    )
    floor = noise_floor(system, n=500, generator=seeded(6))
    assert (noisy(7).mean(1, keepdim=True) - noisy(8)).square().mean().item() == pytest.approx(
        floor * (1 + 1 / 64), rel=0.1
    )
    assert noise_floor(system, noise=0.0, n=10) == 0


# ---------------------------------------------------------------- hgn.py


class Spring(Hamiltonian):
    """p^2 / 2 m + k q^2 / 2 with m 0.5, k 3: its motion is known, and m is not 1."""

    def forward(self, q, p):
        return (p.square() + 1.5 * q.square()).sum(1)

    @staticmethod
    def exact(q, p, t):
        w = math.sqrt(6.0)
        cos, sin = math.cos(w * t), math.sin(w * t)
        return torch.cat((q * cos + p * sin / (0.5 * w), p * cos - 0.5 * w * q * sin), 1)


class Twist(Hamiltonian):
    """((q^2 + p^2) / 2)^2 / 2: not separable; turns in phase space at the rate (q^2 + p^2) / 2."""

    def forward(self, q, p):
        return ((q.square() + p.square()) / 2).square().sum(1) / 2

    @staticmethod
    def exact(q, p, t):
        a = (q.square() + p.square()) / 2 * t
        return torch.cat((q * a.cos() + p * a.sin(), p * a.cos() - q * a.sin()), 1)


def last(integrate, H, q, p, dt, steps, **options):
    return torch.cat([x[:, -1] for x in integrate(H, q, p, dt, steps, **options)], 1)


def start(*shape):
    return torch.randn(2, *shape, dtype=torch.float64, generator=seeded()).unbind(0)


ORDERS = (
    (leapfrog, Spring, 2), (euler, Spring, 1), (explicit_leapfrog, Spring, 2),
    (leapfrog, Twist, 2), (euler, Twist, 1), (explicit_leapfrog, Twist, 1),
)  # fmt: skip


@pytest.mark.parametrize("integrate, H, order", ORDERS)
def test_order_of_convergence(integrate, H, order):
    q, p = (0.7 * x for x in start(5, 1))
    exact = H.exact(q, p, 2.0)
    errors = [(last(integrate, H(), q, p, 2.0 / n, n) - exact).norm() for n in (200, 400)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)
    substeps = last(integrate, H(), q, p, 2.0, 1, substeps=400)
    assert (substeps - exact).norm() == pytest.approx(errors[1].item(), rel=1e-6)


def bent_hamiltonian(dim, **options):
    """A Natural H whose masses depend on q, in float64."""
    torch.manual_seed(1)
    H = Natural(dim, 32, **options).double()
    torch.nn.init.normal_(H.second.weight, std=0.05)
    return H


@pytest.mark.parametrize(
    "H, dim", ((Twist(), 1), (bent_hamiltonian(3), 3), (Separable(3, 16).double(), 3))
)
def test_leapfrog_is_symplectic_and_returns(H, dim):
    H.rounds = H.rounds and 12  # to convergence
    step = lambda s: last(leapfrog, H, s[None, :dim], s[None, dim:], 0.1, 20)[0]
    J = torch.autograd.functional.jacobian(step, torch.cat(start(dim)))
    omega = torch.kron(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]).double(), torch.eye(dim).double())
    torch.testing.assert_close(J.T @ omega @ J, omega, rtol=0, atol=1e-9)
    assert (J - torch.eye(2 * dim)).norm() > 0.1
    q, p = (0.7 * x for x in start(8, dim))
    with torch.no_grad():
        there = last(leapfrog, H, q, p, 0.05, 1000)
        back = last(leapfrog, H, *there.chunk(2, 1), -0.05, 1000)
    torch.testing.assert_close(back, torch.cat((q, p), 1), rtol=0, atol=1e-8)
    assert (there[:, :dim] - q).norm() > 0.1


def test_the_rounds_of_a_natural_hamiltonian_are_enough():
    """At the steps that models take, what is left of the implicit equations is below leapfrog's own
    error in training, and a hundredth of that afterwards."""
    H, left = bent_hamiltonian(3), []
    q, p = (0.5 * x for x in start(8, 3))
    with torch.no_grad():
        for mode in (True, False):
            left.append(last(leapfrog, H.train(mode), q, p, 0.125, 40))
        finer = last(leapfrog, H, q, p, 0.125, 40, substeps=16)
        H.rounds = 20
        solved = last(leapfrog, H, q, p, 0.125, 40)
    few, many = ((x - solved).norm() / (solved - finer).norm() for x in left)
    assert few < 1 and many < 0.01


def test_what_goes_astray_stays_finite():
    """Forces and masses far too large for the step: no state, picture or loss overflows."""
    model = HGN(size=16, latent=3)
    for w in model.H.parameters():
        torch.nn.init.normal_(w, std=5.0)
    context, targets = torch.rand(4, 5, 3, 16, 16), torch.rand(4, 6, 3, 16, 16)
    values = model.charted_loss(context, targets, torch.randint(60, (4, 6)))
    assert all(value.isfinite() for value in values)


def test_a_separable_step_takes_one_gradient_of_each():
    H, calls = Separable(2, 8).double(), []
    for name, energy in (("V", H.V), ("K", H.K)):
        energy.grad = lambda x, name=name, grad=energy.grad: calls.append(name) or grad(x)
    q, p = start(4, 2)
    qs, ps = leapfrog(H, q, p, 0.1, 50)
    assert calls.count("V") == 51 and calls.count("K") == 50 and qs.shape == (4, 51, 2)
    explicit = explicit_leapfrog(H, q, p, 0.1, 50)  # the same on a separable H
    torch.testing.assert_close(explicit, (qs, ps))


def test_gradients_of_H_are_its_gradients():
    torch.manual_seed(0)
    for H, dim in (
        (Separable(6, 32), 6), (Separable(6, 32, periodic=True), 6),
        (Separable(6, 32, kinetic="mlp"), 6), (PaperHamiltonian(6, 4, width=8), 96),
        (bent_hamiltonian(4), 4), (bent_hamiltonian(4, periodic=True), 4),
    ):  # fmt: skip
        for energy in H.children():
            if isinstance(energy, Energy):
                torch.nn.init.normal_(energy.L)  # not symmetric either
        q, p = torch.randn(2, 7, dim, dtype=torch.float64).requires_grad_().unbind(0)
        expected = torch.autograd.grad(H.double()(q, p).sum(), (q, p))
        torch.testing.assert_close((H.dq(q, p), H.dp(q, p)), expected)
        torch.testing.assert_close(H.kick(H.at(q), p), expected[0])
        assert H(q, p).shape == (7,)


def test_the_momentum_of_a_velocity_moves_q_at_that_velocity():
    H = bent_hamiltonian(3)
    q, v = start(5, 3)
    torch.testing.assert_close(H.dp(*H.of_velocity(torch.cat((q, v), 1))), v)


def shaken(seed=0, **options):
    """A compact model in float64 whose masses depend on q."""
    torch.manual_seed(seed)
    model = HGN(**options).double()
    torch.nn.init.normal_(model.H.second.weight, std=0.05)
    return model


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_loss_is_the_elbo(arch):
    """Every term by torch.distributions; the learnt prior's density by the change of variables."""
    torch.manual_seed(0)
    model, normal = HGN(arch=arch, latent=2, size=16), torch.distributions.Normal
    frames = clips(SYSTEMS["pendulum"], 3, 7, size=16, generator=seeded())[0]
    mean, logvar = model.encode(frames)
    noise = torch.randn(mean.shape, generator=seeded(1))
    z = mean + (0.5 * logvar).exp() * noise
    posterior = normal(mean, (0.5 * logvar).exp())
    if arch == "paper":
        kl = torch.distributions.kl_divergence(posterior, normal(0.0, 1.0)).flatten(1).sum(1)
    else:
        u = model.prior.inverse(z)[0]
        J = [torch.autograd.functional.jacobian(model.prior, x[None]).squeeze() for x in u]
        log_p = [normal(0.0, 1.0).log_prob(x).sum() - j.det().abs().log() for x, j in zip(u, J)]
        kl = posterior.log_prob(z).sum(1) - torch.stack(log_p)
    q, p = model.f_psi(z)
    back = last(model.integrate, model.H, q, p, -model.dt, model.encoder.lead)
    qs = model.integrate(model.H, *back.chunk(2, 1), model.dt, 6)[0]
    painted = torch.stack([model.decoder(x) for x in qs.unbind(1)], 1)
    log_p = normal(painted, 0.05**0.5).log_prob(frames) - normal(0.0, 0.05**0.5).log_prob(
        torch.zeros(())
    )
    loss, mse, found = model.loss(frames, beta=0.1, noise=noise)
    torch.testing.assert_close(found, kl.mean(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(mse, (painted - frames).square().mean())
    elbo = (
        log_p.sum((1, 2, 3, 4)).mean() / 7 - kl.mean()
    )  # the paper's, of pixels of variance beta / 2
    torch.testing.assert_close(loss, -0.1 * elbo / frames[0, 0].numel(), rtol=1e-4, atol=1e-5)


def test_samples_come_through_the_prior():
    model = HGN(latent=2)
    with torch.no_grad():
        model.prior.nets[0][-1].bias[4:].add_(3.0)  # shift what the prior makes
        u = torch.randn(6, 4, generator=seeded())
        expected = model.decode(model.rollout(*model.state(model.prior(u)), 2)[0])
        torch.testing.assert_close(model.sample(6, 2, generator=seeded()), expected)
        assert not torch.allclose(expected, model.decode(model.rollout(*model.state(u), 2)[0]))


OPTIONS = (
    {}, {"arch": "paper"}, {"arch": "paper", "f_psi": False},
    {"arch": "paper", "integrator": "euler", "deterministic": True},
)  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
def test_every_weight_learns(options):
    torch.manual_seed(0)
    model = HGN(latent=4, context=3, **options)
    frames = clips(SYSTEMS["mass_spring"], 2, 4, generator=seeded())[0]
    model.fit(frames.flatten(0, 1))
    before = [x.clone() for x in model.parameters()]
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(3):  # some last layers start at zero
        optimiser.zero_grad()
        model.loss(frames)[0].backward()
        optimiser.step()
    still = [name for (name, x), y in zip(model.named_parameters(), before) if torch.equal(x, y)]
    assert still == (
        ["H.convs.5.bias"] if "arch" in options else []
    )  # a constant in H moves nothing


def test_the_papers_model_learns_to_reconstruct():
    torch.manual_seed(0)
    model = HGN(arch="paper", size=16, context=3)
    frames = clips(SYSTEMS["mass_spring"], 16, 5, size=16, generator=seeded())[0]
    model.fit(frames.flatten(0, 1))
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(60):
        loss, mse, _ = model.loss(frames)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert mse < 0.6 * frames.var((0, 1)).mean()  # a blank prediction's error


def test_geco_keeps_beta_bounded_and_pushes_the_right_way():
    for mse, end in ((1.0, 1e-5), (1e-9, 1.0)):
        geco = GECO()
        first = geco.beta.item()
        geco.update(torch.tensor(mse))
        assert (geco.beta < first) == (mse == 1.0)
        for _ in range(2000):
            geco.update(torch.tensor(mse))
        assert geco.beta.item() == pytest.approx(end)


def test_hnn_is_a_hamiltonian_vector_field_and_learns():
    torch.manual_seed(0)
    for conv in (False, True):
        model = HNN(latent=2, conv=conv)
        z = torch.randn(5, 4, requires_grad=True)
        dq, dp = torch.autograd.grad(model.H(z).sum(), z)[0].chunk(2, 1)
        torch.testing.assert_close(model.field(z), torch.cat((dp, -dq), 1))
        zs, nothing = model.rollout(z.detach(), None, 200, 0.01)
        H = model.energy(zs[:, ::50].flatten(0, 1), None).view(5, 5)
        assert H.std(1).max() < 1e-4 and (zs[:, -1] - zs[:, 0]).norm() > 0.1
        frames = clips(SYSTEMS["mass_spring"], 8, 6, generator=seeded())[0]
        model.fit(frames.flatten(0, 1))
        optimiser, losses = torch.optim.Adam(model.parameters(), 1e-3), []
        for _ in range(30):
            loss = model.loss(frames)[0]
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]
        assert model.decode(model.rollout(*model.infer(frames), 3)[0]).shape == (8, 4, 3, 32, 32)


BAD_OPTIONS = (
    {"size": 20}, {"size": 136}, {"arch": "x"}, {"integrator": "rk4"}, {"context": 0},
    {"latent": 0}, {"latent": 65}, {"substeps": 0}, {"dt": -1.0}, {"channels": 0},
)  # fmt: skip


@pytest.mark.parametrize("option", BAD_OPTIONS)
def test_hgn_names_the_bad_argument(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        HGN(**option)


@pytest.mark.parametrize("frames, message", (
    (torch.zeros(1, 3, 3, 32, 32), "needs 5 frames, got 3"),
    (torch.zeros(1, 5, 1, 32, 32), "floats in"),
    (torch.zeros(1, 5, 3, 48, 48), "floats in"),
    (torch.zeros(1, 5, 3, 32, 32, dtype=torch.uint8), "floats in"),
))  # fmt: skip
def test_frames_of_another_kind_are_refused(frames, message):
    with pytest.raises(ValueError, match=message):
        HGN().loss(frames)


def needs_cuda(test):
    return pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")(test)


def test_frames_depend_on_q_alone():
    model = shaken(latent=4)
    q, p = torch.randn(2, 3, 4, dtype=torch.float64, generator=seeded()).unbind(0)
    a, b = (model.decode(model.rollout(q, momentum, 3)[0]) for momentum in (p, -p))
    assert torch.equal(a[:, 0], b[:, 0]) and not torch.allclose(a[:, 3], b[:, 3])


def test_faster_is_the_same_motion():
    """At double speed every second state of the normal rollout: steps are never longer than in
    training."""
    model = shaken(latent=3)
    q, p = torch.randn(2, 4, 3, dtype=torch.float64, generator=seeded()).unbind(0)
    normal, fast = model.rollout(q, p, 20), model.rollout(q, p, 10, 2 * model.dt)
    torch.testing.assert_close([x[:, ::2] for x in normal], list(fast))


def test_ten_thousand_frames_in_constant_memory():
    code = (
        "import resource, torch; from hgn import HGN\nm = HGN()\nwith torch.inference_mode():\n"
        " f = m.decode(m.rollout(torch.randn(1, 6), torch.randn(1, 6), 9999)[0])\n"
        "print(f.shape[1], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    frames, kilobytes = map(
        int, subprocess.check_output([sys.executable, "-c", code], cwd=HERE, text=True).split()
    )
    assert frames == 10_000 and kilobytes < 1.5e6


# ---------------------------------------------------------------- nhf.py


def flow(dim=2, **options):
    """A flow with weights as large as training makes them, in float32."""
    torch.manual_seed(0)
    model = NHF(dim, hamiltonians=3, steps=2, width=32, **options)
    with torch.no_grad():
        for parameter in model.H.parameters():
            parameter.mul_(1.5)
    return model


@pytest.mark.parametrize("dim", (2, 16))
@pytest.mark.parametrize("kinetic", ("mlp", "quadratic"))
def test_the_flow_preserves_volume_and_inverts(dim, kinetic):
    model = flow(dim, kinetic=kinetic)
    q, p = torch.randn(2, 4, dim, generator=seeded()).unbind(0)
    qs, ps = model.flow(q, p)
    assert qs.shape == (4, 7, dim) and (qs[:, -1] - q).norm() > 0.5
    back = model.flow(qs[:, -1], ps[:, -1], reverse=True)
    torch.testing.assert_close((back[0].flip(1), back[1].flip(1)), (qs, ps), rtol=0, atol=1e-5)
    last = lambda s: torch.cat([x[0, -1] for x in model.flow(s[None, :dim], s[None, dim:])])
    J = torch.autograd.functional.jacobian(last, torch.cat((q[0], p[0])))
    assert abs(J.double().det().abs() - 1) < 1e-5


@pytest.mark.parametrize("base", BASES)
def test_log_prob_is_the_density_of_the_samples(base):
    """In one dimension: against the marginal of the joint density by quadrature over p, and its
    integral over x."""
    model = flow(1, base=base, shift=2.0, scale=3.0)
    x, p = torch.linspace(-25, 29, 200), torch.linspace(-12, 12, 750)
    with torch.no_grad():
        q = ((x - 2) / 3).repeat_interleave(len(p)).unsqueeze(1)
        q0, p0 = (s[:, -1] for s in model.flow(q, p.repeat(len(x)).unsqueeze(1), reverse=True))
        joint = (model.base.log_prob(q0) + model.base.log_prob(p0)).view(len(x), -1)
        truth = joint.exp().sum(1) * (p[1] - p[0]) / 3
        assert truth.sum() * (x[1] - x[0]) == pytest.approx(1, abs=2e-3)
        near = truth > 0.01
        x, truth = x[near].unsqueeze(1), truth[near].log()
        elbo = torch.stack([model.elbo(x, seeded(i)) for i in range(100)]).mean(0)
        few, many = (
            torch.stack([model.log_prob(x, k, seeded(i)) for i in range(10)]).mean(0)
            for k in (8, 2000)
        )
        drawn = model.sample(20_000, seeded(1))
    assert (
        elbo.mean() < few.mean() - 0.01
    ) and few.mean() < truth.mean() + 0.01  # a bound that tightens with samples
    assert (many - truth).abs().mean() < 0.05
    mean = (truth.exp() * x[:, 0]).sum() / truth.exp().sum()
    assert drawn.mean() == pytest.approx(mean.item(), abs=0.4)


@pytest.mark.parametrize("name", DENSITIES)
def test_densities_have_the_entropy_they_say(name):
    density = DENSITIES[name]
    a, b = density.sample(20_000, seeded(4)), density.sample(20_000, seeded(4))
    assert torch.equal(a, b) and a.shape == (20_000, 2) and a.isfinite().all()
    # Kozachenko and Leonenko's estimator: the entropy from the distances to nearest neighbours
    # alone.
    a = a[:5000].double()
    nearest = torch.cat(
        [torch.cdist(part, a).kthvalue(4, 1).values for part in a.split(1000)]
    )  # the third besides itself
    digamma = lambda n: torch.digamma(torch.tensor(float(n))).item()
    estimate = digamma(len(a)) - digamma(3) + math.log(math.pi) + 2 * nearest.log().mean().item()
    assert estimate == pytest.approx(density.entropy, abs=0.06)
    if density.log_prob:
        assert -density.log_prob(b).mean().item() == pytest.approx(density.entropy, abs=0.02)
        side = torch.linspace(-8, 8, 500)
        grid = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1).view(-1, 2)
        total = (
            sum(density.log_prob(part).exp().sum() for part in grid.split(10_000))
            * (side[1] - side[0]) ** 2
        )
        assert total.item() == pytest.approx(1, abs=0.02)


def test_realnvp_is_a_density_of_the_same_size():
    nhf = NHF()
    model = RealNVP.like(nhf)
    a, b = (sum(w.numel() for w in m.parameters()) for m in (nhf, model))
    assert abs(a / b - 1) < 0.02
    with torch.no_grad():
        for w in model.parameters():
            w.mul_(1.5)
        side = torch.linspace(-12, 12, 400)
        grid = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1).view(-1, 2)
        assert model.log_prob(grid).exp().sum() * (side[1] - side[0]) ** 2 == pytest.approx(
            1, abs=0.01
        )
        assert model.sample(20_000, seeded()).mean(0) == pytest.approx(
            (
                (model.log_prob(grid).exp().unsqueeze(1) * grid).sum(0) * (side[1] - side[0]) ** 2
            ).numpy(),
            abs=0.1,
        )


def test_a_flow_learns():
    """Two separated Gaussians in three dimensions: the NLL comes near the entropy within a few
    hundred steps."""
    torch.manual_seed(0)
    model = NHF(3, hamiltonians=4, width=32, scale=(2.0, 0.5, 0.5))
    optimisers = train.make_optimisers(model, 5e-3)
    for i in range(250):
        x = 0.5 * torch.randn(256, 3, generator=seeded(i))
        x[::2, 0] += 2
        x[1::2, 0] -= 2
        model.zero_grad()
        (-model.elbo(x, seeded(1000 + i)).mean()).backward()
        for optimiser in optimisers:
            optimiser.step()
    with torch.no_grad():
        nll = -model.log_prob(x, 64, seeded(1)).mean().item()
    assert nll < 3 * (0.5 * math.log(2 * math.pi * math.e) + math.log(0.5)) + math.log(2) + 0.25


@pytest.mark.parametrize(
    "option",
    ({"dim": 0}, {"hamiltonians": 0}, {"steps": 0}, {"width": 0}, {"kinetic": "x"}, {"base": "x"}),
)
def test_nhf_names_the_bad_argument(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        NHF(**option)


# ---------------------------------------------------------------- the commands


def run(main, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["x.py", *map(str, words)])
    return main()


TINY = ("--steps", 4, "--batch-size", 2, "--window", 6, "--targets", 2, "--device", "cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with runs/mass_spring, made by the command itself."""
    folder = tmp_path_factory.mktemp("trained")
    words = [sys.executable, HERE / "train.py", "--noise", "paper", *TINY]
    done = subprocess.run([*map(str, words)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_train_writes_what_it_says(trained):
    run_folder = trained / "runs/mass_spring"
    files = "checkpoint.pt metrics.jsonl rollout.gif rollout.png"
    assert sorted(p.name for p in run_folder.iterdir()) == files.split()
    checkpoint = torch.load(run_folder / "checkpoint.pt", weights_only=True)
    assert (
        checkpoint["step"] == 4
        and checkpoint["config"]["seed"] == 0
        and checkpoint["config"]["noise"] == "paper"
    )
    assert {"model", "optimisers", "versions", "command"} <= checkpoint.keys()
    lines = [json.loads(line) for line in open(run_folder / "metrics.jsonl")]
    assert lines[0]["config"] == checkpoint["config"] and "mse_0_29" in lines[-1]


def test_eval_writes_every_movie_and_figure(trained):
    words = [
        sys.executable,
        HERE / "eval.py",
        "--reverse",
        "--speed",
        2,
        "--speed",
        0.5,
        "--sample",
        2,
        "--frames",
        12,
        "--clips",
        4,
    ]
    done = subprocess.run([*map(str, words)], cwd=trained, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = trained / "runs/mass_spring"
    assert {"rollout.gif", "reverse.gif", "speed_2.gif", "speed_0.5.gif", "samples.gif"} <= {
        p.name for p in folder.iterdir()
    }
    report = json.load(open(folder / "metrics.json"))
    metrics = report["metrics"]
    assert (
        len(metrics["mse_per_frame"]) == 12
        and metrics["noise_floor"] > 1e-4
        and "eval.py --reverse" in report["command"]
    )
    assert "train.py --noise paper" in report["training"]["command"]
    for key in (
        "mse_0_11",
        "mse_backward",
        "mse_double_speed",
        "mse_double_speed_same_time",
        "mse_half_speed",
        "energy_std_ratio",
        "reversal_error",
        "mse_noisy",
    ):
        assert math.isfinite(metrics[key])
    assert "return error" in done.stdout
    from PIL import Image

    with Image.open(folder / "rollout.gif") as gif:
        assert gif.n_frames == 12 and gif.info["duration"] in (120, 130) and gif.width >= 4 * 8 * 32


def test_measures_of_a_perfect_model():
    """A stand-in that encodes the true state, rolls it out with the true forces and paints it has
    no error."""
    system = SYSTEMS["mass_spring"]
    config = {"system": "mass_spring", "size": 32, "noise": 0.0, "context": 5, "dt": 0.125}
    test = evaluation.TestClips(config, 8)

    class Perfect:
        dt = 0.125
        infer = staticmethod(lambda frames: (test.q.flatten(1), test.p.flatten(1)))
        decode = staticmethod(lambda q: render(system, q.unsqueeze(-1)))
        energy = staticmethod(lambda q, p: system.energy(q.unsqueeze(-1), p.unsqueeze(-1)))

        def rollout(self, q, p, steps, dt=0.125):
            path = simulate(system, q.unsqueeze(-1), p.unsqueeze(-1), steps + 1, dt)
            return tuple(x.flatten(2) for x in path)

    result = evaluation.measure(Perfect(), test, 40)
    assert (
        max(result["mse_per_frame"]) < 1e-6
        and result["energy_std_ratio"] < 1e-3
        and result["reversal_error"] < 1e-10
    )
    assert (
        max(result[f"mse_{k}"] for k in ("0_29", "30_39", "backward", "double_speed", "half_speed"))
        < 1e-6
    )
    assert result["blank_mse"] == pytest.approx(60e-4, rel=0.3)


def test_valid_prediction_time_counts_frames():
    error = torch.tensor(
        [[0.0, 0.05, 0.2, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, float("nan"), 0.0, 0.0]]
    )
    assert evaluation.first_bad(error, 0.1).tolist() == [2, 4, 1]


def test_lasso_shrinks_as_it_should():
    """With orthonormal columns its solution is the least-squares one, soft-thresholded."""
    A = torch.linalg.qr(torch.randn(200, 5, dtype=torch.float64, generator=seeded()))[0] * 200**0.5
    w = torch.tensor([[1.0], [-0.5], [0.05], [0.0], [2.0]], dtype=torch.float64)
    torch.testing.assert_close(
        evaluation.lasso(A, A @ w, alpha=0.1), w.sign() * (w.abs() - 0.1).clamp(min=0)
    )


def test_symetric_tells_symplectic_maps_from_others():
    true = torch.randn(600, 4, dtype=torch.float64, generator=seeded())
    M = torch.randn(2, 2, dtype=torch.float64, generator=seeded(1))
    linear = torch.cat(
        (3 * true[:, :2] @ M, true[:, 2:] @ torch.linalg.inv(M).T), 1
    )  # conformally symplectic
    shear = linear + 0.1 * torch.cat(
        (torch.zeros_like(M.new_zeros(600, 2)), linear[:, :2] ** 2), 1
    )  # p + grad of q^3 / 30
    for latent, order in ((linear, 1), (shear, None)):
        result = evaluation.symetric(latent, true)
        assert (
            result["symetric_r2"] > 0.9
            and result["symetric"] < 0.05
            and order in (None, result["symetric_order"])
        )
    stretched = torch.cat((true[:, :1] * 3, true[:, 1:]), 1)
    bent = torch.cat((true[:, :2] + 2 * true[:, 2:], true[:, :2]), 1) ** 3
    assert evaluation.symetric(stretched, true)["symetric"] == pytest.approx(
        2 * (8 / 9) ** 2 / 16, rel=1e-3
    )
    assert evaluation.symetric(bent, true)["symetric_order"] > 1


@pytest.mark.parametrize("name", NAMES)
def test_judging_clips(name):
    system = SYSTEMS[name]
    frames, q, _ = clips(system, 12, generator=seeded())
    torch.testing.assert_close(
        system.position(evaluation.read(system, frames[:2])),
        system.position(q[:2]),
        rtol=0,
        atol=1e-3,
    )
    assert evaluation.judge(system, frames, 0.125) == (1.0, 1.0)
    wrong = frames[
        :, [*range(10)] + [9] * 20
    ]  # stops after ten frames: valid pictures, another motion
    valid, obey = evaluation.judge(system, wrong, 0.125)
    assert valid == 1.0 and obey < 0.3
    assert (
        evaluation.judge(system, frames.lerp(torch.tensor(BACKGROUND).view(3, 1, 1), 0.7), 0.125)[0]
        == 0.0
    )


def test_physics_of_a_perfect_model():
    """What the true state and the true forces reach: every prediction valid to the end, a
    symplectic chart, samples that obey."""
    system, test = (
        SYSTEMS["pendulum"],
        evaluation.TestClips(
            {"system": "pendulum", "size": 32, "noise": 0.0, "context": 5, "dt": 0.125}, 8
        ),
    )

    class Perfect:
        dt, context = 0.125, 5

        def infer(self, frames):
            q = evaluation.read(system, frames[:, :5])
            q = q[:, :1] + torch.cat((q[:, :1] * 0, evaluation.wrapped(q.diff(dim=1)).cumsum(1)), 1)
            v = (-25 * q[:, 0] + 48 * q[:, 1] - 36 * q[:, 2] + 16 * q[:, 3] - 3 * q[:, 4]) / (
                12 * 0.125
            )
            return q[:, 0].flatten(1), 0.5 * v.flatten(1)

        decode = staticmethod(lambda q: render(system, q.unsqueeze(-1)))

        def rollout(self, q, p, steps, dt=0.125):
            return tuple(
                x.flatten(2)
                for x in simulate(system, q.unsqueeze(-1), p.unsqueeze(-1), steps + 1, dt)
            )

        def sample(self, n, steps, generator):
            return clips(system, n, steps + 1, generator=generator)[0]

    result = evaluation.measure_physics(Perfect(), test, 30, frames=60)
    assert (
        result["strict_vpt_forward"]
        == result["strict_vpt_backward"]
        == result["strict_vpt_ceiling"]
        == 60
        and result["vpt"] == 1.0
    )
    assert (
        result["symetric_r2"] > 0.999
        and result["symetric"] < 0.01
        and max(result["state_precision"]) < 0.02
    )
    assert (
        result["samples_valid"]
        == result["samples_obey"]
        == result["real_valid"]
        == result["real_obey"]
        == 1.0
    )


@pytest.mark.parametrize("name", PAPER)
def test_shipped_checkpoints_are_used_where_nothing_was_trained(
    name, tmp_path, monkeypatch, capsys
):
    """And what they were shipped for: less than half of the paper's error inside the window; after
    it half of a blank picture's, where motion can be predicted."""
    monkeypatch.chdir(tmp_path)
    path = evaluation.newest_run(system=name)
    assert path.resolve() == HERE / "checkpoints" / f"{name}.pt" and path.stat().st_size < 4e6
    model, checkpoint = evaluation.load(path)
    result = evaluation.measure(model, evaluation.TestClips(checkpoint["config"], 16))
    assert result["mse_0_29"] < 3e-4
    if name != "three_body":  # which is chaotic
        assert result["mse_30_59"] < 0.5 * result["blank_mse"]


def test_resumed_run_is_the_uninterrupted_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        train, "measure", lambda *_: {"mse_0_29": 1.0, "blank_mse": 1.0, "clips": 1}
    )
    monkeypatch.setattr(train, "movies", lambda *_: None)
    run(train.main, monkeypatch, *TINY, "--geco")
    run(train.main, monkeypatch, *TINY, "--geco")  # the same again, into mass_spring-2
    make = train.Batches.__call__

    def interrupted(self, step):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)  # in the middle of a step
        return make(self, step)

    monkeypatch.setattr(train.Batches, "__call__", interrupted)
    with pytest.raises(SystemExit, match="143"):
        run(train.main, monkeypatch, *TINY, "--geco", "--name", "cut")
    assert "--resume runs/cut/checkpoint.pt" in capsys.readouterr().out
    monkeypatch.setattr(train.Batches, "__call__", make)
    run(train.main, monkeypatch, "--resume", "runs/cut/checkpoint.pt")
    a, b, c = (
        torch.load(f"runs/{n}/checkpoint.pt", weights_only=True)
        for n in ("mass_spring", "mass_spring-2", "cut")
    )
    for key in a["model"]:
        assert torch.equal(a["model"][key], b["model"][key]) and torch.equal(
            a["model"][key], c["model"][key]
        )
    assert a["geco"] == c["geco"] and c["step"] == 4
    with pytest.raises(SystemExit, match="2"):
        run(
            train.main,
            monkeypatch,
            "--resume",
            "runs/cut/checkpoint.pt",
            "--steps",
            9,
            "--latent",
            3,
        )
    assert "--latent cannot change" in capsys.readouterr().err


# ---------------------------------------------------------------- pictures that are not discs

SCENES = "rod photo twins string bar depth rods grid guise".split()


def scene(name, n, frames, size=32, seed=3):
    """Clips (n, frames, C, size, size) in [0, 1] whose motion is exact and Hamiltonian, and whose
    pictures are not what physics.py paints. Time between frames: 0.125, of rods 0.0625."""
    generator, dt = seeded(seed), 0.0625 if name == "rods" else 0.125
    x = ((torch.arange(size) - (size - 1) / 2) / (size / 2)).view(1, 1, 1, size)
    y, zero, white = -x.transpose(2, 3), torch.zeros(1), torch.ones(3, 1, 1)

    def path(system):  # (n, frames, bodies, dims)
        start = initial_states(SYSTEMS[system], n, generator)
        return simulate(SYSTEMS[system], *start, frames, dt)[0]

    def swing(system):
        return path(system)[:, :, 0, 0].float()[..., None, None]

    def cover(distance, radius):  # share of each pixel that lies within radius
        return ((radius - distance) * size / 2 + 0.5).clamp(0, 1)

    def disc(cx, cy, radius):
        return cover(((x - cx) ** 2 + (y - cy) ** 2).sqrt(), radius)

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
        slope = (one * u.cos() + 2 * two * (2 * u).cos()) * math.pi / 2
        away = (y - one * u.sin() - two * (2 * u).sin()).abs() / (1 + slope**2).sqrt()
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


def write_scenes(folder, n=800, frames=60):
    """What results/README.md's table of scenes was measured on: folder/NAME.npy of each."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name in SCENES:
        clips = scene(name, n, frames).clamp(0, 1).mul(255).round().byte().movedim(2, 4)
        np.save(Path(folder) / f"{name}.npy", clips.numpy())


@pytest.mark.parametrize("name", SCENES)
def test_any_picture_is_learnt(name, tmp_path, monkeypatch):
    """In seconds, by train.py's own steps and with nothing but the clips, the error of what is
    painted from the chart of held-out frames, and of what is rolled out, falls below a blank
    prediction's."""
    clips = scene(name, 24, 24).clamp(0, 1).mul(255).round().byte().movedim(2, 4)
    np.save(tmp_path / "clips.npy", clips.numpy())
    command = ["train.py", "--data", str(tmp_path / "clips.npy"), "--steps", "240"]
    monkeypatch.setattr(sys, "argv", command)
    args = train.parse()
    train.settle(args)
    torch.manual_seed(0)
    learner = train.Pixels(args, train.build(args), torch.device("cpu"))
    learner.start()
    for step in range(int(train.CHART * args.steps)):
        train.set_rate(learner.optimisers, args.lr, *learner.stage(step))
        learner.advance(step)
    frames = evaluation.unit(clips.movedim(4, 2))[:16]
    with torch.no_grad():
        seen = learner.model.decode(learner.model.encoder.read(frames))
    blank = frames.var((0, 1)).mean()
    assert (seen - frames).square().mean() < 0.5 * blank


# ---------------------------------------------------------------- own clips, faults


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Clips as users have them: channels last or first, bytes or floats, grey, packed, GIFs,
    folders of pictures."""
    folder = tmp_path_factory.mktemp("own")
    frames = clips(SYSTEMS["mass_spring"], 12, 20, size=16, generator=seeded(9))[0]
    last = frames.mul(255).round().byte().permute(0, 1, 3, 4, 2).numpy()
    np.save(folder / "bytes.npy", last)
    np.save(folder / "floats.npy", (last / 255).astype("float32").transpose(0, 1, 4, 2, 3))
    np.save(folder / "grey.npy", last[..., :1])
    np.savez_compressed(folder / "packed.npz", clips=last)
    for i, clip in enumerate(last[:5]):
        (folder / f"pictures/{i}").mkdir(parents=True)
        (folder / "gifs").mkdir(exist_ok=True)
        iio.imwrite(folder / f"gifs/{i}.gif", clip, duration=125, loop=0)
        for t, picture in enumerate(clip[: 20 - i]):
            iio.imwrite(folder / f"pictures/{i}/{t:03d}.png", picture)
    return folder, torch.from_numpy(last).permute(0, 1, 4, 2, 3) / 255


@pytest.mark.parametrize(
    "name, n, length",
    (
        ("bytes.npy", 12, 20),
        ("floats.npy", 12, 20),
        ("grey.npy", 12, 20),
        ("packed.npz", 12, 20),
        ("gifs", 5, 20),
        ("pictures", 5, 16),
    ),
)
def test_own_clips_in_every_form(own, name, n, length, monkeypatch):
    folder, frames = own
    data = evaluation.Clips({"data": str(folder / name), "context": 5, "seed": 0})
    assert (
        data.length == length
        and data.channels == (1 if name == "grey.npy" else 3)
        and data.size == 16
    )
    assert (
        sorted(torch.cat((data.held_out, data.train)).tolist()) == [*range(n)]
        and len(data.held_out) == 2
    )
    assert not data.held_out.equal(
        evaluation.Clips({"data": str(folder / name), "context": 5, "seed": 1}).held_out
    )
    assert isinstance(data.array, np.memmap) == name.endswith(".npy")  # stays on disk
    read = data.frames(torch.tensor([3, 0]), torch.tensor([[4, 0], [7, 7]]))
    expected = torch.stack((frames[3, [4, 0]], frames[0, [7, 7]]))[:, :, : data.channels]
    torch.testing.assert_close(read, expected, rtol=0, atol=0.02 if name == "gifs" else 1e-6)


def batches(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    args = train.parse()
    train.settle(args)
    return train.Batches(args, torch.device("cpu"))


KINDS = {
    "own": (),
    "two_body": ("--system", "two_body", "--noise", "paper"),
    "hnn": ("--model", "hnn"),
    "paper": ("--arch", "paper", "--system", "pendulum"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_the_clips_at_the_times_they_say(kind, own, monkeypatch):
    words = KINDS[kind] or ("--data", own[0] / "bytes.npy")
    words = (*words, "--batch-size", 4, "--window", 12, "--steps", 10)
    whole = batches(monkeypatch, *words)
    batch = whole(9)
    assert all(torch.equal(a, b) for a, b in zip(batch, batches(monkeypatch, *words)(9)))
    assert not torch.equal(whole(8)[0], batch[0])
    if kind in ("hnn", "paper"):
        assert [x.shape[:2] for x in batch] == [(4, 8 if kind == "hnn" else 12)]
        return
    context, targets, times = batch
    assert context.shape[:2] == (4, 5) and targets.shape[:2] == times.shape == (4, 8)
    assert 0 <= times.min() and 3 < times.max() < 12 and whole(0)[2].max() <= 3
    if kind == "own":  # each a stretch of a training clip
        frames = own[1][whole.data.train]
        for seen, painted, at in zip(context, targets, times):
            match = [(i, t) for i in range(len(frames)) for t in range(16)
                     if torch.allclose(frames[i, t:t + 5], seen)]  # fmt: skip
            inside = [(i, t + at) for i, t in match if 0 <= t + at.min() and t + at.max() < 20]
            assert any(torch.allclose(frames[i, t], painted) for i, t in inside)


def test_times_are_uniform(own, monkeypatch):
    """Every time from where the encoder's frames begin to the horizon or the clip's end is drawn as
    often as any other."""
    words = ("--data", own[0] / "bytes.npy", "--batch-size", 64, "--window", 19, "--steps", 10)
    seen = batches(monkeypatch, *words)
    monkeypatch.setattr(seen.data, "read", lambda clips, at: at)  # the frames' numbers
    drawn = [seen.draw(step) for step in range(9, 200)]
    first, at = (torch.cat([batch[i] for batch in drawn]) for i in (0, 1))
    for begin in (0, 4, 9):
        counts = torch.bincount(at[first[:, 0] == begin].flatten(), minlength=20).float()
        counts = counts[begin : min(begin + 19, 20)]
        assert (counts / counts.mean() - 1).abs().max() < 0.35  # a sixth is chance


def quick(monkeypatch):
    """Training without its evaluations."""
    monkeypatch.setattr(
        train, "measure", lambda *_: {"mse_0_29": 1.0, "blank_mse": 1.0, "clips": 1}
    )
    monkeypatch.setattr(train, "movies", lambda *_: None)


def test_a_run_that_learnt_nothing_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick(monkeypatch)
    run(train.main, monkeypatch, *TINY)
    assert "little was learnt. Try more --steps" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("options", ({"latent": 2}, {"arch": "paper", "latent": 2}), ids=str)
def test_compiled_gradients_are_the_eager_ones(options, device="cpu"):
    """The whole loss as one region, nested leapfrog steps included."""
    torch.manual_seed(1)
    model = HGN(size=16, **options).to(device)
    z = torch.randn(4, *model.prior.shape).to(device)
    batch = [torch.rand(4, 5, 3, 16, 16).to(device)]
    losses = [model.loss]
    if "arch" not in options:
        batch += [torch.rand(4, 6, 3, 16, 16).to(device)]
        batch += [torch.randint(4, (4, 6)).to(device), 3]
        losses = [model.charted_loss]
    gradients = []
    for loss in (losses[0], train.compiled(losses[0])):
        model.zero_grad()
        torch.manual_seed(2)  # of what is drawn inside, by torch's own generator in both
        with torch._inductor.config.patch(fallback_random=True):
            loss(*batch, noise=z)[0].backward()
        gradients.append({k: w.grad for k, w in model.named_parameters() if w.grad is not None})
    for k, g in gradients[0].items():
        assert (gradients[1][k] - g).norm() <= 1e-4 * g.norm() + 1e-9, k


@pytest.mark.parametrize("shape", ((64, 32), (32, 64), (7, 7)))
def test_muon_is_torchs(shape):
    """But for its rounding to bfloat16."""
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
    options = {"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
    optimisers = train.Muon([ours], 1e-2), torch.optim.Muon([theirs], 1e-2, **options)
    for _ in range(5):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for optimiser in optimisers:
            optimiser.step()
    assert (ours - theirs).norm() < 0.03 * theirs.norm()


def test_too_many_recompilations_are_an_error():
    with (
        torch._dynamo.config.patch(recompile_limit=1),
        pytest.raises(Exception, match="recompile_limit"),
    ):
        f = train.compiled(lambda x: x + 1)
        f(torch.zeros(2)), f(torch.zeros(3)), f(torch.zeros(4))


def test_the_prior_is_fitted_to_the_states_and_nothing_else_moves(monkeypatch):
    """Then the prior takes the states of clips never drawn before to N(0, I)."""
    torch.manual_seed(0)
    monkeypatch.setattr(
        sys, "argv", ["train.py", "--system", "two_body", "--steps", "300", "--seed", "3"]
    )
    args = train.parse()
    train.settle(args)
    model = train.build(args)
    data = clips(SYSTEMS["two_body"], 512, frames=5, generator=seeded())[0]
    model.fit(data[:64].flatten(0, 1))
    before = {name: w.clone() for name, w in model.state_dict().items()}

    def prior():
        with torch.no_grad():
            u, log_det = model.prior.inverse(model.encode(data)[0])
        return u, (log_det - 0.5 * u.square().sum(1)).mean().item() / u.shape[1]

    blurred = prior()[1]
    train.fit_prior(model, args, torch.device("cpu"))
    u, likelihood = prior()
    assert likelihood > blurred + 0.5
    assert u.mean(0).abs().max() < 0.3 and (u.std(0) - 1).abs().max() < 0.4
    same = (
        torch.equal(w, before[k])
        for k, w in model.state_dict().items()
        if not k.startswith("prior")
    )
    assert all(same)


@pytest.mark.parametrize("always", (False, True))
def test_a_loss_that_is_not_finite_does_no_harm(always, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick(monkeypatch)
    make = train.Batches.__call__

    def poisoned(self, step):
        wrong = math.nan if step == 7 or always and 7 < step < 120 else 1.0
        return [x * wrong if x.is_floating_point() else x for x in make(self, step)]

    monkeypatch.setattr(train.Batches, "__call__", poisoned)
    words = (*TINY, "--steps", 120 if always else 12, "--save-every", 5)
    if not always:
        run(train.main, monkeypatch, *words)
    else:
        with pytest.raises(SystemExit, match="2"):
            run(train.main, monkeypatch, *words)
        assert "the loss is not finite at step 100: try --lr" in capsys.readouterr().err
    assert evaluation.load("runs/mass_spring/checkpoint.pt")[1]["step"] == (15 if always else 12)


def test_a_full_disk(tmp_path, monkeypatch, capsys):
    """The kernel refuses files larger than 100 kB from step 3 on."""
    monkeypatch.chdir(tmp_path)
    quick(monkeypatch)
    make, limits, first = train.Batches.__call__, resource.getrlimit(resource.RLIMIT_FSIZE), []

    def filling(self, step):
        if step == 3:
            first.append(Path("runs/mass_spring/checkpoint.pt").read_bytes())
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        return make(self, step)

    monkeypatch.setattr(train.Batches, "__call__", filling)
    try:
        with pytest.raises(SystemExit, match="2"):
            run(train.main, monkeypatch, *TINY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "error: cannot write into runs/mass_spring (File too large)" in capsys.readouterr().err
    assert Path("runs/mass_spring/checkpoint.pt").read_bytes() == first[0]


@needs_cuda
def test_cuda_gradients_compiled_and_eager():
    for options in ({"latent": 2}, {"arch": "paper", "latent": 2}):
        test_compiled_gradients_are_the_eager_ones(options, "cuda")


@needs_cuda
@pytest.mark.parametrize(
    "words", ((), ("--arch", "paper", "--geco"), ("--model", "hnn", "--targets", 4))
)
def test_cuda_graph_trains_as_eager_does(words, tmp_path, monkeypatch):
    """Weights after a few steps replayed as a graph are those of the same steps one kernel at a
    time."""
    monkeypatch.chdir(tmp_path)
    quick(monkeypatch)
    words = (*TINY[:-2], "--device", "cuda", "--steps", 12, *words)
    run(train.main, monkeypatch, *words)
    monkeypatch.setattr(train, "Graphed", lambda step: step)
    run(train.main, monkeypatch, *words)
    paths = (f"runs/{n}/checkpoint.pt" for n in ("mass_spring", "mass_spring-2"))
    a, b = (torch.load(path, weights_only=True)["model"] for path in paths)
    for k in a:
        if not k.startswith("prior"):
            torch.testing.assert_close(a[k], b[k], rtol=0.05, atol=2e-3)


@needs_cuda
def test_cuda_training_resume_and_movies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = (*TINY[:-2], "--device", "cuda")
    run(train.main, monkeypatch, *words)
    run(
        train.main,
        monkeypatch,
        "--resume",
        "runs/mass_spring/checkpoint.pt",
        "--steps",
        8,
        "--device",
        "cuda",
    )
    run(evaluation.main, monkeypatch, "--frames", 12, "--clips", 4, "--reverse", "--sample", 2)
    assert {"rollout.gif", "reverse.gif", "samples.gif"} <= {
        p.name for p in Path("runs/mass_spring").iterdir()
    }


def test_own_clips_through_both_commands(own, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("grey.npy",) if not LONG else ("grey.npy", "bytes.npy", "packed.npz"):
        run(train.main, monkeypatch, "--data", own[0] / name, *TINY, "--dt", 0.5)
        run(
            evaluation.main,
            monkeypatch,
            "--frames",
            25,
            "--reverse",
            "--speed",
            2,
            "--sample",
            1,
            "--show",
            1,
        )
        assert "no true system behind it" in capsys.readouterr().out
        folder = Path("runs") / Path(name).stem
        assert {"rollout.gif", "reverse.gif", "speed_2.gif", "samples.gif"} <= {
            p.name for p in folder.iterdir()
        }
        metrics = json.load(open(folder / "metrics.json"))["metrics"]
        assert (
            metrics["frames"] == 20
            and math.isfinite(metrics["mse_0_19"])
            and "mse_backward" not in metrics
        )
        assert (
            len(iio.imread(folder / "rollout.gif")) == 25
            and evaluation.load(folder / "checkpoint.pt")[0].dt == 0.5
        )
    run(train.main, monkeypatch, "--resume", "runs/grey/checkpoint.pt", "--steps", 6)
    assert "resumed runs/grey/checkpoint.pt at step 4 of 6" in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES[4:])
def test_a_new_system_is_one_entry(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick(monkeypatch)
    run(train.main, monkeypatch, "--system", name, *TINY, "--batch-size", 16, "--targets", 8)
    model, checkpoint = evaluation.load(f"runs/{name}/checkpoint.pt")
    result = evaluation.measure(model, evaluation.TestClips(checkpoint["config"], 6), 30)
    assert (
        all(math.isfinite(v) for v in result.values() if isinstance(v, float))
        and result["mse_0_29"] < 10 * result["blank_mse"]
    )


def test_killed_at_any_moment_it_resumes_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick(monkeypatch)
    words = (
        "--steps",
        900 if LONG else 60,
        "--batch-size",
        2,
        "--window",
        6,
        "--targets",
        2,
        "--device",
        "cpu",
        "--save-every",
        5,
    )
    run(train.main, monkeypatch, *words, "--name", "whole")
    draw, checkpoint, kills = random.Random(0), Path("runs/cut/checkpoint.pt"), 0
    while kills < (30 if LONG else 2):
        resume = ("--resume", checkpoint) if checkpoint.exists() else (*words, "--name", "cut")
        process = subprocess.Popen(
            [sys.executable, str(HERE / "train.py"), *map(str, resume)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        before = torch.load(checkpoint, weights_only=True)["step"] if checkpoint.exists() else -1
        while (
            not checkpoint.exists() or torch.load(checkpoint, weights_only=True)["step"] <= before
        ):
            assert process.poll() is None  # it is always on its way
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.3))  # somewhere between or within two of its saves
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        step = torch.load(checkpoint, weights_only=True)["step"]
        evaluation.load(checkpoint)
        assert (
            all(json.loads(line) for line in open("runs/cut/metrics.jsonl"))
            and Path("runs/cut").is_dir()
        )
        if step >= words[1] - 20:
            break
    if step < words[1]:
        run(train.main, monkeypatch, "--resume", checkpoint)
    a, b = (
        torch.load(f"runs/{n}/checkpoint.pt", weights_only=True)["model"] for n in ("whole", "cut")
    )
    assert all(torch.equal(a[k], b[k]) for k in a)
    losses = [
        {
            line["step"]: line["loss"]
            for line in map(json.loads, open(f"runs/{n}/metrics.jsonl"))
            if "loss" in line
        }
        for n in ("whole", "cut")
    ]
    assert losses[0] == losses[1]


def crafted(folder, good):
    """Checkpoints and data no run has written: name -> what to do with it."""

    class Code:
        def __reduce__(self):
            return os.system, (f"touch {folder}/hacked",)

    whole = good.read_bytes()
    content = torch.load(good, weights_only=True)
    change = lambda part, **values: content | {part: content[part] | values}
    wrong = {
        "code": content | {"seconds": Code()},
        "list": [1, 2],
        "kind": content | {"kind": ["hgn"]},
        "no_config": content | {"config": None},
        "system": change("config", system="pluto"),
        "size": change("config", size=10**9),
        "negative": change("config", window=-3),
        "dt": change("config", dt=math.nan),
        "noise": change("config", noise="x"),
        "context": change("config", context=7),
        "latent": change("model_config", latent=-1),
        "huge": change("model_config", latent=10**12),
        "unknown": change("model_config", colour=1),
        "periodic": change("model_config", periodic="x"),
        "substeps": change("model_config", substeps=10**9),
        "nan": change("model", **{"H.V.last": content["model"]["H.V.last"] * math.nan}),
        "shape": change("model", **{"H.V.last": torch.zeros(3)}),
        "view": change("model", **{"H.V.last": torch.zeros(1).expand(10**12)}),
        "missing": content | {"model": {}},
        "weights": content | {"model": [1]},
    }
    for name, value in wrong.items():
        torch.save(value, folder / f"{name}.pt")
    for i, cut in enumerate((0, 10, len(whole) // 3, len(whole) - 5)):
        (folder / f"cut{i}.pt").write_bytes(whole[:cut])
    with zipfile.ZipFile(folder / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\0" * 10**7)
    for action in ("steps", "batch_size", "lr", "targets"):  # what only a resumed run reads
        torch.save(
            change("config", **{action: "x" if action == "steps" else -1}),
            folder / f"resume_{action}.pt",
        )
    first = content["optimisers"][0]
    for name, value in (
        (
            "state",
            first
            | {
                "state": {
                    0: {
                        "step": torch.tensor(1.0),
                        "exp_avg": torch.zeros(7),
                        "exp_avg_sq": torch.zeros(7),
                    }
                }
            },
        ),
        ("no_state", []),
        ("geco", ["a", "b"]),
    ):
        torch.save(
            content | ({"geco": value} if name == "geco" else {"optimisers": [value]}),
            folder / f"resume_{name}.pt",
        )
    torch.save(content | {"step": "x"}, folder / "step.pt")
    good = np.zeros((6, 8, 16, 16, 3), "uint8")
    arrays = {
        "objects": np.array([Code()] * 4, dtype=object),
        "words": np.array([["a"]]),
        "flat": good[0, 0, 0],
        "oblong": good[:, :, :8],
        "few": good[:2],
        "short": good[:, :4],
        "colours": np.zeros((6, 8, 16, 16, 4), "uint8"),
        "bright": np.full((6, 8, 16, 16, 3), 7.0),
        "shorts": good.astype("int16"),
        "empty": good[:0],
        "not_finite": np.full((6, 8, 16, 16, 3), np.nan),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=True)
    (folder / "cut.npy").write_bytes((folder / "bright.npy").read_bytes()[:5000])
    (folder / "text.npy").write_text("hello")
    (folder / "text.npz").write_text("hello")
    with zipfile.ZipFile(folder / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as file:
        with file.open("a.npy", "w", force_zip64=True) as part:
            for _ in range(1100):
                part.write(b"\0" * 10**6)
    (folder / "nothing").mkdir()
    (folder / "odd").mkdir()
    (folder / "odd/clip.gif").write_text("not a picture")


def test_files_of_strangers_get_one_line_and_run_nothing(tmp_path, monkeypatch, capsys, trained):
    monkeypatch.chdir(tmp_path)
    crafted(tmp_path, trained / "runs/mass_spring/checkpoint.pt")
    calls = [
        (evaluation.main, "--checkpoint", path)
        for path in tmp_path.glob("*.pt")
        if not path.name.startswith("resume")
    ]
    calls += [(train.main, "--resume", path, "--steps", 99) for path in tmp_path.glob("*.pt")]
    (tmp_path / "state").mkdir()
    for path in tmp_path.glob("resume_*.pt"):  # in a run's folder, under a run's name
        (tmp_path / "state" / path.stem).mkdir()
        calls.append(
            (
                train.main,
                "--resume",
                path.rename(tmp_path / "state" / path.stem / "checkpoint.pt"),
                "--steps",
                99,
            )
        )
    calls += [
        (train.main, "--data", path)
        for path in [*tmp_path.glob("*.np?"), tmp_path / "nothing", tmp_path / "odd"]
    ]
    assert len(calls) > 60
    for call in calls:
        with pytest.raises(SystemExit) as stop:
            run(call[0], monkeypatch, *call[1:])
            pytest.fail(f"{call} was accepted")
        error = capsys.readouterr().err.strip()
        assert stop.value.code == 2 and error.startswith("error: ") and "\n" not in error, (
            call,
            error,
        )
    assert not (tmp_path / "hacked").exists() and not (tmp_path / "runs").exists()


def test_no_command_line_ends_in_a_traceback(tmp_path, monkeypatch, capsys):
    """Options at random with values at random: a run that could start, or one line and status 2."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        evaluation, "keep_memory", lambda: sys.exit(0)
    )  # stop before anything is done
    np.save("points.npy", np.random.default_rng(0).normal(size=(50, 2)))
    help_text = {}
    for main in (train.main, evaluation.main):
        with pytest.raises(SystemExit):
            run(main, monkeypatch, "--help")
        help_text[main] = sorted(
            set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out)) - {"--help"}
        )
    values = (
        "",
        "0",
        "-1",
        "1",
        "7",
        "1e9",
        "nan",
        "inf",
        "x",
        "../x",
        "\0",
        "é",
        "pendulum",
        "rings",
        "hgn",
        "hnn",
        "nhf",
        "paper",
        "euler",
        "points.npy",
        "--",
        "99999999999999999999",
    )
    draw = random.Random(0)
    for _ in range(200 if LONG else 60):
        main = draw.choice((train.main, evaluation.main))
        words = [
            w
            for option in draw.sample(help_text[main], draw.randint(1, 4))
            for w in (option, *draw.choices(values, k=draw.choice((0, 1, 1, 1, 2))))
        ]
        monkeypatch.setattr(sys, "argv", ["x.py", *words])
        try:
            if main is train.main:
                train.settle(train.parse())
            else:
                evaluation.main()
        except SystemExit as stop:
            error = capsys.readouterr().err.strip()
            assert (
                stop.code == 0
                or stop.code == 2
                and error.startswith("error: ")
                and "\n" not in error
            ), words


@pytest.fixture(scope="module")
def flows(tmp_path_factory):
    """A folder with a run on points of three dimensions in odd units, and its RealNVP."""
    folder = tmp_path_factory.mktemp("flows")
    np.save(
        folder / "points.npy",
        np.random.default_rng(0).normal(size=(500, 3)) * [1e3, 1e-3, 1] + [5e4, 0, -1],
    )
    for model in ("nhf", "realnvp"):
        words = ("--data", "points.npy", "--model", model, "--steps", 60, "--batch-size", 64)
        subprocess.run(
            [sys.executable, str(HERE / "train.py"), *map(str, words)],
            cwd=folder,
            check=True,
            capture_output=True,
        )
    return folder


def test_a_flow_through_both_commands(flows, monkeypatch, capsys):
    monkeypatch.chdir(flows)
    run(evaluation.main, monkeypatch, "--checkpoint", "runs/points/checkpoint.pt")
    assert {"density.png", "flow.gif", "metrics.json"} <= {
        p.name for p in Path("runs/points").iterdir()
    }
    metrics = json.load(open("runs/points/metrics.json"))["metrics"]
    truth = 3 * 0.5 * math.log(2 * math.pi * math.e) + math.log(
        1e3 * 1e-3
    )  # entropy in the user's units
    for name in ("nhf", "realnvp"):
        assert (
            -metrics[name]["log_prob_256"] == pytest.approx(truth, abs=0.5)
            and metrics[name]["points"] == 50
        )
    assert metrics["nhf"]["elbo"] <= metrics["nhf"]["log_prob_256"] + 0.05
    run(train.main, monkeypatch, "--resume", "runs/points/checkpoint.pt", "--steps", 80)
    run(
        train.main,
        monkeypatch,
        "--data",
        "points.npy",
        "--steps",
        80,
        "--batch-size",
        64,
        "--name",
        "whole",
    )
    assert torch.load("runs/points/checkpoint.pt", weights_only=True)["step"] == 80
    assert "nll" in Path("runs/whole/metrics.jsonl").read_text()


def test_modes_and_gap_of_a_perfect_flow():
    density = DENSITIES["eight_gaussians"]

    class Perfect(torch.nn.Module):
        elbo = staticmethod(lambda x, generator=None: density.log_prob(x))
        log_prob = staticmethod(lambda x, samples=1, generator=None: density.log_prob(x))
        sample = staticmethod(lambda n, generator: density.sample(n, generator))

    result = evaluation.measure_flow(Perfect(), evaluation.Points({"density": "eight_gaussians"}))
    assert (
        abs(result["gap"]) < 0.03
        and result["modes_found"] == 8
        and max(result["mode_weights"]) < 0.15
    )
    assert sum(result["mode_weights"]) == pytest.approx(1)


def test_minima_of_a_known_potential():
    """V = sum over coordinates of (x^2 - 1)^2 has its four wells at (+-1, +-1)."""
    model = NHF(scale=(2.0, 3.0), shift=(1.0, 0.0))

    class Wells:
        V = staticmethod(lambda x: (x.square() - 1).square().sum(-1))

    found = evaluation.minima(model, Wells)
    expected = torch.tensor([[-1.0, -3.0], [3.0, -3.0], [-1.0, 3.0], [3.0, 3.0]])
    assert len(found) == 4 and torch.cdist(found, expected).amin(1).max() < 1e-4


def write_bad_points(folder):
    good = np.random.default_rng(0).normal(size=(20, 2))
    for name, array in (
        ("nan", np.where(good > 0.5, np.nan, good)),
        ("constant", good * [1, 0]),
        ("one", good[:1]),
        ("flat", good[:, 0]),
        ("words", np.array([["a", "b"], ["c", "d"]])),
    ):
        np.save(folder / f"{name}.npy", array)
    np.save(folder / "objects.npy", np.array([{"a": 1}, None]), allow_pickle=True)


BAD_TRAIN = (
    "--model hnn --targets 40",
    "--model hnn_conv --size 20",
    "--bench --model hnn",
    "--latent 65",
    "--model hnn --density rings",
    "--density blob",
    "--density rings --system pendulum",
    "--density rings --model hgn",
    "--model nhf",
    "--system pendulum --model realnvp",
    "--density rings --hamiltonians 0",
    "--density rings --kinetic x",
    "--density rings --base x",
    "--density rings --bench",
    "--density rings --samples 0",
    "--data nowhere.npy",
    "--data bad.pt",
    "--data nan.npy",
    "--data constant.npy",
    "--data one.npy",
    "--data flat.npy",
    "--data words.npy",
    "--data objects.npy",
    "--system pluto",
    "--size 20",
    "--size 500",
    "--size x",
    "--noise -1",
    "--noise loud",
    "--window 0",
    "--targets 0",
    "--arch big",
    "--latent 0",
    "--context 0",
    "--context 50",
    "--integrator rk4",
    "--substeps 0",
    "--steps 0",
    "--steps 1.5",
    "--batch-size 0",
    "--lr 0",
    "--lr nan",
    "--beta -1",
    "--tolerance 0",
    "--seed -1",
    f"--seed {2**40}",
    "--name taken",
    "--name ../up",
    "--resume nowhere.pt",
    "--resume bad.pt",
    "--resume other.pt",
    "--device tpu",
    "--device cuda:77",
    "--colour red",
)
BAD_EVAL = (
    "--density rings",
    "--density blob",
    "--checkpoint nowhere.pt",
    "--checkpoint bad.pt",
    "--checkpoint other.pt",
    "--checkpoint cut.pt",
    "--checkpoint parts.pt",
    "--checkpoint negative.pt",
    "--checkpoint nan.pt",
    "--system pluto",
    "--frames 0",
    "--frames x",
    "--clips 0",
    "--speed 0",
    "--speed -1",
    "--speed inf",
    "--sample -1",
    "--scale 0",
    "--seed x",
    "--device tpu",
)


@pytest.mark.parametrize(
    "main, words", [(train.main, w) for w in BAD_TRAIN] + [(evaluation.main, w) for w in BAD_EVAL]
)
def test_a_mistake_gets_one_line_and_status_2(main, words, tmp_path, monkeypatch, capsys, trained):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/taken").mkdir(parents=True)
    (tmp_path / "bad.pt").write_bytes(b"not a checkpoint")
    write_bad_points(tmp_path)
    whole = (trained / "runs/mass_spring/checkpoint.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"kind": "something else"}, tmp_path / "other.pt")
    good = torch.load(trained / "runs/mass_spring/checkpoint.pt", weights_only=True)
    torch.save({k: good[k] for k in ("kind", "model")}, tmp_path / "parts.pt")
    torch.save(
        good | {"model_config": good["model_config"] | {"context": -3}}, tmp_path / "negative.pt"
    )
    torch.save(
        good | {"model": good["model"] | {"H.V.last": good["model"]["H.V.last"] * math.nan}},
        tmp_path / "nan.pt",
    )
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        run(main, monkeypatch, *words.split())
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and error.startswith("error: ") and "\n" not in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("main", (train.main, evaluation.main))
def test_unwritable_folder(main, tmp_path, monkeypatch, capsys, trained):
    monkeypatch.chdir(tmp_path)
    if main is train.main:
        (tmp_path / "runs").write_text("a file where the folder should be")
    else:
        shutil.copytree(trained / "runs", tmp_path / "runs")
        monkeypatch.setattr(evaluation.os, "access", lambda *_: False)
    with pytest.raises(SystemExit, match="2"):
        run(main, monkeypatch, *(TINY if main is train.main else ()))
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name, companions", (("hgn", ()), ("physics", ()), ("nhf", ("hgn",))))
def test_stands_alone(name, companions, tmp_path):
    for file in (name, *companions):
        shutil.copy(HERE / f"{file}.py", tmp_path)
    subprocess.run([sys.executable, "-c", f"import {name}"], cwd=tmp_path, check=True)


def test_the_example_in_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S):
        exec(block, {})
