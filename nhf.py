"""Neural Hamiltonian Flow: a normalising flow made of Hamiltonian dynamics. Needs torch and hgn.py.

Toth et al., "Hamiltonian Generative Networks", ICLR 2020, section 4. Draw a state (q, p) from a
simple base density, roll it through a few learnt Hamiltonians with leapfrog, keep q. Leapfrog
preserves volume, so no log-determinant appears anywhere:

    model = NHF(dim=2)
    loss = -model.elbo(x).mean()                    # x (B, 2)
    model.log_prob(x, samples=256)                  # (B,) nats, a tighter bound
    model.sample(1000)                              # (1000, 2)
"""

import math
from dataclasses import dataclass
from typing import Callable, Optional

import torch
import torch.nn.functional as F
from torch import nn

from hgn import Couplings, Separable, he_, leapfrog, mlp


# ---------------------------------------------------------------- densities


@dataclass(frozen=True)
class Density:
    """A density in the plane. sample(n, generator) -> (n, 2). entropy: nats, the lowest test NLL
    there is. log_prob(x): (B, 2) -> (B,), where it has a closed form. parts: how many equal modes,
    points or curves, it has; centres: (parts * nodes, 2), where they lie."""

    sample: Callable
    entropy: float
    log_prob: Optional[Callable] = None
    parts: Optional[int] = None
    centres: Optional[torch.Tensor] = None

    def part_of(self, x):
        """Which mode is nearest to each x (B, 2): (B,)."""
        return torch.cdist(x, self.centres).argmin(1) * self.parts // len(self.centres)


def _around(curves, entropy, sigma, parts=1, nodes=400):
    """Gaussian noise of width sigma round curves: curves(k, t), with part k and t in [0, 1], are
    points (n, 2). The density is the integral over t by the midpoint rule, exact to 1e-6; for
    single points (nodes 1) it is a Gaussian mixture."""

    def sample(n, generator=None):
        k, t = torch.randint(parts, (n,), generator=generator), torch.rand(n, generator=generator)
        return curves(k, t) + sigma * torch.randn(n, 2, generator=generator)

    k, t = (
        torch.arange(parts).repeat_interleave(nodes),
        ((torch.arange(nodes) + 0.5) / nodes).repeat(parts),
    )
    centres = curves(k, t)

    def log_prob(x):
        square = torch.cdist(x, centres.to(x), compute_mode="donot_use_mm_for_euclid_dist").square()
        return (-0.5 * square / sigma**2).logsumexp(1) - math.log(
            len(centres) * 2 * math.pi * sigma**2
        )

    return Density(sample, entropy, log_prob, parts, centres)


def _polar(r, a):
    return torch.stack((r * a.cos(), r * a.sin()), -1)


def _moons(k, t):
    a, sign = math.pi * t, 1.0 - 2 * k  # the second is the first, turned and shifted
    return torch.stack((2 * sign * a.cos() + 2 * k - 1, 2 * sign * a.sin() + k - 0.2), -1)


def _pinwheel(n, generator=None):
    x = torch.randn(n, 2, generator=generator) * torch.tensor((0.3, 0.1)) + torch.tensor((1.0, 0.0))
    a = (
        math.pi / 2 * torch.randint(5, (n,), generator=generator) + 0.25 * x[:, 0].exp()
    )  # two of the five arms coincide
    c, s = a.cos(), a.sin()
    return 2 * torch.stack((c * x[:, 0] - s * x[:, 1], s * x[:, 0] + c * x[:, 1]), -1)


def _spirals(n, generator=None):
    a = 3 * math.pi * torch.rand(n, generator=generator).sqrt()
    arm = torch.stack((-a * a.cos(), a * a.sin()), -1) + 0.5 * torch.rand(n, 2, generator=generator)
    sign = 2.0 * torch.randint(2, (n, 1), generator=generator) - 1
    return sign * arm / 3 + 0.1 * torch.randn(n, 2, generator=generator)


def _checkerboard(n, generator=None):
    x = 4 * torch.rand(n, generator=generator) - 2
    y = (
        torch.rand(n, generator=generator)
        - 2 * torch.randint(2, (n,), generator=generator)
        + x.floor() % 2
    )
    return 2 * torch.stack((x, y), -1)


def _checkerboard_log_prob(x):
    column, row = (x[:, 0] / 2).floor(), (x[:, 1] / 2).floor()
    inside = (
        (column.abs() <= 2)
        & (column < 2)
        & (row.abs() <= 2)
        & (row < 2)
        & ((column + row) % 2 == 0)
    )
    return torch.where(inside, -math.log(32.0), -math.inf)


# Entropies are Monte Carlo means of -log p, +- 0.002; FFJORD's toy definitions (Grathwohl et al.
# 2019) where they exist.
DENSITIES = {
    "eight_gaussians": _around(
        lambda k, t: _polar(torch.tensor(4 / 1.414), k * math.pi / 4), 2.833, 0.5 / 1.414, 8, 1
    ),
    "nine_gaussians": _around(
        lambda k, t: 2.0 * torch.stack((k % 3 - 1, k // 3 - 1), -1), 2.627, 0.3, 9, 1
    ),
    "two_moons": _around(_moons, 2.396, 0.2, 2),
    "crescents": _around(
        lambda k, t: _polar(torch.tensor(2.0), math.pi * (k + (2 * t - 1) / 3)), 2.020, 0.2, 2
    ),
    "circles": _around(lambda k, t: _polar(3.0 / (1 + k), 2 * math.pi * t), 3.268, 0.24, 2),
    "rings": _around(lambda k, t: _polar(0.75 * (1.0 + k), 2 * math.pi * t), 2.622, 0.08, 4),
    "pinwheel": Density(_pinwheel, 2.045),
    "two_spirals": Density(_spirals, 2.648),
    "checkerboard": Density(_checkerboard, math.log(32), _checkerboard_log_prob),
}


# ---------------------------------------------------------------- base densities


class Gaussian:
    """N(0, I)."""

    def log_prob(self, x):
        return -0.5 * (x.square() + math.log(2 * math.pi)).sum(-1)

    def sample(self, *shape, generator=None):
        return torch.randn(shape, generator=generator)


class SoftUniform:
    """Uniform on [-a, a] with soft edges, in every coordinate: a product of two sigmoids, which is
    exactly the density of a uniform plus a logistic variable of scale 1 / beta."""

    a, beta = 1.7, 10.0

    def log_prob(self, x):
        edges = F.logsigmoid(self.beta * (x + self.a)) + F.logsigmoid(self.beta * (self.a - x))
        return (edges + math.log(-math.expm1(-2 * self.a * self.beta)) - math.log(2 * self.a)).sum(
            -1
        )

    def sample(self, *shape, generator=None):
        u, v = torch.rand(2, *shape, generator=generator)
        return self.a * (2 * u - 1) + torch.logit(v, eps=1e-6) / self.beta


BASES = {"gaussian": Gaussian, "soft_uniform": SoftUniform}


# ---------------------------------------------------------------- the flow


class Flow(nn.Module):
    """What NHF and RealNVP share: the user's units. Inside, data are standardised to (x - shift) /
    scale."""

    def __init__(self, dim, shift, scale):
        super().__init__()
        self.register_buffer(
            "shift", torch.zeros(dim) + torch.as_tensor(shift, dtype=torch.float32)
        )
        self.register_buffer("scale", torch.ones(dim) * torch.as_tensor(scale, dtype=torch.float32))

    def standard(self, x):
        """Data -> standardised data, and the log of the volume that one unit of it has."""
        return (x - self.shift) / self.scale, self.scale.log().sum()


class NHF(Flow):
    """Neural Hamiltonian Flow (Toth et al. 2020, section 4).

    Args: dim: of the data. hamiltonians: how many, each H = K(p) + V(q), rolled `steps` leapfrog
    steps of learnt length. width: of the MLPs. kinetic: "mlp" (the paper) or "quadratic" (Souveton
    et al. 2023, arXiv 2302.01955). base: "gaussian" or "soft_uniform", of q and of p. shift, scale:
    of the data, to standardise them. Raises: ValueError, with the cure, for a value outside these.
    """

    def __init__(
        self,
        dim=2,
        hamiltonians=8,
        steps=1,
        width=64,
        kinetic="mlp",
        base="gaussian",
        shift=0.0,
        scale=1.0,
    ):
        self.config = {
            k: v for k, v in locals().items() if k not in ("self", "__class__", "shift", "scale")
        }
        super().__init__(dim, shift, scale)
        for name, value in (
            ("dim", dim),
            ("hamiltonians", hamiltonians),
            ("steps", steps),
            ("width", width),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        for name, value, known in (
            ("kinetic", kinetic, ("mlp", "quadratic")),
            ("base", base, BASES),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
        self.dim, self.steps, self.base = dim, steps, BASES[base]()
        self.H = nn.ModuleList(Separable(dim, width, kinetic=kinetic) for _ in range(hamiltonians))
        self.log_dt = nn.Parameter(torch.full((hamiltonians,), math.log(0.5)))
        self.encoder = mlp(dim, width, width, 2 * dim)  # f(p | q) = N(mean, exp(log_std)^2)
        he_(self.encoder)
        self.encoder[-1].weight.data.mul_(0.1)

    def flow(self, q, p, reverse=False):
        """Roll base states (q, p), each (B, dim), to data, or with `reverse` data to base. Returns
        all states on the way, (B, hamiltonians * steps + 1, dim) twice, the start included; in
        standardised units."""
        qs, ps = [q.unsqueeze(1)], [p.unsqueeze(1)]
        for H, log_dt in list(zip(self.H, self.log_dt))[:: -1 if reverse else 1]:
            q, p = leapfrog(
                H, qs[-1][:, -1], ps[-1][:, -1], log_dt.exp() * (-1 if reverse else 1), self.steps
            )
            qs.append(q[:, 1:])
            ps.append(p[:, 1:])
        return torch.cat(qs, 1), torch.cat(ps, 1)

    def log_weights(self, x, noise):
        """log pi(flow^-1(q, p)) - log f(p|q) for every draw p ~ f(p|q) made of noise N(0, I)
        (samples, B, dim): (samples, B), nats in the units of x. Its mean over samples is the
        ELBO."""
        q, volume = self.standard(x)
        mean, log_std = self.encoder(q).chunk(2, 1)
        p = mean + log_std.exp() * noise
        log_f = -(0.5 * (noise.square() + math.log(2 * math.pi)) + log_std).sum(-1)
        q0, p0 = (
            s[:, -1].unflatten(0, noise.shape[:2])
            for s in self.flow(q.expand_as(noise).flatten(0, 1), p.flatten(0, 1), reverse=True)
        )
        return self.base.log_prob(q0) + self.base.log_prob(p0) - log_f - volume

    def elbo(self, x, generator=None):
        """The evidence lower bound of log p(x), one draw of p a point: (B,) nats."""
        return self.log_weights(x, torch.randn(1, *x.shape, generator=generator))[0]

    def log_prob(self, x, samples=16, generator=None):
        """log p(x) by importance weighting with `samples` draws of p (IWAE, Burda et al. 2016):
        (B,) nats. On average a lower bound, the ELBO at samples = 1, that tightens towards log p(x)
        as samples grow."""
        noise = torch.randn(samples, *x.shape, generator=generator)
        return self.log_weights(x, noise).logsumexp(0) - math.log(samples)

    def sample(self, n, generator=None):
        """n points (n, dim)."""
        q, p = self.base.sample(2, n, self.dim, generator=generator)
        return self.flow(q, p)[0][:, -1] * self.scale + self.shift


class RealNVP(Flow):
    """The baseline that the paper compares with (Dinh et al. 2017): affine couplings with
    alternating masks, two-layer ReLU MLPs. log_prob is exact, so `samples` changes nothing."""

    def __init__(self, dim=2, layers=8, width=128, shift=0.0, scale=1.0):
        self.config = {"dim": dim, "layers": layers, "width": width}
        super().__init__(dim, shift, scale)
        self.dim, self.base, self.couplings = dim, Gaussian(), Couplings(dim, layers, width)

    @classmethod
    def like(cls, flow, layers=8):
        """A RealNVP with as many parameters as `flow`, to within a percent, on the same data."""
        count = lambda width: sum(w.numel() for w in cls(flow.dim, layers, width).parameters())
        target = sum(w.numel() for w in flow.parameters())
        width = min(range(8, 513, 2), key=lambda width: abs(count(width) - target))
        return cls(flow.dim, layers, width, flow.shift, flow.scale)

    def log_weights(self, x, noise):
        """The interface of NHF: one weight a point, which is log p(x) itself."""
        return self.log_prob(x).unsqueeze(0)

    def log_prob(self, x, samples=1, generator=None):
        x, volume = self.standard(x)
        z, log_det = self.couplings.inverse(x)
        return self.base.log_prob(z) + log_det - volume

    elbo = log_prob

    def sample(self, n, generator=None):
        return (
            self.couplings(self.base.sample(n, self.dim, generator=generator)) * self.scale
            + self.shift
        )
