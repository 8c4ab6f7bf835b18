"""Hamiltonian Generative Networks in one file that needs only torch.

Toth, Rezende, Jaegle, Racaniere, Botev, Higgins: "Hamiltonian Generative Networks", ICLR 2020
(arXiv 1909.13789). An encoder infers an abstract state (q, p) from the first frames, a learnt
scalar H rolls it out with leapfrog, and a decoder paints every frame from q alone:

    model = HGN()                                   # 32x32 RGB, sees 5 frames
    loss, mse, kl = model.loss(frames)              # frames (B, T, 3, 32, 32) in [0, 1]
    q, p = model.infer(frames)                      # state at frame 0
    q, p = model.rollout(q, p, steps=90)            # (B, 91, latent); dt=-model.dt runs backward
    movie = model.decode(q)                         # (B, 91, 3, 32, 32)

In order: integrators, Hamiltonians, priors, the paper's networks, the compact ones, HGN, GECO, HNN.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

# ------------------------------------------------------------------ integrators (section 2.1)


once = torch.compiler.nested_compile_region  # torch.compile translates it once, not every step


@once
def leapfrog_step(H, q, p, here, h):
    half = p
    for _ in range(1 + H.rounds):
        half = p - h / 2 * H.kick(here, half)
    drift = H.drift(here, half)
    new = q + h * drift
    for _ in range(H.rounds):
        new = q + h / 2 * (drift + H.dp(new, half))
    here = H.at(new)
    return new, half - h / 2 * H.kick(here, half), here


def leapfrog(H, q, p, dt, steps, substeps=1):
    """Roll (q, p) out under dq/dt = dH/dp, dp/dt = -dH/dq by leapfrog, in its form for every H.

        p_{n+1/2} = p_n       - dt/2  dH/dq(q_n, p_{n+1/2})
        q_{n+1}   = q_n       + dt/2 (dH/dp(q_n, p_{n+1/2}) + dH/dp(q_{n+1}, p_{n+1/2}))
        p_{n+1}   = p_{n+1/2} - dt/2  dH/dq(q_{n+1}, p_{n+1/2})

    It is of order 2, symplectic and reversible (Stoermer-Verlet; Hairer, Lubich & Wanner, Geometric
    Numerical Integration, VI.3). The first two lines are implicit and take `H.rounds` fixed-point
    iterations. A separable H needs none: kick, drift, kick, one gradient of V and one of K a step.

    Args: H: a Hamiltonian. q, p: (B, ...). dt: time between the returned states, a number or a
    tensor that broadcasts with q; negative runs backward. substeps: leapfrog steps from one
    returned state to the next. Returns: q, p of shape (B, steps + 1, ...), the start included.
    """
    q, p = q.clone(), p.clone()  # a compiled step takes no two halves of one tensor
    return roll(leapfrog_step, H, (q, p, H.at(q)), dt / substeps, steps, substeps)


@once
def explicit_step(H, q, p, h):
    p = p - h / 2 * H.dq(q, p)
    q = q + h * H.dp(q, p)
    return q, p - h / 2 * H.dq(q, p)


def explicit_leapfrog(H, q, p, dt, steps, substeps=1):
    """The paper's leapfrog, explicit whatever H is: where H is not separable, as the paper's is
    not, of order 1 and neither symplectic nor reversible. Arguments as for `leapfrog`."""
    return roll(explicit_step, H, (q.clone(), p.clone()), dt / substeps, steps, substeps)


@once
def euler_step(H, q, p, h):
    return q + h * H.dp(q, p), p - h * H.dq(q, p)


def euler(H, q, p, dt, steps, substeps=1):
    """Explicit Euler, the paper's ablation: order 1, not symplectic. Arguments as for
    `leapfrog`."""
    return roll(euler_step, H, (q.clone(), p.clone()), dt / substeps, steps, substeps)


def roll(step, H, state, h, steps, substeps):
    """The start of `state`, q and p, and what follows `substeps` times step(H, *state, h) each."""
    states = [state]
    for _ in range(steps):
        for _ in range(substeps):
            state = step(H, *state, h)
        states.append(state)
    return tuple(torch.stack([state[i] for state in states], 1) for i in range(2))


INTEGRATORS = {"leapfrog": leapfrog, "explicit_leapfrog": explicit_leapfrog, "euler": euler}


# ------------------------------------------------------------------ Hamiltonians


class Hamiltonian(nn.Module):
    """Any H(q, p): a subclass gives `forward`, (B, ...) twice -> (B,). What integrators need of it
    follows by autograd; those below write it out, since rollouts spend their time there."""

    rounds = 8  # fixed-point iterations of `leapfrog`; each gains a factor of order dt

    def dq(self, q, p):
        """dH/dq, of q's shape."""
        return torch.func.grad(lambda x: self(x, p).sum())(q)

    def dp(self, q, p):
        """dH/dp, of p's shape."""
        return torch.func.grad(lambda x: self(q, x).sum())(p)

    def at(self, q):
        """What `kick` and `drift` need to know of q, computed once a step: a tuple of tensors."""
        return (q,)

    def kick(self, here, p):
        """dH/dq at the q of here = at(q)."""
        return self.dq(*here, p)

    def drift(self, here, p):
        """dH/dp there."""
        return self.dp(*here, p)


def embed(q):
    """Angles as points on the unit circle: (..., dim) -> (..., 2 dim)."""
    return torch.cat((q.sin(), q.cos()), -1)


def of_angles(g, x):
    """A gradient with respect to x = embed(q), (..., 2 dim), as that with respect to q, (...,
    dim)."""
    (sin, cos), (g_sin, g_cos) = x.chunk(2, -1), g.chunk(2, -1)
    return g_sin * cos - g_cos * sin


class Quadratic(nn.Module):
    """K(p) = |p L|^2 / 2 with a learnt matrix L: any constant masses."""

    def __init__(self, dim):
        super().__init__()
        self.L = nn.Parameter(torch.eye(dim))

    def forward(self, p):  # (..., dim) -> (...)
        return 0.5 * (p @ self.L).square().sum(-1)

    def grad(self, p):  # (..., dim) -> (..., dim)
        return F.linear(p @ self.L, self.L)  # L.T would be an alias, which a compiled step refuses


class Energy(nn.Module):
    """A learnt scalar of a vector, V(q) or K(p): |x L|^2 / 2 + MLP(x); of angles, of `embed(q)`.
    The first term makes latents oscillate from the first training step; the second is bounded."""

    def __init__(self, dim, width, periodic=False):
        super().__init__()
        self.periodic, dim = periodic, dim * (1 + periodic)
        self.L = nn.Parameter(torch.eye(dim))
        self.first, self.second = nn.Linear(dim, width), nn.Linear(width, width)
        for layer in (self.first, self.second):  # torch's default is almost linear near the states
            nn.init.normal_(layer.weight, std=1.5 / layer.in_features**0.5)
            nn.init.uniform_(layer.bias, -1, 1)
        self.last = nn.Parameter(torch.randn(width) * 0.1 / width**0.5)

    def forward(self, x):  # (..., dim) -> (...)
        x = embed(x) if self.periodic else x
        h = torch.tanh(self.second(torch.tanh(self.first(x))))
        return 0.5 * (x @ self.L).square().sum(-1) + h @ self.last

    def grad(self, x):  # (..., dim) -> (..., dim)
        x = embed(x) if self.periodic else x
        a = torch.tanh(self.first(x))
        b = torch.tanh(self.second(a))
        g = (self.last * (1 - b * b)) @ self.second.weight * (1 - a * a)
        g = F.linear(x @ self.L, self.L) + g @ self.first.weight
        return of_angles(g, x) if self.periodic else g


class Separable(Hamiltonian):
    """H(q, p) = K(p) + V(q). kinetic: "quadratic" or "mlp"."""

    rounds = 0

    def __init__(self, dim, width, periodic=False, kinetic="quadratic"):
        super().__init__()
        self.K = Quadratic(dim) if kinetic == "quadratic" else Energy(dim, width)
        self.V = Energy(dim, width, periodic)

    def forward(self, q, p):
        return self.K(p) + self.V(q)

    def dq(self, q, p):
        return self.V.grad(q)

    def dp(self, q, p):
        return self.K.grad(p)

    def at(self, q):
        return (self.V.grad(q),)

    def kick(self, here, p):
        return here[0]


FAR = 50.0  # beyond it forces grow no further and q looks the same: what goes astray stays finite


class Natural(Hamiltonian):
    """H(q, p) = p^T M(q)^-1 p / 2 + V(q), the form of every mechanical system in every coordinates:
    for Q = f(q), M' = J^-T M J^-1, so a chart may bend. M^-1 = L L^T + a little, with L a constant
    and a small network of q that starts at zero."""

    rounds, least = 2, 0.3  # least eigenvalue of M^-1, with which energy bounds p

    def __init__(self, dim, width, periodic=False, bend=64):
        super().__init__()
        self.V, self.periodic, self.dim = Energy(dim, width, periodic), periodic, dim
        self.first, self.second = nn.Linear(dim * (1 + periodic), bend), nn.Linear(bend, dim * dim)
        nn.init.zeros_(self.second.weight)
        self.second.bias.data.copy_(torch.eye(dim).flatten())

    def train(self, mode=True):
        self.rounds = 2 if mode else 6  # cheap while it learns, afterwards to rounding errors
        return super().train(mode)

    def factor(self, q):
        """L (B, dim, dim), and the hidden layer and the input that it comes from."""
        x = embed(q) if self.periodic else q.clamp(-FAR, FAR)
        h = torch.tanh(self.first(x))
        return self.second(h).unflatten(1, (self.dim, self.dim)), h, x

    def forward(self, q, p):  # (B, dim) twice -> (B,)
        return 0.5 * (p * self.dp(q, p)).sum(1) + self.V(q)

    def dp(self, q, p):
        return self.velocity(self.factor(q)[0], p)

    def velocity(self, L, p):
        """M^-1 p, (B, dim)."""
        p = p.unsqueeze(2)
        return torch.baddbmm(p, L, L.transpose(1, 2) @ p, beta=self.least).squeeze(2)

    def at(self, q):
        L, h, x = self.factor(q)
        slope = ((1 - h * h).unsqueeze(1) * self.second.weight) @ self.first.weight  # dL/dx
        slope = of_angles(slope, x.unsqueeze(1)) if self.periodic else slope
        force = self.V.grad(q if self.periodic else x).unsqueeze(1)
        return force, L, slope  # (B, 1, dim), (B, dim, dim), (B, dim^2, dim)

    def kick(self, here, p):
        force, L, slope = here
        p = p.clamp(-FAR, FAR)
        outer = p.unsqueeze(2) * (p.unsqueeze(1) @ L)
        return torch.baddbmm(force, outer.flatten(1).unsqueeze(1), slope).squeeze(1)

    def drift(self, here, p):
        return self.velocity(here[1], p)

    def dq(self, q, p):
        return self.kick(self.at(q), p)

    def of_velocity(self, z):
        """z = (q, dq/dt), (B, 2 dim) -> q and p = M(q) dq/dt (the Legendre transform)."""
        q, v = z.chunk(2, 1)
        L, one = self.factor(q)[0], torch.eye(self.dim, dtype=z.dtype, device=z.device)
        p = torch.linalg.solve_ex(L @ L.mT + self.least * one, v.unsqueeze(2)).result
        return q, p.squeeze(2)


# ------------------------------------------------------------------ priors p(z)


def chain(layer, activation, sizes):
    """layer(sizes[0], sizes[1]), activation(), layer(sizes[1], sizes[2]), ... and last a layer."""
    pairs = zip(sizes, sizes[1:])
    layers = [m for a, b in pairs for m in (layer(a, b), activation())]
    return nn.Sequential(*layers[:-1])


class StandardNormal(nn.Module):
    """The paper's prior, N(0, I) over z of shape (B, *shape)."""

    def __init__(self, *shape):
        super().__init__()
        self.shape = shape

    def kl(self, z, mean, logvar):
        """KL(q(z|x) || p(z)) of each clip, nats, (B,): in closed form."""
        return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)

    def forward(self, u):
        """N(0, I) noise (B, *shape) -> z."""
        return u


class Couplings(nn.Module):
    """A learnt prior over z (B, dim): N(0, I) through an invertible map, affine couplings with
    alternating masks (Dinh et al. 2017, "RealNVP")."""

    def __init__(self, dim, layers=8, width=64):
        super().__init__()
        self.shape, sizes = (dim,), (dim, width, width, 2 * dim)
        self.register_buffer("masks", (torch.arange(dim) + torch.arange(layers)[:, None]) % 2.0)
        self.nets = nn.ModuleList(chain(nn.Linear, nn.ReLU, sizes) for _ in range(layers))

    def coupling(self, net, mask, x):
        log_s, t = (net(mask * x) * (1 - mask).repeat(2)).chunk(2, -1)
        return 2 * torch.tanh(log_s / 2), t

    def forward(self, u):  # (B, dim) -> (B, dim)
        for net, mask in list(zip(self.nets, self.masks))[::-1]:
            log_s, t = self.coupling(net, mask, u)
            u = (u - t) * (-log_s).exp()
        return u

    def inverse(self, z):
        """The u that `forward` takes to z, and log |det du/dz|, (B,)."""
        log_det = 0
        for net, mask in zip(self.nets, self.masks):
            log_s, t = self.coupling(net, mask, z)
            z, log_det = z * log_s.exp() + t, log_det + log_s.sum(-1)
        return z, log_det

    def kl(self, z, mean, logvar):
        """log q(z|x) - log p(z) at a sample z of q(z|x), (B,): its mean is the KL."""
        u, log_det = self.inverse(z)
        off = (z - mean).square() * (-logvar).exp()
        return 0.5 * (u.square() - off - logvar).sum(1) - log_det


# ------------------------------------------------------------------ the paper's networks (appendix)


def he_(*modules):
    """He initialisation: with torch's own, HGN paints the mean image for over 1,000 steps."""
    for layer in (layer for module in modules for layer in module.modules()):
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)


def convs(*sizes, stride=1):
    return chain(lambda a, b: nn.Conv2d(a, b, 3, stride, 1), nn.LeakyReLU, sizes)


class PaperEncoder(nn.Module):
    """Frames, less the still picture, stacked along channels -> eight convolutions -> q(z|x) over
    48 maps. Without f_psi, whose convolutions are then its last, z is the state."""

    lead = 0  # z stands for the state at frame 0

    def __init__(self, size, channels, context, maps, f_psi):
        super().__init__()
        self.register_buffer("still", torch.zeros(channels, size, size))
        self.convs = convs(channels * context, 32, *(64,) * 6, 96 if f_psi else 48)
        if not f_psi:
            tail = convs(48, 64, 64, 4 * maps, stride=2)
            self.convs = nn.Sequential(*self.convs, nn.LeakyReLU(), *tail, nn.Flatten())
        he_(self)
        last = [layer for layer in self.convs if isinstance(layer, nn.Conv2d)][-1]
        last.weight.data.chunk(2)[1].mul_(0.01)  # variance exp(-8) at first: with that of the prior
        last.bias.data.chunk(2)[1].fill_(-8)  # the decoder would see nothing but noise

    def fit(self, frames):
        self.still.copy_(frames.median(0).values)

    def forward(self, frames):  # (B, context, C, H, W) -> (B, 48, H, W) twice
        return self.convs(4 * (frames - self.still).flatten(1, 2)).chunk(2, 1)


class PaperPsi(nn.Module):
    """f_psi: z -> the initial state, q and p of `maps` maps of an eighth of the size, here as
    vectors."""

    def __init__(self, maps):
        super().__init__()
        self.convs = convs(48, 64, 64, 2 * maps, stride=2)
        he_(self)

    def forward(self, z):  # (B, 48, H, W) -> (B, dim) twice
        return self.convs(z).flatten(1).chunk(2, 1)


def no_psi(z):
    """The paper's ablation of f_psi: z (B, 2 dim) is the state."""
    return z.chunk(2, 1)


class PaperHamiltonian(Hamiltonian):
    """H(q, p): six 3x3 convolutions on the stacked maps of q and p, summed over space; not
    separable. Softplus, as the second derivative of a ReLU is zero and such an H never learns."""

    def __init__(self, maps, side, width=64):
        super().__init__()
        sizes = (2 * maps,) + (width,) * 5 + (1,)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, 1, 1) for a, b in zip(sizes, sizes[1:]))
        self.shape = (2 * maps, side, side)

    def forward(self, q, p):  # (B, dim) twice -> (B,)
        x = torch.cat((q, p), 1).unflatten(1, self.shape)
        for conv in self.convs[:-1]:
            x = F.softplus(conv(x))
        return self.convs[-1](x).sum((1, 2, 3))

    def grad(self, q, p, half):
        """dH/dq (half 0) or dH/dp (half 1), written out."""
        x, slopes = torch.cat((q, p), 1).unflatten(1, self.shape), []
        for conv in self.convs[:-1]:
            x = conv(x)
            slopes.append(x.sigmoid())  # of the softplus
            x = F.softplus(x)
        g = torch.ones_like(x[:, :1])
        for conv, slope in zip(self.convs[:0:-1], slopes[::-1]):
            g = F.conv_transpose2d(g, conv.weight, padding=1) * slope
        weight = self.convs[0].weight.chunk(2, 1)[half]
        return F.conv_transpose2d(g, weight, padding=1).flatten(1)

    def dq(self, q, p):
        return self.grad(q, p, 0)

    def dp(self, q, p):
        return self.grad(q, p, 1)


class ResidualUp(nn.Module):
    """Nearest x2 upsampling, then two 3x3 convolutions with a skip."""

    def __init__(self, channels, width):
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, 1, 1)
        self.second = nn.Conv2d(width, width, 3, 1, 1)
        self.skip = nn.Conv2d(channels, width, 1) if channels != width else nn.Identity()

    def forward(self, x):
        x = F.interpolate(x, scale_factor=2)
        return F.leaky_relu(self.skip(x) + self.second(F.leaky_relu(self.first(x))))


class PaperDecoder(nn.Module):
    """Three residual blocks that double the size, and a sigmoid."""

    def __init__(self, size, channels, maps):
        super().__init__()
        self.blocks = nn.Sequential(
            nn.Unflatten(1, (maps, size // 8, size // 8)),
            *(ResidualUp(maps, 64), ResidualUp(64, 64), ResidualUp(64, 64)),
            nn.Conv2d(64, channels, 3, 1, 1),
        )
        he_(self)
        self.blocks[-1].weight.data.mul_(0.1)  # at first, paint one colour

    def fit(self, frames, encoder):
        self.blocks[-1].bias.data.copy_(torch.logit(frames.mean((0, 2, 3)), eps=0.01))

    def forward(self, q):  # (n, dim) -> (n, C, H, W)
        return torch.sigmoid(self.blocks(q))


# ------------------------------------------------------------------ the compact networks

SPREAD = 3  # features have a spread of 1/3: a step of Adam's, on hundreds of them, stays small
CHARTED = 600  # frames whose geodesic distances start the chart: a second's work
LEAST = 1e-2  # mass that a filter has to see before its centre counts
FASTEST = 10  # initial velocities are cut to this: a chart that is bad yet sends no q far away
JITTER = 0.02  # noise on charted coordinates before they are painted: finer detail carries nothing
PRICE = 0.001  # of one nat of coordinates, in units of a blank prediction's error
SEEN = 32  # pixels a side that a chart works on: of larger pictures it sees block averages
TOLERANCE = 0.1  # error, in the same units, above which a frame counts by its logarithm


def mlp(*sizes):
    return chain(nn.Linear, nn.SiLU, sizes)


def bent(*sizes):
    """An MLP that starts at zero: beside a linear layer, what it learns to bend."""
    net = mlp(*sizes)
    nn.init.zeros_(net[-1].weight)
    nn.init.zeros_(net[-1].bias)
    return net


def geodesic(y, dim, near=8):
    """Coordinates (n, dim) whose distances are those of y (n, features) along the surface they lie
    on (Tenenbaum et al. 2000, "Isomap"), the first of unit variance: a curve comes out straight,
    where a principal component may fold it."""
    d = torch.cdist(y, y)
    reach = d.kthvalue(min(near + 1, len(d)), 1).values
    d = torch.where(d <= torch.maximum(reach, reach[:, None]), d, 10 * d)  # no part is out of reach
    for _ in range(math.ceil(math.log2(len(d)))):
        d = torch.stack([(row + d).amin(1) for row in d])  # by way of one more point
    d = d.square()
    d = d - d.mean(0) - d.mean(1, keepdim=True) + d.mean()
    value, axes = torch.linalg.eigh(-0.5 * d.double())
    q = axes * (value.clamp(min=0) / value[-1].clamp(min=1e-12) * len(d)).sqrt()
    return F.pad(q.flip(1)[:, :dim], (0, max(0, dim - len(d)))).to(y)


def ridge(x, y, penalty):
    """The W for which |x W - y|^2 + penalty |W|^2, means over rows, is least."""
    one = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    return torch.linalg.solve(x.T @ x / len(x) + penalty * one, x.T @ y / len(x))


class Chart(nn.Module):
    """One frame -> q. Two kinds of features: the mass, centre and inertia of what each of a few
    learnt filters sees, which tell to a hundredth of a pixel where things are, and strided
    convolutions, for shapes and colours. q is a linear map of them plus an MLP; of angles, that
    gives (sin, cos)."""

    def __init__(self, size, channels, latent, periodic, filters=24):
        super().__init__()
        self.periodic = periodic
        first, last = nn.Conv2d(channels, filters, 3, padding=1), nn.Conv2d(filters, filters, 1)
        self.filters = nn.Sequential(first, nn.SiLU(), last)
        down = chain(lambda a, b: nn.Conv2d(a, b, 3, 2, 1), nn.SiLU, (channels, 16, 32, 32))
        self.shapes = nn.Sequential(*down, nn.SiLU(), nn.Flatten())
        he_(self)
        blur = torch.tensor([0.25, 0.5, 0.25])  # centres of blurred things move more smoothly
        first.weight.data = 1.5 * torch.randn(filters, channels, 1, 1) * blur[:, None] * blur
        whole = (k for k in (2, 3, 4) if size % k == 0 and size >= k * SEEN)
        self.pool = max(whole, default=1)
        low, out = math.ceil(size / self.pool / 8), latent * (1 + periodic)
        features = 6 * filters + 32 * low * low
        self.linear, self.bent = nn.Linear(features, out), bent(features, 128, 128, out)
        self.bent[0].weight.data.mul_(SPREAD)
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.register_buffer("still", torch.zeros(channels, size, size))
        self.register_buffer("blank", torch.ones(()))  # mean squared error of the mean picture

    def features(self, frames):  # (n, C, H, W) -> (n, features)
        frames = F.avg_pool2d(4 * (frames - self.still), self.pool)
        side = torch.linspace(-1, 1, frames.shape[-1], dtype=frames.dtype, device=frames.device)
        x, y = (x.flatten() for x in torch.meshgrid(side, side, indexing="xy"))  # (H W,)
        powers = torch.stack((torch.ones_like(x), x, y, x * x, x * y, y * y))
        seen = self.filters(frames).square().movedim(1, 3).flatten(1, 2)  # (n, H W, filters)
        mass, x, y, xx, xy, yy = (powers @ seen).unbind(1)
        x, y, xx, xy, yy = (moment / (mass + LEAST) for moment in (x, y, xx, xy, yy))
        moments = (mass + 1).log(), x, y, xx - x * x, xy - x * y, yy - y * y
        return (torch.cat((*moments, self.shapes(frames)), 1) - self.mean) / self.scale

    def fit(self, frames):
        """Start from frames (n, C, H, W): the still picture, the scale of features, coordinates."""
        self.still.copy_(frames.median(0).values)
        self.blank.copy_(frames.var(0, correction=0).mean() + 1e-12)
        y = torch.cat([self.features(part) for part in frames.split(256)])
        self.mean.copy_(y.mean(0))
        self.scale.copy_(SPREAD * y.std(0, correction=0) + 1e-2)
        y = ((y - self.mean) / self.scale)[:CHARTED]
        q = geodesic(y, len(self.linear.weight))
        q = q / q.std(0).clamp(min=1e-3) if self.periodic else q
        self.linear.weight.copy_(ridge(y, q, 1e-2).T)

    def places(self, frames, n):
        """q of frames, and the centres (len(frames), 2 n), x first, of what n filters see."""
        y = torch.cat([self.features(part) for part in frames.split(256)])
        centres = (y * self.scale + self.mean).split(self.filters[0].out_channels, 1)[1:3]
        return self.of_features(y), torch.cat([x[:, :n] for x in centres], 1)

    def of_features(self, y):
        q = self.linear(y) + self.bent(y)
        return torch.atan2(*q.chunk(2, 1)) if self.periodic else q

    def forward(self, frames):  # (n, C, H, W) -> (n, latent)
        return self.of_features(self.features(frames))


class ChartEncoder(nn.Module):
    """Context frames -> q(z|x) of z = (q, dq/dt) at the middle one, where both are known best. Each
    frame is charted by itself; q and its velocity start as a polynomial's that fits the charts, of
    degree four (of more than five frames six), and an MLP corrects them."""

    def __init__(self, size, channels, context, latent, periodic, dt):
        super().__init__()
        self.chart, self.lead = Chart(size, channels, latent, periodic), context // 2
        self.periodic = periodic
        time = (torch.arange(context, dtype=torch.float64) - self.lead) * dt
        order = torch.arange(min(context, 5 if context <= 5 else 7))
        fit = torch.linalg.pinv((time / time.abs().max().clamp(min=dt)).unsqueeze(1) ** order)
        fit = torch.cat((fit, torch.zeros(2, context)))[:2].float()  # value and slope at the middle
        fit[1] /= time.abs().max().clamp(min=dt)
        self.register_buffer("poly", fit)  # (2, context)
        seen = (context * (1 + periodic) + 2) * latent
        self.bent = bent(seen, 128, 128, 2 * latent)
        self.logvar = nn.Parameter(torch.full((2 * latent,), -1.2))

    def fit(self, frames):
        self.chart.fit(frames)

    def read(self, frames):  # (B, n, C, H, W) -> (B, n, latent), the chart of single frames
        return self.chart(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])

    def wrap(self, q):
        """Differences of coordinates, of angles the short way round."""
        return torch.atan2(q.sin(), q.cos()) if self.periodic else q

    def forward(self, frames):  # (B, context, C, H, W) -> (B, 2 latent) twice
        e = self.read(frames)
        moved = F.pad(self.wrap(e.diff(dim=1)).cumsum(1), (0, 0, 1, 0))  # from the first frame
        place, velocity = (self.poly @ moved).unbind(1)
        velocity = velocity.clamp(-FASTEST, FASTEST)
        seen = embed(e) if self.periodic else e
        bent = self.bent(torch.cat((seen.flatten(1), moved[:, -1], velocity), 1))
        mean = torch.cat((e[:, 0] + place, velocity), 1) + bent
        return mean, (10 * self.logvar).expand_as(mean)  # Adam moves it ten times as fast


class BlobDecoder(nn.Module):
    """A still picture, moved and lit as q says, plus what 1x1 convolutions make, pixel by pixel, of
    q and of Gaussians whose centres, shapes and heights follow q, by a linear map plus an MLP."""

    def __init__(self, size, channels, latent, periodic, blobs=20, width=24):
        super().__init__()
        self.size, self.periodic, dim = size, periodic, latent * (1 + periodic)
        self.finest = 3 + math.log(size / 32)  # the narrowest blob is 0.8 pixels wide
        self.still = nn.Parameter(torch.full((channels, size, size), 0.5))
        self.linear, self.bent = nn.Linear(dim, 6 * blobs), bent(dim, 128, 128, 6 * blobs)
        nn.init.normal_(self.linear.weight, std=0.3)
        self.linear.weight.data[2 * blobs :] *= 0.1
        narrow = -torch.linspace(math.log(0.1), math.log(0.6), blobs)
        start = *(0.3 * torch.randn(2, blobs)), narrow, narrow, torch.zeros(2 * blobs)
        self.linear.bias.data = torch.cat(start)
        self.camera = bent(dim, 64, 2 + channels)  # at first, the still picture stays as it is
        self.first = nn.Conv2d(blobs, width, 1, bias=False)
        self.colour = nn.Linear(dim, 2 * width)
        self.second, self.last = nn.Conv2d(width, width, 1), nn.Conv2d(width, channels, 1)
        nn.init.kaiming_normal_(self.first.weight)
        he_(self.second)
        self.last.weight.data.mul_(0.1)  # at first, paint the still picture
        nn.init.zeros_(self.last.bias)

    def fit(self, frames, encoder):
        """Start from the still picture and from blobs that go with what the filters see."""
        self.still.copy_(frames.median(0).values)
        q, places = encoder.chart.places(frames, len(self.linear.bias) // 6)
        q = embed(q) if self.periodic else q
        W = ridge(torch.cat((q, torch.ones_like(q[:, :1])), 1), places, 1e-3)
        for start, fit in ((self.linear.weight, W[:-1].T), (self.linear.bias, W[-1])):
            start[: len(fit)] = 0.3 * start[: len(fit)] + fit

    def blobs(self, q, X, Y):  # (n, dim), (h, w) twice -> (n, blobs, h, w), channels_last
        x, y, a, c, b, height = (self.linear(q) + self.bent(q)).unflatten(1, (6, -1)).unbind(1)
        a, c = a.clamp(-2, self.finest).exp(), c.clamp(-2, self.finest).exp()
        x, y, b, height = x.clamp(-3, 3), y.clamp(-3, 3), b.clamp(-3, 3), height.clamp(max=2)
        # height - ((a X + b c Y)^2 + (c Y)^2) / 2 at (X, Y) from (x, y), as a polynomial of these
        xx, xy, yy = -0.5 * a * a, -a * b * c, -0.5 * (b * b + 1) * c * c
        none = height + xx * x * x + xy * x * y + yy * y * y
        terms = torch.stack((xx, xy, yy, -2 * xx * x - xy * y, -2 * yy * y - xy * x, none), 1)
        powers = torch.stack((X * X, X * Y, Y * Y, X, Y, torch.ones_like(X)), 2)  # (h, w, 6)
        maps = (powers.flatten(0, 1) @ terms).exp()  # (n, h w, blobs)
        return maps.unflatten(1, X.shape).movedim(3, 1)

    def ground(self, q, X, Y):  # -> (n, C, h, w)
        move, light = self.camera(q).split((2, len(self.still)), 1)
        move = move.clamp(-2, 2).nan_to_num()  # grid_sample reads any memory where a place is nan
        at = torch.stack((X, Y), 2) + move[:, None, None]  # (n, h, w, 2)
        still = self.still.expand(len(q), -1, -1, -1)
        still = F.grid_sample(still, at, padding_mode="border", align_corners=True)
        return still * (1 + light[:, :, None, None])

    def forward(self, q, rows=None, columns=None):  # (n, latent) -> (n, C, H, W), or a part of it
        side = torch.linspace(-1, 1, self.size, dtype=q.dtype, device=q.device)
        x, y = (side, side) if rows is None else (side[columns], side[rows])
        X, Y = torch.meshgrid(x, y, indexing="xy")  # (h, w)
        q = embed(q) if self.periodic else q.clamp(-FAR, FAR)
        shift, gain = self.colour(q)[:, :, None, None].chunk(2, 1)
        x = F.leaky_relu(self.first(self.blobs(q, X, Y)) + shift, 0.1)
        x = self.last(F.leaky_relu(self.second(x), 0.1) * (1 + gain))
        return self.ground(q, X, Y) + x


# ------------------------------------------------------------------ HGN (section 3)


def check(config, known):
    """ValueError, with the cure, where an option is not among its known values."""
    for name, values in known.items():
        if config[name] not in values:
            every = [str(v) for v in values if v is not None]
            text = ", ".join(every[:3] + ["..."] + every[-1:] if len(every) > 4 else every)
            raise ValueError(f"{name} must be one of {text}, not {config[name]!r}")


def paper(size, channels, context, latent, periodic, f_psi, dt):
    """The published networks: encoder, f_psi, H, decoder and prior."""
    maps, low = latent or 16, size // 8
    encoder = PaperEncoder(size, channels, context, maps, f_psi)
    H, decoder = PaperHamiltonian(maps, low), PaperDecoder(size, channels, maps)
    if not f_psi:
        return encoder, no_psi, H, decoder, StandardNormal(2 * maps * low * low)
    return encoder, PaperPsi(maps), H, decoder, StandardNormal(48, size, size)


def compact(size, channels, context, latent, periodic, f_psi, dt):
    """Vector latents, H = p^T M(q)^-1 p / 2 + V(q); z = (q, dq/dt), of which f_psi makes (q, p)."""
    latent = latent or 6
    H = Natural(latent, 128, periodic)
    encoder = ChartEncoder(size, channels, context, latent, periodic, dt)
    decoder = BlobDecoder(size, channels, latent, periodic)
    return encoder, H.of_velocity, H, decoder, Couplings(2 * latent)


ARCHITECTURES = {"compact": compact, "paper": paper}


class HGN(nn.Module):
    """Hamiltonian Generative Network (Toth et al. 2020, section 3).

    Args:
        size: height and width of a frame, a multiple of 8 from 16 to 128. channels: of a frame.
        context: how many first frames the encoder sees (the paper: all 30; here 5).
        arch: "compact" (vectors, H = p^T M(q)^-1 p / 2 + V(q)) or "paper" (the published one).
        latent: numbers in q (compact, default 6), or feature maps in q (paper, default 16).
        integrator: of INTEGRATORS; default leapfrog (compact), explicit_leapfrog (paper).
        substeps: integrator steps from one frame to the next. periodic: q are angles (compact).
        f_psi: False is the paper's ablation, z itself is the state (paper).
        deterministic: no sampling of z and no KL. dt: time between frames.
    Raises: ValueError, with the cure, for a value outside these.
    """

    def __init__(
        self, size=32, channels=3, context=5, arch="compact", latent=None, integrator=None,
        substeps=1, periodic=False, f_psi=True, deterministic=False, dt=0.125,
    ):  # fmt: skip
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        known = {"arch": ARCHITECTURES, "size": range(16, 129, 8), "channels": range(1, 5),
                 "context": range(1, 1001), "latent": (None, *range(1, 65)),
                 "integrator": (None, *INTEGRATORS), "substeps": range(1, 1001)}  # fmt: skip
        check(self.config, known)
        if not dt > 0:
            raise ValueError(f"dt must be above 0, not {dt}: a negative dt goes to rollout")
        self.context, self.dt = context, dt
        self.substeps, self.deterministic = substeps, deterministic
        parts = ARCHITECTURES[arch](size, channels, context, latent, periodic, f_psi, dt)
        self.encoder, self.f_psi, self.H, self.decoder, self.prior = parts
        usual = {"compact": "leapfrog", "paper": "explicit_leapfrog"}
        self.integrate = INTEGRATORS[integrator or usual[arch]]
        for module in (self.encoder, self.decoder):
            module.to(memory_format=torch.channels_last)  # 1.3-2x on small convolutions

    @torch.no_grad()
    def fit(self, frames):
        """Before training: take what needs no learning from frames (n, C, size, size), a few
        hundred of any times: the still picture, the scale of features, the first coordinates."""
        if len(frames) < 2:
            raise ValueError(f"fit needs at least two frames, not {len(frames)}")
        self.encoder.fit(frames)
        self.decoder.fit(frames, self.encoder)

    def encode(self, frames):
        """frames (B, T >= context, C, size, size) -> mean and log-variance of q(z|x)."""
        shape = (self.config["channels"], self.config["size"], self.config["size"])
        if frames.shape[2:] != shape or not frames.is_floating_point():
            known = ", ".join(map(str, shape))
            raise ValueError(f"frames must be floats in [0, 1] of shape (B, T, {known}), "
                             f"not {frames.dtype} {tuple(frames.shape)}")  # fmt: skip
        if frames.shape[1] < self.context:
            raise ValueError(f"the encoder needs {self.context} frames, got {frames.shape[1]}: "
                             "give longer clips, or train with a smaller context")  # fmt: skip
        return self.encoder(frames[:, : self.context])

    def posterior(self, frames, noise=None):
        """z ~ q(z|x), and its KL to the prior: nats, the mean over clips."""
        mean, logvar = self.encode(frames)
        if self.deterministic:
            return mean, mean.new_zeros(())
        z = mean + (0.5 * logvar).exp() * (torch.randn_like(mean) if noise is None else noise)
        return z, self.prior.kl(z, mean, logvar).mean()

    def state(self, z):
        """z (B, ...) -> q, p at frame 0, back from the frame whose state the encoder infers."""
        path = self.rollout(*self.f_psi(z), self.encoder.lead, -self.dt)
        return tuple(x[:, -1] for x in path)

    def infer(self, frames):
        """The state q, p at frame 0 of clips, taken at the posterior mean."""
        return self.state(self.encode(frames)[0])

    def energy(self, q, p):
        """The learnt H of states (B, ...): (B,). It has no natural zero and no natural unit."""
        return self.H(q, p)

    def rollout(self, q, p, steps, dt=None):
        """States at `steps` frames after (q, p), the start included: (B, steps + 1, ...) twice. dt:
        time from frame to frame, by default that of training; -dt runs backward, 2 dt at double
        speed, in steps never longer than those of training."""
        dt = self.dt if dt is None else dt
        longer = max(1, math.ceil(abs(dt) / self.dt - 1e-6))
        return self.integrate(self.H, q, p, dt, steps, longer * self.substeps)

    def decode(self, q, block=256):
        """Paint q (B, T, ...) -> frames (B, T, C, size, size). Without gradients they are cut to
        [0, 1], and painted in blocks, so that memory beside the output stays constant."""
        flat = q.flatten(0, 1)
        if torch.is_grad_enabled():
            return self.decoder(flat).unflatten(0, q.shape[:2])
        frames = torch.cat([self.decoder(part).clamp(0, 1) for part in flat.split(block)])
        return frames.unflatten(0, q.shape[:2])

    @torch.no_grad()
    def sample(self, n, steps, dt=None, generator=None):
        """n rollouts from the prior: frames (n, steps + 1, C, size, size) in [0, 1]."""
        where = getattr(generator, "device", None)
        u = torch.randn(n, *self.prior.shape, generator=generator, device=where)
        z = self.prior(u.to(next(self.parameters()).device))
        return self.decode(self.rollout(*self.state(z), steps, dt)[0])

    def loss(self, frames, beta=1e-3, noise=None):
        """The negative ELBO (equation 5), in units of the mean squared error of a pixel:

            mse + beta KL(q(z|x) || p(z)) / (C size size)

        the paper's -(1/T) sum_t log p(x_t|q_t) + KL for a Gaussian p of variance beta / 2, over the
        numbers of a frame. frames: (B, T, C, size, size); the encoder sees the first `context`, all
        are scored. noise: of z, N(0, I). Returns: loss, mse, kl (nats)."""
        z, kl = self.posterior(frames, noise)
        q, p = self.rollout(*self.state(z), frames.shape[1] - 1)
        mse = (self.decode(q) - frames).square().mean()
        return mse + beta * kl / frames[0, 0].numel(), mse, kl

    # ---- the compact model's recipe: what its training adds to the ELBO

    def chart_loss(self, frames):
        """Before there is any H: chart and decoder as an autoencoder of frames (B, n, C, size,
        size). Returns the loss, in units of a blank prediction's error, the mse, and zero for the
        KL."""
        e = self.encoder.read(frames)
        mse = self.error(self.jittered(e), frames).mean()
        return self.priced(mse / self.encoder.chart.blank, e), mse, mse.new_zeros(())

    def charted_loss(self, context, targets, times, reach=None, beta=1e-3, noise=None):
        """The ELBO on some of a clip's frames, plus what ties the chart of single frames to it:

            robust  error of all targets, painted from the rolled-out q; far ones by its logarithm
            chart   error of the first few targets, painted from their own charts, and the price
            misfit  distance of the rolled-out q from these charts
            kl      as in `loss`

        context: (B, context, C, size, size). targets: (B, n, C, size, size), at integer times
        (B, n) counted from the first frame of context. reach: the last time there can be; with it
        torch.compile needs one compilation and a GPU never waits. Returns: the sum, in units of a
        blank prediction's error; the mse of all targets; the kl."""
        z, kl = self.posterior(context, noise)
        reach = int(times.max()) if reach is None else reach
        q, _ = self.rollout(*self.state(z), reach)  # (B, reach + 1, latent)
        q = q[torch.arange(len(q), device=q.device).unsqueeze(1), times]  # (B, n, latent)
        blank, few = self.encoder.chart.blank, 1 + targets.shape[1] // 8
        e = self.encoder.read(targets[:, :few])  # (B, few, latent)
        painted = torch.cat((q, self.jittered(e)), 1)
        error = self.error(painted, torch.cat((targets, targets[:, :few]), 1)) / blank
        error, chart = error[:, :-few], error[:, -few:].mean()
        robust = TOLERANCE * torch.log1p(error / TOLERANCE).mean()
        off = self.encoder.wrap(q[:, :few] - e).square().mean(2) / spread(e).mean().detach()
        misfit = 0.01 * torch.log1p(off / 0.01).mean()
        kl_weight = beta / context[0, 0].numel() / blank
        loss = robust + self.priced(chart, e) + misfit + kl_weight * kl
        return loss, error.mean() * blank, kl

    def error(self, q, frames):
        """Mean squared error, (B, n), of frames (B, n, C, size, size) painted from q (B, n,
        latent), on a lattice of their pixels that starts anywhere: of 32 pixels, at every second
        row and column."""
        size = frames.shape[-1]
        stride = 1 if size < 32 else 2 if size < 64 else 4
        first = torch.randint(stride, (2, 1), device=q.device)
        rows, columns = first + torch.arange(0, size, stride, device=q.device)
        painted = self.decoder(q.flatten(0, 1), rows, columns).unflatten(0, q.shape[:2])
        return (painted - frames[..., rows, :][..., columns]).square().mean((2, 3, 4))

    def jittered(self, e):
        return e + JITTER * torch.randn_like(e)

    def priced(self, error, e):
        """An autoencoder's error plus a price on the nats that coordinates e (B, n, latent) carry
        beside their jitter, so that what is not needed falls still; none while nothing is
        painted."""
        nats = 0.5 * torch.log1p(spread(e) / JITTER**2).sum()
        return error + PRICE * (1 - error.detach()).clamp(min=0) * nats


def spread(e):
    """Variance of each coordinate over e (B, n, latent)."""
    return e.flatten(0, 1).var(0, correction=0) + 1e-12


class GECO:
    """Rezende & Viola 2018, "Taming VAEs": minimise the KL subject to mse <= tolerance.

    Their Lagrange multiplier is 1 / beta here, which leaves the scale of the loss alone: beta
    shrinks while the moving average of the error is above the tolerance and grows while it is
    below. Both are bounded, so that a tolerance below the noise ends as a small beta instead of
    diverging. Tensors all, so that no GPU is waited for."""

    def __init__(self, tolerance=2e-4, rate=0.01, beta=1e-3, bounds=(1e-5, 1.0), device=None):
        self.tolerance, self.rate, self.bounds = tolerance, rate, bounds
        self.beta, self.mse = torch.tensor([beta, math.nan], device=device).unbind()

    def update(self, mse):
        """Take one batch's mse, a tensor, after the step: changes beta, in place."""
        mse = torch.where(mse.isfinite(), mse.detach(), self.mse)
        self.mse.copy_(torch.where(self.mse.isnan(), mse, 0.95 * self.mse + 0.05 * mse))
        push = (self.tolerance / self.mse.clamp(min=1e-12)).log().clamp(-1, 1).nan_to_num(0)
        self.beta.mul_((self.rate * push).exp()).clamp_(*self.bounds)


class HNN(nn.Module):
    """The baseline from pixels of Greydanus et al. 2019, "Hamiltonian Neural Networks": an
    autoencoder of two stacked frames whose latent z is read as (q, p), and an H of it whose
    symplectic gradient is asked to be the change of z. Used like HGN, but a state is (z, nothing),
    z has no prior, and the decoder sees p too. latent: numbers in q. conv: the convolutional twin.
    The others as for HGN."""

    def __init__(self, size=32, channels=3, latent=2, conv=False, dt=0.125):
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        known = {"size": range(16, 129, 8), "channels": range(1, 5), "latent": range(1, 65)}
        check(self.config, known)
        self.context, self.dt, low, z = 2, dt, size // 8, 2 * latent
        shape = (2 * channels, size, size)
        if conv:
            down = convs(2 * channels, 32, 64, 64, stride=2)
            self.encoder = nn.Sequential(down, nn.Flatten(), nn.Linear(64 * low * low, z))
            first = nn.Linear(z, 64 * low * low), nn.Unflatten(1, (64, low, low))
            up = ResidualUp(64, 64), ResidualUp(64, 32), ResidualUp(32, 16)
            self.decoder = nn.Sequential(*first, *up, nn.Conv2d(16, 2 * channels, 3, 1, 1))
        else:
            self.encoder = nn.Sequential(nn.Flatten(), mlp(math.prod(shape), 200, 200, z))
            self.decoder = nn.Sequential(mlp(z, 200, 200, math.prod(shape)), nn.Unflatten(1, shape))
        self.H = Energy(z, 200)
        he_(self.encoder, self.decoder)
        self.register_buffer("still", torch.full(shape, 0.5))

    @torch.no_grad()
    def fit(self, frames):
        self.still.copy_(frames.median(0).values.repeat(2, 1, 1))

    def encode(self, frames):  # (B, T, C, H, W) -> (B, T - 1, 2 latent), and the pairs
        pairs = torch.cat((frames[:, :-1], frames[:, 1:]), 2)
        z = self.encoder(4 * (pairs - self.still).flatten(0, 1))
        return z.unflatten(0, pairs.shape[:2]), pairs

    def paint(self, z):  # (n, 2 latent) -> (n, 2 C, H, W)
        return torch.sigmoid(self.decoder(z) + torch.logit(self.still, eps=0.01))

    def field(self, z):
        dq, dp = self.H.grad(z).chunk(2, -1)
        return torch.cat((dp, -dq), -1)

    def infer(self, frames):
        z = self.encode(frames[:, :2])[0][:, 0]
        return z, z[:, :0]

    def energy(self, z, nothing):
        return self.H(z)

    def rollout(self, z, nothing, steps, dt=None):
        """As HGN.rollout, by the classical Runge-Kutta method."""
        h, states = self.dt if dt is None else dt, [z]
        for _ in range(steps):
            a = self.field(z)
            b = self.field(z + h / 2 * a)
            c = self.field(z + h / 2 * b)
            z = z + h / 6 * (a + 2 * b + 2 * c + self.field(z + h * c))
            states.append(z)
        z = torch.stack(states, 1)
        return z, z[..., :0]

    def decode(self, z, block=1024):
        frames = [self.paint(part).chunk(2, 1)[0] for part in z.flatten(0, 1).split(block)]
        return torch.cat(frames).unflatten(0, z.shape[:2])

    def loss(self, frames):
        """frames: (B, n, C, size, size), consecutive. Returns loss, mse and, in the KL's place,
        zero."""
        z, pairs = self.encode(frames)
        mse = F.mse_loss(self.paint(z.flatten(0, 1)), pairs.flatten(0, 1))
        change = z.diff(dim=1) / self.dt
        symplectic = F.mse_loss(self.field(z[:, :-1]), change)
        canonical = F.mse_loss(z[:, :-1].chunk(2, 2)[1], change.chunk(2, 2)[0])
        return mse + 0.1 * (symplectic + canonical), mse, mse.new_zeros(())
