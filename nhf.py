"""Neural Hamiltonian Flow: a normalising flow made of Hamiltonian dynamics. Needs torch and hgn.py.

Toth et al., "Hamiltonian Generative Networks", ICLR 2020. A state (q, p) is drawn from a simple
density pi and moved by leapfrog steps of a learnt Hamiltonian; q is the datum. Leapfrog
preserves volume, so the dynamics need no log-determinant. The momenta, which data lack, come from a
learnt density f(p|q), so that

    log p(q) >= E_f(p|q) [ log pi(flow^-1(q, p)) - log f(p|q) ]        (their ELBO for flows)

    model = NHF(dim=2)
    loss = -model.elbo(x).mean()                    # x (B, 2)
    model.log_prob(x, samples=256)                  # (B,) in nats, a tighter bound: no_grad() saves
                                                    # much memory where no gradient is needed
    model.sample(1000)                              # (1000, 2)
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from math import inf, log, pi

import torch
import torch.nn.functional as F
from torch import nn

from hgn import PotentialMLP, RealNVP, Saved, SeparableHamiltonian, check_options

# ------------------------------------------------------------------------------------------ flows

SIZES = range(1, 4097)  # allowed numbers of dimensions, Hamiltonians, steps, layers and units


def log_normal(x):
    """log N(x; 0, I): x (..., dim) -> (...)."""
    return -0.5 * (x.square() + log(2 * pi)).sum(-1)


class Flow(Saved):
    """What NHF and RealNVPFlow share: the user's units.

    Inside, coordinates are tail asinh(scale^-1 (x - shift) / tail): about linear near zero, and
    logarithmic far out, as the base density of far points would else be almost zero. Densities
    account for this change.
    Data are tensors, arrays or lists. They are standardised in float64, and densities and samples
    are float64; the networks keep the precision of their weights. Moving a flow to a GPU is safe;
    `.float()` is not, as it rounds shift and scale too.
    shift: a number or (dim,). scale: a number above 0 or a lower triangular matrix (dim, dim).
    Raises: ValueError for other values.
    """

    tail = 3.0

    def __init__(self, config, shift=0.0, scale=1.0):
        super().__init__()
        check_options(config, self.allowed)
        self.config = config
        dim = config["dim"]
        shift = torch.as_tensor(shift, dtype=torch.float64, device="cpu")
        scale = torch.as_tensor(scale, dtype=torch.float64, device="cpu")
        if scale.dim() == 0:
            scale = scale.expand(dim).diag()
        if shift.shape not in ((), (dim,)) or scale.shape != (dim, dim):
            raise ValueError(f"shift must be a number or ({dim},), scale one or ({dim}, {dim})")
        # A logarithm is finite only of a number above 0.
        numbers = shift + scale.diagonal().log() + scale
        if not numbers.isfinite().all() or scale.triu(1).any():
            raise ValueError("shift must be finite, scale above 0 or a lower triangular matrix")
        self.shift = nn.Buffer(shift.expand(dim).clone())
        self.scale = nn.Buffer(scale.clone())
        self.dim = dim

    def as_points(self, x):
        """Data (..., dim) as a float64 tensor, as they may be far from zero.

        Raises: ValueError for data of another dimension.
        """
        x = torch.as_tensor(x, dtype=torch.float64, device=self.shift.device)
        if x.shape[-1:] != (self.dim,):
            raise ValueError(f"points must be (..., {self.dim}), not {list(x.shape)}")
        return x

    def standardise(self, x):
        """Data x (..., dim) -> standardised q (..., dim), and log |det dx/dq| (...)."""
        x = (self.as_points(x) - self.shift) @ self.scale.double().inverse().mT
        x = x / self.tail
        log_volume = self.scale.diagonal().log().sum() + x.square().log1p().sum(-1) / 2
        q = self.tail * x.asinh()
        return q.to(next(self.parameters()).dtype), log_volume

    def unstandardise(self, q):
        """Standardised data (..., dim) -> data, in float64."""
        x = self.tail * (q.double() / self.tail).sinh()
        return x @ self.scale.double().mT + self.shift

    def noise(self, *shape, generator=None):
        """N(0, I) in the model's precision and on its device, drawn on the CPU."""
        return torch.randn(shape, generator=generator).to(next(self.parameters()))

    def elbo(self, x, generator=None):
        """The evidence lower bound of log p(x), by one draw of p, x (..., dim) -> (...), nats."""
        return self.log_prob(x, 1, generator)


class SoftUniform(nn.Module):
    """The soft-uniform density of the paper, here of q alone.

    Each coordinate is U(-h, h) plus logistic noise of scale s. h and s are learnt: with a small s
    the density is a box, which suits data with edges. At first its KL divergence from N(0, 1) is
    0.002 nats a coordinate.
    """

    # s is never smaller, as a point beside the box could else cost any number of nats. Where the
    # parameter is below it, it has no gradient and stays there.
    least_s = 0.01
    least_u = 1e-6  # torch.rand may be 0, whose logit is infinite

    def __init__(self):
        super().__init__()
        h = (3 / 2) ** 0.5  # half of the variance is that of the uniform part, h^2 / 3
        s = h / pi  # and half that of the noise, (pi s)^2 / 3
        self.log_sizes = nn.Parameter(torch.tensor([h, s]).log())

    def sizes(self):
        """h and s."""
        h, s = self.log_sizes.exp()
        return h, s.clamp(min=self.least_s)

    def log_prob(self, q):
        """q (..., dim) -> log pi(q), (...).

        In one coordinate pi(q) = (sigmoid((q + h) / s) - sigmoid((q - h) / s)) / (2 h). This equals
        sigmoid((h + q) / s) sigmoid((h - q) / s) / norm with norm = 2 h / (1 - exp(-2 h / s)).
        """
        h, s = self.sizes()
        log_norm = (2 * h).log() - (-torch.expm1(-2 * h / s)).log()
        edges = F.logsigmoid((h + q) / s) + F.logsigmoid((h - q) / s)
        return (edges - log_norm).sum(-1)

    def sample(self, *shape, generator=None):
        """q of this shape, made of uniform numbers that are drawn on the CPU."""
        h, s = self.sizes()
        u, v = torch.rand(2, *shape, generator=generator).to(self.log_sizes)
        return h * (2 * u - 1) + s * v.logit(self.least_u)


class Quadratic(nn.Module):
    """K(p) = |p L|^2 / 2 with a learnt matrix L, which stands for any constant masses."""

    def __init__(self, dim):
        super().__init__()
        # The masses start heavy, so that the random p moves q little in the last drift: such random
        # moves would blur the edges of the density.
        self.L = nn.Parameter(0.15 * torch.eye(dim))

    def forward(self, p):
        """p (..., dim) -> K (...)."""
        return 0.5 * (p @ self.L).square().sum(-1)

    def grad(self, p):
        """dK/dp, (..., dim)."""
        return p @ self.L @ self.L.mT


class FlowHamiltonian(SeparableHamiltonian):
    """H(q, p) = K(p) + V(q), where V is a `PotentialMLP`, and K too if kinetic="mlp".

    `kinetic` is K of p and `potential` is V of standardised q, (..., dim) -> (...). V is in units
    of K, not in nats: a difference of V is what K changes by along a path, but only roughly, as
    leapfrog steps are long. V / T would be nats only if the density were exp(-H / T), which
    training does not ask for.
    """

    def __init__(self, dim, width, kinetic="quadratic"):
        super().__init__()
        self.kinetic = Quadratic(dim) if kinetic == "quadratic" else PotentialMLP(dim, width)
        self.potential = PotentialMLP(dim, width)
        # The slopes of the first units are one to four times the usual, as densities have edges;
        # their biases grow with them, which spreads these edges over the plane.
        steepness = torch.logspace(0, 2, width, base=2)
        self.potential.first.weight.data *= steepness.unsqueeze(1)
        self.potential.first.bias.data *= 1.5 * steepness

    def leap(self, q, p, dt):
        """One leapfrog step of length dt as drift, kick, drift: it needs one gradient of V only."""
        q = q + dt / 2 * self.kinetic.grad(p)
        p = p - dt * self.potential.grad(q)
        q = q + dt / 2 * self.kinetic.grad(p)
        return q, p


class NHF(Flow):
    """Neural Hamiltonian Flow (Toth et al. 2020).

    Args:
        dim: columns of the data.
        hamiltonians: how many follow each other, each H = K(p) + V(q).
        steps: leapfrog steps of each of them, of learnt lengths.
        width: of the MLPs.
        kinetic: "quadratic" (Souveton et al. 2023, arXiv 2302.01955) or "mlp" (a general
            K, as in the paper; its MLP is of tanh and has a quadratic term).
        units: shift and scale of the data, see Flow.
    Raises: ValueError for values that are not allowed.
    """

    allowed = {
        "dim": SIZES, "hamiltonians": SIZES, "steps": SIZES, "width": SIZES,
        "kinetic": ("quadratic", "mlp"),
    }  # fmt: skip
    couplings = 6  # of f(p|q)

    def __init__(self, dim=2, hamiltonians=1, steps=2, width=96, kinetic="quadratic", **units):
        config = {
            "dim": dim, "hamiltonians": hamiltonians, "steps": steps, "width": width,
            "kinetic": kinetic,
        }  # fmt: skip
        super().__init__(config, **units)
        self.base = SoftUniform()
        self.H = nn.ModuleList(FlowHamiltonian(dim, width, kinetic) for _ in range(hamiltonians))
        # At first all steps together turn a state by half a radian about the middle of V, if K is
        # quadratic.
        dt = torch.full((hamiltonians, steps), 3.2 / hamiltonians / steps)
        self.log_dt = nn.Parameter(dt.log())
        hidden = max(width // 4, 2 * dim)
        self.encoder = RealNVP(dim, self.couplings, hidden)  # its `forward` takes noise to p
        self.context = nn.Linear(width, self.couplings * hidden)  # what the couplings see of q

    def base_states(self, n, generator=None):
        """n draws of q and p from the base density, (n, dim) each."""
        q = self.base.sample(n, self.dim, generator=generator)
        return q, self.noise(n, self.dim, generator=generator)

    def flow(self, q, p, reverse=False):
        """Move base states (q, p), (..., dim) each, to data, or with `reverse` data to base.

        Returns: the path (2, ..., hamiltonians * steps + 1, dim), in standardised units, from the
        given states on.
        """
        lengths = zip(self.H, self.log_dt.exp(), strict=True)
        leaps = [(H, dt) for H, dts in lengths for dt in dts]
        if reverse:
            leaps = [(H, -dt) for H, dt in reversed(leaps)]
        path = [torch.stack((q, p))]
        for H, dt in leaps:
            q, p = H.leap(q, p, dt)
            path.append(torch.stack((q, p)))
        return torch.stack(path, -2)

    def log_weights(self, x, noise):
        """log pi(flow^-1(q, p)) - log f(p|q) - log |det dx/dq| for every draw p ~ f(p|q).

        x: (B, dim). noise: N(0, I), (samples, B, dim), of which p is made.
        Returns: (samples, B) in nats, in the units of x; the mean over draws is the ELBO.
        """
        q, log_volume = self.standardise(x)
        _, hidden = self.H[-1].potential.hidden(q)  # found once for each point, not for each draw
        context = self.context(hidden).chunk(self.couplings, -1)
        p, log_det = self.encoder(noise, context)
        log_f = log_normal(noise) - log_det
        q0, p0 = self.flow(q.expand_as(p), p, reverse=True)[..., -1, :]
        return self.base.log_prob(q0) + log_normal(p0) - log_f - log_volume

    def log_prob(self, x, samples=16, generator=None):
        """log p(x) by importance weighting (IWAE, Burda et al. 2016), x (..., dim) -> (...), nats.

        On average it is a lower bound; more samples make it tighter and less noisy.
        """
        x = self.as_points(x)
        log_p = []
        block = max(1, 2048 // samples)  # points whose states fit into the cache of a CPU
        for part in x.reshape(-1, self.dim).split(block):
            noise = self.noise(samples, *part.shape, generator=generator)
            log_p.append(self.log_weights(part, noise).logsumexp(0) - log(samples))
        return torch.cat(log_p).view(x.shape[:-1])

    @torch.no_grad()
    def sample(self, n, generator=None):
        """n points (n, dim), in float64, without gradients: for these see `flow`."""
        path_q, _ = self.flow(*self.base_states(n, generator))
        return self.unstandardise(path_q[:, -1])


class RealNVPFlow(Flow):
    """The baseline that the paper compares with (Dinh et al. 2017), affine couplings of data.

    With the default width it has about as many parameters as NHF, in the plane. Its log_prob is
    exact.
    Raises: ValueError in one dimension, where nothing is coupled.
    """

    allowed = {"dim": SIZES[1:], "layers": SIZES, "width": SIZES}

    def __init__(self, dim=2, layers=8, width=56, **units):
        super().__init__({"dim": dim, "layers": layers, "width": width}, **units)
        self.couplings = RealNVP(dim, layers, width)

    def log_prob(self, x, samples=1, generator=None):
        """log p(x), x (..., dim) -> (...), in nats: exactly, whatever `samples` is."""
        x, log_volume = self.standardise(x)
        noise, log_det = self.couplings(x)
        return log_normal(noise) + log_det - log_volume

    def log_weights(self, x, noise):
        """The interface of NHF: one weight for each point, log p(x) itself, (1, B)."""
        return self.log_prob(x).unsqueeze(0)

    @torch.no_grad()
    def sample(self, n, generator=None):
        """n points (n, dim), in float64, without gradients: see `couplings.inverse`."""
        x = self.couplings.inverse(self.noise(n, self.dim, generator=generator))
        return self.unstandardise(x)


# -------------------------------------------------------------------------------------- densities

# The seed of all test data. Training draws from seeds below it only (train.py). It must be below
# 2^32, as torch's generator of the CPU uses 32 bits of a seed.
TEST_SEED = 4095 << 20


@dataclass(frozen=True)
class Density:
    """A density in the plane.

    Attributes:
        sample: a function of n and a generator that returns points (n, 2).
        entropy: in nats.
    """

    sample: Callable
    entropy: float


def xy(x, y):
    return torch.stack((x, y), -1)


def polar(r, angle):
    return xy(r * angle.cos(), r * angle.sin())


def noisy_arcs(arcs, entropy, sigma):
    """Noise of width sigma around arcs of circles, all of them equally likely.

    arcs: a row (x, y, radius, middle, k) for each arc, the centre and the radius of its circle, the
    direction of its middle in half turns, and the part 1/k of the circle that it is; k is inf for a
    point.
    """
    arcs = torch.tensor(arcs)

    def sample(n, generator=None):
        arc = torch.randint(len(arcs), (n,), generator=generator)
        x, y, radius, middle, k = arcs[arc].unbind(1)  # (n,) each
        t = torch.rand(n, generator=generator)
        noise = torch.randn(n, 2, generator=generator)
        angle = pi * (middle + (2 * t - 1) / k)
        return xy(x, y) + polar(radius, angle) + sigma * noise

    return Density(sample, entropy)


def sample_pinwheel(n, generator=None):
    x, y = torch.randn(n, 2, generator=generator).unbind(1)
    radius = 0.3 * x + 1
    arm = torch.randint(5, (n,), generator=generator)  # a quarter of a turn apart: two coincide
    angle = pi / 2 * arm + 0.25 * radius.exp()
    along = polar(radius, angle)
    across = polar(0.1 * y, angle + pi / 2)
    return 2 * (along + across)


def sample_spirals(n, generator=None):
    angle = 3 * pi * torch.rand(n, generator=generator).sqrt()
    width = 0.5 * torch.rand(n, 2, generator=generator)
    arm = polar(angle, pi - angle) + width
    sign = 2.0 * torch.randint(2, (n, 1), generator=generator) - 1
    noise = 0.1 * torch.randn(n, 2, generator=generator)
    return sign * arm / 3 + noise


def sample_checkerboard(n, generator=None):
    x = 4 * torch.rand(n, generator=generator) - 2
    y = torch.rand(n, generator=generator)
    y = y - 2 * torch.randint(2, (n,), generator=generator) + x.floor() % 2
    return 2 * xy(x, y)


# After the toy densities of FFJORD (Grathwohl et al. 2019). The entropies are right to within
# 0.001: those of arcs are integrals over a grid, those of pinwheel and two_spirals are of
# histograms of 4e7 points, extrapolated to cells of no size; that of the checkerboard is exact.
DENSITIES = {
    "eight_gaussians": noisy_arcs(
        [(0, 0, 4 / 1.414, k / 4, inf) for k in range(8)], 2.832, 1 / 2.828
    ),
    "nine_gaussians": noisy_arcs(
        [(x, y, 0, 0, inf) for y in (-2, 0, 2) for x in (-2, 0, 2)], 2.624, 0.3
    ),
    "two_moons": noisy_arcs([(-1, -0.2, 2, 0.5, 2), (1, 0.8, 2, 1.5, 2)], 2.394, 0.2),
    "crescents": noisy_arcs([(0, 0, 2, 0, 3), (0, 0, 2, 1, 3)], 2.019, 0.2),
    "circles": noisy_arcs([(0, 0, 3, 1, 1), (0, 0, 1.5, 1, 1)], 3.268, 0.24),
    "rings": noisy_arcs([(0, 0, r, 1, 1) for r in (0.75, 1.5, 2.25, 3)], 2.623, 0.08),
    "pinwheel": Density(sample_pinwheel, 2.043),
    "two_spirals": Density(sample_spirals, 2.645),
    "checkerboard": Density(sample_checkerboard, log(32)),
}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


class Points:
    """What a flow learns from: a density of `DENSITIES`, given by its name, or points (N, D).

    Attributes:
        held_out: points to test with, which `draw` never returns; of given points a tenth, chosen
            by `seed`.
        rows: the given points without those held out, or a sample of the density, float64.
        shift: their mean, (dim,). scale: the Cholesky factor of their covariance, (dim, dim). Far
            rows count as nearer here, see `robust_units`.
        digest: of given points, a text that differs where they or `seed` differ; else None.
        summary: a line about all this, in which given points are called `name`.
    Raises: ValueError for points that no flow can learn from.
    """

    def __init__(self, source, seed=0, name="points"):
        self.density = None
        self.digest = None
        if isinstance(source, str):
            check_options({"density": source}, {"density": list(DENSITIES)})
            name = source
            self.density = DENSITIES[source]
            self.held_out = self.draw(10_000, seeded(TEST_SEED))
            self.rows = self.draw(20_000, seeded(TEST_SEED - 1)).double()
        else:
            rows = valid_points(source, name)
            rows = rows[torch.randperm(len(rows), generator=seeded(seed))]
            checksum = zlib.crc32(rows.numpy())
            self.digest = f"points {tuple(rows.shape)}, CRC {checksum:x}"
            self.held_out, self.rows = rows.tensor_split([max(1, len(rows) // 10)])
        self.dim = self.rows.shape[1]
        self.shift, self.scale, far = robust_units(self.rows, name)
        self.summary = f"{name}: {self.digest or 'fresh points'}, {len(self.held_out)} held out"
        if far:
            self.summary += f"; {far} of the rows lie far from the rest, and do not set the scale"
        distinct = min(len(column.unique()) for column in self.rows.T)
        if distinct < len(self.rows) / 2:
            self.summary += f"; a column has only {distinct} values, no density: add noise"

    def draw(self, n, generator=None):
        """n points to learn from, (n, dim): fresh ones of a density, else some of the rows."""
        if self.density:
            return self.density.sample(n, generator)
        return self.rows[torch.randint(len(self.rows), (n,), generator=generator)]


def valid_points(source, name):
    """The points (N, D) in float64.

    Raises: ValueError for other shapes, NaN and infinity.
    """
    points = torch.as_tensor(source, dtype=torch.float64, device="cpu")
    # A tenth of fewer than 20 points is a single one, which has no standard error.
    if points.dim() != 2 or points[19:].numel() == 0:
        raise ValueError(f"{name} must be points (N, D), N at least 20, not {list(points.shape)}")
    bad = (~points.isfinite()).nonzero()
    if len(bad):
        raise ValueError(f"{name}: not finite at {bad[0].tolist()}: drop such rows")
    return points


FAR = 4  # times the distance from the median that nine of ten rows keep, in each column


def robust_units(rows, name):
    """The mean (D,) of rows (N, D), the Cholesky factor (D, D) of their covariance, and how many
    rows have a coordinate beyond `FAR`.

    Such coordinates are moved to that distance, so that a single row cannot set the scale of all
    others. Gaussian rows have none.
    Raises: ValueError where a column is a constant or a sum of others.
    """
    median = rows.median(0).values
    away = (rows - median).abs()
    nine_of_ten = len(rows) - len(rows) // 10
    largest = FAR * away.kthvalue(nine_of_ten, 0).values
    far = (away > largest).any(1).sum().item()
    near = rows.clamp(median - largest, median + largest)
    mean = near.mean(0)
    centred = (near - mean) / len(rows) ** 0.5
    _, R = torch.linalg.qr(centred, mode="r")  # centred^T centred = R^T R
    new = R.diagonal()  # what each column adds to those before it, which must exceed rounding
    rounding = 1e-6 * centred.norm(dim=0) + 1e-12 * near.abs().amax(0)
    bad = (new.abs() <= rounding[: len(new)]).nonzero()
    if len(bad):
        raise ValueError(
            f"{name}: column {bad[0].item()} is a constant or a sum of others, but for rows very "
            "far out: drop it, or add rows"
        )
    scale = R.mT * new.sign()
    return mean, scale, far
