"""Neural Hamiltonian Flow: a normalising flow made of Hamiltonian dynamics. Needs torch and hgn.py.

Toth et al., "Hamiltonian Generative Networks", ICLR 2020, section 4. A state (q, p) is drawn from
N(0, I) and moved by leapfrog steps of a learnt Hamiltonian; q is the datum. Leapfrog preserves
volume, so the dynamics need no log-determinant. The momenta, which data lack, come from a learnt
density f(p|q), so that with base density pi

    log p(q) >= E_f(p|q) [ log pi(flow^-1(q, p)) - log f(p|q) ]        (the ELBO of section 4)

    model = NHF(dim=2)
    loss = -model.elbo(x).mean()                    # x (B, 2)
    model.log_prob(x, samples=256)                  # (B,) in nats, a tighter bound
    model.sample(1000)                              # (1000, 2)
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from hgn import Hamiltonian, PotentialMLP, RealNVP, Saved, check_options

# ------------------------------------------------------------------------------------------ flows


def log_normal(x):
    """log N(x; 0, I) of x (..., dim), (...): the base density of q and of p."""
    return -0.5 * (x.square() + math.log(2 * math.pi)).sum(-1)


class Flow(Saved):
    """What NHF and RealNVPFlow share: the user's units. Inside, x is scale^-1 (x - shift).

    shift: a number or (dim,). scale: numbers above 0 or a lower triangular matrix (dim, dim).
    Raises: ValueError for other values.
    """

    def __init__(self, dim, shift=0.0, scale=1.0):
        super().__init__()
        shift = torch.as_tensor(shift, dtype=torch.float64, device="cpu")
        scale = torch.as_tensor(scale, dtype=torch.float64, device="cpu")
        if scale.dim() < 2:
            scale = scale.expand(dim).diag()
        shapes = shift.shape in ((), (dim,)) and scale.shape == (dim, dim)
        numbers = torch.cat((shift.view(-1), scale.diagonal().log()))
        if not shapes or not numbers.isfinite().all() or scale.triu(1).any():
            raise ValueError(f"shift, scale: {dim} numbers, scale above 0 or lower triangular")
        self.shift = nn.Buffer(shift.expand(dim).clone())
        self.scale = nn.Buffer(scale.clone())
        self.dim = dim

    def standardise(self, x):
        """Data (..., dim) -> standardised data, and log |det scale|, which densities lose.

        Raises: ValueError for data of another dimension.
        """
        if x.shape[-1:] != (self.dim,):
            raise ValueError(f"points must be (..., {self.dim}), not {list(x.shape)}")
        # In float64, as data may be far from zero; the model itself may be of float32.
        x = (x.double() - self.shift) @ self.scale.double().inverse().mT
        return x.to(next(self.parameters()).dtype), self.scale.diagonal().log().sum()

    def unstandardise(self, q):
        """Standardised data (..., dim) -> data, in float64."""
        return q.double() @ self.scale.double().mT + self.shift

    def noise(self, *shape, generator=None):
        """N(0, I) in the model's precision and on its device, drawn on the generator's."""
        weight = next(self.parameters())
        device = weight.device if generator is None else generator.device
        noise = torch.randn(shape, generator=generator, device=device, dtype=weight.dtype)
        return noise.to(weight)

    def elbo(self, x, generator=None):
        """The evidence lower bound of log p(x), by one draw of p: x (..., dim) -> (...)."""
        return self.log_prob(x, 1, generator)


class Quadratic(nn.Module):
    """K(p) = |p L|^2 / 2 with a learnt matrix L: any constant masses."""

    def __init__(self, dim):
        super().__init__()
        # Heavy masses: q drifts slowly, so that the wells of V focus it.
        self.L = nn.Parameter(0.3 * torch.eye(dim))

    def forward(self, p):
        """p (..., dim) -> K (...)."""
        return 0.5 * (p @ self.L).square().sum(-1)

    def grad(self, p):
        """dK/dp, (..., dim)."""
        return F.linear(p @ self.L, self.L)


class SeparableHamiltonian(Hamiltonian):
    """H(q, p) = K(p) + V(q). kinetic: "quadratic" or "mlp"."""

    def __init__(self, dim, width, kinetic="quadratic"):
        super().__init__()
        self.K = Quadratic(dim) if kinetic == "quadratic" else PotentialMLP(dim, width)
        self.V = PotentialMLP(dim, width)

    def forward(self, q, p):
        """q, p (..., dim) -> H (...)."""
        return self.K(p) + self.V(q)

    def leap(self, q, p, dt):
        """One leapfrog step as drift, kick, drift, which takes a single gradient of V."""
        q = q + dt / 2 * self.K.grad(p)
        p = p - dt * self.V.grad(q)
        q = q + dt / 2 * self.K.grad(p)
        return q, p


class NHF(Flow):
    """Neural Hamiltonian Flow (Toth et al. 2020, section 4).

    Args:
        dim: columns of the data.
        hamiltonians: how many follow each other, each H = K(p) + V(q).
        steps: leapfrog steps of each of them, of learnt lengths.
        width: of the MLPs.
        kinetic: "quadratic" (Souveton et al. 2023, arXiv 2302.01955) or "mlp" (the paper).
        units: shift and scale of the data, see Flow.
    Raises: ValueError for values that are not allowed.
    """

    couplings = 6  # of f(p|q)

    def __init__(self, dim=2, hamiltonians=1, steps=6, width=64, kinetic="quadratic", **units):
        config = {
            "dim": dim, "hamiltonians": hamiltonians, "steps": steps, "width": width,
            "kinetic": kinetic,
        }  # fmt: skip
        allowed = dict.fromkeys(config, range(1, 4097))
        check_options(config, allowed | {"kinetic": ["quadratic", "mlp"]})
        super().__init__(dim, **units)
        self.config = config
        parts = [SeparableHamiltonian(dim, width, kinetic) for _ in range(hamiltonians)]
        self.H = nn.ModuleList(parts)
        # All steps together take a time of 1.6, a quarter of the period of V's quadratic part.
        dt = torch.full((hamiltonians, steps), 1.6 / hamiltonians / steps)
        self.log_dt = nn.Parameter(dt.log())
        hidden = max(width // 4, 2 * dim)
        self.encoder = RealNVP(dim, self.couplings, hidden)  # its inverse: noise -> p ~ f(p|q)
        self.context = nn.Linear(width, self.couplings * hidden)  # what the couplings see of q

    def leaps(self):
        """Every leapfrog step in order: its H and its length."""
        for H, lengths in zip(self.H, self.log_dt.exp(), strict=True):
            for dt in lengths:
                yield H, dt

    def flow(self, q, p, reverse=False):
        """Move base states (q, p), (..., dim) each, to data, or with `reverse` data to base.

        Returns: the path (2, ..., hamiltonians * steps + 1, dim), in standardised units.
        """
        leaps = list(self.leaps())
        if reverse:
            leaps = [(H, -dt) for H, dt in reversed(leaps)]
        path_q = [q]
        path_p = [p]
        for H, dt in leaps:
            q, p = H.leap(q, p, dt)
            path_q.append(q)
            path_p.append(p)
        return torch.stack((torch.stack(path_q, -2), torch.stack(path_p, -2)))

    def log_weights(self, x, noise):
        """log pi(flow^-1(q, p)) - log f(p|q) for every draw p ~ f(p|q).

        x: (B, dim). noise: N(0, I), (samples, B, dim), of which p is made.
        Returns: (samples, B) in nats, in the units of x; the mean over draws is the ELBO.
        """
        q, log_volume = self.standardise(x)
        _, hidden = self.H[-1].V.hidden(q)  # found once for each point, not for each draw
        context = self.context(hidden).chunk(self.couplings, -1)
        p, log_det = self.encoder.inverse(noise, context)
        log_f = log_normal(noise) - log_det
        q0, p0 = self.flow(q.expand_as(p), p, reverse=True)[..., -1, :]
        return log_normal(q0) + log_normal(p0) - log_f - log_volume

    def log_prob(self, x, samples=16, generator=None):
        """log p(x) by importance weighting (IWAE, Burda et al. 2016), x (..., dim) -> (...), nats.

        On average it is a lower bound, which is tighter for more samples.
        """
        log_p = []
        block = max(1, 2048 // samples)  # states that stay in the cache of a CPU
        for part in x.reshape(-1, x.shape[-1]).split(block):
            noise = self.noise(samples, *part.shape, generator=generator)
            log_mean = self.log_weights(part, noise).logsumexp(0) - math.log(samples)
            log_p.append(log_mean)
        return torch.cat(log_p).view(x.shape[:-1])

    def sample(self, n, generator=None):
        """n points (n, dim), in float64; gradients reach the weights."""
        q, p = self.noise(2, n, self.dim, generator=generator)
        path_q, _ = self.flow(q, p)
        return self.unstandardise(path_q[:, -1])


class RealNVPFlow(Flow):
    """The baseline that the paper compares with (Dinh et al. 2017), affine couplings of data.

    Its log_prob is exact. Raises: ValueError in one dimension, where nothing is coupled.
    """

    def __init__(self, dim=2, layers=8, width=128, **units):
        config = {"dim": dim, "layers": layers, "width": width}
        allowed = dict.fromkeys(config, range(1, 4097))
        check_options(config, allowed | {"dim": range(2, 4097)})
        super().__init__(dim, **units)
        self.config = config
        self.couplings = RealNVP(dim, layers, width)

    @classmethod
    def like(cls, flow, layers=8):
        """The smallest RealNVPFlow with no fewer parameters than `flow`, on the same data."""
        least = parameters(flow)
        width = 8
        while parameters(cls(flow.dim, layers, width)) < least:
            width += 1
        return cls(flow.dim, layers, width, shift=flow.shift, scale=flow.scale)

    def log_weights(self, x, noise=None):
        """The interface of NHF: one weight for each point, log p(x) itself, (1, B)."""
        x, log_volume = self.standardise(x)
        z, log_det = self.couplings(x)
        return (log_normal(z) + log_det - log_volume).unsqueeze(0)

    def log_prob(self, x, samples=1, generator=None):
        """log p(x), x (..., dim) -> (...), nats, exactly, whatever `samples` is."""
        return self.log_weights(x)[0]

    def sample(self, n, generator=None):
        """n points (n, dim), in float64; gradients reach the weights."""
        x, _ = self.couplings.inverse(self.noise(n, self.dim, generator=generator))
        return self.unstandardise(x)


def parameters(model):
    """The number of parameters."""
    return sum(weight.numel() for weight in model.parameters())


# -------------------------------------------------------------------------------------- densities

TEST_SEED = 2**40  # of all test data; training draws from seeds below it only (train.py)


@dataclass(frozen=True)
class Density:
    """A density in the plane. sample(n, generator) -> (n, 2). entropy: in nats.

    Of densities that are noise around equal points or curves also the width of the noise, and
    points (m, 2) on these curves.
    """

    sample: Callable
    entropy: float
    sigma: float | None = None
    centres: torch.Tensor | None = None


def xy(x, y):
    return torch.stack((x, y), -1)


def polar(r, angle):
    return xy(r * angle.cos(), r * angle.sin())


def noisy_curves(curve, entropy, sigma, parts=1, nodes=400):
    """Noise of width sigma around curve(k, t), points (n, 2) of part k and of t in [0, 1]."""
    nodes_t = (torch.arange(nodes) + 0.5) / nodes
    nodes_k = torch.arange(parts).repeat_interleave(nodes)
    centres = curve(nodes_k, nodes_t.repeat(parts)).double()

    def sample(n, generator=None):
        k = torch.randint(parts, (n,), generator=generator)
        t = torch.rand(n, generator=generator)
        return curve(k, t) + sigma * torch.randn(n, 2, generator=generator)

    return Density(sample, entropy, sigma, centres)


def eight_points(k, t):
    return polar(4 / 1.414, k * math.pi / 4)


def nine_points(k, t):
    return 2.0 * xy(k % 3 - 1, k // 3 - 1)


def moons(k, t):
    return polar(2, math.pi * (k + t)) + xy(2 * k - 1, k - 0.2)


def crescents(k, t):
    return polar(2.0, math.pi * (k + (2 * t - 1) / 3))


def circles(k, t):
    return polar(3.0 / (1 + k), 2 * math.pi * t)


def rings(k, t):
    return polar(0.75 * (1.0 + k), 2 * math.pi * t)


def sample_pinwheel(n, generator=None):
    x, y = torch.randn(n, 2, generator=generator).unbind(1)
    x = 0.3 * x + 1
    y = 0.1 * y
    arm = torch.randint(5, (n,), generator=generator)  # a quarter of a turn apart: two coincide
    angle = math.pi / 2 * arm + 0.25 * x.exp()
    cos = angle.cos()
    sin = angle.sin()
    return 2 * xy(cos * x - sin * y, sin * x + cos * y)


def sample_spirals(n, generator=None):
    angle = 3 * math.pi * torch.rand(n, generator=generator).sqrt()
    arm = polar(angle, math.pi - angle) + 0.5 * torch.rand(n, 2, generator=generator)
    sign = 2.0 * torch.randint(2, (n, 1), generator=generator) - 1
    return sign * arm / 3 + 0.1 * torch.randn(n, 2, generator=generator)


def sample_checkerboard(n, generator=None):
    x = 4 * torch.rand(n, generator=generator) - 2
    y = torch.rand(n, generator=generator)
    y = y - 2 * torch.randint(2, (n,), generator=generator) + x.floor() % 2
    return 2 * xy(x, y)


# After the toy densities of FFJORD (Grathwohl et al. 2019). The entropies are means of -log p,
# known to 0.002; the checkerboard's is exact.
DENSITIES = {
    "eight_gaussians": noisy_curves(eight_points, 2.833, 1 / 2.828, parts=8, nodes=1),
    "nine_gaussians": noisy_curves(nine_points, 2.627, 0.3, parts=9, nodes=1),
    "two_moons": noisy_curves(moons, 2.396, 0.2, parts=2),
    "crescents": noisy_curves(crescents, 2.020, 0.2, parts=2),
    "circles": noisy_curves(circles, 3.268, 0.24, parts=2),
    "rings": noisy_curves(rings, 2.622, 0.08, parts=4),
    "pinwheel": Density(sample_pinwheel, 2.045),
    "two_spirals": Density(sample_spirals, 2.648),
    "checkerboard": Density(sample_checkerboard, math.log(32)),
}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


class Points:
    """What a flow learns from: a density of `DENSITIES`, by its name, or points (N, D).

    `draw(n, generator)`: points to learn from, (n, dim). `held_out`: others, to test with; a tenth
    of given points, chosen by `seed`. `shift`: the mean, (dim,). `scale`: the Cholesky factor of
    the covariance, (dim, dim). `name` is for messages. Raises: ValueError.
    """

    def __init__(self, source, seed=0, name="points"):
        if isinstance(source, str):
            name = source
            self.take_density(source)
        else:
            self.take_points(source, seed, name)
        self.dim = self.rows.shape[1]
        self.shift = self.rows.mean(0)
        self.scale = covariance_factor(self.rows, name)
        kept = len(self.held_out)
        self.summary = f"{name}: {self.digest or 'fresh points'}, {kept} held out"

    def take_density(self, name):
        check_options({"density": name}, {"density": list(DENSITIES)})
        self.density = DENSITIES[name]
        self.digest = None  # of given points: tells whether they have changed
        self.draw = self.density.sample
        self.held_out = self.draw(10_000, seeded(TEST_SEED))
        self.rows = self.draw(20_000, seeded(TEST_SEED - 1)).double()

    def take_points(self, source, seed, name):
        rows = torch.as_tensor(source, dtype=torch.float64, device="cpu")
        if rows.dim() != 2 or len(rows) < 2 or rows.shape[1] == 0:
            raise ValueError(f"{name} must be points (N, D), N > 1, not {list(rows.shape)}")
        bad = (~rows.isfinite()).nonzero()
        if len(bad):
            raise ValueError(f"{name}: not finite at {bad[0].tolist()}: drop such rows")
        rows = rows[torch.randperm(len(rows), generator=seeded(seed))]
        self.density = None
        self.digest = f"points {tuple(rows.shape)}, CRC {zlib.crc32(rows.numpy()):x}"
        self.held_out, self.rows = rows.tensor_split([max(1, len(rows) // 10)])
        self.draw = self.draw_rows

    def draw_rows(self, n, generator=None):
        return self.rows[torch.randint(len(self.rows), (n,), generator=generator)]


def covariance_factor(rows, name):
    """The Cholesky factor of the covariance of rows (N, D).

    Raises: ValueError where a column is constant, or a sum of others.
    """
    dim = rows.shape[1]
    covariance = rows.mT.cov(correction=0).view(dim, dim)
    scale, failed_at = torch.linalg.cholesky_ex(covariance)
    smallest = 1e-6 * rows.std(0, correction=0) + 1e-12 * rows.abs().amax(0)  # rounding
    bad = (scale.diagonal() <= smallest).nonzero()
    if failed_at or len(bad):
        column = failed_at - 1 if failed_at else bad[0]
        raise ValueError(f"{name}: [:, {int(column)}] says nothing new: drop it, or add rows")
    return scale
