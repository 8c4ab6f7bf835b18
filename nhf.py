"""Neural Hamiltonian Flow: a normalising flow made of Hamiltonian dynamics. Needs torch and hgn.py.

Toth et al., "Hamiltonian Generative Networks", ICLR 2020, section 4. A state (q, p) is drawn from
N(0, I) and rolled by leapfrog through a learnt Hamiltonian; q is the datum. Leapfrog preserves
volume, so the dynamics need no log-determinant:

    model = NHF(dim=2)
    loss = -model.elbo(x).mean()                    # x (B, 2)
    model.log_prob(x, samples=256)                  # (B,) nats, a tighter bound
    model.sample(1000)                              # (1000, 2)
"""

import zlib
from math import log, pi
from typing import Callable, NamedTuple, Optional

import torch
from torch import nn

from hgn import Couplings, Energy, Hamiltonian, check

TEST_SEED = 2**40  # of all test data; training draws from seeds below it only (train.py)
_xy = lambda x, y: torch.stack((x, y), -1)
_polar = lambda r, a: _xy(r * a.cos(), r * a.sin())


class Density(NamedTuple):
    """A density in the plane. sample(n, generator) -> (n, 2). entropy: nats. Of noise round equal
    modes, points or curves: its width, and points (m, 2) of these modes."""

    sample: Callable
    entropy: float
    sigma: Optional[float] = None
    centres: Optional[torch.Tensor] = None


def _on(curves, entropy, sigma, parts=1, nodes=400):
    """Noise of width sigma on curves(k, t), points (n, 2) of part k and t in [0, 1]."""
    t = ((torch.arange(nodes) + 0.5) / nodes).repeat(parts)
    centres = curves(torch.arange(parts).repeat_interleave(nodes), t).double()

    def sample(n, generator=None):
        k, t = torch.randint(parts, (n,), generator=generator), torch.rand(n, generator=generator)
        return curves(k, t) + sigma * torch.randn(n, 2, generator=generator)

    return Density(sample, entropy, sigma, centres)


def _pinwheel(n, generator=None):
    x, y = torch.randn(n, 2, generator=generator).unbind(1)
    x, y = 0.3 * x + 1, 0.1 * y
    a = pi / 2 * torch.randint(5, (n,), generator=generator) + 0.25 * x.exp()  # two arms coincide
    return 2 * _xy(a.cos() * x - a.sin() * y, a.sin() * x + a.cos() * y)


def _spirals(n, generator=None):
    a = 3 * pi * torch.rand(n, generator=generator).sqrt()
    arm = _polar(a, pi - a) + 0.5 * torch.rand(n, 2, generator=generator)
    sign = 2.0 * torch.randint(2, (n, 1), generator=generator) - 1
    return sign * arm / 3 + 0.1 * torch.randn(n, 2, generator=generator)


def _checkerboard(n, generator=None):
    x, y = 4 * torch.rand(n, generator=generator) - 2, torch.rand(n, generator=generator)
    return 2 * _xy(x, y - 2 * torch.randint(2, (n,), generator=generator) + x.floor() % 2)


# After FFJORD's toys (Grathwohl et al. 2019). Entropies: means of -log p, +- 0.002.
DENSITIES = {
    "eight_gaussians": _on(lambda k, t: _polar(4 / 1.414, k * pi / 4), 2.833, 1 / 2.828, 8, 1),
    "nine_gaussians": _on(lambda k, t: 2.0 * _xy(k % 3 - 1, k // 3 - 1), 2.627, 0.3, 9, 1),
    "two_moons": _on(lambda k, t: _polar(2, pi * (k + t)) + _xy(2 * k - 1, k - 0.2), 2.396, 0.2, 2),
    "crescents": _on(lambda k, t: _polar(2.0, pi * (k + (2 * t - 1) / 3)), 2.020, 0.2, 2),
    "circles": _on(lambda k, t: _polar(3.0 / (1 + k), 2 * pi * t), 3.268, 0.24, 2),
    "rings": _on(lambda k, t: _polar(0.75 * (1.0 + k), 2 * pi * t), 2.622, 0.08, 4),
    "pinwheel": Density(_pinwheel, 2.045),
    "two_spirals": Density(_spirals, 2.648),
    "checkerboard": Density(_checkerboard, log(32)),
}


class Points:
    """What a flow learns from: a density of `DENSITIES`, or points (N, D), by their name. draw(n,
    generator): (n, dim). held_out: not among these, of points a tenth chosen by the seed. shift:
    the mean, (dim,); scale: the covariance's Cholesky factor, (dim, dim). Raises: ValueError."""

    def __init__(self, source, seed=0, name="points"):
        self.density, fixed = None, lambda seed: torch.Generator().manual_seed(seed)
        if isinstance(source, str):
            check({"density": source}, {"density": [*DENSITIES]})
            self.density, self.digest, name = DENSITIES[source], None, source
            self.draw = self.density.sample
            self.held_out = self.draw(10_000, fixed(TEST_SEED))
            rows = self.draw(20_000, fixed(TEST_SEED - 1)).double()
        else:
            rows = torch.as_tensor(source, dtype=torch.float64, device="cpu")  # 1e7 + N(0, 1)
            if rows.dim() != 2 or len(rows) < 2 or not rows.shape[1]:
                raise ValueError(f"{name} must be points (N, D), N > 1, not {[*rows.shape]}")
            if len(bad := (~rows.isfinite()).nonzero()):
                raise ValueError(f"{name}: not finite at {bad[0].tolist()}: drop such rows")
            rows = rows[torch.randperm(len(rows), generator=fixed(seed))]
            self.digest = f"points {(*rows.shape,)}, CRC {zlib.crc32(rows.numpy()):x}"
            self.held_out, rows = rows.tensor_split([max(1, len(rows) // 10)])
            self.draw = lambda n, g: rows[torch.randint(len(rows), (n,), generator=g)]
        self.rows, self.dim, self.shift = rows, rows.shape[1], rows.mean(0)
        least = 1e-6 * rows.std(0, correction=0) + 1e-12 * rows.abs().amax(0)
        self.scale, failed = torch.linalg.cholesky_ex(rows.mT.cov(correction=0).view(self.dim, -1))
        bad = [failed - 1] if failed else (self.scale.diagonal() <= least).nonzero()
        if len(bad):  # constant, or a sum of others
            raise ValueError(f"{name}: [:, {int(bad[0])}] says nothing new: drop it, or add rows")
        self.summary = f"{name}: {self.digest or 'fresh points'}, {len(self.held_out)} held out"


def log_normal(x):
    """log N(x; 0, I), (..., dim) -> (...): the base density of q and of p."""
    return -0.5 * (x.square() + log(2 * pi)).sum(-1)


class Quadratic(nn.Module):
    """K(p) = |p L|^2 / 2 with a learnt matrix L: any constant masses."""

    def __init__(self, dim):
        super().__init__()
        self.L = nn.Parameter(0.3 * torch.eye(dim))  # heavy: q drifts slowly, wells focus it

    def forward(self, p):  # (..., dim) -> (...)
        return 0.5 * (p @ self.L).square().sum(-1)

    def grad(self, p):
        return nn.functional.linear(p @ self.L, self.L)


class Separable(Hamiltonian):
    """H(q, p) = K(p) + V(q). kinetic: "quadratic" or "mlp"."""

    def __init__(self, dim, width, kinetic="quadratic"):
        super().__init__()
        self.K = Quadratic(dim) if kinetic == "quadratic" else Energy(dim, width)
        self.V, self.rounds = Energy(dim, width), 0  # of leapfrog, which is explicit here

    def forward(self, q, p):
        return self.K(p) + self.V(q)

    def leap(self, q, p, dt):
        """One leapfrog step as drift, kick, drift: it takes a single gradient of V."""
        q = q + dt / 2 * self.K.grad(p)
        p = p - dt * self.V.grad(q)
        return q + dt / 2 * self.K.grad(p), p


class Flow(nn.Module):
    """What NHF and RealNVP share: the user's units. Inside, x is scale^-1 (x - shift), by float64.
    shift: a number or (dim,). scale: also a lower triangular matrix. Raises: ValueError."""

    def __init__(self, dim, shift=0.0, scale=1.0):
        super().__init__()
        double = {"dtype": torch.float64, "device": "cpu"}
        shift, scale = (torch.as_tensor(x, **double) for x in (shift, scale))
        scale = scale if scale.dim() > 1 else (scale if scale.dim() else scale.expand(dim)).diag()
        bad = shift.shape not in ((), (dim,)) or scale.shape != (dim, dim) or scale.triu(1).any()
        if bad or not torch.cat((shift.view(-1), scale.diagonal().log())).isfinite().all():
            raise ValueError(f"shift, scale: {dim} numbers, scale above 0 or lower triangular")
        self.register_buffer("shift", shift.expand(dim).clone())
        self.register_buffer("scale", scale.clone())
        self.dim = dim

    def standard(self, x):
        """Data (..., dim) -> standardised data, and log of a unit's volume. Raises: ValueError."""
        if x.shape[-1:] != (self.dim,):
            raise ValueError(f"points must be (..., {self.dim}), not {[*x.shape]}")
        x = (x.double() - self.shift) @ self.scale.double().inverse().mT  # the model may be float()
        return x.to(next(self.parameters()).dtype), self.scale.diagonal().log().sum()

    def user(self, q):
        """Standardised data (..., dim) -> data, in float64."""
        return q.double() @ self.scale.double().mT + self.shift

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
    learnt lengths. width: of MLPs. kinetic: "quadratic" (Souveton et al. 2023, arXiv 2302.01955)
    or "mlp" (the paper). units: shift and scale of the data. Raises: ValueError."""

    def __init__(self, dim=2, hamiltonians=1, steps=6, width=64, kinetic="quadratic", **units):
        known = dict.fromkeys(("dim", "hamiltonians", "steps", "width"), range(1, 4097))
        known["kinetic"] = "quadratic", "mlp"
        self.config = {k: v for k, v in locals().items() if k in known}
        check(self.config, known)
        super().__init__(dim, **units)
        self.H = nn.ModuleList(Separable(dim, width, kinetic) for _ in range(hamiltonians))
        lengths = torch.full((hamiltonians, steps), 1.6 / hamiltonians / steps)
        self.log_dt, hidden = nn.Parameter(lengths.log()), max(width // 4, 2 * dim)
        self.encoder = Couplings(dim, 6, hidden)  # its inverse: noise -> p ~ f(p|q)
        self.read = nn.Linear(width, 6 * hidden)  # V's hidden units of q -> their contexts

    def flow(self, q, p, reverse=False):
        """Roll base states (q, p), each (..., dim), to data, or with `reverse` data to base: their
        path (2, ..., hamiltonians * steps + 1, dim), in standardised units."""
        path, sign = [(q, p)], -1 if reverse else 1
        leaps = [(H, dt) for H, lengths in zip(self.H, self.log_dt.exp()) for dt in lengths]
        for H, dt in leaps[::sign]:
            path.append(H.leap(*path[-1], sign * dt))
        return torch.stack([torch.stack(x, -2) for x in zip(*path)])

    def log_weights(self, x, noise):
        """log pi(flow^-1(q, p)) - log f(p|q) for every draw p ~ f(p|q) made of noise N(0, I),
        (samples, B, dim): (samples, B), nats in the units of x; its mean is the ELBO."""
        q, volume = self.standard(x)
        context = self.read(self.H[-1].V.hidden(q)[1]).chunk(6, -1)
        p, log_det = self.encoder.inverse(noise, context=context)
        q0, p0 = self.flow(q.expand_as(noise), p, reverse=True)[..., -1, :]
        return log_normal(q0) + log_normal(p0) - log_normal(noise) + log_det - volume

    def log_prob(self, x, samples=16, generator=None):
        """log p(x) by importance weighting with `samples` draws of p (IWAE, Burda et al. 2016): x
        (..., dim) -> (...), nats. On average a lower bound, tighter for more samples."""
        log_p = []
        for part in x.reshape(-1, x.shape[-1]).split(max(1, 2048 // samples)):  # in a CPU's cache
            noise = self.noise(samples, *part.shape, generator=generator)
            log_p.append(self.log_weights(part, noise).logsumexp(0) - log(samples))
        return torch.cat(log_p).view(x.shape[:-1])

    def sample(self, n, generator=None):
        """n points (n, dim), in float64; gradients reach the weights."""
        return self.user(self.flow(*self.noise(2, n, self.dim, generator=generator))[0][:, -1])


class RealNVP(Flow):
    """The baseline that the paper compares with (Dinh et al. 2017): affine couplings. log_prob is
    exact, whatever `samples` is. Raises: ValueError in one dimension, where nothing is coupled."""

    def __init__(self, dim=2, layers=8, width=128, **units):
        self.config = {"dim": dim, "layers": layers, "width": width}
        check(self.config, dict.fromkeys(self.config, range(1, 4097)) | {"dim": range(2, 4097)})
        super().__init__(dim, **units)
        self.couplings = Couplings(dim, layers, width)

    @classmethod
    def like(cls, flow, layers=8):
        """The smallest RealNVP with no fewer parameters than `flow`, on the same data."""
        count = lambda model: sum(w.numel() for w in model.parameters())
        enough = lambda width: count(cls(flow.dim, layers, width)) >= count(flow)
        size = flow.dim, layers, next(filter(enough, range(8, 4097)))
        return cls(*size, shift=flow.shift, scale=flow.scale)

    def log_weights(self, x, noise=None):
        """The interface of NHF: one weight a point, which is log p(x) itself, (1, B)."""
        x, volume = self.standard(x)
        z, log_det = self.couplings.inverse(x)
        return (log_normal(z) + log_det - volume).unsqueeze(0)

    def log_prob(self, x, samples=1, generator=None):
        return self.log_weights(x)[0]

    def sample(self, n, generator=None):
        return self.user(self.couplings(self.noise(n, self.dim, generator=generator)))
