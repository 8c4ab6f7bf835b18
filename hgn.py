"""Hamiltonian Generative Networks (Toth et al., ICLR 2020, arXiv 1909.13789).

This file needs only torch, 2.11 or later.

An encoder infers an abstract state (q, p) from the first frames of a clip, a learnt scalar H rolls
the state out in time, and a decoder paints every frame from q alone:

    model = HGN(arch="paper")                  # 32 x 32 RGB pictures, the encoder sees 5 frames
    model.init_from_data(pictures)             # (n, 3, 32, 32) in [0, 1], once before training
    loss, mse, kl = model.loss(frames)         # frames (B, T, 3, 32, 32); compact: `charted_loss`
    q, p = model.infer(frames)                 # the state at frame 0, (B, dim) each
    q, p = model.rollout(q, p, steps=90)       # (B, 91, dim) each; dt=-model.dt runs backward
    movie = model.decode(q)                    # (B, 91, 3, 32, 32)
    model.save("mine.pt")
    model = HGN.load("mine.pt")

The first half of this file is the paper's model, in the paper's order; what the paper leaves open,
such as the initialisation, and what differs is said where it stands. The second half is the compact
model, which is the default: other networks and another loss behind the same interface.
"""

import functools
import io
import itertools
import math
import os
import zipfile

import torch
import torch.nn.functional as F
from torch import nn

__version__ = "1.5"  # of all files here; it goes up where what is computed changes


def compiled_once(step):
    """Let torch.compile compile `step` once instead of unrolling each of its calls."""
    # This compares numbers, not strings. Before 2.13 a nested region fails where autograd
    # differentiates H in it.
    if torch.__version__ >= "2.13":
        region = torch.compiler.nested_compile_region(step)
        return functools.wraps(step)(region)  # else it has no help and cannot be pickled
    return step


# ==================================================================================================
# First half: the paper's model
# ==================================================================================================

# ------------------------------------------------------------- Hamiltonian dynamics (section 2.1)


@compiled_once
def leapfrog_step(H, q, p, h):
    """Take one explicit leapfrog step of length h, the paper's equation (2).

    For a separable H(q, p) = K(p) + V(q), such as a `SeparableHamiltonian`, it is symplectic,
    reversible and of order 2. For any other H it is only of order 1, and neither symplectic nor
    reversible: use `implicit_leapfrog_step` instead.
    q, p: (B, ...). Returns: q, p after the step.
    """
    p = p - h / 2 * H.grad_q(q, p)
    q = q + h * H.grad_p(q, p)
    p = p - h / 2 * H.grad_q(q, p)
    return q, p


@compiled_once
def euler_step(H, q, p, h):
    """Take one explicit Euler step of length h, the paper's ablation. It has order 1."""
    return q + h * H.grad_p(q, p), p - h * H.grad_q(q, p)


def rollout(H, q, p, dt, steps, step=leapfrog_step, substeps=1, gamma=None):
    """Follow dq/dt = dH/dp, dp/dt = -dH/dq from the state (q, p).

    Args:
        H: a `Hamiltonian`.
        q, p: (B, ...).
        dt: time from one returned state to the next; a negative dt runs backward.
        step: `leapfrog_step` for a separable H(q, p) = K(p) + V(q), best written as a
            `SeparableHamiltonian`; `implicit_leapfrog_step` for any other H.
        steps: number of states after the given one.
        substeps: how many calls of `step` a dt is divided into.
        gamma: coefficient of friction, a scalar tensor, or None. p is multiplied by
            exp(-gamma h / 2) before and after each step of length h.
    Returns: q, p, each (B, steps + 1, ...), the given state first.
    """
    h = dt / substeps
    decay = 1.0 if gamma is None else torch.exp(-gamma * h / 2)
    path_q = [q]
    path_p = [p]
    cache = ()  # what an implicit step hands to the next one
    for _ in range(steps):
        for _ in range(substeps):
            q, p, *cache = step(H, q, decay * p, h, *cache)
            p = decay * p
        path_q.append(q)
        path_p.append(p)
    return torch.stack(path_q, 1), torch.stack(path_p, 1)


def gradient(energy, argument, *state):
    """Differentiate energy(*state), (B,), with respect to state[argument] by autograd.

    Raises: RuntimeError in inference mode.
    """
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        # Some versions of torch return zero here without an error.
        raise RuntimeError("the gradients of H need torch.no_grad(), not inference_mode()")

    # Elements of the batch are independent, so the gradient of the sum holds all their gradients.
    def total(*state):
        return energy(*state).sum()

    return torch.func.grad(total, argument)(*state)


class Hamiltonian(nn.Module):
    """Any scalar H(q, p): a subclass writes `forward`, (B, ...) twice -> (B,).

    It suits `implicit_leapfrog_step`. The gradients are computed by autograd unless a subclass
    overrides `grad_q` and `grad_p`. It may also override `features`: `implicit_leapfrog_step`
    passes its result to both of them and reuses it while q does not change; the explicit steps
    pass None.
    """

    iterations = 8  # of each implicit equation; an iteration gains a factor of the order of h

    def features(self, q):
        """Whatever `grad_q` and `grad_p` both need of q alone."""
        return None

    def grad_q(self, q, p, features=None):
        """dH/dq at (q, p), of the shape of q."""
        return gradient(self, 0, q, p)

    def grad_p(self, q, p, features=None):
        """dH/dp at (q, p), of the shape of p."""
        return gradient(self, 1, q, p)


class SeparableHamiltonian(Hamiltonian):
    """H(q, p) = kinetic(p) + potential(q): a subclass writes these two, (B, ...) -> (B,).

    It suits `leapfrog_step`, whose gradients are two of `potential` and one of `kinetic`.
    """

    def forward(self, q, p):
        """q, p (B, ...) -> H (B,)."""
        return self.kinetic(p) + self.potential(q)

    def grad_q(self, q, p, features=None):
        return gradient(self.potential, 0, q)

    def grad_p(self, q, p, features=None):
        return gradient(self.kinetic, 0, p)


# ------------------------------------------------------------------------------- building blocks


def conv(inputs, outputs, kernel_size=3, stride=1):
    """A padded convolution with the initialisation of He et al. (2015).

    With torch's own initialisation HGN paints the mean picture for over 1,000 steps.
    """
    layer = nn.Conv2d(inputs, outputs, kernel_size, stride, padding=kernel_size // 2)
    nn.init.kaiming_normal_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def stack(*sizes, layer=conv, activation=nn.LeakyReLU, **options):
    """Layers from each of the sizes to the next, with an activation between each two."""
    modules = []
    for inputs, outputs in itertools.pairwise(sizes):
        modules.append(layer(inputs, outputs, **options))
        modules.append(activation())
    return nn.Sequential(*modules[:-1])


# ------------------------------------------------------------ encoder, prior and f_psi (section 3)


class Encoder(nn.Module):
    """What every encoder q(z|x) shares: it sees how pictures differ from their median.

    Most of a picture is background. The paper's encoder sees the pictures as they are.
    """

    reference_frame = 0  # of the context: z gives the state at this frame
    contrast = 4.0  # brings the difference to the background to about unit size
    angles = 0  # how many of q are angles; these come first

    def __init__(self, size, channels):
        super().__init__()
        self.background = nn.Buffer(torch.zeros(channels, size, size))

    def init_from_data(self, pictures):
        self.background.copy_(pictures.median(0).values)

    def foreground(self, pictures):
        """Pictures (..., C, H, W) -> their difference to the background, of about unit size."""
        return self.contrast * (pictures - self.background)


class PaperEncoder(Encoder):
    """q(z|x): eight convolutions over the frames of the context, stacked along channels.

    The paper's context is the whole clip; the default of `HGN` is five frames.
    reduction: further layers after the eight, for the ablation without f_psi.
    """

    def __init__(self, size, channels, context, reduction=()):
        super().__init__(size, channels)
        layers = stack(channels * context, 32, 64, 64, 64, 64, 64, 64, 96)
        self.convs = nn.Sequential(*layers, *reduction)
        # The variance starts at exp(-8): with a variance of one the decoder would see only noise.
        last = self.convs[-1]
        half = last.out_channels // 2
        last.weight.data[half:] *= 0.01
        last.bias.data[half:] = -8

    def forward(self, frames):
        """frames (B, context, C, H, W) -> mean and log-variance of z, (B, maps, H, W) each."""
        x = self.foreground(frames).flatten(1, 2)  # (B, context * C, H, W)
        return self.convs(x).chunk(2, 1)


class Prior(nn.Module):
    """What every prior p(z) shares: z is drawn from q(z|x) by reparametrisation."""

    def draw(self, mean, logvar, noise=None):
        """z ~ q(z|x), made of `noise` ~ N(0, I), which is drawn where none is given."""
        if noise is None:
            noise = torch.randn_like(mean)
        return mean + (0.5 * logvar).exp() * noise


class StandardNormal(Prior):
    """The paper's prior, N(0, I)."""

    def kl(self, z, mean, logvar):
        """KL(q(z|x) || p(z)) of each clip in nats, (B,)."""
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
        return kl.flatten(1).sum(1)

    def from_noise(self, noise):
        """A draw from the prior, made of noise ~ N(0, I)."""
        return noise


class Deterministic(Prior):
    """The paper's deterministic ablation: z is the mean of q(z|x), and nothing can be sampled."""

    def draw(self, mean, logvar, noise=None):
        return mean

    def kl(self, z, mean, logvar):
        return mean.new_zeros(len(mean))

    def from_noise(self, noise):
        raise ValueError("a deterministic model has no prior to draw samples from")


class PaperPsi(nn.Sequential):
    """f_psi: z -> (q, p), three convolutions of stride 2.

    Without layers it is the paper's ablation without f_psi, where z is the state itself.
    """

    def forward(self, z):
        """z (B, maps, H, W) -> q and p as vectors, (B, dim) each."""
        state = super().forward(z)  # (B, 2 * maps of q, H / 8, W / 8)
        return state.flatten(1).chunk(2, 1)


# -------------------------------------------------------------- Hamiltonian and decoder (appendix)


class PaperHamiltonian(Hamiltonian):
    """Six convolutions over the maps of q and p, summed over space.

    The activation is softplus: the forces of a ReLU network would be piecewise constant.
    The paper does not give the initialisation. Here H starts as a sum over all numbers x in q and p
    of c (f(x) + f(-x)), where f is softplus applied five times and c is how many windows of the
    last convolution see the place of x in its map, four to nine. In this bowl each number in q
    oscillates by itself, with a period of 20 to 45 frames. With random weights H would start almost
    linear, and q would move along a straight line, which tells the time rather than the state.
    """

    def __init__(self, maps, side):
        super().__init__()
        self.shape = (2 * maps, side, side)
        width = max(64, 4 * maps)  # the published 64 suffice for the published 16 maps
        self.convs = stack(2 * maps, width, width, width, width, width, 1, activation=nn.Softplus)
        for layer in self.convs[::2]:
            nn.init.dirac_(layer.weight)  # each map to itself
        weight = self.convs[0].weight.data
        weight[width // 2 :] = -weight[: width // 2]  # and its negative
        self.convs[-1].weight.data.fill_(1.0)

    def forward(self, q, p):
        """q, p (B, dim) -> H (B,)."""
        maps = torch.cat((q, p), 1).unflatten(1, self.shape)
        return self.convs(maps).sum((1, 2, 3))


def upsampled_conv(layer, x):
    """Upsample x by two, nearest neighbour, and convolve: (n, C, H, W) -> (n, C', 2 H, 2 W).

    Taps of the 3x3 kernel that see the same pixel of x are added first. The sums are the kernel
    of a transposed convolution, which takes 4/9 of the multiplications.
    """
    kernel = 4 * F.avg_pool2d(layer.weight, 2, stride=1, padding=1)  # sums of 2x2: (C', C, 4, 4)
    kernel = kernel.flip(2, 3).transpose(0, 1)  # (C, C', 4, 4)
    return F.conv_transpose2d(x, kernel, layer.bias, stride=2, padding=1)


class ResidualUp(nn.Module):
    """Upsample by two, then add two 3x3 convolutions to a skip connection."""

    def __init__(self, channels, width):
        super().__init__()
        self.first = conv(channels, width)
        self.second = conv(width, width)
        self.skip = conv(channels, width, 1) if channels != width else nn.Identity()

    def forward(self, x):
        y = F.leaky_relu(upsampled_conv(self.first, x))
        skip = F.interpolate(self.skip(x), scale_factor=2)  # nearest neighbour, (n, C, 2 H, 2 W)
        return F.leaky_relu(skip + self.second(y))


class PaperDecoder(nn.Sequential):
    """p(x|q): three residual blocks that double the size, then a sigmoid, (n, dim) -> pictures."""

    def __init__(self, size, channels, maps):
        super().__init__(
            nn.Unflatten(1, (maps, size // 8, size // 8)),
            ResidualUp(maps, 64),
            ResidualUp(64, 64),
            ResidualUp(64, 64),
            conv(64, channels),
            nn.Sigmoid(),
        )
        self[-2].weight.data.mul_(0.1)  # at first every pixel has the same colour

    def init_from_data(self, pictures):
        colour = pictures.mean((0, 2, 3))  # (C,)
        self[-2].bias.data.copy_(torch.logit(colour, eps=0.01))


def paper_networks(size, channels, context, latent, periodic, f_psi):
    """The published networks: what `ARCHITECTURES` lists, in its order.

    latent: maps in q. f_psi: False is the ablation without it.
    """
    if periodic is not None:
        raise ValueError("periodic is an option of arch compact, not of arch paper")
    maps = latent or 16
    side = size // 8
    if f_psi:
        encoder = PaperEncoder(size, channels, context)
        psi = PaperPsi(*stack(48, 64, 64, 2 * maps, stride=2))
        z_shape = (48, size, size)
    else:  # the layers of f_psi belong to the encoder, and z is the state
        reduction = (nn.LeakyReLU(), *stack(96, 64, 64, 4 * maps, stride=2))
        encoder = PaperEncoder(size, channels, context, reduction)
        psi = PaperPsi()
        z_shape = (2 * maps, side, side)
    H = PaperHamiltonian(maps, side)
    decoder = PaperDecoder(size, channels, maps)
    # This H is not separable, so explicit leapfrog, the paper's choice, is neither symplectic nor
    # reversible here; integrator="implicit_leapfrog" is both.
    return encoder, decoder, psi, H, StandardNormal(), z_shape, leapfrog_step


# ---------------------------------------------------------------------------- saving and loading


def write_file(path, data):
    """Write bytes to a file in one piece: whatever happens, the file is the old or the new one.

    Raises: OSError, in one line, where the disk refuses.
    """
    unfinished = f"{path}.new"
    try:
        with open(unfinished, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        if os.path.exists(unfinished):  # a full disk gets its space back
            os.remove(unfinished)
        raise OSError(f"{path} cannot be written: {error.strerror}. Mend this, try again") from None


def read_checkpoint(path):
    """The dictionary in a file that `Saved.save` wrote. Raises: ValueError."""
    if not os.path.isfile(path):
        raise ValueError(f"there is no checkpoint file {path}: train a model first")
    try:
        if zipfile.ZipFile(path).testzip():  # torch does not compare the checksums
            raise ValueError("a checksum is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ValueError(f"{path} is not a checkpoint, or damaged: train again") from error


class Saved(nn.Module):
    """A model that can be saved: `config` holds the arguments of its constructor."""

    def save(self, path, **extra):
        """Write `config`, the weights and anything `extra` to a file, in one piece.

        Raises: OSError where the file cannot be written.
        """
        buffer = io.BytesIO()
        torch.save({"config": self.config, "weights": self.state_dict(), **extra}, buffer)
        write_file(path, buffer.getvalue())

    @classmethod
    def load(cls, path, device="cpu"):
        """The model that `save` wrote to a file, in evaluation mode. No code in it is run.

        Raises: ValueError where the file does not hold such a model.
        """
        saved = read_checkpoint(path)
        try:
            model = cls(**saved["config"])
            model.load_state_dict(saved["weights"])
        except Exception as error:  # of another class or version: anything may be missing
            raise ValueError(f"{path} holds no {cls.__name__} of this version") from error
        return model.to(device).eval()


# -------------------------------------------------------------------------------- HGN (section 3)

FRAME_TIME = 0.125  # from frame to frame inside the model, whatever unit of time `dt` is in


def check_options(options, allowed):
    """Raises: ValueError for the first option whose value is not among those allowed."""
    for name, values in allowed.items():
        if options[name] not in values:
            raise ValueError(f"{name} must be in {values}, not {options[name]!r}")


def check_range(frames):
    """Raises: ValueError unless frames are in [0, 1], but for noise."""
    if not (frames - 0.5).abs().max() < 1.4:  # NaN is not either
        raise ValueError("frames must be from 0 to 1, not NaN: divide those from 0 to 255 by 255")


class HGN(Saved):
    """Hamiltonian Generative Network (Toth et al. 2020, section 3).

    Args:
        size: side of the square frames in pixels, a multiple of 8 from 16 to 128.
        channels: of the frames, 1 to 4.
        context: first frames of a clip that the encoder sees.
        arch: "compact" or "paper", the published networks.
        latent: numbers in q (compact, default 6) or maps in q (paper, default 16).
        integrator: one of INTEGRATORS; default: "implicit_leapfrog" (compact), "leapfrog" (paper).
        substeps: steps of the integrator from frame to frame.
        periodic: whether all numbers in q are angles, or none; default: the first half (compact).
        f_psi: False is the paper's ablation in which z itself is the state (paper).
        deterministic: the paper's ablation without sampling of z and without KL.
        friction: learn the coefficient gamma of a friction p -> exp(-gamma t) p.
        dt: time from frame to frame.
    With integrator="implicit_leapfrog", the equations of a step are solved by `model.H.iterations`
    iterations. You may set this number: TRAINING_ITERATIONS are enough for the compact model's
    loss.
    Raises: ValueError for values that are not allowed.
    """

    def __init__(
        self, size=32, channels=3, context=5, arch="compact", latent=None, integrator=None,
        substeps=1, periodic=None, f_psi=True, deterministic=False, friction=False, dt=0.125,
    ):  # fmt: skip
        super().__init__()
        self.config = {
            "size": size, "channels": channels, "context": context, "arch": arch,
            "latent": latent, "integrator": integrator, "substeps": substeps,
            "periodic": periodic, "f_psi": f_psi, "deterministic": deterministic,
            "friction": friction, "dt": dt,
        }  # fmt: skip
        check_options(self.config, ALLOWED)
        if not 0 < dt < math.inf:
            raise ValueError(f"dt must be above 0, not {dt}: a negative dt goes to rollout")
        self.context = context
        self.dt = dt
        self.frame_shape = (channels, size, size)
        networks = ARCHITECTURES[arch](size, channels, context, latent, periodic, f_psi)
        # The order of the modules is that of the parameters, by which optimisers are resumed.
        self.encoder, self.decoder, self.f_psi, self.H, prior, self.z_shape, step = networks
        self.prior = Deterministic() if deterministic else prior
        self.step = INTEGRATORS[integrator] if integrator else step
        self.log_gamma = nn.Parameter(torch.tensor(-3.0)) if friction else None
        # Small convolutions are 1.3 to 2 times as fast in this memory format.
        self.to(memory_format=torch.channels_last)

    @property
    def gamma(self):
        """The coefficient of friction in p -> exp(-gamma t) p, or None without friction.

        It is in the model's unit of time, in which a frame lasts FRAME_TIME: multiply it by
        FRAME_TIME / dt for the unit of `dt`.
        """
        return None if self.log_gamma is None else self.log_gamma.exp()

    @torch.no_grad()
    def init_from_data(self, pictures):
        """Set what needs no learning from some hundred pictures (n, C, size, size) in [0, 1].

        Raises: ValueError for other pictures.
        """
        self.check_frames(pictures.unsqueeze(0), least=2)
        check_range(pictures)
        self.encoder.init_from_data(pictures)
        self.decoder.init_from_data(pictures)

    def check_frames(self, frames, least=1):
        """Raises: ValueError unless frames are floats (B, at least `least`, C, size, size)."""
        shape = tuple(frames.shape)
        enough = shape[2:] == self.frame_shape and shape[1] >= least
        if not enough or not frames.is_floating_point():
            raise ValueError(
                f"frames must be floats (B, T, C, H, W), T at least {least}, (C, H, W) = "
                f"{self.frame_shape} as the model was made for; yours are {frames.dtype} {shape}"
            )

    def encode(self, frames):
        """frames (B, T >= context, C, size, size) -> mean and log-variance of q(z|x)."""
        self.check_frames(frames, self.context)
        return self.encoder(frames[:, : self.context])

    def posterior(self, frames, noise=None):
        """z ~ q(z|x), (B, ...), and the KL to the prior in nats, the mean over the clips.

        With a learnt prior the KL is estimated from this single z, without bias.
        """
        mean, logvar = self.encode(frames)
        z = self.prior.draw(mean, logvar, noise)
        return z, self.prior.kl(z, mean, logvar).mean()

    def state(self, z):
        """z (B, ...) -> q, p at frame 0, (B, dim) each."""
        to_state = self.H.momentum if self.f_psi is None else self.f_psi
        q, p = self.rollout(*to_state(z), self.encoder.reference_frame, -self.dt)
        return q[:, -1], p[:, -1]

    def q_at(self, z, times, horizon):
        """z (B, ...) -> q (B, n, dim) at frames `times`, integers (B, n) from 0 to `horizon`."""
        q, _ = self.rollout(*self.state(z), horizon)
        return q.take_along_dim(times.unsqueeze(2), 1)

    def infer(self, frames):
        """frames (B, T >= context, C, size, size) -> q, p at frame 0, of the mean of q(z|x).

        Raises: ValueError for frames of another shape, that are not floats or that are not in
        [0, 1], but for noise.
        """
        check_range(frames)
        mean, _ = self.encode(frames)
        return self.state(mean)

    def rollout(self, q, p, steps, dt=None):
        """The state (q, p) and those at `steps` frames after it, (B, steps + 1, dim) each.

        dt: time from frame to frame, default the model's. -model.dt runs backward; 2 * model.dt
        shows the motion at double speed; the steps of the integrator are never longer than usual.

        `model.H` may be any `Hamiltonian`, and `model.step` the integrator that suits it. For the
        compact model's `infer`, `loss` and `sample` it also needs a method `momentum`.
        """
        speed = 1.0 if dt is None else dt / self.dt
        # A speed of 2 that is slightly more by rounding takes two steps, not three.
        substeps = self.config["substeps"] * max(1, math.ceil(abs(speed) - 1e-6))
        return rollout(self.H, q, p, FRAME_TIME * speed, steps, self.step, substeps, self.gamma)

    def energy(self, q, p):
        """H of states (B, ..., dim), (B, ...). Its zero and its unit mean nothing."""
        return self.H(q.flatten(0, -2), p.flatten(0, -2)).view(q.shape[:-1])

    def decode(self, q):
        """Paint q (B, T, dim): frames (B, T, C, size, size), 64 at a time to save memory.

        Pixels may be slightly below 0 or above 1: clamp them where you show or save the frames.
        """
        pictures = [self.decoder(part) for part in q.flatten(0, 1).split(64)]
        return torch.cat(pictures).unflatten(0, q.shape[:2])

    @torch.no_grad()
    def sample(self, n, steps, generator=None):
        """n rollouts from the prior: frames (n, steps + 1, C, size, size) in [0, 1].

        generator: a torch.Generator of the CPU, so that no sample depends on the device.
        Raises: ValueError if the model is deterministic.
        """
        noise = torch.randn(n, *self.z_shape, generator=generator)
        z = self.prior.from_noise(noise.to(next(self.parameters())))
        q, _ = self.rollout(*self.state(z), steps)
        return self.decode(q).clamp(0, 1)

    def loss(self, frames, beta=1e-3, noise=None, times=None):
        """The negative ELBO, -1/T sum_t log p(x_t|q_t) + KL(q(z|x) || p(z)), equation (5).

        It is the loss of arch="paper"; that of arch="compact" is `charted_loss`.
        p(x|q) is Gaussian of variance beta / 2 in each of the N = C size size numbers of a picture.
        What is returned is beta / N times the negative ELBO, less a constant: mse + beta KL / N.
        frames: (B, T, C, size, size): the encoder sees the first `context`.
        noise: of z, N(0, I). times: integers (B, n), which frames are scored, by default all.
        Of random times the loss is an unbiased estimate.
        Returns: loss, mse and kl (nats), scalars.
        """
        z, kl = self.posterior(frames, noise)
        q, _ = self.rollout(*self.state(z), frames.shape[1] - 1)
        if times is not None:
            q = q.take_along_dim(times.unsqueeze(2), 1)  # (B, n, dim)
            frames = frames.take_along_dim(times[:, :, None, None, None], 1)
        mse = (self.decode(q) - frames).square().mean()
        return mse + beta * kl / frames[0, 0].numel(), mse, kl


class GECO:
    """Seek the least KL with a reconstruction error of at most `tolerance` (Rezende & Viola 2018).

    beta, the inverse of their Lagrange multiplier, is changed after each step by the logarithm of
    tolerance over the moving average of the error; theirs by the difference of the two.

        geco = GECO(tolerance=5e-5)
        loss, mse, kl = model.loss(frames, geco.beta)   # then loss.backward(), optimiser.step()
        geco.update(mse)

    tolerance: the MSE to reach. beta: its first value.
    """

    rate = 0.01  # the largest change of log(beta) in a step
    bounds = (1e-5, 1.0)  # of beta after each update

    def __init__(self, tolerance=2e-4, beta=1e-3, device=None):
        self.tolerance = tolerance
        self.beta = torch.tensor(beta, device=device)
        self.mse = torch.tensor(tolerance, device=device)  # the moving average

    def update(self, mse):
        """Change `beta` in place, given the error of a training step, a scalar tensor."""
        error = torch.where(mse.isfinite(), mse.detach(), self.mse)
        self.mse.lerp_(error, 0.05)
        push = (self.tolerance / self.mse.clamp(min=1e-12)).log().clamp(-1, 1)
        self.beta.mul_((self.rate * push).exp()).clamp_(*self.bounds)


# ==================================================================================================
# Second half: the compact model
# ==================================================================================================

# ------------------------------------------------------------------------ an integrator for any H


@compiled_once
def implicit_leapfrog_step(H, q, p, h, cache=None):
    """Take one step of the generalised leapfrog method, which suits any H(q, p).

    It is the method of Stoermer and Verlet (Hairer, Lubich & Wanner, Geometric Numerical
    Integration, VI.3): of order 2, symplectic and reversible as far as `H.iterations` fixed-point
    iterations solve its two implicit equations. For a separable H its result is that of
    `leapfrog_step`, which is several times as fast.
    cache: the third value that the previous step returned, or None at the first step: H.features(q)
    and an estimate of dH/dq, from which the iteration starts.
    Returns: q, p after the step, and the cache for the next step.
    """
    if cache is None:
        features = H.features(q)
        dH_dq = H.grad_q(q, p, features)
    else:
        features, dH_dq = cache
    for _ in range(H.iterations):  # p_half = p - h/2 dH/dq(q, p_half)
        dH_dq = H.grad_q(q, p - h / 2 * dH_dq, features)
    p_half = p - h / 2 * dH_dq
    dH_dp = H.grad_p(q, p_half, features)
    q_new = q + h * dH_dp
    for _ in range(H.iterations):  # q_new = q + h/2 (dH/dp(q, p_half) + dH/dp(q_new, p_half))
        dH_dp_new = H.grad_p(q_new, p_half, H.features(q_new))
        q_new = q + h / 2 * (dH_dp + dH_dp_new)
    features = H.features(q_new)
    dH_dq = H.grad_q(q_new, p_half, features)
    return q_new, p_half - h / 2 * dH_dq, (features, dH_dq)


INTEGRATORS = {
    "leapfrog": leapfrog_step,
    "implicit_leapfrog": implicit_leapfrog_step,
    "euler": euler_step,
}

# ------------------------------------------------------------------------- coordinates and priors

# Networks see numbers in q, and forces see p, clamped to [-LIMIT, LIMIT], which keeps a diverging
# rollout finite. Beyond it `grad_q` is the force at the limit, not the derivative of H.
LIMIT = 50.0


class Space:
    """The coordinates q (..., dim) where all of them are numbers; networks see x = embed(q)."""

    angles = 0  # how many of q are angles; these come first

    def __init__(self, dim):
        self.dim = dim
        self.embedded_dim = dim

    def embed(self, q):
        """q (..., dim) -> x (..., embedded_dim)."""
        return q.clamp(-LIMIT, LIMIT)

    def unembed(self, x):
        """x (..., embedded_dim) -> q (..., dim)."""
        return x.clamp(-LIMIT, LIMIT)

    def wrap(self, q):
        """q, a difference of two states, with its angles brought into [-pi, pi].

        Where there are angles, the numbers are clamped as in `embed`.
        """
        return q

    def vjp(self, grad_x, x):
        """A gradient with respect to x = embed(q) -> the gradient with respect to q."""
        return grad_x


class SpaceWithAngles(Space):
    """The coordinates q (..., dim) where the first `angles` of them are angles.

    Networks see an angle as its sine and its cosine, so that they are periodic in it.
    """

    def __init__(self, dim, angles):
        super().__init__(dim)
        self.angles = angles
        self.embedded_dim = dim + angles
        self.q_parts = (angles, dim - angles)
        self.x_parts = (angles, angles, dim - angles)

    def embed(self, q):
        """q (..., dim) -> x (..., embedded_dim): sines, cosines, numbers."""
        angles, numbers = q.split(self.q_parts, -1)
        return torch.cat((angles.sin(), angles.cos(), super().embed(numbers)), -1)

    def unembed(self, x):
        """x (..., embedded_dim) -> q (..., dim), angles in [-pi, pi]."""
        sin, cos, numbers = x.split(self.x_parts, -1)
        return torch.cat((torch.atan2(sin, cos), super().unembed(numbers)), -1)

    def wrap(self, q):
        return self.unembed(self.embed(q))

    def vjp(self, grad_x, x):
        sin, cos, _ = x.split(self.x_parts, -1)
        grad_sin, grad_cos, grad_numbers = grad_x.split(self.x_parts, -1)
        return torch.cat((grad_sin * cos - grad_cos * sin, grad_numbers), -1)


class RealNVP(Prior):
    """An invertible map made of affine couplings (Dinh et al. 2017).

    Each layer changes the coordinates that its mask leaves out, by a scale and a shift that a
    network computes from the others. As a learnt prior of z, `forward` takes z to noise.
    condition: for each layer a tensor (..., width) that is added before the first ReLU.
    """

    def __init__(self, dim, layers=8, width=64):
        super().__init__()
        alternating = torch.arange(dim) + torch.arange(layers).unsqueeze(1)
        self.masks = nn.Buffer(alternating % 2.0)  # (layers, dim)
        self.nets = nn.ModuleList(
            stack(dim, width, width, 2 * dim, layer=nn.Linear, activation=nn.ReLU)
            for _ in range(layers)
        )

    def coupling(self, layer, x, condition):
        """log s and t of a layer, (..., dim) each, zero where the layer changes nothing."""
        mask = self.masks[layer]
        net = self.nets[layer]
        hidden = net[0](mask * x)
        if condition is not None:
            hidden = hidden + condition[layer]
        output = net[1:](hidden) * (1 - mask).repeat(2)
        log_s, t = output.chunk(2, -1)
        return 2 * torch.tanh(log_s / 2), t

    def forward(self, x, condition=None):
        """x (..., dim) -> y (..., dim) and log |det dy/dx|, (...)."""
        log_det = 0
        for layer in range(len(self.nets)):
            log_s, t = self.coupling(layer, x, condition)
            x = x * log_s.exp() + t
            log_det = log_det + log_s.sum(-1)
        return x, log_det

    def inverse(self, y, condition=None):
        """The x (..., dim) that `forward` takes to y (..., dim)."""
        for layer in reversed(range(len(self.nets))):
            log_s, t = self.coupling(layer, y, condition)
            y = (y - t) * (-log_s).exp()
        return y

    def kl(self, z, mean, logvar):
        """log q(z|x) - log p(z) of each clip, (B,); over z ~ q(z|x) its mean is the KL."""
        u, log_det = self(z)
        log_ratio = u.square() - (z - mean).square() / logvar.exp() - logvar
        return 0.5 * log_ratio.sum(1) - log_det

    def from_noise(self, noise):
        """A draw from the prior, made of noise ~ N(0, I)."""
        return self.inverse(noise)


# ---------------------------------------------------------------------- Hamiltonian and its f_psi


class PotentialMLP(nn.Module):
    """V(x) = |x L|^2 / 2 + last . b(x), where b are the second hidden units of a tanh MLP.

    The quadratic term makes numbers oscillate at the start of training, while angles turn freely,
    as sin^2 + cos^2 is constant. The other term is bounded.
    """

    def __init__(self, dim, width):
        super().__init__()
        self.L = nn.Parameter(torch.eye(dim))
        self.first = nn.Linear(dim, width)
        self.second = nn.Linear(width, width)
        for layer in (self.first, self.second):
            # With torch's own initialisation the units are almost linear near the states.
            nn.init.normal_(layer.weight, std=1.5 / layer.in_features**0.5)
            nn.init.uniform_(layer.bias, -1, 1)
        self.last = nn.Parameter(torch.randn(width) * 0.1 / width**0.5)

    def hidden(self, x):
        """x (..., dim) -> the hidden units a and b, (..., width) each."""
        a = torch.tanh(self.first(x))
        b = torch.tanh(self.second(a))
        return a, b

    def forward(self, x):
        """x (..., dim) -> V (...)."""
        a, b = self.hidden(x)
        return 0.5 * (x @ self.L).square().sum(-1) + b @ self.last

    def grad(self, x):
        """dV/dx, (..., dim)."""
        a, b = self.hidden(x)
        return self.backward(x, a, b, self.last.expand_as(b))

    def backward(self, x, a, b, grad_b):
        """The gradient of |x L|^2 / 2 + grad_b . b(x) with respect to x, (..., dim)."""
        # tanh_backward(g, y) is g (1 - y^2) in one kernel, where y = tanh.
        grad_second = torch.ops.aten.tanh_backward(grad_b, b)
        grad_first = torch.ops.aten.tanh_backward(grad_second @ self.second.weight, a)
        return F.linear(x @ self.L, self.L) + grad_first @ self.first.weight


TRAINING_ITERATIONS = 2  # enough for the loss; with a single one H would learn its error


class CompactHamiltonian(Hamiltonian):
    """H(q, p) = p^T M(q)^-1 p / 2 + V(q), the form of every natural mechanical system.

    Under any change of coordinates Q = f(q) of Jacobian J the form is kept, M' = J^-T M J^-1, so
    that the encoder's chart may be bent.
    M^-1 = W diag(s) W^T + 0.3 I, where s = 2 sigmoid(b(q) S) and b(q) are the hidden units of V.
    S starts at zero, so that M starts constant.
    """

    least_inverse_mass = 0.3  # keeps M^-1 positive definite
    iterations = 6  # TRAINING_ITERATIONS while it learns

    def __init__(self, space, width=128):
        super().__init__()
        self.space = space
        self.V = PotentialMLP(space.embedded_dim, width)
        dim = space.dim
        self.W = nn.Parameter(torch.cat((torch.eye(dim), 0.3 * torch.randn(dim, 3 * dim)), 1))
        self.S = nn.Parameter(torch.zeros(width, 4 * dim))

    def forward(self, q, p):
        """q, p (B, dim) -> H (B,)."""
        velocity = self.grad_p(q, p)
        return 0.5 * (p * velocity).sum(1) + self.V(self.space.embed(q))

    def features(self, q):
        """The embedded q, the hidden units of V and the scales s of M^-1."""
        x = self.space.embed(q)
        a, b = self.V.hidden(x)
        s = 2 * torch.sigmoid(b @ self.S)
        return x, a, b, s

    def grad_q(self, q, p, features=None):
        """dH/dq, by one backward pass through the hidden units, which M and V share.

        K is sum_i K_i + 0.3 |p|^2 / 2, where K_i = (p W)_i^2 s_i / 2 and s = 2 sigmoid(y), y = b S.
        As ds/dy = s (1 - s / 2), dK/dy_i is K_i (1 - s_i / 2), and dK/db is S dK/dy.
        Hence dH/db = last + S dK/dy. From b to x it goes on by `V.backward`, from x to q by `vjp`.
        """
        x, a, b, s = self.features(q) if features is None else features
        K_i = 0.5 * (p.clamp(-LIMIT, LIMIT) @ self.W).square() * s
        dH_db = self.V.last + F.linear(K_i * (1 - s / 2), self.S)
        return self.space.vjp(self.V.backward(x, a, b, dH_db), x)

    def grad_p(self, q, p, features=None):
        """dH/dp = M(q)^-1 p, the velocity dq/dt."""
        x, a, b, s = self.features(q) if features is None else features
        return self.least_inverse_mass * p + F.linear(p @ self.W * s, self.W)

    def momentum(self, z):
        """f_psi of the compact model: z = (q, dq/dt) -> q and p = M(q) dq/dt, (B, dim) each.

        This is the Legendre transform, p = dL/d(dq/dt).
        """
        q, velocity = z.chunk(2, 1)
        x, a, b, s = self.features(q)
        constant = torch.full_like(q, self.least_inverse_mass).diag_embed()
        M_inverse = (self.W * s.unsqueeze(1)) @ self.W.T + constant  # (B, dim, dim)
        if q.is_cuda:  # in torch 2.11 a CUDA graph cannot hold cholesky_solve, but this
            return q, torch.linalg.solve_ex(M_inverse, velocity).result
        L, _ = torch.linalg.cholesky_ex(M_inverse)  # M is positive, which needs no check
        return q, torch.cholesky_solve(velocity.unsqueeze(2), L).squeeze(2)


# --------------------------------------------------------------------------- encoder and decoder


def correction_mlp(*sizes, activation=nn.SiLU):
    """An MLP whose last layer starts at zero. With Tanh as the activation its output is bounded."""
    network = stack(*sizes, layer=nn.Linear, activation=activation)
    nn.init.zeros_(network[-1].weight)
    nn.init.zeros_(network[-1].bias)
    return network


class CompactEncoder(Encoder):
    """q(z|x), where z = (q, dq/dt) at the middle frame of the context.

    `encode_frame` maps each frame by itself to its q; this map is called the chart. The squared
    response of each learnt filter is described by the logarithm of its mass, by its centre and by
    its inertia about that, per mass. q is a linear map of these features, in which the centres
    count most, plus an MLP.
    A polynomial fitted to the q of the context gives the place and the velocity, and an MLP
    corrects them. The variance is the same for all clips.
    """

    coefficients = 7  # of the polynomial, at most
    fit_time = 2.0  # it cannot follow longer motion: it sees 15 frames on each side of its own
    logvar_scale = 10.0  # makes Adam move the log-variance ten times as fast

    def __init__(self, size, channels, context, space, side=32, filters=24, hidden=12):
        super().__init__(size, channels)
        self.reference_frame = context // 2
        self.angles = space.angles
        self.space = space
        features = 6 * filters
        x_dim = space.embedded_dim
        z_dim = 2 * space.dim
        self.filters = nn.Sequential(
            nn.AdaptiveAvgPool2d(side),  # on coarser pictures small discs are placed less exactly
            conv(channels, hidden),
            nn.SiLU(),
            conv(hidden, filters, 1),
        )
        self.linear = nn.Linear(features, x_dim)
        self.bend = correction_mlp(features, 128, 128, x_dim)
        self.correction = correction_mlp(context * x_dim + z_dim, 128, 128, z_dim)
        self.logvar = nn.Parameter(torch.full((z_dim,), -1.2))
        self.feature_mean = nn.Buffer(torch.zeros(features))
        self.feature_var = nn.Buffer(torch.ones(features))
        # The linear part of the chart sees centres as they are and all other features at a fifth of
        # their size. As centres are linear in the places of things, and the others are not, this
        # keeps q close to linear in these places, and M close to constant, where that is possible.
        # It is a buffer that is saved, so that checkpoints made without it are refused.
        scale = torch.tensor((0.2, 1.0, 1.0, 0.2, 0.2, 0.2)).repeat_interleave(filters)
        self.feature_scale = nn.Buffer(scale)
        # Least-squares polynomial in time; its first two coefficients are the value and the slope
        # at the reference frame.
        time = FRAME_TIME * (torch.arange(context).double() - self.reference_frame)
        powers = torch.vander(time, min(context, self.coefficients), increasing=True)
        powers[time.abs() >= self.fit_time] = 0.0  # these frames have no weight
        self.fit = nn.Buffer(torch.linalg.pinv(powers)[:2].float())  # (2, context)
        line = torch.linspace(-1, 1, side)
        y, x = torch.cartesian_prod(line, line).T  # (side * side,) each
        monomials = torch.stack((torch.ones_like(x), x, y, x * x, x * y, y * y))  # (6, side * side)
        self.monomials = nn.Buffer(monomials, persistent=False)

    def init_from_data(self, pictures):
        super().init_from_data(pictures)
        features = self.features(pictures)
        F.batch_norm(features, self.feature_mean, self.feature_var, training=True, momentum=1.0)

    def features(self, pictures):
        """Pictures (n, C, H, W) -> moments of what each filter sees, (n, 6 * filters)."""
        response = self.filters(self.foreground(pictures))  # (n, filters, side, side)
        response = response.flatten(2).mT  # (n, side * side, filters)
        density = response * response  # square() has a slow backward pass
        mass, *moments = (self.monomials @ density).unbind(1)  # (n, filters) each
        x, y, xx, xy, yy = (moment / (mass + 0.01) for moment in moments)
        log_mass = (mass + 1).log()
        return torch.cat((log_mass, x, y, xx - x * x, xy - x * y, yy - y * y), 1)

    def encode_frame(self, frames):
        """The chart: q of each frame by itself, (B, n, C, H, W) -> (B, n, dim)."""
        features = self.features(frames.flatten(0, 1))
        y = F.batch_norm(features, self.feature_mean, self.feature_var, eps=1e-4)
        q = self.space.unembed(self.linear(self.feature_scale * y) + self.bend(y))
        return q.unflatten(0, frames.shape[:2])

    def forward(self, frames):
        """frames (B, context, C, H, W) -> mean and log-variance of z, (B, 2 dim) each."""
        q = self.encode_frame(frames)
        steps = self.space.wrap(q.diff(dim=1))  # angles move the short way round
        # As angles jump by 2 pi, the fit is to the sums of the steps since the first frame.
        moved = F.pad(steps.cumsum(1), (0, 0, 1, 0))  # (B, context, dim)
        displacement, velocity = (self.fit @ moved).unbind(1)  # (B, dim) each
        # A bad chart at the start of training must not throw the state far away. An angle turns by
        # less than half a turn from frame to frame, at a velocity below 26.
        velocity = velocity.clamp(-LIMIT, LIMIT)
        seen = torch.cat((self.space.embed(q).flatten(1), moved[:, -1], velocity), 1)
        z = torch.cat((q[:, 0] + displacement, velocity), 1) + self.correction(seen)
        return z, (self.logvar_scale * self.logvar).expand_as(z)


class CompactDecoder(nn.Module):
    """p(x|q): parts that follow q, before a ground that a small MLP paints as a whole.

    A part has a colour and is a Gaussian, w = h exp(-(dx + b dy)^2 / 2 - dy^2 / 2) with
    dx = a (x - x0) and dy = c (y - y0). A pixel is the weighted mean of the ground, whose weight is
    1, and of the colours of all parts, whose weights are w: a part of large h is opaque and has a
    sharp edge.
    Parts come in groups of four. The path of a group is a linear map of x = embed(q) plus an MLP,
    and another MLP gives how far from there the centre x0, y0 of each part is, and all its other
    properties. The output of both MLPs is bounded. Far from the q of training a group therefore
    moves as one, by its linear map of numbers in q, out of the picture, and the ground stays,
    unless a part has become wide enough to hide it.
    """

    largest_log_h = 10.0  # the edge of a disc is then a fifth of its radius wide
    group = 4  # parts with one path: a body that they paint keeps together far from training too
    offset_scale = 0.2  # what moves ought to be learnt as the path of a group, not of each part

    def __init__(self, size, channels, space, gaussians=20):
        super().__init__()
        self.shape = (channels, size, size)
        self.space = space
        # Of log a and log c, for a width of half a pixel: narrower Gaussians flicker as they move.
        self.largest_log_scale = 3.5 + math.log(size / 32)
        self.line = nn.Buffer(torch.linspace(-1, 1, size), persistent=False)  # x or y of pixels
        x_dim = space.embedded_dim
        self.picture = correction_mlp(x_dim, 16, channels * size * size, activation=nn.Tanh)
        coordinates = 2 * gaussians // self.group  # of all groups
        self.linear = nn.Linear(x_dim, coordinates)
        # The weight of a coordinate that hardly varies in training stays as it starts. If it were
        # large, groups that paint one body would come apart in rollouts that go farther.
        self.linear.weight.data.mul_(0.1)
        self.path = correction_mlp(x_dim, 64, 64, coordinates, activation=nn.Tanh)
        # Of each part: its offset from the group, log a and log c, b, log h, its colour.
        self.property_sizes = (2, 2, 1, 1, channels)
        outputs = sum(self.property_sizes) * gaussians
        self.bend = correction_mlp(x_dim, 128, 128, outputs, activation=nn.Tanh)
        bias = self.bend[-1].bias.data.view(-1, gaussians)
        _, log_scale, _, log_h, colour = bias.split(self.property_sizes)
        log_scale += 1.5  # each Gaussian is as wide as a ninth of the picture
        log_h -= 2.0  # at first the parts hide little of the ground
        colour.uniform_()

    def init_from_data(self, pictures):
        self.picture[-1].bias.copy_(pictures.median(0).values.flatten())

    def parts(self, x):
        """Embedded q (n, x_dim) -> the properties of all parts.

        Returns: centre and log_scale, (n, 2, gaussians) each, b and log_h, (n, 1, gaussians) each,
        and colour, (n, C, gaussians).
        """
        properties = self.bend(x).unflatten(1, (sum(self.property_sizes), -1))
        offset, log_scale, b, log_h, colour = properties.split(self.property_sizes, 1)
        path = (self.linear(x) + self.path(x)).unflatten(1, (2, -1))  # (n, 2, groups)
        centre = self.offset_scale * offset + path.repeat_interleave(self.group, 2)
        log_scale = log_scale.clamp(-2, self.largest_log_scale)
        return centre, log_scale, b, log_h.clamp(max=self.largest_log_h), colour

    def forward(self, q, rows=slice(None), columns=slice(None)):
        """q (n, dim) -> pictures (n, C, w, w).

        rows, columns: which w rows and which w columns of pixels to paint, by default all.
        """
        x = self.space.embed(q)
        centre, log_scale, b, log_h, colour = self.parts(x)
        pixels = torch.stack((self.line[columns], self.line[rows])).unsqueeze(2)  # (2, w, 1)
        offset = pixels - centre.unsqueeze(2)  # (n, 2, w, gaussians)
        dx, dy = (log_scale.exp().unsqueeze(2) * offset).unbind(1)  # (n, w, gaussians) each
        slanted = dx.unsqueeze(1) + (b * dy).unsqueeze(2)  # (n, w, w, gaussians)
        log_of_row = log_h - 0.5 * dy.square()  # (n, w, gaussians)
        weights = (log_of_row.unsqueeze(2) - 0.5 * slanted.square()).exp()
        weights = weights.flatten(1, 2)  # (n, w w, gaussians)
        ground = self.picture(x).unflatten(1, self.shape)[:, :, rows][..., columns]
        painted = (colour @ weights.mT).view_as(ground)
        total = 1 + weights.sum(2).view_as(ground[:, :1])
        return (ground + painted) / total


def compact_networks(size, channels, context, latent, periodic, f_psi):
    """The compact networks: what `ARCHITECTURES` lists, in its order.

    latent: numbers in q. periodic: whether they are angles.
    """
    if not f_psi:
        raise ValueError("f_psi=False is an option of arch paper, not of arch compact")
    dim = latent or 6
    angles = dim if periodic else 0
    if periodic is None:
        angles = dim // 2  # motion that goes round needs an angle, other motion a number
    space = SpaceWithAngles(dim, angles) if angles else Space(dim)
    encoder = CompactEncoder(size, channels, context, space)
    H = CompactHamiltonian(space)
    decoder = CompactDecoder(size, channels, space)
    return encoder, decoder, None, H, RealNVP(2 * dim), (2 * dim,), implicit_leapfrog_step


# Each function returns the encoder, the decoder, f_psi (None stands for H.momentum), H, the prior,
# the shape of z without its batch dimension, and the default integrator.
ARCHITECTURES = {"compact": compact_networks, "paper": paper_networks}

ALLOWED = {
    "arch": [*ARCHITECTURES],
    "size": range(16, 129, 8),
    "channels": range(1, 5),
    "context": range(2, 1001),
    "latent": [None, *range(1, 65)],
    "substeps": range(1, 1001),
    "integrator": [None, *INTEGRATORS],
}

# ------------------------------------------------------------------------------------------- loss


def robust(x, tolerance):
    """The mean of tolerance log(1 + x / tolerance): x where small, its logarithm where large."""
    return tolerance * torch.log1p(x / tolerance).mean()


def picture_error(model, q, targets):
    """Squared error of pictures painted from q (B, n, dim) against targets (B, n, C, size, size).

    Pictures smaller than 32 are compared at all pixels, those smaller than 64 at every second row
    and column, and larger ones at every fourth, from a random row and column on.
    Returns: the mean over these pixels, (B, n).
    """
    size = targets.shape[-1]
    stride = 2 ** min(size // 32, 2)
    first = torch.randint(stride, (2, 1), device=q.device)
    rows, columns = first + torch.arange(0, size, stride, device=q.device)
    painted = model.decoder(q.flatten(0, 1), rows, columns).unflatten(0, q.shape[:2])
    truth = targets[:, :, :, rows][..., columns]
    return (painted - truth).square().mean((2, 3, 4))


def unchanged(x):
    """x, which in a single process is the mean of x over all processes."""
    return x


def variance(x, average):
    """The mean variance of the numbers in x (B, n, ...) over B, n and all processes."""
    x = x.detach().flatten(0, 1)
    mean = average(x.mean(0))
    return average((x - mean).square().mean(0)).mean() + 1e-12


def charted_loss(
    model, seen, targets, times, horizon, beta=1e-3, noise=None, average=unchanged
):  # fmt: skip
    """The loss of the compact model, in units of the variance E of the targets' pixels.

    E is the error of a blank prediction, the mean picture. The loss is the sum of four terms, where
    robust(x, c) is c log(1 + x / c):

        robust(mse / E, 0.1)       frames painted from the rollout: the ELBO's first term
        beta KL / (C size size E)  the ELBO's second term
        chart mse / E              frames painted from the chart, `encode_frame`
        robust(d^2 / var, 0.01)    d: from the rollout's q to the chart's, whose variance is var
                                   (angles as they are in [-pi, pi])

    Args:
        model: an `HGN` of arch="compact".
        seen: frames that the encoder sees, (B, context, C, size, size).
        targets: frames to paint, (B, n, C, size, size), at random times: the two terms of the chart
            see only the first 1 + n // 8 of them.
        times: which frames the targets are, integers (B, n) from 0 to `horizon`. Frame 0 is the
            first frame of `seen`.
        horizon: frames to roll out.
        beta: weight of the KL.
        noise: N(0, I), of the shape of z, which is made of it; by default it is drawn.
        average: a function of a tensor without gradients. Where several processes train together,
            it gives the mean over all of them.
    Returns: loss, mse of the pixels scored, and kl (nats), scalars.
    """
    model.check_frames(targets)
    E = variance(targets, average)
    z, kl = model.posterior(seen, noise)
    q = model.q_at(z, times, horizon)
    few = 1 + targets.shape[1] // 8  # painting more for the chart is slow and helps little
    few_targets = targets[:, :few]
    chart = model.encoder.encode_frame(few_targets)
    distance = model.encoder.space.wrap(q[:, :few] - chart).square().mean(2)
    chart_variance = variance(chart, average)
    mse = picture_error(model, q, targets)
    chart_mse = picture_error(model, chart, few_targets)
    negative_elbo = robust(mse / E, 0.1) + beta * kl / seen[0, 0].numel() / E
    chart_loss = (chart_mse / E).mean() + robust(distance / chart_variance, 0.01)
    return negative_elbo + chart_loss, mse.mean(), kl


def averaged_picture_error(model, seen, targets, times, horizon, scale, draws=8):
    """Squared error of the mean picture over draws of z, an unbiased estimate, a scalar.

    scale: what the standard deviation of q(z|x) is multiplied by. The error is least where draws of
    z differ from its mean as much as the true state does. What no z explains, such as noise, adds a
    constant. draws: at least 2. seen, targets, times, horizon: those of `charted_loss`.
    """
    mean, logvar = model.encode(seen)
    logvar = logvar + 2 * math.log(scale)
    z = torch.cat([model.prior.draw(mean, logvar) for _ in range(draws)])
    q = model.q_at(z, times.repeat(draws, 1), horizon)  # (draws B, n, dim)
    pictures = model.decode(q).unflatten(0, (draws, -1))  # (draws, B, n, C, size, size)
    error = (pictures.mean(0) - targets).square()
    return (error - pictures.var(0) / draws).mean()
