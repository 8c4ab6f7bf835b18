"""Neural Hamiltonian Flow: a normalising flow made of Hamiltonian dynamics. Needs torch and hgn.py.

Toth et al., "Hamiltonian Generative Networks", ICLR 2020, section 4. Draw a state (q, p) from a
simple base density, roll it through a few learnt Hamiltonians with leapfrog, keep q. Leapfrog
preserves volume, so no log-determinant appears anywhere:

    model = NHF(dim=2)
    loss = -model.elbo(x).mean()                    # x (B, 2)
    model.log_prob(x, samples=256)                  # (B,) nats, a tighter bound
    model.sample(1000)                              # (1000, 2)
"""

from math import log, pi
from typing import Callable, NamedTuple, Optional

import torch
from torch import nn

from hgn import Couplings, Energy, Hamiltonian, check

TEST_SEED = 2**40  # of all test data; training draws from seeds below it only (train.py)
ROWS = 2048  # states that log_prob rolls at a time
_plane = lambda x, y: torch.stack((x, y), -1)
_polar = lambda r, a: _plane(r * a.cos(), r * a.sin())


class Density(NamedTuple):
    """A density in the plane. sample(n, generator) -> (n, 2). entropy: nats, the lowest NLL there
    is. Where known: log_prob(x), (B, 2) -> (B,), and centres (parts * nodes, 2), where its equal
    modes, points or curves, lie."""

    sample: Callable
    entropy: float
    log_prob: Optional[Callable] = None
    parts: Optional[int] = None
    centres: Optional[torch.Tensor] = None


def _around(curves, entropy, sigma, parts=1, nodes=400):
    """Gaussian noise of width sigma round curves: curves(k, t), with part k and t in [0, 1], are
    points (n, 2). The density is an integral over t by the midpoint rule, exact to 1e-6."""
    t = ((torch.arange(nodes) + 0.5) / nodes).repeat(parts)
    centres = curves(torch.arange(parts).repeat_interleave(nodes), t)

    def sample(n, generator=None):
        k, t = torch.randint(parts, (n,), generator=generator), torch.rand(n, generator=generator)
        return curves(k, t) + sigma * torch.randn(n, 2, generator=generator)

    def log_prob(x):
        square = torch.cdist(x, centres.to(x), compute_mode="donot_use_mm_for_euclid_dist").square()
        return (-0.5 * square / sigma**2).logsumexp(1) - log(len(centres) * 2 * pi * sigma**2)

    return Density(sample, entropy, log_prob, parts, centres.double())


def _pinwheel(n, generator=None):
    x, y = torch.randn(n, 2, generator=generator).unbind(1)
    x, y = 0.3 * x + 1, 0.1 * y
    a = pi / 2 * torch.randint(5, (n,), generator=generator) + 0.25 * x.exp()  # two arms coincide
    return 2 * _plane(a.cos() * x - a.sin() * y, a.sin() * x + a.cos() * y)


def _spirals(n, generator=None):
    a = 3 * pi * torch.rand(n, generator=generator).sqrt()
    arm = _polar(a, pi - a) + 0.5 * torch.rand(n, 2, generator=generator)
    sign = 2.0 * torch.randint(2, (n, 1), generator=generator) - 1
    return sign * arm / 3 + 0.1 * torch.randn(n, 2, generator=generator)


def _checkerboard(n, generator=None):
    x, y = 4 * torch.rand(n, generator=generator) - 2, torch.rand(n, generator=generator)
    y = y - 2 * torch.randint(2, (n,), generator=generator) + x.floor() % 2
    return 2 * _plane(x, y)


# FFJORD's toys (Grathwohl et al. 2019) where they exist. Entropies: means of -log p, +- 0.002.
DENSITIES = {
    "eight_gaussians": _around(lambda k, t: _polar(4 / 1.414, k * pi / 4), 2.833, 1 / 2.828, 8, 1),
    "nine_gaussians": _around(lambda k, t: 2.0 * _plane(k % 3 - 1, k // 3 - 1), 2.627, 0.3, 9, 1),
    "two_moons": _around(
        lambda k, t: _polar(2.0, pi * (k + t)) + _plane(2 * k - 1, k - 0.2), 2.396, 0.2, 2
    ),
    "crescents": _around(lambda k, t: _polar(2.0, pi * (k + (2 * t - 1) / 3)), 2.020, 0.2, 2),
    "circles": _around(lambda k, t: _polar(3.0 / (1 + k), 2 * pi * t), 3.268, 0.24, 2),
    "rings": _around(lambda k, t: _polar(0.75 * (1.0 + k), 2 * pi * t), 2.622, 0.08, 4),
    "pinwheel": Density(_pinwheel, 2.045),
    "two_spirals": Density(_spirals, 2.648),
    "checkerboard": Density(_checkerboard, log(32)),
}


class Points:
    """What a flow learns from: a density of `DENSITIES`, or points (N, D), a tenth of them, chosen
    by the seed, held out. shift, scale: mean and standard deviation, (dim,). Raises: ValueError."""

    def __init__(self, source, seed=0):
        self.density = None
        if isinstance(source, str):
            check({"density": source}, {"density": DENSITIES})
            self.density = DENSITIES[source]
            self.rows = self.density.sample(20_000, torch.Generator().manual_seed(TEST_SEED - 1))
        else:
            rows = torch.as_tensor(source, dtype=torch.float64)  # 1e7 + N(0, 1) needs as much
            if rows.dim() != 2 or len(rows) < 2 or not rows.isfinite().all():
                raise ValueError(f"points must be (N, D), two or more, not {[*rows.shape]}, finite")
            rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
            self.held_out, self.rows = rows.tensor_split([max(1, len(rows) // 10)])
        self.dim, self.shift = self.rows.shape[1], self.rows.mean(0)
        self.scale = self.rows.std(0, correction=0)
        if (constant := self.scale <= 1e-12 * self.rows.abs().amax(0)).any():
            raise ValueError(f"column {int(constant.int().argmax())} is constant: remove it")

    def draw(self, n, generator):
        """n training points (n, dim)."""
        if self.density:
            return self.density.sample(n, generator)
        return self.rows[torch.randint(len(self.rows), (n,), generator=generator)]

    def test(self, n):
        """n fixed test points, never trained on; fewer if fewer were held out."""
        fixed = torch.Generator().manual_seed(TEST_SEED)
        return self.density.sample(n, fixed) if self.density else self.held_out[:n]


def log_normal(x):
    """log N(x; 0, I), (..., dim) -> (...): the base density of q and of p."""
    return -0.5 * (x.square() + log(2 * pi)).sum(-1)


class Quadratic(nn.Module):
    """K(p) = |p L|^2 / 2 with a learnt matrix L: any constant masses."""

    def __init__(self, dim):
        super().__init__()
        self.L = nn.Parameter(torch.eye(dim))

    def forward(self, p):  # (..., dim) -> (...)
        return 0.5 * (p @ self.L).square().sum(-1)

    def grad(self, p):
        return nn.functional.linear(p @ self.L, self.L)


class Separable(Hamiltonian):
    """H(q, p) = K(p) + V(q). kinetic: "quadratic" or "mlp"."""

    def __init__(self, dim, width, kinetic="quadratic"):
        super().__init__()
        self.K = Quadratic(dim) if kinetic == "quadratic" else Energy(dim, width)
        self.V = Energy(dim, width)
        self.K.L.data.mul_(0.3)  # heavy: what a well of V focuses in a quarter turn is narrow

    def forward(self, q, p):
        return self.K(p) + self.V(q)

    def leap(self, q, p, dt):
        """One leapfrog step as drift, kick, drift: it takes a single gradient of V."""
        q = q + dt / 2 * self.K.grad(p)
        p = p - dt * self.V.grad(q)
        return q + dt / 2 * self.K.grad(p), p


class Flow(nn.Module):
    """What NHF and RealNVP share: the user's units. Inside, data are standardised to (x - shift) /
    scale, in float64 whatever the model is, for data far from zero."""

    def __init__(self, dim, shift=0.0, scale=1.0):
        super().__init__()
        if not (torch.as_tensor(scale, device="cpu") > 0).all():
            raise ValueError(f"scale must be above 0, not {scale}")
        zero = torch.zeros(dim, dtype=torch.float64)
        self.register_buffer("shift", zero + torch.as_tensor(shift))
        self.register_buffer("scale", zero + torch.as_tensor(scale))
        self.dim = dim

    def standard(self, x):
        """Data -> standardised data, and the log of the volume that one unit of it has."""
        x = (x - self.shift) / self.scale
        return x.to(next(self.parameters()).dtype), self.scale.log().sum()

    def noise(self, *shape, generator=None):
        """N(0, I) in the model's precision and place, drawn where the generator is."""
        like = next(self.parameters())
        where = getattr(generator, "device", like.device)
        return torch.randn(shape, generator=generator, device=where, dtype=like.dtype).to(like)

    def elbo(self, x, generator=None):
        """The evidence lower bound of log p(x), one draw of p a point: x (..., dim) -> (...)."""
        return self.log_prob(x, 1, generator)


class NHF(Flow):
    """Neural Hamiltonian Flow (Toth et al. 2020, section 4).

    dim: of the data. hamiltonians: how many, each H = K(p) + V(q), rolled `steps` leapfrog steps of
    learnt length. width: of the MLPs. kinetic: "quadratic" (Souveton et al. 2023, arXiv 2302.01955)
    or "mlp" (the paper). units: shift and scale of the data, (dim,). Raises: ValueError."""

    def __init__(self, dim=2, hamiltonians=1, steps=6, width=96, kinetic="quadratic", **units):
        known = dict.fromkeys(("dim", "hamiltonians", "steps", "width"), range(1, 4097))
        known["kinetic"] = "quadratic", "mlp"
        self.config = {k: v for k, v in locals().items() if k in known}
        check(self.config, known)
        super().__init__(dim, **units)
        self.steps = steps
        self.H = nn.ModuleList(Separable(dim, width, kinetic) for _ in range(hamiltonians))
        self.log_dt = nn.Parameter(torch.full((hamiltonians,), log(1.6 / hamiltonians / steps)))
        self.encoder = Couplings(2 * dim, 6, (width + 2) // 3)  # of (q, p); they change p alone
        self.encoder.masks[:, :dim] = 1

    def flow(self, q, p, reverse=False):
        """Roll base states (q, p), each (..., dim), to data, or with `reverse` data to base: their
        path (2, ..., hamiltonians * steps + 1, dim), in standardised units."""
        path, sign = [(q, p)], -1 if reverse else 1
        for H, log_dt in list(zip(self.H, self.log_dt))[::sign]:
            for _ in range(self.steps):
                path.append(H.leap(*path[-1], sign * log_dt.exp()))
        return torch.stack([torch.stack(x, -2) for x in zip(*path)])

    def log_weights(self, x, noise):
        """log pi(flow^-1(q, p)) - log f(p|q) for every draw p ~ f(p|q) made of noise N(0, I),
        (samples, B, dim): (samples, B), nats in the units of x; its mean is the ELBO."""
        q, volume = self.standard(x)
        state, log_det = self.encoder.inverse(torch.cat((q.expand_as(noise), noise), -1))
        log_f = log_normal(noise) - log_det
        q0, p0 = self.flow(*state.chunk(2, -1), reverse=True)[..., -1, :]
        return log_normal(q0) + log_normal(p0) - log_f - volume

    def log_prob(self, x, samples=16, generator=None):
        """log p(x) by importance weighting with `samples` draws of p (IWAE, Burda et al. 2016): x
        (..., dim) -> (...), nats. On average a lower bound, tighter for more samples; of one it is
        the ELBO. A few rows at a time, as arrays that leave the cache are 5 times slower."""
        log_p = []
        for part in x.reshape(-1, self.dim).split(max(1, ROWS // samples)):
            noise = self.noise(samples, *part.shape, generator=generator)
            log_p.append(self.log_weights(part, noise).logsumexp(0) - log(samples))
        return torch.cat(log_p).view(x.shape[:-1])

    def sample(self, n, generator=None):
        """n points (n, dim)."""
        q, p = self.noise(2, n, self.dim, generator=generator)
        return self.flow(q, p)[0][:, -1] * self.scale + self.shift


class RealNVP(Flow):
    """The baseline that the paper compares with (Dinh et al. 2017): affine couplings with
    alternating masks, two-layer ReLU MLPs. log_prob is exact, so `samples` changes nothing. Of one
    dimension, where a coupling has nothing to look at, ValueError."""

    def __init__(self, dim=2, layers=8, width=128, **units):
        self.config = {"dim": dim, "layers": layers, "width": width}
        check(self.config, dict.fromkeys(self.config, range(1, 4097)) | {"dim": range(2, 4097)})
        super().__init__(dim, **units)
        self.couplings = Couplings(dim, layers, width)

    @classmethod
    def like(cls, flow, layers=8):
        """A RealNVP with as many parameters as `flow`, to within a percent, on the same data."""
        count = lambda model: sum(w.numel() for w in model.parameters())
        off = lambda width: abs(count(cls(flow.dim, layers, width)) - count(flow))
        width = min(range(8, 513, 2), key=off)
        return cls(flow.dim, layers, width, shift=flow.shift, scale=flow.scale)

    def log_weights(self, x, noise=None):
        """The interface of NHF: one weight a point, which is log p(x) itself, (1, B)."""
        x, volume = self.standard(x)
        z, log_det = self.couplings.inverse(x)
        return (log_normal(z) + log_det - volume).unsqueeze(0)

    def log_prob(self, x, samples=1, generator=None):
        return self.log_weights(x)[0]

    def sample(self, n, generator=None):
        """n points (n, dim)."""
        u = self.noise(n, self.dim, generator=generator)
        return self.couplings(u) * self.scale + self.shift
