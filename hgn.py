"""Hamiltonian Generative Networks in one file that needs only torch.

Toth, Rezende, Jaegle, Racaniere, Botev, Higgins: "Hamiltonian Generative Networks", ICLR 2020 (arXiv
1909.13789). An encoder infers an abstract state (q, p) from the first frames, a learnt scalar H rolls it out
with leapfrog, and a decoder paints every frame from q alone:

    model = HGN()                                   # 32x32 RGB, sees 5 frames
    loss, mse, kl = model.loss(frames)              # frames (B, T, 3, 32, 32) in [0, 1]
    q, p = model.infer(frames)                      # state at frame 0
    q, p = model.rollout(q, p, steps=90)            # (B, 91, latent); dt=-model.dt runs backward
    movie = model.decode(q)                         # (B, 91, 3, 32, 32)
"""
import math

import torch
import torch.nn.functional as F
from torch import nn


@torch.compiler.nested_compile_region               # torch.compile translates it once, not once for every step
def leapfrog_step(dH_dq, dH_dp, q, p, kick, h, separable=True):
    """(q, p) and kick = dH/dq there, one step of length h later; see `leapfrog`."""
    p = p - 0.5 * h * kick
    q = q + h * dH_dp(q, p)
    kick = dH_dq(q, p)
    p = p - 0.5 * h * kick
    return q, p, kick if separable else dH_dq(q, p)


def leapfrog(dH_dq, dH_dp, q, p, dt, steps, substeps=1, separable=True):
    """Roll (q, p) out under dq/dt = dH/dp, dp/dt = -dH/dq by leapfrog (kick, drift, kick; "velocity Verlet").

        p_{n+1/2} = p_n       - dt/2 dH/dq(q_n, p_n)
        q_{n+1}   = q_n       + dt   dH/dp(q_n, p_{n+1/2})
        p_{n+1}   = p_{n+1/2} - dt/2 dH/dq(q_{n+1}, p_{n+1/2})

    For separable H = K(p) + V(q) it is of order 2, symplectic and reversible, and the last kick's gradient is the
    next step's first: one gradient of V and one of K a step. Otherwise this is the paper's explicit form, of
    order 1 and neither exactly symplectic nor exactly reversible (section 2.1 and appendix of the paper).

    Args: dH_dq, dH_dp: functions of (q, p). q, p: (B, ...). dt: time between the returned states, a number or a
    tensor that broadcasts with q; negative runs backward. substeps: leapfrog steps from one returned state to
    the next. Returns: q, p of shape (B, steps + 1, ...), the start included.
    """
    h = dt / substeps
    q, p = q.clone(), p.clone()                     # a compiled step takes no two halves of one tensor
    states, kick = [(q, p)], dH_dq(q, p)
    for _ in range(steps):
        for _ in range(substeps):
            q, p, kick = leapfrog_step(dH_dq, dH_dp, q, p, kick, h, separable)
        states.append((q, p))
    return tuple(torch.stack(x).transpose(0, 1) for x in zip(*states))


def euler(dH_dq, dH_dp, q, p, dt, steps, substeps=1, separable=True):
    """Explicit Euler, the paper's ablation: order 1, not symplectic. Arguments as for `leapfrog`."""
    h = dt / substeps
    states = [(q, p)]
    for _ in range(steps):
        for _ in range(substeps):
            q, p = q + h * dH_dp(q, p), p - h * dH_dq(q, p)
        states.append((q, p))
    return tuple(torch.stack(x).transpose(0, 1) for x in zip(*states))


INTEGRATORS = {"leapfrog": leapfrog, "euler": euler}


def embed(q):
    """Angles as points on the unit circle: (..., dim) -> (..., 2 dim)."""
    return torch.cat((q.sin(), q.cos()), -1)


class Quadratic(nn.Module):
    """K(p) = |p L|^2 / 2 with a learnt matrix L: the kinetic energy of masses in any coordinates linear in the true ones."""
    def __init__(self, dim):
        super().__init__()
        self.L = nn.Parameter(torch.eye(dim))

    def forward(self, p):                                                        # (..., dim) -> (...)
        return 0.5 * (p @ self.L).square().sum(-1)

    def grad(self, p):                                                           # (..., dim) -> (..., dim)
        return F.linear(p @ self.L, self.L)                                      # L.T would be an alias in a compiled step


class Energy(nn.Module):
    """A learnt scalar of a vector, V(q) or the paper's K(p): |x L|^2 / 2 + MLP(x), with its gradient written out; of angles, the
    same function of `embed(q)`.

    The quadratic term makes latents oscillate, all at one frequency, from the first training step. It is never negative and the
    MLP is bounded, so nothing runs away. The gradient is a formula rather than a call of autograd because it is what a rollout
    spends its time on.
    """
    def __init__(self, dim, width, periodic=False):
        super().__init__()
        self.periodic, dim = periodic, dim * (1 + periodic)
        self.L = nn.Parameter(torch.eye(dim))
        self.first, self.second = nn.Linear(dim, width), nn.Linear(width, width)
        for layer in (self.first, self.second):          # torch's default is almost linear where the states are:
            nn.init.normal_(layer.weight, std=1.5 / layer.in_features ** 0.5)    # errors 10x larger after 300 steps
            nn.init.uniform_(layer.bias, -1, 1)
        self.last = nn.Parameter(torch.randn(width) * 0.1 / width ** 0.5)

    def forward(self, x):                                                        # (..., dim) -> (...)
        x = embed(x) if self.periodic else x
        h = torch.tanh(self.second(torch.tanh(self.first(x))))
        return 0.5 * (x @ self.L).square().sum(-1) + h @ self.last

    def grad(self, x):                                                           # (..., dim) -> (..., dim)
        x = embed(x) if self.periodic else x
        a = torch.tanh(self.first(x))
        b = torch.tanh(self.second(a))
        g = (self.last * (1 - b * b)) @ self.second.weight * (1 - a * a)
        g = F.linear(x @ self.L, self.L) + g @ self.first.weight
        if not self.periodic:
            return g
        (sin, cos), (g_sin, g_cos) = x.chunk(2, -1), g.chunk(2, -1)              # d sin q = cos q dq, d cos q = -sin q dq
        return g_sin * cos - g_cos * sin


class Separable(nn.Module):
    """H(q, p) = K(p) + V(q): leapfrog on it is exactly symplectic and reversible. kinetic: "quadratic" or "mlp"."""
    separable = True

    def __init__(self, dim, width, periodic=False, kinetic="quadratic"):
        super().__init__()
        self.K = Quadratic(dim) if kinetic == "quadratic" else Energy(dim, width)
        self.V = Energy(dim, width, periodic=periodic)

    def forward(self, q, p):
        return self.K(p) + self.V(q)

    def dq(self, q, p):
        return self.V.grad(q)

    def dp(self, q, p):
        return self.K.grad(p)


class ConvHamiltonian(nn.Module):
    """The paper's H(q, p): six 3x3 convolutions on the stacked maps of q and p, summed over space; not separable.
    Softplus, since the second derivative of a ReLU is zero and such an H would never learn."""
    separable = False

    def __init__(self, channels, side, width=64):
        super().__init__()
        sizes = (2 * channels,) + (width,) * 5 + (1,)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(sizes, sizes[1:]))
        self.shape = (2 * channels, side, side)

    def forward(self, q, p):                                                     # (B, 16 * 4 * 4) twice -> (B,)
        x = torch.cat((q, p), 1).unflatten(1, self.shape)
        for conv in self.convs[:-1]:
            x = F.softplus(conv(x))
        return self.convs[-1](x).sum((1, 2, 3))

    def grad(self, q, p, half):
        """dH/dq (half 0) or dH/dp (half 1), written out like `Energy.grad`."""
        x, slopes = torch.cat((q, p), 1).unflatten(1, self.shape), []
        for conv in self.convs[:-1]:
            x = conv(x)
            slopes.append(x.sigmoid())                                           # of the softplus
            x = F.softplus(x)
        g = torch.ones_like(x[:, :1])
        for conv, slope in zip(self.convs[:0:-1], slopes[::-1]):
            g = F.conv_transpose2d(g, conv.weight, padding=1) * slope
        return F.conv_transpose2d(g, self.convs[0].weight.chunk(2, 1)[half], padding=1).flatten(1)

    def dq(self, q, p):
        return self.grad(q, p, 0)

    def dp(self, q, p):
        return self.grad(q, p, 1)


def he_(*modules):
    """He initialisation of every layer: with torch's own, HGN paints the mean image for over 1,000 steps."""
    for layer in (layer for module in modules for layer in module.modules()):
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)


def mlp(*sizes):
    layers = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.SiLU())]
    return nn.Sequential(*layers[:-1])


class Couplings(nn.Module):
    """An invertible map of R^dim: affine couplings with alternating masks (Dinh et al. 2017, "RealNVP")."""
    def __init__(self, dim, layers=8, width=64):
        super().__init__()
        self.register_buffer("masks", (torch.arange(dim) + torch.arange(layers).unsqueeze(1)) % 2.0)
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
                                                nn.Linear(width, 2 * dim)) for _ in range(layers))

    def coupling(self, net, mask, x):
        log_s, t = (net(mask * x) * (1 - mask).repeat(2)).chunk(2, -1)
        return 2 * torch.tanh(log_s / 2), t

    def forward(self, z):                                                        # (B, dim) -> (B, dim)
        for net, mask in list(zip(self.nets, self.masks))[::-1]:
            log_s, t = self.coupling(net, mask, z)
            z = (z - t) * (-log_s).exp()
        return z

    def inverse(self, x):
        """The z that `forward` takes to x, and log |det dz/dx|, (B,)."""
        log_det = 0
        for net, mask in zip(self.nets, self.masks):
            log_s, t = self.coupling(net, mask, x)
            x, log_det = x * log_s.exp() + t, log_det + log_s.sum(-1)
        return x, log_det


def all_ways_round(kernel):
    """The mean of (..., n, n) turned and mirrored in all eight ways: as a hook on gradients it keeps symmetric kernels symmetric."""
    kernel = kernel + kernel.mT
    return sum(kernel.rot90(k, (-2, -1)) for k in range(4)) / 8


class CentroidEncoder(nn.Module):
    """Where things are and how they move. The centroids of learnt filters' energy, in every context frame, are charted by a
    linear map into q (or into the angle of a point in a plane); p starts as the velocity of q at the middle frame, by the
    polynomial of order four (six, where there are the frames) that fits best, times the masses that `fit_chart` finds, and
    stays linear in how q moves. Of more than five frames q starts as that polynomial too.

    Why nothing bends here: K(p) + V(q) can only describe motion in coordinates that are linear in the true ones. Encoders
    with an MLP or convolutions agree with the decoder on a bent chart, on which no such H is right, long before they learn
    the motion. Centroids are linear in the positions, to a hundredth of a pixel, from the first step.
    """
    def __init__(self, channels, context, latent, periodic, dt, filters=32):
        super().__init__()
        self.periodic = periodic
        self.filters = nn.Sequential(nn.Conv2d(channels, filters, 3, padding=1), nn.SiLU(), nn.Conv2d(filters, filters, 1))
        self.chart = nn.Linear(2 * filters, (1 + periodic) * latent)
        self.chart.requires_grad_(periodic and latent > 1)    # otherwise fit_chart finds it, and it stays; see README
        self.momentum, self.logvar = nn.Linear(context * latent, latent), nn.Linear(context * latent, 2 * latent)
        he_(self)
        blur = torch.tensor([0.25, 0.5, 0.25])                # blurred blobs have smoother centroids than sharp edges
        self.filters[0].weight.data = 1.5 * torch.randn(filters, channels, 1, 1) * blur.unsqueeze(1) * blur
        if context <= 5:
            self.filters[0].weight.register_hook(all_ways_round)                 # lest one learn to see a thing beside where it is
        else:                                                 # noisy as a rule: filters that follow noise are worse (two bodies: 4.3 x 1e-4
            self.filters.requires_grad_(False)                # after 1,000 steps instead of 3.1, of which 2.9 are the noise's own)
        if periodic:                                          # of what the filters see; round the picture's centre until fit_chart
            seen = torch.rand(latent, filters)
            self.chart.weight.data = torch.kron(torch.eye(2), seen / seen.sum(1, keepdim=True))
        self.register_buffer("spread", torch.ones(()))        # mean variance of the chart's coordinates, see fit_chart
        # Orthogonal polynomials in time; higher orders are small, so louder. Of many frames, in which things move farther, all as loud
        # as of five: else one step of Adam moves a pendulum's state by a radian. A buffer that is kept, as QR depends on the machine.
        time = torch.linspace(-1, 1, context, dtype=torch.float64) if context > 1 else torch.zeros(1, dtype=torch.float64)
        basis, r = torch.linalg.qr(torch.stack([time ** j for j in range(context)], 1))
        scale = 3.0 ** torch.arange(context).clamp(max=2) * min(1, 5 / context) ** 1.5
        order, middle = torch.arange(min(context, 7)), time[context // 2]
        self.register_buffer("basis", (basis * scale).T.float())                 # (order, context)

        def start(layer, coefficients):                       # linear in the coefficients of the first polynomials
            layer.weight.data.zero_().view(latent, context, latent)[:, :len(order)] = (
                coefficients.float().unsqueeze(1) * torch.eye(latent).unsqueeze(1))
        fit = torch.linalg.inv(r[:len(order), :len(order)]) / scale[:len(order)]
        start(self.momentum, (order * middle ** (order - 1).clamp(min=0)) @ fit * 2 / (max(context - 1, 1) * dt))
        if context > 5:                                       # many frames, noisy ones at that, say more than a local fit
            self.position = nn.Linear(context * latent, latent, bias=False)
            start(self.position, middle ** order @ fit)
        self.logvar.weight.data.mul_(0.01)                    # variance exp(-8): with that of the prior, the decoder first
        self.logvar.bias.data.fill_(-8)                       # sees nothing but noise

    def energy(self, frames):                                                    # (n, C, H, W) -> (n, H * W, filters)
        return self.filters(frames).permute(0, 2, 3, 1).flatten(1, 2).square()

    def centroids(self, frames):                                                 # (n, C, H, W) -> (n, 2 * filters)
        side = torch.linspace(-2, 2, frames.shape[-1], dtype=frames.dtype, device=frames.device)
        x, y = side.expand(len(side), -1), side.unsqueeze(1).expand(-1, len(side))
        moments = torch.stack((x, y, torch.ones_like(x))).flatten(1)             # (3, H * W)
        xy = moments @ self.energy(frames)                                       # (n, 3, filters)
        return (xy[:, :2] / (xy[:, 2:] + 1e-2)).flatten(1)

    @torch.no_grad()
    def fit_chart(self, frames):
        """Start the chart as the principal components of the centroids of frames (n, C, H, W), all on one scale, or as the angles
        round the centres of the circles that fit them best (Kasa's: |x|^2 = 2 x.centre + constant). Returns, but for angles,
        the standard deviations of q, the first being 1, and the L of K with which things of one size weigh alike."""
        xy = torch.cat([self.centroids(part) for part in frames.split(256)]).double()
        if self.periodic:
            points = F.linear(xy, self.chart.weight.double()).unflatten(1, (2, -1)).movedim(2, 0)        # (latent, n, 2)
            known = torch.cat((2 * points, torch.ones_like(points[..., :1])), 2)
            centre = (torch.linalg.pinv(known) @ points.square().sum(2, keepdim=True))[:, :2, 0]         # (latent, 2)
            self.chart.bias.copy_(-centre.T.flatten())
            return None
        latent, mean = len(self.chart.weight), xy.mean(0)
        variance, axes = torch.linalg.eigh((xy - mean).T @ (xy - mean) / len(xy))
        std = variance.flip(0).clamp(min=1e-12).sqrt()
        self.chart.weight.copy_(axes.T.flip(0)[:latent] / std[0])
        self.chart.bias.copy_(-self.chart.weight.double() @ mean)
        scale = (std[:latent] / std[0]).float()
        self.spread.copy_(scale.square().mean())
        self.logvar.bias.add_(2 * scale.log().repeat(2))      # noise as small a part of each
        # Nothing in the pictures ties the scale of p of a motion that is independent, as the centre of mass's is, to the others:
        # here all things get one mass. One that moves takes a filter's centroid along by its share of what the filter sees; every
        # pixel shows one thing, so products of pixels' shares say how far q goes with each. 0.1 of the identity, as a q with
        # which nothing moves would have infinite mass.
        shares = (e / (e.sum(1, keepdim=True) + 1e-2) for e in map(self.energy, frames.split(256)))
        products = sum((s.mT @ s).sum(0) for s in shares)                        # (filters, filters)
        metric = self.chart.weight @ torch.block_diag(products, products) @ self.chart.weight.T
        metric = torch.eye(latent, device=metric.device).lerp(metric / metric[0, 0].clamp(min=1e-12), 0.9)
        self.momentum.weight.copy_(torch.linalg.solve(metric, self.momentum.weight))             # p of that velocity
        return scale, torch.linalg.cholesky(metric)

    def charted(self, frames):                               # (B, n, C, H, W) -> (B, n, latent), twice that of angles
        return self.chart(self.centroids(frames.flatten(0, 1))).unflatten(0, frames.shape[:2])

    @torch.no_grad()
    def read(self, frames):
        """q as the chart sees it in each frame by itself, taken as given: (B, n, C, H, W) -> (B, n, latent)."""
        a = self.charted(frames)
        return torch.atan2(*a.chunk(2, 2)) if self.periodic else a

    def misfit(self, q, a):
        """How far q is from a, both (B, n, latent): mean square over its variance before training, of angles 1 - cos. (B, n)."""
        return (1 - torch.cos(q - a)).mean(2) if self.periodic else (q - a).square().mean(2) / self.spread

    def forward(self, frames):                                                   # (B, context, C, H, W) -> (B, 4 latent)
        a, middle = self.charted(frames), frames.shape[1] // 2
        q, moved = a[:, middle], a                           # (B, latent), (B, context, latent); twice that of angles
        if self.periodic:                                                        # turns from frame to frame, added up
            (sin, cos), q = a.chunk(2, 2), torch.atan2(*q.chunk(2, 1))
            moved = torch.atan2(sin[:, 1:] * cos[:, :-1] - cos[:, 1:] * sin[:, :-1],
                                sin[:, 1:] * sin[:, :-1] + cos[:, 1:] * cos[:, :-1])
            moved = F.pad(moved.cumsum(1), (0, 0, 1, 0))
        moved = moved - moved[:, middle:middle + 1]
        moved = (self.basis @ moved).flatten(1)
        mean = torch.cat((q, self.momentum(moved)), 1)
        if frames.shape[1] > 5:
            mean = mean + F.pad(self.position(moved), (0, len(q[0])))
        return torch.cat((mean, self.logvar(moved)), 1)


class Embed(nn.Module):
    def forward(self, q):
        return embed(q)


class Blobs(nn.Module):
    """Round bumps of learnt widths at points linear in q, a map each, as of landmarks (Jakab et al. 2018): the mirror of
    CentroidEncoder. A decoder that is given q as numbers paints nothing right where it has not been; what this one has learnt to
    paint in some places it paints in all."""
    def __init__(self, dim, size, blobs):
        super().__init__()
        self.at = nn.Linear(dim, 2 * blobs)                                      # x of all, then y; the picture is [-1, 1]
        self.log_width = nn.Parameter(torch.linspace(math.log(0.1), math.log(0.5), blobs))
        self.size = size
        nn.init.normal_(self.at.weight, std=dim ** -0.5)
        nn.init.normal_(self.at.bias, std=0.1)

    def forward(self, q):                                                        # (n, dim) -> (n, blobs, size, size)
        side = torch.linspace(-1, 1, self.size, dtype=q.dtype, device=q.device)
        off = (side - self.at(q).unsqueeze(2)) / self.log_width.exp().repeat(2).unsqueeze(1)     # (n, 2 blobs, size)
        x, y = (-0.5 * off.square()).exp().chunk(2, 1)
        return (y.unsqueeze(3) * x.unsqueeze(2)).contiguous(memory_format=torch.channels_last)


def compact(size, channels, context, latent, f_psi, periodic, dt):
    """Vector latent, separable H. The encoder's z is the state itself and f_psi, invertible, takes N(0, I) to the distribution
    of states: a prior that bends no coordinates. The decoder makes colours of the blobs, pixel by pixel."""
    decoder = nn.Sequential(Embed() if periodic else nn.Identity(), Blobs(latent * (1 + periodic), size, 16), nn.Conv2d(16, 32, 1),
                            nn.ReLU(inplace=True), nn.Conv2d(32, 32, 1), nn.ReLU(inplace=True), nn.Conv2d(32, channels, 1))
    he_(*decoder[2:])
    encoder = CentroidEncoder(channels, context, latent, periodic, dt)
    return encoder, Couplings(2 * latent) if f_psi else nn.Identity(), Separable(latent, 128, periodic), decoder


class ResidualUp(nn.Module):
    """Nearest x2 upsampling, then two 3x3 convolutions with a skip."""
    def __init__(self, channels, width):
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, width, 3, 1, 1), nn.Conv2d(width, width, 3, 1, 1)
        self.skip = nn.Conv2d(channels, width, 1) if channels != width else nn.Identity()

    def forward(self, x):
        x = F.interpolate(x, scale_factor=2)
        return F.leaky_relu(self.skip(x) + self.second(F.leaky_relu(self.first(x))))


def paper(size, channels, context, latent, f_psi, *_):
    """The paper's networks (its appendix, and the reproduction's): q and p are 16 maps of size / 8 squared, here as
    one vector each. Without f_psi its strided convolutions become the encoder's last, and z itself is the state."""
    def convs(*sizes, stride):
        layers = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Conv2d(a, b, 3, stride, 1), nn.LeakyReLU())]
        return layers[:-1]
    low = size // 8
    head = convs(channels * context, 32, *(64,) * 6, 96 if f_psi else 48, stride=1)
    tail = convs(48, 64, 64, 2 * latent if f_psi else 4 * latent, stride=2)
    last = (head if f_psi else tail)[-1]
    encoder = nn.Sequential(nn.Flatten(1, 2), *head, *(() if f_psi else (nn.LeakyReLU(), *tail, nn.Flatten())))
    f_psi = nn.Sequential(*tail, nn.Flatten()) if f_psi else nn.Identity()
    decoder = nn.Sequential(nn.Unflatten(1, (latent, low, low)), ResidualUp(latent, 64), ResidualUp(64, 64),
                            ResidualUp(64, 64), nn.Conv2d(64, channels, 3, 1, 1))
    he_(encoder, f_psi, decoder)
    last.weight.data.chunk(2)[1].mul_(0.01)              # a small posterior variance at first, as in CentroidEncoder
    last.bias.data.chunk(2)[1].fill_(-8)
    return encoder, f_psi, ConvHamiltonian(latent, low), decoder


ARCHITECTURES = {"compact": compact, "paper": paper}


def typical(x):
    """Geometric mean over a clip's frames, (B, n) -> (B, 1), as a number to compare with."""
    return x.detach().log().mean(1, keepdim=True).exp()


class HGN(nn.Module):
    """Hamiltonian Generative Network (Toth et al. 2020, section 3).

    Args:
        size: height and width of a frame, a multiple of 8 from 16 to 128. channels: of a frame.
        context: how many first frames the encoder sees (the paper: all 30; here 5).
        arch: "compact" (vector latent, separable K(p) + V(q)) or "paper" (16x4x4 latents, convolutional H).
        latent: numbers in q (compact, default 8), or feature maps in q (paper, default 16).
        integrator: "leapfrog" or "euler". substeps: integrator steps from one frame to the next.
        periodic: q are angles (compact). f_psi: False drops the network between z ~ N(0, I) and the initial state.
        deterministic: no sampling and no KL.
        dt: time between frames. background: colour that inputs are centred on and the decoder starts from.
    Raises: ValueError, with the cure, for a value outside these.
    """
    def __init__(self, size=32, channels=3, context=5, arch="compact", latent=None, integrator="leapfrog", substeps=1,
                 periodic=False, f_psi=True, deterministic=False, dt=0.125, background=(0.318, 0.345, 0.365)):
        latent = latent if latent is not None else 16 if arch == "paper" else 8
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        if size % 8 or not 16 <= size <= 128:
            raise ValueError(f"size must be a multiple of 8 from 16 to 128, not {size}")
        for name, value, known in (("arch", arch, ARCHITECTURES), ("integrator", integrator, INTEGRATORS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
        for name, value, most in (("context", context, 1000), ("latent", latent, 64), ("substeps", substeps, 1000)):
            if not 1 <= value <= most:
                raise ValueError(f"{name} must be from 1 to {most}, not {value}")
        if len(background) != channels:
            raise ValueError(f"background needs one number for each of the {channels} channels, not {len(background)}")
        self.context, self.dt, self.substeps, self.deterministic = context, dt, substeps, deterministic
        self.lead = context // 2 if arch == "compact" else 0
        self.integrate = INTEGRATORS[integrator]
        self.encoder, self.f_psi, self.H, self.decoder = ARCHITECTURES[arch](
            size, channels, context, latent, f_psi, periodic, dt)
        self.flow = isinstance(self.f_psi, Couplings)
        self.dim = latent if arch == "compact" else latent * (size // 8) ** 2      # numbers in q
        self.z_shape = (48, size, size) if arch == "paper" and f_psi else (2 * self.dim,)
        self.register_buffer("background", torch.tensor(background).view(-1, 1, 1), persistent=False)
        self.sigmoid, blank = arch == "paper", self.background.flatten()
        self.decoder[-1].weight.data.mul_(0.1)                                   # first, paint a blank background
        self.decoder[-1].bias.data.copy_(torch.logit(blank, eps=0.01) if self.sigmoid else blank)
        for module in (self.encoder, self.decoder):
            module.to(memory_format=torch.channels_last)                         # 1.3-2x on small convolutions

    def encode(self, frames):
        """frames (B, T >= context, C, size, size) -> mean and log-variance of q(z|x), each (B, *z_shape)."""
        if frames.shape[1] < self.context:
            raise ValueError(f"the encoder needs {self.context} frames, got {frames.shape[1]}: "
                             "give longer clips, or train with a smaller context")
        return self.encoder(4 * (frames[:, :self.context] - self.background)).chunk(2, 1)

    def fit_chart(self, frames):
        """Before training: start the compact encoder's coordinates from the principal components of what moves in frames
        (n, C, size, size), a few hundred of any times, so that they are of one scale, of one frequency at first, and K weighs
        alike whatever moves."""
        if isinstance(self.encoder, CentroidEncoder):
            fitted = self.encoder.fit_chart(4 * (frames - self.background))
            if fitted:
                scale, L = fitted
                self.H.K.L.data.copy_(L)
                self.H.V.L.data.copy_(torch.linalg.solve(L.T, scale.diag()))     # the frequencies of L = 1
                self.H.V.first.weight.data.copy_(self.H.V.first.weight.data @ self.H.V.L.data.T)

    def state(self, z):
        """z (B, *z_shape) -> state q, p at frame 0. The compact model infers the state at the middle of the context, where
        position and velocity are known best, and goes back from there with its own dynamics."""
        q, p = self.inferred(z)
        return tuple(x[:, -1] for x in self.rollout(q, p, self.lead, -self.dt)) if self.lead else (q, p)

    def inferred(self, z):
        """The state that z stands for, `lead` frames after frame 0: f_psi(z), or z itself where f_psi shapes the prior."""
        return (z if self.flow else self.f_psi(z)).chunk(2, 1)

    def infer(self, frames):
        """The state q, p at frame 0 of clips, taken at the posterior mean; where the compact model sees more than five frames it
        is then fitted to all of them."""
        return self.state(self.fitted(self.encode(frames)[0], frames))

    @torch.no_grad()
    def fitted(self, z, frames, rounds=8, h=0.01):
        """z (B, 2 dim) after damped Gauss-Newton steps towards the state whose rollout is nearest to the q that the chart reads in
        each context frame; of up to five frames z itself. Not to train with from the start: to whatever a wrong H does some
        state fits, and it would not learn."""
        if self.lead <= 2:
            return z
        seen, n = self.encoder.read(4 * (frames[:, :self.context] - self.background)).flatten(1), z.shape[1]
        unit = torch.eye(n, device=z.device)
        for _ in range(rounds):
            q, p = torch.cat((z.unsqueeze(1), z.unsqueeze(1) + h * unit), 1).flatten(0, 1).chunk(2, 1)        # (B (1 + n), dim)
            before, after = self.rollout(q, p, self.lead, -self.dt)[0], self.rollout(q, p, self.context - 1 - self.lead)[0]
            path = torch.cat((before.flip(1)[:, :-1], after), 1)
            path = path.flatten(1).unflatten(0, (-1, n + 1))                     # (B, 1 + n, context dim)
            off, J = seen - path[:, 0], (path[:, 1:] - path[:, :1]) / h
            off = torch.atan2(off.sin(), off.cos()) if self.encoder.periodic else off
            z = z + torch.linalg.solve_ex(J @ J.mT + unit, (J @ off.unsqueeze(2)).squeeze(2))[0]   # waits for no GPU
        return z

    def energy(self, q, p):
        """The learnt H of states (B, ...), shape (B,). It has neither a natural zero nor a natural unit."""
        return self.H(q, p)

    def rollout(self, q, p, steps, dt=None):
        """States at `steps` frames after (q, p), the start included: (B, steps + 1, ...) twice. dt: time from one
        frame to the next, by default that of training; -dt runs backward, 2 dt at double speed, in steps that are
        never longer than those of training (a tensor is taken as it is)."""
        dt = self.dt if dt is None else dt
        longer = 1 if torch.is_tensor(dt) else max(1, math.ceil(abs(dt) / self.dt - 1e-6))
        return self.integrate(self.H.dq, self.H.dp, q, p, dt, steps, longer * self.substeps, self.H.separable)

    def decode(self, q, block=256):
        """Paint q (B, T, ...) -> frames (B, T, C, size, size), all in one call. Without gradients they are cut to [0, 1], and it
        goes in blocks, so that memory beside the output stays constant."""
        def paint(q):                         # no sigmoid but in the paper's: once saturated it stays so, as one colour of mass_spring
            return torch.sigmoid(self.decoder(q)) if self.sigmoid else self.decoder(q)
        flat = q.flatten(0, 1)
        frames = paint(flat) if torch.is_grad_enabled() else torch.cat([paint(b).clamp(0, 1) for b in flat.split(block)])
        return frames.unflatten(0, q.shape[:2])

    def sample(self, n, steps, dt=None, generator=None):
        """n rollouts from the prior z ~ N(0, I): frames (n, steps + 1, C, size, size)."""
        source, target = generator.device if generator is not None else None, self.background.device
        z = torch.randn(n, *self.z_shape, generator=generator, device=source).to(target)
        z = self.f_psi(z) if self.flow else z
        return self.decode(self.rollout(*self.state(z), steps, dt)[0])

    def loss(self, frames, targets=None, times=None, reach=None, beta=1e-3, noise=None, consistency=0.3, mean=None):
        """The negative ELBO, in units of the mean squared error of a pixel.

            mse + beta * KL(q(z|x) || p(z)) / (C * size * size) [+ consistency * misfit]

        It is the paper's -(1/T) sum_t log p(x_t | q_t) + KL for a Gaussian p of variance beta / 2, divided by the
        pixels of a frame; p(z) is N(0, I), or what f_psi makes of it (compact). A fixed beta is the default because one
        value serves every system at any noise; see `GECO` for the paper's own scheme.

        Args: frames: (B, T, C, size, size); the encoder sees the first `context`. targets, times: to score other
        frames, `targets` (B, n, C, size, size) at integer `times` (B, n) counted from frame 0, negative ones before
        it; a random choice of times gives an unbiased estimate. Default: all of `frames`. reach: largest |time|
        there can be; say it, and torch.compile(model.loss, fullgraph=True) needs one compilation. beta: a number or
        a tensor. noise: of the posterior sample, N(0, I) of shape (B, *z_shape), by default drawn here.
        consistency: the compact encoder charts each scored frame by itself; weight of the distance of the rolled-out q
        from there, which unlike pixels tells H where to go however far it is off. A frame whose q is far off is painted from
        there, since it would teach the decoder nothing but to blur; if that goes wrong, it counts nothing: the chart misreads
        things that overlap. 0: none of this. mean: of q(z|x), by default the encoder's; once H is nearly right, that from
        `fitted`. The decoder then learns from no state less precise than those it is to paint, as it would blur: from the mean
        itself, and in the context's frames alone.
        Returns: loss, mse, kl (nats, mean over clips), each a scalar tensor.
        """
        encoded, logvar = self.encode(frames)
        fitted, mean = mean is not None, encoded if mean is None else mean
        z, kl = mean, mean.new_zeros(())
        if not self.deterministic:
            noise = torch.randn_like(mean) if noise is None else noise
            z = mean + (0.5 * logvar).exp() * noise
            if self.flow:                     # log q(z|x) - log p(z), whose mean is the KL
                u, log_det = self.f_psi.inverse(z)
                kl = (0.5 * (u.square() - noise.square() - logvar).sum(1) - log_det).mean()
            else:
                kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()
            z = mean if fitted else z
        if times is None:
            targets, q = frames, self.rollout(*self.state(z), frames.shape[1] - 1)[0]
        else:                                 # from where z is inferred, forward and backward in one batch of twice the size
            q, p = self.inferred(z)
            ahead, row = times - self.lead, torch.arange(2 * len(q), device=q.device)
            reach = int(ahead.abs().max()) if reach is None else reach + self.lead
            dt = torch.where(row < len(q), self.dt, -self.dt).unsqueeze(1)
            both = self.rollout(torch.cat((q, q)), torch.cat((p, p)), reach, dt)[0]      # (2B, reach + 1, ...)
            q = both[row[:len(q), None] + len(q) * (ahead < 0), ahead.abs()]             # (B, n, ...)
        misfit, far = 0.0, q.new_zeros(q.shape[:2], dtype=torch.bool)
        if consistency and isinstance(self.encoder, CentroidEncoder):
            a = self.encoder.read(4 * (targets - self.background))
            off = self.encoder.misfit(q, a)
            far = off > (4 * typical(off)).clamp(0.01, 0.1)                                     # noisy charts are off themselves
            misfit, q = torch.log1p(off).mean(), torch.where(far.unsqueeze(2), a, q)            # log: chaos weighs less
        error = (self.decode(q) - targets).square().mean((2, 3, 4))                             # (B, n)
        error = error * ~(far & (error > 30 * typical(error)))                                  # there the chart is wrong
        if fitted:
            at = torch.arange(frames.shape[1], device=q.device) if times is None else times
            seen = ((at >= 0) & (at < self.context)).float()
            error = error * seen / seen.mean().clamp(min=1e-6)
        mse = error.mean()
        return mse + beta * kl / targets[0, 0].numel() + consistency * misfit, mse, kl


class HNN(nn.Module):
    """The baseline from pixels of Greydanus et al. 2019, "Hamiltonian Neural Networks": an autoencoder of two stacked frames
    whose latent z is read as (q, p), and an H of it whose symplectic gradient is asked to be the change of z. Used like
    HGN, save that a state is (z, nothing), that z has no prior, and that the decoder sees p too.

    Args: latent: numbers in q. conv: the convolutional twin instead of MLPs. The others as for HGN.
    """
    def __init__(self, size=32, channels=3, latent=2, conv=False, dt=0.125, background=(0.318, 0.345, 0.365)):
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        if size % 8 or not 16 <= size <= 128:
            raise ValueError(f"size must be a multiple of 8 from 16 to 128, not {size}")
        self.context, self.dt, pixels = 2, dt, 2 * channels * size * size
        if conv:
            sides = (2 * channels, 32, 64, 64)
            self.encoder = nn.Sequential(*(m for a, b in zip(sides, sides[1:]) for m in (nn.Conv2d(a, b, 3, 2, 1), nn.SiLU())),
                                         nn.Flatten(), nn.Linear(64 * (size // 8) ** 2, 2 * latent))
            low, grow = size // 8, lambda a, b: (nn.Conv2d(a, b, 3, 1, 1), nn.SiLU(), nn.PixelShuffle(2))
            self.decoder = nn.Sequential(mlp(2 * latent, 128, 32 * low * low), nn.SiLU(), nn.Unflatten(1, (32, low, low)),
                                         *grow(32, 64), *grow(16, 64), *grow(16, 32), nn.Conv2d(8, 2 * channels, 3, 1, 1))
        else:
            self.encoder = nn.Sequential(nn.Flatten(), mlp(pixels, 200, 200, 2 * latent))
            self.decoder = nn.Sequential(mlp(2 * latent, 200, 200, pixels), nn.Unflatten(1, (2 * channels, size, size)))
        self.H = Energy(2 * latent, 200)
        he_(self.encoder, self.decoder)
        self.register_buffer("background", torch.tensor(background).repeat(2).view(-1, 1, 1), persistent=False)

    def encode(self, frames):                                                    # (B, T, C, H, W) -> (B, T - 1, 2 latent)
        pairs = torch.cat((frames[:, :-1], frames[:, 1:]), 2)
        return self.encoder(4 * (pairs - self.background).flatten(0, 1)).unflatten(0, pairs.shape[:2]), pairs

    def paint(self, z):                                                          # (n, 2 latent) -> (n, 2 C, H, W)
        return torch.sigmoid(self.decoder(z) + torch.logit(self.background))

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
        return torch.cat([self.paint(part).chunk(2, 1)[0] for part in z.flatten(0, 1).split(block)]).unflatten(0, z.shape[:2])

    def loss(self, frames, targets, *_):
        """targets: (B, n, C, size, size), consecutive frames. Returns loss, mse, and a zero in the place of the KL."""
        z, pairs = self.encode(targets)
        mse = F.mse_loss(self.paint(z.flatten(0, 1)), pairs.flatten(0, 1))
        change = z.diff(dim=1) / self.dt
        symplectic = F.mse_loss(self.field(z[:, :-1]), change)
        canonical = F.mse_loss(z[:, :-1].chunk(2, 2)[1], change.chunk(2, 2)[0])
        return mse + 0.1 * (symplectic + canonical), mse, mse.new_zeros(())


class GECO:
    """Rezende & Viola 2018, "Taming VAEs": minimise the KL subject to mse <= tolerance.

    Their Lagrange multiplier is 1 / beta here, which leaves the scale of the loss alone: beta shrinks while the
    moving average of the error is above the tolerance and grows while it is below. Both are bounded, so that a
    tolerance below the noise floor ends as a small fixed beta instead of diverging (the brittleness that the
    ReScience reproduction reports).
    """
    def __init__(self, tolerance=2e-4, rate=0.01, beta=1e-3, bounds=(1e-5, 1.0)):
        self.tolerance, self.rate, self.bounds, self.beta, self.mse = tolerance, rate, bounds, beta, None

    def update(self, mse):
        """Take one batch's mse (a number); returns the beta for the next step."""
        self.mse = mse if self.mse is None else 0.95 * self.mse + 0.05 * mse
        push = max(-1.0, min(1.0, math.log(self.tolerance / max(self.mse, 1e-12))))
        self.beta = min(max(self.beta * math.exp(self.rate * push), self.bounds[0]), self.bounds[1])
        return self.beta
