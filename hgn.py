"""Hamiltonian Generative Networks (Toth et al., ICLR 2020, arXiv 1909.13789). Needs only torch.

An encoder infers an abstract state (q, p) from the first frames, a learnt scalar H rolls it out
with leapfrog, and a decoder paints every frame from q alone:

    model = HGN(arch="paper")                       # 32x32 RGB, sees 5 frames
    model.fit(pictures)                             # (n, 3, 32, 32): where training starts
    loss, mse, kl = model.loss(frames)              # frames (B, T, 3, 32, 32) in [0, 1]
    q, p = model.infer(frames)                      # state at frame 0
    q, p = model.rollout(q, p, steps=90)            # (B, 91, dim); dt=-model.dt runs backward
    movie = model.decode(q)                         # (B, 91, 3, 32, 32)
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

region = torch.compiler.nested_compile_region if torch.__version__ >= "2.13" else lambda f: f


@region  # compiled once, not for every step of a rollout; torch 2.11's fails where H is autograd's
def leapfrog_step(H, q, p, here, slope, h, rounds):  # here = H.at(q); slope: about dH/dq there
    slope = slope if rounds == H.rounds else H.kick(here, p)  # the explicit form's is of this p
    for _ in range(rounds):  # towards half = p - h/2 dH/dq(q, half)
        slope = H.kick(here, p - h / 2 * slope)
    half = p - h / 2 * slope
    drift = H.drift(here, half)
    new = q + h * drift
    for _ in range(rounds):  # towards new = q + h/2 (dH/dp(q, half) + dH/dp(new, half))
        new = q + h / 2 * (drift + H.drift(H.at(new), half))
    slope = H.kick(here := H.at(new), half)
    return new, half - h / 2 * slope, here, slope


@region
def euler_step(H, q, p, here, slope, h, rounds):
    q, p = q + h * H.drift(here, p), p - h * H.kick(here, p)
    return q, p, H.at(q), p  # it needs no slope


def leapfrog(H, q, p, dt, steps, substeps=1, gamma=None, step=leapfrog_step, rounds=None):
    """Roll (q, p), (B, ...), out under dq/dt = dH/dp, dp/dt = -dH/dq by leapfrog for any H: order
    2, symplectic and reversible (Hairer, Lubich & Wanner, Geometric Numerical Integration, VI.3) as
    far as `rounds` iterations (default: H.rounds) solve its implicit lines. dt: from state to state
    in `substeps` steps of length h; negative runs backward. gamma: of friction, a tensor, p ->
    exp(-gamma h / 2) p before and after a step. Returns: q, p, (B, steps + 1, ...), from now on."""
    q, p, h = q.clone(), p.clone(), dt / substeps  # a compiled step refuses views of one tensor
    path, slope = [(q, p)], H.kick(here := H.at(q), p)
    decay = 1.0 if gamma is None else torch.exp(-gamma * h / 2)
    rounds = H.rounds if rounds is None else rounds
    for _ in range(steps):
        for _ in range(substeps):
            q, p, here, slope = step(H, q, decay * p, here, slope, h, rounds)
            p = decay * p
        path.append((q, p))
    return tuple(torch.stack(x, 1) for x in zip(*path))


# Of order 1, not symplectic: the paper's form (leapfrog, where H is separable), and its ablation.
explicit_leapfrog, euler = partial(leapfrog, rounds=0), partial(leapfrog, step=euler_step)
INTEGRATORS = {"leapfrog": leapfrog, "explicit_leapfrog": explicit_leapfrog, "euler": euler}
ARCHITECTURES = {"compact": leapfrog, "paper": explicit_leapfrog}  # of HGN, and their integrators


class Hamiltonian(nn.Module):
    """Any H(q, p): a subclass gives `forward`, (B, ...) twice -> (B,); the rest is autograd's."""

    rounds = 8  # fixed-point iterations of `leapfrog`; each gains a factor of order h; 0: separable

    def grad(self, q, p):  # dH/dq, dH/dp
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():  # 2.11 gives 0
            raise RuntimeError("autograd's forces need torch.no_grad(), not torch.inference_mode()")
        return torch.func.grad(lambda q, p: self(q, p).sum(), (0, 1))(q, p)

    # What leapfrog asks for: whatever both forces need of q, computed once per q; dH/dq; dH/dp.
    at = lambda self, q: (q,)
    kick = lambda self, here, p: self.grad(*here, p)[0]
    drift = lambda self, here, p: self.grad(*here, p)[1]


class Energy(nn.Module):  # V(x): |x L|^2 / 2, so that numbers oscillate at first, + a bounded MLP
    def __init__(self, dim, width):
        super().__init__()
        self.L = nn.Parameter(torch.eye(dim))
        self.first, self.second = nn.Linear(dim, width), nn.Linear(width, width)
        for layer in (self.first, self.second):  # torch's default is almost linear near the states
            nn.init.normal_(layer.weight, std=1.5 / layer.in_features**0.5)
            nn.init.uniform_(layer.bias, -1, 1)
        self.last = nn.Parameter(torch.randn(width) * 0.1 / width**0.5)

    def hidden(self, x):  # (..., dim) -> (..., width) twice
        tanh = lambda y: 2 * torch.sigmoid(2 * y) - 1  # on CPUs torch.tanh is far slower
        return (a := tanh(self.first(x))), tanh(self.second(a))

    def forward(self, x):  # (..., dim) -> (...)
        return 0.5 * (x @ self.L).square().sum(-1) + self.hidden(x)[1] @ self.last

    def grad(self, x, hidden=None, last=None):  # of |x L|^2 / 2 + last . b(x), (..., dim)
        (a, b), last = (hidden or self.hidden(x)), (self.last if last is None else last)
        tanh_backward = torch.ops.aten.tanh_backward  # (g, y = tanh x) -> g (1 - y^2): one kernel
        g = tanh_backward(tanh_backward(last.expand_as(b), b) @ self.second.weight, a)
        return F.linear(x @ self.L, self.L) + g @ self.first.weight


def chain(*sizes, layer=nn.Linear, activation=nn.ReLU, flat=False, **options):
    """layer(sizes[0], sizes[1]), activation(), ... and last a layer, which with `flat` is zero."""
    layers = [m for ab in zip(sizes, sizes[1:]) for m in (layer(*ab, **options), activation())]
    [nn.init.zeros_(w) for w in layers[-2].parameters() if flat]
    return nn.Sequential(*layers[:-1])


def conv(inputs, outputs, kernel_size=3, **options):  # padded; initialised as by He et al.
    layer = nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2, **options)
    nn.init.kaiming_normal_(layer.weight)  # by torch's, HGN paints the mean for over 1,000 steps
    nn.init.zeros_(layer.bias)
    return layer


convs = partial(chain, layer=conv, activation=nn.LeakyReLU)
mlp = partial(chain, activation=nn.SiLU, flat=True)  # zero at first: bends what is linear


class StandardNormal(nn.Identity):  # the paper's prior, N(0, I), of z (B, ...), which noise is
    def kl(self, z, mean, logvar):  # KL(q(z|x) || p(z)) of each clip, nats, (B,)
        return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)


class Couplings(nn.Module):  # a learnt prior of z (B, dim): N(0, I) through RealNVP's, Dinh et al.
    def __init__(self, dim, layers=8, width=64):
        super().__init__()
        self.register_buffer("masks", (torch.arange(dim) + torch.arange(layers)[:, None]) % 2.0)
        self.nets = nn.ModuleList(chain(dim, width, width, 2 * dim) for _ in range(layers))

    forward = lambda self, u: self.inverse(u, order=-1)[0]  # (B, dim) -> (B, dim)

    def inverse(self, z, order=1, context=()):  # -> u, that -order takes to z, log |det du/dz|
        log_det, context = 0, context or [0.0] * len(self.nets)  # added before the first ReLU
        for net, mask, c in list(zip(self.nets, self.masks, context))[::order]:
            log_s, t = (net[1:](net[0](mask * z) + c) * (1 - mask).repeat(2)).chunk(2, -1)
            log_s = 2 * torch.tanh(log_s / 2)
            z = z * log_s.exp() + t if order == 1 else (z - t) * (-log_s).exp()
            log_det = log_det + log_s.sum(-1)
        return z, log_det

    def kl(self, z, mean, logvar):  # log q(z|x) - log p(z) at a z ~ q(z|x): its mean is the KL
        u, log_det = self.inverse(z)
        return 0.5 * (u.square() - (z - mean).square() / logvar.exp() - logvar).sum(1) - log_det


# ------------------------------------------------------------------ the paper's networks (appendix)
class PaperEncoder(nn.Module):
    """Frames, less their median and times 4 as most of a picture is ground, stacked along channels
    -> eight convolutions -> q(z|x), 48 maps; with the ablation's `tail`, f_psi's, the state."""

    def __init__(self, size, channels, context, tail=()):
        super().__init__()
        self.lead = 0  # the frame whose state z stands for
        self.still = nn.Buffer(torch.zeros(channels, size, size))
        self.convs = nn.Sequential(*convs(channels * context, 32, *(64,) * 6, 96), *tail)
        last = self.convs[-1]  # at first the variance is exp(-8): with that of the prior the
        last.weight.data.chunk(2)[1].mul_(0.01)  # decoder would see nothing but noise
        last.bias.data.chunk(2)[1].fill_(-8)

    def fit(self, frames):
        self.still.copy_(frames.median(0).values)

    def forward(self, frames):  # (B, context, C, H, W) -> mean and log-variance of z
        return self.convs(4 * (frames - self.still).flatten(1, 2)).chunk(2, 1)


class PaperPsi(nn.Sequential):
    """f_psi: z -> q and p, maps of an eighth of the size, as vectors; without layers z is both."""

    def forward(self, z):  # (B, 48 maps, or those of q and p, H, W) -> (B, dim) twice
        return super().forward(z).flatten(1).chunk(2, 1)


class PaperHamiltonian(Hamiltonian):
    """Six 3x3 convolutions, summed over space. Softplus: ReLU's forces are piecewise constant."""

    def __init__(self, maps, side, width=64):
        super().__init__()
        plain = partial(nn.Conv2d, kernel_size=3, padding=1)  # as torch starts it, forces are small
        self.convs = convs(2 * maps, *[width] * 5, 1, layer=plain, activation=nn.Softplus)
        self.shape = (2 * maps, side, side)

    def forward(self, q, p):  # (B, dim) twice -> (B,)
        return self.convs(torch.cat((q, p), 1).unflatten(1, self.shape)).sum((1, 2, 3))


class ResidualUp(nn.Module):  # nearest x2 upsampling, then two 3x3 convolutions with a skip
    def __init__(self, channels, width):
        super().__init__()
        self.first, self.second = conv(channels, width), conv(width, width)
        self.skip = conv(channels, width, 1) if channels != width else nn.Identity()

    def forward(self, x):
        x = F.interpolate(x, scale_factor=2)
        return F.leaky_relu(self.skip(x) + self.second(F.leaky_relu(self.first(x))))


class PaperDecoder(nn.Sequential):
    """Three residual blocks that double the size, and a sigmoid: q (n, dim) -> (n, C, H, W)."""

    def __init__(self, size, channels, maps):
        blocks = (ResidualUp(n, 64) for n in (maps, 64, 64))
        low = nn.Unflatten(1, (maps, size // 8, size // 8))
        super().__init__(low, *blocks, conv(64, channels), nn.Sigmoid())
        self[-2].weight.data.mul_(0.1)  # at first, paint one colour

    def fit(self, frames):
        self[-2].bias.data.copy_(torch.logit(frames.mean((0, 2, 3)), eps=0.01))


# ------------------------------------------------------------------ the compact networks
FAR = 50.0  # forces count q and p as no farther: no mechanics there, but all stays finite
FRAME = 0.125  # time from frame to frame inside: what is learnt does not depend on the unit of dt


class Space:  # of q (..., dim): angles, which networks see as sines and cosines, then numbers
    def __init__(self, dim, angles):
        self.dim, self.seen, self.parts = dim, dim + angles, (angles, angles, dim - angles)

    def see(self, q):  # -> x (..., seen)
        angles, numbers = q.split(self.parts[1:], -1)
        return torch.cat((angles.sin(), angles.cos(), numbers.clamp(-FAR, FAR)), -1)

    def read(self, x):  # the way back
        sin, cos, numbers = x.split(self.parts, -1)
        return torch.cat((torch.atan2(sin, cos), numbers.clamp(-FAR, FAR)), -1)

    def pull(self, g, x):  # a gradient with respect to x = see(q) -> to q
        (sin, cos, _), (g_sin, g_cos, g) = (t.split(self.parts, -1) for t in (x, g))
        return torch.cat((g_sin * cos - g_cos * sin, g), -1)


class CompactEncoder(nn.Module):
    """Every frame by itself -> its q (`read`, the chart), a linear map plus an MLP of mass, centre
    and inertia of what each learnt filter sees. A few in a row -> q(z|x), z = (q, dq/dt) at the
    middle one: a polynomial through their q, plus an MLP; its variance is constant."""

    def __init__(self, size, channels, context, space, filters=48, hidden=24):
        super().__init__()
        self.lead, self.space, self.side = context // 2, space, min(size, 32)
        self.filters = nn.Sequential(conv(channels, hidden), nn.SiLU(), conv(hidden, filters, 1))
        features, seen, dim = 6 * filters, space.seen, space.dim
        self.linear, self.bent = nn.Linear(features, seen), mlp(features, 128, 128, seen)
        self.mean, self.var = nn.Buffer(torch.zeros(features)), nn.Buffer(torch.ones(features))
        self.still = nn.Buffer(torch.zeros(channels, size, size))
        time = FRAME * torch.arange(-self.lead, context - self.lead).double().unsqueeze(1)
        self.poly = nn.Buffer(torch.linalg.pinv(time ** torch.arange(min(context, 7)))[:2].float())
        self.correct = mlp(context * seen + 2 * dim, 128, 128, 2 * dim)
        self.logvar = nn.Parameter(torch.full((2 * dim,), -1.2))

    def features(self, frames):  # (n, C, H, W) -> (n, features)
        frames = F.adaptive_avg_pool2d(4 * (frames - self.still), self.side)
        side = torch.linspace(-1, 1, self.side, dtype=frames.dtype, device=frames.device)
        x, y = (x.flatten() for x in torch.meshgrid(side, side, indexing="xy"))  # (H W,)
        powers = torch.stack((torch.ones_like(x), x, y, x * x, x * y, y * y))
        seen = self.filters(frames).movedim(1, 3).flatten(1, 2)  # (n, H W, filters)
        mass, *moments = (powers @ (seen * seen)).unbind(1)  # square() has a slow backward
        x, y, xx, xy, yy = (moment / (mass + 0.01) for moment in moments)
        return torch.cat(((mass + 1).log(), x, y, xx - x * x, xy - x * y, yy - y * y), 1)

    def fit(self, frames):
        self.still.copy_(frames.median(0).values)
        F.batch_norm(self.features(frames), self.mean, self.var, training=True, momentum=1.0)

    def read(self, frames):  # (B, n, C, H, W) -> (B, n, latent), of each frame by itself
        y = F.batch_norm(self.features(frames.flatten(0, 1)), self.mean, self.var, eps=1e-4)
        return self.space.read(self.linear(y) + self.bent(y)).unflatten(0, frames.shape[:2])

    def forward(self, frames):  # (B, context, C, H, W) -> (B, 2 latent) twice
        e = self.read(frames)
        step = self.space.read(self.space.see(e.diff(dim=1)))  # of angles the short way round
        moved = F.pad(step.cumsum(1), (0, 0, 1, 0))  # since the first
        place, velocity = (self.poly @ moved).clamp(-10, 10).unbind(1)  # bad charts send none far
        seen = torch.cat((self.space.see(e).flatten(1), moved[:, -1], velocity), 1)
        z = torch.cat((e[:, 0] + place, velocity), 1) + self.correct(seen)
        return z, (10 * self.logvar).expand_as(z)  # Adam moves it ten times as fast


class CompactHamiltonian(Hamiltonian):
    """H(q, p) = p^T M(q)^-1 p / 2 + V(q), the form of every natural mechanical system in all
    coordinates: for Q = f(q) of Jacobian J, M' = J^-T M J^-1, so q may bend. M^-1 = W diag(s) W^T +
    0.3 I, s = 2 sigmoid(b(q) S), b the hidden units of V; S starts at zero, M constant."""

    rounds = property(lambda self: 2 if self.training else 6)  # with one, H learns its error

    def __init__(self, space, width=128):
        super().__init__()
        self.V, self.space, dim = Energy(space.seen, width), space, space.dim
        self.W = nn.Parameter(torch.cat((torch.eye(dim), 0.3 * torch.randn(dim, 3 * dim)), 1))
        self.S = nn.Parameter(torch.zeros(width, 4 * dim))

    def forward(self, q, p):  # (B, dim) twice -> (B,)
        return 0.5 * (p * self.drift(self.at(q), p)).sum(1) + self.V(self.space.see(q))

    def at(self, q):
        x = self.space.see(q)
        a, b = self.V.hidden(x)
        return x, a, b, 2 * torch.sigmoid(b @ self.S)

    def kick(self, here, p):
        x, a, b, s = here
        K = 0.5 * (p.clamp(-FAR, FAR) @ self.W).square() * s  # kinetic energy along each of W
        last = self.V.last + F.linear(K * (1 - s / 2), self.S)
        return self.space.pull(self.V.grad(x, (a, b), last), x)

    def drift(self, here, p):  # M^-1 p
        return 0.3 * p + F.linear(p @ self.W * here[3], self.W)

    def momentum(self, z):  # f_psi, the Legendre transform: z = (q, dq/dt) -> q and p = M(q) dq/dt
        q, v = z.chunk(2, 1)
        M_inverse = (self.W * self.at(q)[3].unsqueeze(1)) @ self.W.T + torch.diag_embed(0.3 + 0 * v)
        return q, torch.linalg.solve_ex(M_inverse, v.unsqueeze(2))[0].squeeze(2)  # GPUs don't wait


class CompactDecoder(nn.Module):
    """A picture that a small MLP of q paints, at first the still one, plus what 1x1 convolutions
    make, pixel by pixel, of Gaussians h exp(-dy^2 / 2 - (dx + b dy)^2 / 2), dx = a (x - at_x), dy =
    c (y - at_y), of which at_x, at_y, log a, log c, b, log h are a linear map of q plus an MLP."""

    def __init__(self, size, channels, space, blobs=20, width=24):
        super().__init__()
        self.shape, self.space, seen = (channels, size, size), space, space.seen
        self.finest = 3 + math.log(size / 32)  # 0.8 pixels
        self.whole = mlp(seen, 16, channels * size * size)
        self.linear, self.bent = nn.Linear(seen, 6 * blobs), mlp(seen, 128, 128, 6 * blobs)
        self.linear.bias.data[2 * blobs : 4 * blobs] += 1.5  # at first of a ninth of the picture
        self.paint = convs(blobs, width, width, channels, kernel_size=1)
        self.paint[-1].weight.data.mul_(0.1)  # at first, hardly anything

    def fit(self, frames):
        self.whole[-1].bias.copy_(frames.median(0).values.flatten())

    def blobs(self, q, x, y):  # (n, seen), (w,), (h,) -> (n, blobs, h, w), channels_last
        shapes = (self.linear(q) + self.bent(q)).unflatten(1, (6, -1))
        at_x, at_y, log_a, log_c, b, log_h = shapes.unsqueeze(2).unbind(1)  # (n, 1, blobs) each
        dx = log_a.clamp(-2, self.finest).exp() * (x[:, None] - at_x.clamp(-3, 3))  # (n, w, blobs)
        dy = log_c.clamp(-2, self.finest).exp() * (y[:, None] - at_y.clamp(-3, 3))  # (n, h, blobs)
        turned = dx.unsqueeze(1) + (b.clamp(-3, 3) * dy).unsqueeze(2)  # (n, h, w, blobs)
        log_h = log_h.clamp(max=2) - 0.5 * dy.square()
        return (log_h.unsqueeze(2) - 0.5 * turned.square()).exp().movedim(3, 1)

    def forward(self, q, rows=slice(None), columns=slice(None)):  # (n, latent) -> (n, C, h, w)
        q, side = self.space.see(q), torch.linspace(-1, 1, self.shape[1], device=q.device).to(q)
        whole = self.whole(q).unflatten(1, self.shape)[:, :, rows][..., columns]
        return whole + self.paint(self.blobs(q, side[columns], side[rows]))


# ------------------------------------------------------------------ HGN (section 3)
def check(config, known):  # raises ValueError where an option is not among its known values
    for name, values in known.items():
        if config[name] not in values:
            raise ValueError(f"{name} must be in {values}, not {config[name]!r}")


class HGN(nn.Module):
    """Hamiltonian Generative Network (Toth et al. 2020, section 3).

    size: of frames in pixels, 16, 24, ... 128. context: first frames that the encoder sees. arch:
    "compact" (vectors) or "paper" (the published networks). latent: numbers in q (compact, default
    6) or maps in q (paper, 16). integrator: of INTEGRATORS; None: as in ARCHITECTURES. substeps:
    its steps a frame. periodic: q are angles or, False, numbers (compact; None: half and half).
    f_psi: False is the paper's ablation, z itself is the state. deterministic: no sampling of z, no
    KL. friction: learn gamma of p -> exp(-gamma t) p. dt: between frames. Raises: ValueError."""

    def __init__(
        self, size=32, channels=3, context=5, arch="compact", latent=None, integrator=None,
        substeps=1, periodic=None, f_psi=True, deterministic=False, friction=False, dt=0.125,
    ):  # fmt: skip
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        check(self.config, {
            "arch": [*ARCHITECTURES], "size": range(16, 129, 8), "channels": range(1, 5),
            "context": range(2, 1001), "latent": range(1, 65) if latent is not None else [None],
            "substeps": range(1, 1001), "integrator": [None, *INTEGRATORS],
        })  # fmt: skip
        if not 0 < dt < math.inf:
            raise ValueError(f"dt must be above 0, not {dt}: a negative dt goes to rollout")
        if periodic and arch == "paper" or not f_psi and arch == "compact":
            raise ValueError("periodic needs arch compact, f_psi=False (--no-f-psi) arch paper")
        self.context, self.dt, self.deterministic = context, dt, deterministic
        self.integrate = INTEGRATORS.get(integrator, ARCHITECTURES[arch])
        if arch == "paper":
            maps, low = latent or 16, size // 8
            tail = () if f_psi else (nn.LeakyReLU(), *convs(96, 64, 64, 4 * maps, stride=2))
            self.encoder = PaperEncoder(size, channels, context, tail)
            self.f_psi = PaperPsi(*convs(48, 64, 64, 2 * maps, stride=2) if f_psi else ())
            self.H, self.decoder = PaperHamiltonian(maps, low), PaperDecoder(size, channels, maps)
            self.prior = StandardNormal()
            self.z_shape = (48, size, size) if f_psi else (2 * maps, low, low)
        else:  # z = (q, dq/dt)
            dim = latent or 6
            space = Space(dim, dim // 2 if periodic is None else dim * periodic)
            self.encoder = CompactEncoder(size, channels, context, space)
            self.H, self.decoder = CompactHamiltonian(space), CompactDecoder(size, channels, space)
            self.f_psi, self.prior = self.H.momentum, Couplings(2 * space.dim)
            self.z_shape = (2 * space.dim,)
        self.log_gamma = nn.Parameter(torch.tensor(-3.0)) if friction else None
        for part in (self.encoder, self.decoder):  # 1.3-2x on small convolutions
            part.to(memory_format=torch.channels_last)

    # The friction learnt, of p -> exp(-gamma t) p, or None, in units in which dt is FRAME.
    gamma = property(lambda self: None if self.log_gamma is None else self.log_gamma.exp())
    energy = property(lambda self: self.H)  # energy(q, p), (B,): its zero and unit mean nothing

    @torch.no_grad()
    def fit(self, frames):
        """Before training: take what needs no learning from some hundred frames (n, C, H, W)."""
        self.encoder.fit(self.valid(frames[None], least=2)[0])
        self.decoder.fit(frames)

    def valid(self, frames, least=1):
        """The frames (B, T, C, size, size). Raises: ValueError if not floats, or T < least."""
        C, S, shape = self.config["channels"], self.config["size"], frames.shape
        if shape[2:] != (C, S, S) or shape[1] < least or not frames.is_floating_point():
            want = f"floats in [0, 1], (B, {least} or more, {C}, {S}, {S})"
            raise ValueError(f"frames must be {want}, not {frames.dtype} {[*frames.shape]}")
        return frames

    def encode(self, frames):
        """frames (B, T >= context, C, size, size) -> mean and log-variance of q(z|x)."""
        return self.encoder(self.valid(frames, self.context)[:, : self.context])

    def posterior(self, frames, noise=None):
        """z ~ q(z|x), and the KL to the prior, by this z if it is learnt: nats, mean over clips."""
        mean, logvar = self.encode(frames)
        if self.deterministic:
            return mean, mean.new_zeros(())
        z = mean + (0.5 * logvar).exp() * (torch.randn_like(mean) if noise is None else noise)
        return z, self.prior.kl(z, mean, logvar).mean()

    def state(self, z):
        """z (B, ...) -> q, p at frame 0, back from the frame whose state the encoder infers."""
        return tuple(x[:, -1] for x in self.rollout(*self.f_psi(z), self.encoder.lead, -self.dt))

    def infer(self, frames):
        """q, p at frame 0, of the mean of q(z|x): (B, dim) twice."""
        return self.state(self.encode(frames)[0])

    def rollout(self, q, p, steps, dt=None):
        """(q, p) and the states at `steps` frames after it: (B, steps + 1, ...) twice. dt: from
        frame to frame; -model.dt runs backward, twice it at double speed, in steps no longer."""
        frames = 1.0 if dt is None else dt / self.dt
        substeps = self.config["substeps"] * max(1, math.ceil(abs(frames) - 1e-6))
        return self.integrate(self.H, q, p, FRAME * frames, steps, substeps, self.gamma)

    def decode(self, q, block=512):  # pictures at a time
        """Paint q (B, T, ...): frames (B, T, C, size, size); without gradients cut to [0, 1]."""
        x = torch.cat([*map(self.decoder, q.flatten(0, 1).split(block))]).unflatten(0, q.shape[:2])
        return x if torch.is_grad_enabled() else x.clamp_(0, 1)

    @torch.no_grad()
    def sample(self, n, steps, dt=None, generator=None):
        """n rollouts from the prior: frames (n, steps + 1, C, size, size) in [0, 1]."""
        if self.deterministic:
            raise ValueError("a deterministic model has no prior to draw samples from")
        where = getattr(generator, "device", None)
        u = torch.randn(n, *self.z_shape, generator=generator, device=where)
        z = self.prior(u.to(next(self.parameters())))
        return self.decode(self.rollout(*self.state(z), steps, dt)[0])

    def loss(self, frames, beta=1e-3, noise=None):
        """The negative ELBO, -(1/T) sum_t log p(x_t|q_t) + KL (equation 5), p(x|q) Gaussian, of
        variance beta / 2, up to a constant, times beta / (C S S). All of frames (B, T, C, S, S) are
        scored, the first `context` seen. noise: of z, N(0, I). Returns: loss, mse, kl (nats)."""
        z, kl = self.posterior(frames, noise)
        q, p = self.rollout(*self.state(z), frames.shape[1] - 1)
        mse = (self.decode(q) - frames).square().mean()
        return mse + beta * kl / frames[0, 0].numel(), mse, kl


class GECO:
    """Rezende & Viola 2018: least KL subject to mse <= tolerance. beta, their multiplier's inverse,
    grows by (tolerance / moving average of mse)^rate a step (theirs: by the difference)."""

    def __init__(self, tolerance=2e-4, rate=0.01, beta=1e-3, bounds=(1e-5, 1.0), device=None):
        self.tolerance, self.rate, self.bounds = tolerance, rate, bounds
        self.beta, self.mse = torch.tensor([beta, tolerance], device=device).unbind()

    def update(self, mse):  # after a step, with its batch's mse, a tensor: changes beta, in place
        self.mse.lerp_(torch.where(mse.isfinite(), mse.detach().to(self.mse), self.mse), 0.05)
        push = (self.tolerance / self.mse.clamp(min=1e-12)).log().clamp(-1, 1)
        self.beta.mul_((self.rate * push).exp()).clamp_(*self.bounds)


# ------------------------------------------------------------------ the compact model's recipe
def charted_loss(model, context, targets, times, reach, beta=1e-3, noise=None):
    """The compact model's loss, in units of E, a blank prediction's error:

        r(mse / E, 0.1) + beta KL / (C size size E)     the ELBO, but r(x, c) = c log(1 + x / c)
        + chart mse / E                                 of a few frames painted from `read`
        + r(|q - read|^2 / var read, 0.01)              the rollout stays near them

    context: (B, context, C, size, size). targets: (B, n, C, size, size), at times (B, n), integers
    up to `reach`, from context's first frame. Returns: sum, mse of pixels scored, kl."""
    space, size = model.encoder.space, model.valid(targets).shape[-1]
    blank = targets.flatten(0, 1).var(0, correction=0).mean() + 1e-12
    stride = 1 if size < 32 else 2 if size < 64 else 4

    def error(q):  # of pictures from q (B, n, latent) on some rows, columns, over blank's: (B, n)
        first = torch.randint(stride, (2, 1), device=q.device)
        rows, columns = first + torch.arange(0, size, stride, device=q.device)
        painted = model.decoder(q.flatten(0, 1), rows, columns).unflatten(0, q.shape[:2])
        truth = targets[:, : q.shape[1], :, rows][..., columns]
        return (painted - truth).square().mean((2, 3, 4)) / blank

    z, kl = model.posterior(context, noise)
    q = model.rollout(*model.state(z), reach)[0].take_along_dim(times[..., None], 1)  # (B, n, dim)
    e = model.encoder.read(targets[:, : 1 + targets.shape[1] // 8])  # more teaches little more
    off = space.read(space.see(q[:, : e.shape[1]] - e)).square().mean(2)  # angles the short way
    off = off / (e.detach().flatten(0, 1).var(0, correction=0).mean() + 1e-12)
    robust = lambda x, tolerance: tolerance * torch.log1p(x / tolerance).mean()
    elbo = robust(far := error(q), 0.1) + beta * kl / context[0, 0].numel() / blank  # negative
    return elbo + error(e).mean() + robust(off, 0.01), far.mean() * blank, kl
