"""The four systems of Hamiltonian Generative Networks and two more: exact simulation and rendering.

Stands alone on torch and numpy. A system is one entry of `SYSTEMS`: its constants, its energy, how
its initial states are drawn and how it looks. Constants, initial states and colours follow Toth et
al., "Hamiltonian Generative Networks", ICLR 2020 (arXiv 1909.13789), section 4 and appendix, as
published with its reproduction (Balsells Rodas et al., ReScience 2021); spring_pendulum and
double_pendulum are our own.

    frames, q, p = clips(SYSTEMS["three_body"], n=16)   # (16, 30, 3, 32, 32), (16, 30, 3, 2) twice
"""

import math
from dataclasses import dataclass
from typing import Callable

import numpy as np
import torch

BACKGROUND = (81 / 255, 88 / 255, 93 / 255)
YELLOW, RED, GREEN = (173 / 255, 146 / 255, 0.0), (173 / 255, 0.0, 0.0), (0.0, 146 / 255, 0.0)

# Symmetric composition of 17 leapfrog steps, of order 8: Kahan & Li, "Composition constants for
# raising the orders of unconventional schemes", Math. Comp. 66 (1997), method s17odr8a. The first
# nine of seventeen.
_HALF = (
    0.13020248308889008,
    0.56116298177510838,
    -0.38947496264484729,
    0.15884190655515560,
    -0.39590389413323758,
    0.18453964097831571,
    0.25837438768632205,
    0.29501172360931030,
    -0.60550853383003451,
)
KAHAN_LI = _HALF + _HALF[-2::-1]


@dataclass(frozen=True)
class System:
    """One physical system with H(q, p) = sum p^2 / (2 inertia) + V(q), or any other H, and how it
    is drawn.

    States q and p have shape (..., bodies, dims). Units are those of the paper: dt = 0.125 between
    frames.
    """

    colours: tuple  # RGB that each body adds to the background, in [0, 1]
    radius: float  # of a disc, world units
    half_width: float  # the picture shows [-half_width, half_width] squared, world units
    noise: float  # sigma of the paper's observation noise on every coordinate
    inertia: float  # m, or m l^2 for an angle
    initial: Callable  # (n, uniform) -> q, p, where uniform(low, high, *shape) draws numbers
    potential: Callable  # V(q): (..., bodies, dims) -> (...)
    force: Callable  # -dV/dq, same shape as q; written out because it is the simulator's hot loop
    position: Callable  # q -> where the discs are, (..., bodies, 2), world units, y upward
    locate: Callable  # the inverse of position
    periodic: bool = False  # q are angles
    # Only where the kinetic energy depends on q; `force` is not used then.
    hamiltonian: Callable = None  # (q, p) -> H
    gradient: Callable = None  # (q, p) -> dH/dq, dH/dp
    momentum: Callable = None  # (q, dq/dt) -> p

    def energy(self, q, p):
        """H(q, p) of states (..., bodies, dims), shape (...)."""
        if self.hamiltonian:
            return self.hamiltonian(q, p)
        return p.square().sum((-2, -1)) / (2 * self.inertia) + self.potential(q)


def _polar(low, high):
    """(q, p) = r (cos a, sin a) with r ~ U(low, high) and an exactly uniform angle."""

    def initial(n, uniform):
        r, a = uniform(low, high, n, 1, 1), uniform(0, 2 * math.pi, n, 1, 1)
        return r * a.cos(), r * a.sin()

    return initial


def _orbit(bodies, low, high, speed, jitter=0.1):
    """Bodies evenly spaced on a circle of radius r ~ U(low, high), turning either way at the
    circular speed `speed` / sqrt(r); then every velocity component is scaled by 1 +- jitter. Unit
    masses, so p = v."""

    def initial(n, uniform):
        r, direction = uniform(low, high, n, 1, 1), uniform(-1, 1, n, 1, 1).sign()
        a = uniform(0, 2 * math.pi, n, 1) + torch.arange(bodies) * (
            2 * math.pi / bodies
        )  # (n, bodies)
        q = r * torch.stack((a.cos(), a.sin()), -1)  # (n, bodies, 2)
        p = direction * speed / r.sqrt() * torch.stack((-a.sin(), a.cos()), -1)
        return q, p * (1 + jitter * uniform(-1, 1, n, bodies, 2))

    return initial


def _separations(q):
    """For every cyclic shift: the vector from each body to another, and 1 / distance. Covers all
    ordered pairs."""
    for shift in range(1, q.shape[-2]):
        d = q.roll(-shift, -2) - q  # (..., bodies, 2)
        x, y = d.unbind(-1)
        yield d, torch.addcmul(x * x, y, y).rsqrt_().unsqueeze(-1)


def _gravity(q):
    return -0.5 * sum(inverse.sum((-2, -1)) for _, inverse in _separations(q))


def _gravity_force(q):
    return sum(d * (inverse * inverse * inverse) for d, inverse in _separations(q))


def _spring_force(q):
    r = q.norm(dim=-1, keepdim=True)
    return -4 * (1 - 1 / r) * q - torch.tensor((0.0, 1.5), dtype=q.dtype, device=q.device)


# The double pendulum, m 0.5 and l 1 both, g 3. With a = q_1 - q_2 its mass matrix is 0.5 [[2, cos
# a], [cos a, 1]].


def _double_hamiltonian(q, p):
    (p1, p2), a = p[..., 0].unbind(-1), q[..., 0, 0] - q[..., 1, 0]
    K = (p1 * p1 + 2 * p2 * p2 - 2 * p1 * p2 * a.cos()) / (1 + a.sin().square())
    return K + 3 * (1 - q[..., 0, 0].cos()) + 1.5 * (1 - q[..., 1, 0].cos())


def _double_gradient(q, p):
    (p1, p2), a = p[..., 0].unbind(-1), q[..., 0, 0] - q[..., 1, 0]
    s, c = a.sin(), a.cos()
    d = 1 + s * s
    twist = 2 * s * (p1 * p2 - (p1 * p1 + 2 * p2 * p2 - 2 * p1 * p2 * c) * c / d) / d
    dq = torch.stack((twist + 3 * q[..., 0, 0].sin(), 1.5 * q[..., 1, 0].sin() - twist), -1)
    return dq.unsqueeze(-1), 2 * torch.stack((p1 - c * p2, 2 * p2 - c * p1), -1).div(
        d.unsqueeze(-1)
    ).unsqueeze(-1)


SYSTEMS = {
    "mass_spring": System(  # m 0.5, k 2
        colours=(YELLOW,),
        radius=0.5,
        half_width=2.0,
        noise=0.1,
        inertia=0.5,
        initial=_polar(0.1, 1.0),
        potential=lambda q: q.square().sum((-2, -1)),
        force=lambda q: -2 * q,
        position=lambda q: torch.cat((q, torch.zeros_like(q)), -1),
        locate=lambda x: x[..., :1],
    ),
    "pendulum": System(  # m 0.5, l 1, g 3; angle 0 hangs down
        colours=(YELLOW,),
        radius=0.5,
        half_width=2.0,
        noise=0.1,
        inertia=0.5,
        initial=_polar(1.3, 2.3),
        potential=lambda q: 1.5 * (1 - q.cos()).sum((-2, -1)),
        force=lambda q: -1.5 * q.sin(),
        position=lambda q: torch.cat((q.sin(), -q.cos()), -1),
        locate=lambda x: torch.atan2(x[..., :1], -x[..., 1:]),
        periodic=True,
    ),
    "two_body": System(  # m 1, G 1
        colours=(YELLOW, RED),
        radius=0.375,
        half_width=3.0,
        noise=0.05,
        inertia=1.0,
        initial=_orbit(2, 0.5, 1.5, speed=0.5),
        potential=_gravity,
        force=_gravity_force,
        position=lambda q: q,
        locate=lambda x: x,
    ),
    "three_body": System(  # m 1, G 1
        colours=(YELLOW, RED, GREEN),
        radius=0.28125,
        half_width=3.0,
        noise=0.2,
        inertia=1.0,
        initial=_orbit(3, 0.9, 1.2, speed=3**-0.25),
        potential=_gravity,
        force=_gravity_force,
        position=lambda q: q,
        locate=lambda x: x,
    ),
    "spring_pendulum": System(  # m 0.5, k 4, rest length 1, g 3
        colours=(GREEN,),
        radius=0.4,
        half_width=2.5,
        noise=0.1,
        inertia=0.5,
        initial=lambda n, uniform: (
            torch.tensor((0.0, -1.375)) + uniform(-0.5, 0.5, n, 1, 2),
            uniform(-0.5, 0.5, n, 1, 2),
        ),
        potential=lambda q: (2 * (q.norm(dim=-1) - 1).square() + 1.5 * q[..., 1]).sum(-1),
        force=_spring_force,
        position=lambda q: q,
        locate=lambda x: x,
    ),
    "double_pendulum": System(  # chaotic, and K depends on q
        colours=(YELLOW, RED),
        radius=0.4,
        half_width=2.5,
        noise=0.1,
        inertia=0.5,
        initial=lambda n, uniform: (uniform(-1.5, 1.5, n, 2, 1), uniform(-0.5, 0.5, n, 2, 1)),
        potential=None,
        force=None,
        position=lambda q: torch.cat((q.sin(), -q.cos()), -1).cumsum(-2),
        locate=lambda x: (lambda d: torch.atan2(d[..., :1], -d[..., 1:]))(
            torch.cat((x[..., :1, :], x.diff(dim=-2)), -2)
        ),
        periodic=True,
        hamiltonian=_double_hamiltonian,
        gradient=_double_gradient,
        momentum=lambda q, v: (
            0.5 * torch.tensor(((2.0, 0.0), (0.0, 1.0)), dtype=v.dtype) @ v
            + 0.5 * (q[..., :1, :] - q[..., 1:, :]).cos() * v.flip(-2)
        ),
    ),
}


def initial_states(system, n, generator=None, device=None):
    """n random initial states q, p of shape (n, bodies, dims), float64. Drawn on the generator's
    device (so that a CPU generator gives the same states whatever the device), returned on
    `device`."""
    source = generator.device if generator is not None else "cpu"

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(
            shape, generator=generator, device=source, dtype=torch.float64
        )

    with torch.device(source):
        return tuple(x.to(device or source) for x in system.initial(n, uniform))


def simulate(system, q, p, frames, dt=0.125):
    """True trajectories by symplectic methods of order 8 or more (compositions of leapfrog, or
    Gauss-Legendre), in float64.

    Args: q, p: initial states (B, bodies, dims). frames: how many states to return, the initial one
    included. dt: time between frames; negative runs backward. Returns: q, p of shape (B, frames,
    bodies, dims), float64.
    Raises: ValueError if frames < 1.
    """
    if frames < 1:
        raise ValueError(f"frames must be at least 1, not {frames}")
    states = [(q.double(), p.double())]
    for _ in range(frames - 1):
        states.append(
            _advance(system, *states[-1], dt, substeps=max(1, math.ceil(abs(dt) / 0.125)))
        )
    q, p = zip(*states)
    return torch.stack(q, 1), torch.stack(p, 1)


def _compose(system, q, p, h):
    """One step of length h: 17 leapfrog steps, drift first. A half drift opens and closes each;
    neighbours are merged."""
    drift = [(a + b) / 2 * h / system.inertia for a, b in zip((0.0,) + KAHAN_LI, KAHAN_LI + (0.0,))]
    for c, d in zip(drift, KAHAN_LI):
        q = torch.add(q, p, alpha=c)
        p = torch.add(p, system.force(q), alpha=d * h)
    return torch.add(q, p, alpha=drift[-1]), p


def _gauss_legendre(stages=6):
    c = torch.from_numpy(np.polynomial.legendre.leggauss(stages)[0] + 1) / 2
    powers, k = c.unsqueeze(1) ** torch.arange(stages), torch.arange(1, stages + 1)
    inverse = torch.linalg.inv(powers)
    return powers * c.unsqueeze(1) / k @ inverse, 1 / k.double() @ inverse


def _implicit(system, q, p, h, rounds=16):
    """One step of length h for any H: Gauss-Legendre collocation, its equations solved by
    fixed-point iteration."""
    A, b = (x.to(q.device) for x in _gauss_legendre())

    def field(q, p):
        dq, dp = system.gradient(q, p)
        return torch.stack((dp, -dq))

    k = field(q, p).unsqueeze(1).expand(-1, len(b), *q.shape)
    for _ in range(rounds):  # k: (2, stages, B, bodies, dims)
        last, (dq, dp) = k, torch.einsum("ij,sj...->si...", A, k)
        k = field(q + h * dq, p + h * dp)
        if (k - last).abs().max() < 1e-13:
            break
    dq, dp = torch.einsum("j,sj...->s...", b, k)
    return q + h * dq, p + h * dp


def _advance(system, q, p, dt, substeps, tolerance=1e-9, most=256):
    """One frame. Clips whose energy changed, as in a close encounter, are done again with shorter
    steps."""
    start, h = (q, p), dt / substeps
    for _ in range(substeps):
        q, p = (_implicit if system.gradient else _compose)(system, q, p, h)
    before, after = system.energy(*start), system.energy(q, p)
    bad = ~((after - before).abs() <= tolerance * (1 + before.abs()))  # true for NaN as well
    if substeps < most and bad.any():
        q[bad], p[bad] = _advance(system, start[0][bad], start[1][bad], dt, 4 * substeps)
    return q, p


def render(system, q, size=32):
    """Paint states as pictures: anti-aliased discs at sub-pixel positions, adding colour to the
    background.

    A pixel's share of a disc is 1 inside, 0 outside and linear in its distance across the one-pixel
    edge.
    Args: q: (B, T, bodies, dims), any device. Returns: (B, T, 3, size, size) float32 in [0, 1], row
    0 on top.
    """
    centres = system.position(q).flatten(0, 1).float()  # (B*T, bodies, 2)
    frames = torch.empty(len(centres), 3, size, size, device=q.device)
    block = 256 if q.device.type == "cpu" else len(centres)  # stays in a processor's cache
    for c, out in zip(centres.split(block), frames.split(block)):
        _paint(system, c, out)
    return frames.view(*q.shape[:2], 3, size, size)


def _paint(system, centres, out):
    """Paint discs at centres (n, bodies, 2) into out (n, 3, size, size)."""
    size, device = out.shape[-1], out.device
    pixels = size / (2 * system.half_width)  # per world unit
    grid = torch.arange(size, device=device, dtype=torch.float32) - (size - 1) / 2  # pixel centres
    dx = (grid - pixels * centres[..., 0:1]).square()  # (n, bodies, size)
    dy = (-grid - pixels * centres[..., 1:2]).square()  # row 0 is the top
    distance = (dy.unsqueeze(-1) + dx.unsqueeze(-2)).sqrt_()  # (n, bodies, size, size)
    share = distance.neg_().add_(system.radius * pixels + 0.5).clamp_(0, 1)
    out.copy_(torch.tensor(BACKGROUND, device=device).view(3, 1, 1))
    for i, colour in enumerate(torch.tensor(system.colours, device=device).view(-1, 3, 1, 1)):
        out.addcmul_(share[:, i, None], colour)
    out.clamp_(max=1)


def clips(system, n, frames=30, dt=0.125, noise=0.0, size=32, generator=None, device=None):
    """n random clips. Returns frames (n, frames, 3, size, size) and the true, noise-free states q,
    p (n, frames, bodies, dims).

    noise: sigma of the Gaussian added to every coordinate of every frame before it is painted,
    world units; "paper" takes the paper's sigma for this system. The same generator seed gives the
    same clips.
    """
    q, p = simulate(system, *initial_states(system, n, generator, device), frames, dt)
    return render(system, jitter(system, q, noise, generator), size), q, p


def jitter(system, q, noise=0.0, generator=None):
    """The paper's observation noise: q plus a Gaussian of sigma `noise` (or "paper") on every
    coordinate."""
    sigma = system.noise if noise == "paper" else noise
    if sigma == 0:
        return q
    source = generator.device if generator is not None else q.device
    return q + sigma * torch.randn(q.shape, generator=generator, device=source, dtype=q.dtype).to(
        q.device
    )


def noise_floor(system, noise="paper", size=32, n=2000, draws=32, generator=None):
    """Smallest pixel MSE any model can reach under `noise`: the mean variance of a pixel given the
    true state, by Monte Carlo over n random states with `draws` noisy pictures each."""
    q = simulate(system, *initial_states(system, n, generator), 8, dt=0.5)[0][
        :, -1:
    ]  # away from the start
    return (
        render(system, jitter(system, q.expand(-1, draws, -1, -1), noise, generator), size)
        .var(1)
        .mean()
        .item()
    )
