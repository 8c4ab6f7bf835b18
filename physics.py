"""Every source of clips: simulated systems, exact and rendered, and the user's own recordings.

Needs torch and numpy, and for films and pictures imageio and Pillow. The constants, initial states
and colours of the first four systems are those of Toth et al. (ICLR 2020), section 4, as published
with its reproduction (Balsells Rodas et al. 2021); the others are our own.

    frames, q, p = clips(SYSTEMS["three_body"], n=16)   # (16, 30, 3, 32, 32), (16, 30, 3, 2) twice
    own = Recordings("pendulum.mp4")
    frames = own.frames(torch.tensor([0]), torch.arange(5)[None])  # of clip 0: (1, 5, C, 32, 32)
"""

import math
import re
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------- systems

BACKGROUND = (81 / 255, 88 / 255, 93 / 255)  # a black one hurts training
YELLOW = (173 / 255, 146 / 255, 0.0)
RED = (173 / 255, 0.0, 0.0)
GREEN = (0.0, 146 / 255, 0.0)


def unchanged(x):
    return x


@dataclass(frozen=True)
class System:
    """A physical system, H(q, p) = p M^-1 p / 2 + V(q), where M may depend on q, and how it looks.

    States q and p have shape (..., bodies, dims). Units are the paper's, with 0.125 from frame to
    frame. Either `force` or `motion` must be given, and `potential`.
    """

    colours: tuple  # RGB that each body adds to the background, in [0, 1]
    radius: float  # of a disc, world units
    half_width: float  # the picture shows [-half_width, half_width] squared, world units
    initial: Callable  # (n, uniform) -> q, p, where uniform(low, high, *shape) draws numbers
    potential: Callable  # V(q): (..., bodies, dims) -> (...)
    force: Callable = None  # -dV/dq, of the shape of q; written out, as the simulator's hot loop
    motion: Callable = None  # (q, p) -> dq/dt, dp/dt, in place of force where M depends on q
    inertia: float = 0.5  # m, or m l^2 for an angle
    noise: float = 0.1  # sigma of the paper's observation noise on every coordinate
    position: Callable = unchanged  # q -> where the discs are, (..., bodies, 2), y upward
    locate: Callable = unchanged  # the inverse of position
    periodic: bool = False  # q are angles
    friction: float = 0.0  # gamma of dp/dt = -dH/dq - gamma p

    def derivatives(self, q, p):
        """dq/dt and dp/dt of states (..., bodies, dims)."""
        if self.motion:
            velocity, force = self.motion(q, p)
        else:
            velocity = p / self.inertia
            force = self.force(q)
        return velocity, force - self.friction * p

    def energy(self, q, p):
        """H of states (..., bodies, dims), (...)."""
        velocity, _ = self.derivatives(q, p)
        return (p * velocity).sum((-2, -1)) / 2 + self.potential(q)


# mass_spring: m 0.5, k 2. One coordinate along x.


def polar_state(low, high, n, uniform):
    """(q, p) = r (cos a, sin a) with r ~ U(low, high) and a uniform angle a."""
    r = uniform(low, high, n, 1, 1)
    a = uniform(0, 2 * math.pi, n, 1, 1)
    return r * a.cos(), r * a.sin()


def spring_potential(q):
    return q.square().sum((-2, -1))


def spring_force(q):
    return -2 * q


def along_x(q):
    return torch.cat((q, torch.zeros_like(q)), -1)


def first_coordinate(x):
    return x[..., :1]


# pendulum: m 0.5, l 1, g 3. q is the angle from the lowest point.


def pendulum_potential(q):
    return 1.5 * (1 - q.cos()).sum((-2, -1))


def pendulum_force(q):
    return -1.5 * q.sin()


def rod_ends(q):
    """The ends of a chain of rods of length 1 at angles q."""
    return torch.cat((q.sin(), -q.cos()), -1).cumsum(-2)


def rod_angles(x):
    """The angles of a chain of rods that ends at x."""
    rods = x.diff(dim=-2, prepend=torch.zeros_like(x[..., :1, :]))
    x, y = rods.split(1, -1)
    return torch.atan2(x, -y)


# two_body, three_body: m 1, G 1.


def orbit(bodies, low, high, speed, n, uniform):
    """Bodies of unit mass evenly spaced on a circle of radius r ~ U(low, high), turning either way.

    The speed is `speed` / sqrt(r), of a circular orbit; then each component is scaled by 1 +- 0.1.
    """
    r = uniform(low, high, n, 1, 1)
    direction = uniform(-1, 1, n, 1, 1).sign()
    turn = 2 * math.pi
    a = uniform(0, turn, n, 1) + torch.arange(bodies) * (turn / bodies)
    q = r * torch.stack((a.cos(), a.sin()), -1)  # (n, bodies, 2)
    p = direction * speed / r.sqrt() * torch.stack((-a.sin(), a.cos()), -1)
    return q, p * (1 + 0.1 * uniform(-1, 1, n, bodies, 2))


def pairs(q):
    """For every cyclic shift: the vectors from each body to another, and 1 / distance."""
    for shift in range(1, q.shape[-2]):
        d = q.roll(-shift, -2) - q  # (..., bodies, 2)
        x, y = d.unbind(-1)
        yield d, torch.addcmul(x * x, y, y).rsqrt_().unsqueeze(-1)


def gravity_potential(q):
    return -0.5 * sum(inverse.sum((-2, -1)) for _, inverse in pairs(q))


def gravity_force(q):
    return sum(d * (inverse * inverse * inverse) for d, inverse in pairs(q))


# double_pendulum: m 0.5 and l 1 both, g 3. Chaotic, and its M depends on q.


def two_angles(n, uniform):
    return uniform(-1.5, 1.5, n, 2, 1), uniform(-0.5, 0.5, n, 2, 1)


def double_potential(q):
    return (q.new_tensor((3.0, 1.5)) * (1 - q[..., 0].cos())).sum(-1)


def double_motion(q, p):
    """With M = ((1, c / 2), (c / 2, 1 / 2)), where c = cos(q2 - q1)."""
    difference = q.diff(dim=-2)  # (..., 1, 1)
    s = torch.sin(difference)
    c = torch.cos(difference)
    sign = q.new_tensor((1.0, -1.0)).unsqueeze(1)
    two = q.new_tensor((1.0, 2.0)).unsqueeze(1)
    v = 2 * (two * p - c * p.flip(-2)) / (1 + s * s)
    return v, 0.5 * sign * s * v.prod(-2, keepdim=True) - 3 * q.sin() / two


# A new system is one more entry here; `System` says what it must give.
SYSTEMS = {
    "mass_spring": System(
        colours=(YELLOW,), radius=0.5, half_width=2.0, initial=partial(polar_state, 0.1, 1.0),
        potential=spring_potential, force=spring_force, position=along_x, locate=first_coordinate,
    ),
    "pendulum": System(
        colours=(YELLOW,), radius=0.5, half_width=2.0, initial=partial(polar_state, 1.3, 2.3),
        potential=pendulum_potential, force=pendulum_force, position=rod_ends, locate=rod_angles,
        periodic=True,
    ),
    "two_body": System(
        colours=(YELLOW, RED), radius=0.375, half_width=3.0, noise=0.05, inertia=1.0,
        initial=partial(orbit, 2, 0.5, 1.5, 0.5), potential=gravity_potential, force=gravity_force,
    ),
    "three_body": System(
        colours=(YELLOW, RED, GREEN), radius=0.28125, half_width=3.0, noise=0.2, inertia=1.0,
        initial=partial(orbit, 3, 0.9, 1.2, 3**-0.25), potential=gravity_potential,
        force=gravity_force,
    ),
    "double_pendulum": System(
        colours=(YELLOW, RED), radius=0.4, half_width=2.5, initial=two_angles,
        potential=double_potential, motion=double_motion, position=rod_ends, locate=rod_angles,
        periodic=True,
    ),
}  # fmt: skip
SYSTEMS["damped_spring"] = replace(SYSTEMS["mass_spring"], friction=0.1)
SYSTEMS["damped_pendulum"] = replace(SYSTEMS["pendulum"], friction=0.1)


# -------------------------------------------------------------------------------------- simulation

FRAME_TIME = 0.125  # the paper's time between frames, and the longest step of the simulator
MOST_PARTS = 256  # into which a step is cut where energy is not kept, as when bodies meet


def initial_states(system, n, generator=None, device=None):
    """n random initial states q, p, (n, bodies, dims) each, float64, on `device`.

    They are drawn on the generator's device: a CPU generator gives the same everywhere.
    """
    source = "cpu" if generator is None else generator.device

    def uniform(low, high, *shape):
        numbers = torch.rand(shape, generator=generator, device=source, dtype=torch.float64)
        return low + (high - low) * numbers

    with torch.device(source):
        q, p = system.initial(n, uniform)
    return q.to(device or source), p.to(device or source)


def simulate(system, q, p, frames, dt=FRAME_TIME):
    """True trajectories in float64, by the method of Gauss and Legendre.

    q, p: initial states (B, bodies, dims). frames: how many, with the initial one. dt: from frame
    to frame; negative runs backward. Returns: q, p, (B, frames, bodies, dims) each.
    Raises: ValueError if frames < 1.
    """
    if frames < 1:
        raise ValueError(f"frames must be at least 1, not {frames}")
    path = [torch.stack((q, p)).double()]  # (2, B, bodies, dims)
    for _ in range(frames - 1):
        path.append(advance(system, path[-1], dt))
    q, p = torch.stack(path, 2)
    return q, p


def advance(system, start, dt, refined=1, tolerance=1e-9):
    """States (q, p), stacked, after a time dt; those whose energy changed again, in more parts."""
    state = start
    energy = system.energy(*start)
    parts = math.ceil(abs(dt) / FRAME_TIME) * refined
    for _ in range(parts):
        state, lost = gauss_legendre_step(system, state, dt / parts)
        energy = energy - lost
    error = (system.energy(*state) - energy).abs()
    bad = ~(error <= tolerance * (1 + energy.abs()))  # NaN is bad
    if refined < MOST_PARTS and bad.any():
        state[:, bad] = advance(system, start[:, bad], dt, 4 * refined)
    return state


def gauss_legendre(stages):
    """The coefficients A (stages, stages) and b (stages,) of the collocation method.

    It is symplectic and of order 2 * stages (Hairer, Lubich & Wanner, Geometric Numerical
    Integration, II.1.3). A and b integrate the powers of c exactly, up to c and up to 1.
    """
    nodes, _ = np.polynomial.legendre.leggauss(stages)
    c = torch.from_numpy(nodes + 1).unsqueeze(1) / 2
    powers = c ** torch.arange(stages)
    count = torch.arange(1.0, stages + 1, dtype=torch.float64)
    inverse = powers.inverse()
    return (c * powers / count) @ inverse, (1 / count) @ inverse


A, B = gauss_legendre(stages=6)


def gauss_legendre_step(system, state, h, iterations=16):
    """One step of length h: the states (q, p), stacked, and the energy that friction took, (B,).

    k: their derivatives at the stages, (2, 6, B, bodies, dims), found by fixed-point iteration.
    """
    weights = A.to(state)
    k = torch.stack(system.derivatives(*state))
    k = k.unsqueeze(1).expand(-1, len(B), *state.shape[1:])
    for _ in range(iterations):
        last = k
        stages = state.unsqueeze(1) + h * torch.einsum("ij,sj...->si...", weights, k)
        k = torch.stack(system.derivatives(*stages))
        if (k - last).abs().max() < 1e-13:
            break
    power = (stages[1] * k[0]).sum((2, 3))  # p dq/dt, (6, B)
    lost = h * system.friction * torch.einsum("j,jb->b", B.to(state), power)
    return state + h * torch.einsum("j,sj...->s...", B.to(state), k), lost


# --------------------------------------------------------------------------------------- rendering


def render(system, q, size=32):
    """Paint states q (B, T, bodies, dims): pictures (B, T, 3, size, size), float32 in [0, 1].

    Row 0 is on top. Each disc adds its colour to a pixel by the share of the pixel that it covers,
    which falls linearly with the distance across an edge of one pixel.
    """
    centres = system.position(q).flatten(0, 1).float()  # (B * T, bodies, 2)
    frames = torch.empty(len(centres), 3, size, size, device=q.device)
    colours = torch.tensor((BACKGROUND, *system.colours)).to(q.device, non_blocking=True)
    scale = size / (2 * system.half_width)  # pixels for each world unit
    line = torch.arange(size, device=q.device, dtype=torch.float32) - (size - 1) / 2
    block = 256 if q.device.type == "cpu" else 2**15  # stays in the cache of a CPU
    for c, out in zip(centres.split(block), frames.split(block), strict=True):
        dx = (line - scale * c[..., 0:1]).square()  # (n, bodies, size)
        dy = (-line - scale * c[..., 1:2]).square()  # row 0 is the top
        distance = (dy.unsqueeze(-1) + dx.unsqueeze(-2)).sqrt_()  # (n, bodies, size, size)
        share = distance.neg_().add_(system.radius * scale + 0.5).clamp_(0, 1)
        out.copy_(colours[0, :, None, None])
        for disc, colour in zip(share.split(1, 1), colours[1:], strict=True):
            out.addcmul_(disc, colour[:, None, None])
        out.clamp_(max=1)
    return frames.view(*q.shape[:2], 3, size, size)


def jitter(system, q, noise=0.0, generator=None):
    """q plus observation noise: a Gaussian of sigma `noise`, or "paper" for the paper's sigma."""
    sigma = system.noise if noise == "paper" else noise
    source = q.device if generator is None else generator.device
    gaussian = torch.randn(q.shape, generator=generator, device=source, dtype=q.dtype)
    return q + sigma * gaussian.to(q.device)


def clips(system, n, frames=30, dt=FRAME_TIME, noise=0.0, size=32, generator=None, device=None):
    """n random clips, and their true q and p, (n, frames, bodies, dims) each.

    The pictures are (n, frames, 3, size, size), with noise as `jitter` has it.
    """
    q, p = initial_states(system, n, generator, device)
    q, p = simulate(system, q, p, frames, dt)
    return render(system, jitter(system, q, noise, generator), size), q, p


# ------------------------------------------------------------------------- states read off pictures


def gauss_newton(f, x, target, steps, h, longest, damping):
    """x (n, ...) whose f(x) (n, ...) is nearest target, by damped Gauss-Newton steps.

    h: of the central differences for the slopes of f. longest: that a coordinate moves in a step.
    """
    shape = x.shape[1:]

    def flat_f(x):  # (n, dim) -> (n, m)
        return f(x.view(-1, *shape)).flatten(1)

    x = x.flatten(1)
    target = target.flatten(1)
    one = torch.eye(x.shape[1]).to(x)
    for _ in range(steps):
        moved = x + h * torch.stack((one, -one)).unsqueeze(2)  # (2, dim, n, dim)
        values = flat_f(moved.flatten(0, 2)).to(x)
        ahead, behind = values.unflatten(0, (2, -1, len(x)))
        J = (ahead - behind).permute(1, 2, 0) / (2 * h)  # (n, m, dim)
        error = (target - flat_f(x)).to(x).unsqueeze(2)
        step = torch.linalg.solve(J.mT @ J + damping * one, J.mT @ error)
        x = x + step.squeeze(2).clamp(-longest, longest)
    return x.view(-1, *shape)


def infer_q(system, frames):
    """The true system's q (n, T, bodies, dims) that frames (n, T, 3, S, S) show.

    It starts at the centroids of the pixels whose colour is nearest that of each body.
    """
    size = frames.shape[-1]
    pictures = frames.flatten(0, 1)
    light = pictures - torch.tensor(BACKGROUND).to(frames).view(3, 1, 1)
    colours = F.normalize(torch.tensor(system.colours).to(frames))
    share = torch.einsum("ncyx,bc->nbyx", light, colours).clamp(min=1e-9)
    share = share * (share == share.amax(1, keepdim=True))
    pixels = torch.arange(size).to(frames) - (size - 1) / 2
    line = pixels * 2 * system.half_width / size
    grid = torch.stack(torch.meshgrid(line, -line, indexing="xy"))  # (2, S, S), y upward
    mass = share.sum((2, 3)).unsqueeze(2) + 1e-9
    centre = torch.einsum("nbyx,dyx->nbd", share, grid) / mass

    def painted(q):
        return render(system, q.unsqueeze(1), size)

    start = system.locate(centre).double()
    q = gauss_newton(painted, start, pictures, steps=2, h=0.01, longest=0.2, damping=1e-3)
    return q.unflatten(0, frames.shape[:2])


# ----------------------------------------------------------------------------- files of the user's

ARRAYS = (".npy", ".npz")
FILMS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".wmv")
PICTURES = (".gif", ".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
# Axes of an array: N clips, T frames, H rows, W columns, C colours, which are 1 or 3.
LAYOUTS = ("THW", "THWC", "TCHW", "NTHW", "NTHWC", "NTCHW")
SMALLEST_SIDE = 8  # of pictures in an array: a smaller side is another axis, such as RGBA


@contextmanager
def reading(path):
    """Turn the many errors of files that cannot be read into a ValueError of one line."""
    try:
        if not path.is_file():  # a pipe would be waited for
            raise ValueError("it is no regular file" if path.exists() else "it is not there")
        yield
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        why = why.split(". If you trust")[0].strip(".")  # numpy's advice to run what is in the file
        raise ValueError(f"{path} cannot be read: {why}. Mend or restore it") from error


def read_array(path):
    """The array in an .npy file, left on disk; of an .npz file the clips, else the points."""
    with reading(path):
        if path.suffix.lower() == ".npy":
            arrays = [np.load(path, mmap_mode="r", allow_pickle=False)]
        else:
            arrays = list(np.load(path, allow_pickle=False).values())
            clips = [x for x in arrays if x.ndim > 2]
            arrays = clips or [x for x in arrays if x.ndim == 2]
        if len(arrays) != 1 or arrays[0].dtype.kind not in "buif":
            raise ValueError("save one array of numbers in it, and only one of clips or points")
        return np.asarray(arrays[0])


def read_points(path):
    """Points (N, D), float64, of an array file; None where path holds clips. Raises: ValueError."""
    path = Path(path)
    if path.suffix.lower() not in ARRAYS:
        return None
    array = read_array(path)
    return array.astype("float64") if array.ndim == 2 else None


def name_axes(shape):
    """The first of LAYOUTS that fits an array of this shape. Raises: ValueError."""
    for axes in LAYOUTS:
        if len(axes) != len(shape):
            continue
        sizes = dict(zip(axes, shape, strict=True))
        side = min(sizes["H"], sizes["W"])
        if side >= SMALLEST_SIDE and sizes.get("C", 1) in (1, 3):
            return axes
    raise ValueError(f"clips are (N, T, H, W[, 1 or 3]), points (N, D), not {shape}")


def as_clips(array):
    """Clips (N, T, H, W, C) of an array whose axes `name_axes` names."""
    axes = name_axes(array.shape)
    for axis in "NTHWC":
        if axis not in axes:
            array = array[..., None]
            axes = axes + axis
    return array.transpose([axes.index(axis) for axis in "NTHWC"])


def unit_range(x):
    """Pixels of any kind -> float32 in [0, 1]. Raises: ValueError for values beyond."""
    white = 65535 if x.dtype == "uint16" else 255
    if x.dtype.kind in "bf":
        white = 1
    x = np.asarray(x, "float32") / np.float32(white)
    if not (x.min() >= 0 and x.max() <= 1):  # nor is NaN
        raise ValueError(f"values go beyond 0 to {white}")
    return x


def film_frames(path):
    """Frames (H, W, 3) of a film, and the milliseconds that each lasts."""
    import imageio.v3 as iio

    with iio.imopen(path, "r", plugin="pyav") as film:
        for frame in film.iter():
            yield frame, 1000 / film.metadata()["fps"]


def picture_frames(path):
    """Frames (H, W, 3) of a picture or GIF, and the milliseconds that each lasts, 0 if unknown."""
    from PIL import Image, ImageOps

    with Image.open(path) as file:
        count = 1 if file.format == "MPO" else getattr(file, "n_frames", 1)
        for i in range(count):
            file.seek(i)
            picture = ImageOps.exif_transpose(file)  # as the camera was held
            if picture.mode[0] in "IF":  # grey, integers of 16 bits or floats
                grey = np.asarray(picture, "uint16" if picture.mode[0] == "I" else "float32")
                frame = np.dstack([grey, grey, grey])
            else:  # what is transparent shows white
                white = Image.new("RGBA", picture.size, "white")
                opaque = Image.alpha_composite(white, picture.convert("RGBA"))
                frame = np.asarray(opaque)[..., :3]
            yield frame, file.info.get("duration", 0)


def by_number(path):
    """A key that sorts names as people do: frame10 comes after frame9."""
    parts = re.split(r"(\d+)", path.name)
    return [int(part) if part.isdecimal() else part for part in parts]


def entries(path):
    """The files and folders in a folder, sorted; of a file itself."""
    return sorted(path.iterdir(), key=by_number) if path.is_dir() else [path]


class Recordings:
    """Clips of the user's own: squared, resized, and split into those to train on and a tenth held
    out: of one recording, which is cut, the last in time; of several, whole ones.

    Args:
        path: an array, a film or GIF, or a folder of films, of pictures or of folders of pictures.
        size: pixels; default the pictures' own, if 16 to 128 and a multiple of 8, else 32.
        clip: frames of the clips that a recording is cut into.
        stride: take every k-th frame.
        dt, fps: seconds between recorded frames, or their inverse; default the files', or 0.125.
        seed: of what is held out.
        least: frames that a clip must have.
    Raises: ValueError for what cannot be read or is too short.
    """

    def __init__(self, path, size=None, clip=60, stride=1, dt=None, fps=None, seed=0, least=6):
        self.path = Path(path)
        self.size = size
        self.passed_over = []
        films = [(film[::stride], seconds) for film, seconds in self.films()]
        long = [(film, seconds) for film, seconds in films if len(film) >= least]
        recordings = [film for film, _ in long]
        self.check_length(recordings, 2 * least if 1 in (len(films), len(long)) else least)
        self.channels = recordings[0].shape[3]
        self.check_light(recordings)
        self.dt = stride * self.frame_time([seconds for _, seconds in long], dt, fps)
        self.cut(recordings, clip, least, seed)
        crc = 0
        for x in self.clips:
            crc = zlib.crc32(x.tobytes(), crc)
        self.digest = f"{sum(map(len, self.clips))} frames, CRC {crc:x}"
        self.summary = self.summarise(len(films), len(long))

    def check_length(self, recordings, need):
        """Raises: ValueError for too few frames; a single recording is cut in two."""
        if not recordings or len(recordings[0]) < need:
            what = f"film or pictures of {need} frames, nor is it a .npy file (by numpy.save)"
            raise ValueError(f"{self.path} has no {what}. Passed over: {self.passed_over[:3]}")

    def check_light(self, recordings):
        """Raises: ValueError where all pictures are almost black."""
        for film in recordings:
            some = film[:: 1 + len(film) // 64]
            if unit_range(some).max() > 0.1:
                return
        raise ValueError(f"{self.path} is dark: scale it; of 16-bit integers 65535 is white")

    def frame_time(self, seconds, dt, fps):
        """Seconds between frames, as asked for or as the files say. Raises: ValueError."""
        if dt:
            return dt
        if fps:
            return 1 / fps
        if max(seconds) > 1.1 * min(seconds):
            cure = "convert them, or set all by --fps"
            raise ValueError(f"{self.path} has films of unlike rates: {cure}")
        return seconds[0] or FRAME_TIME

    def cut(self, recordings, clip, least, seed):
        """Cut recordings (T, H, W, C) into clips and hold a tenth out."""
        single = len(recordings) == 1
        if single:
            clip = max(least, min(clip, len(recordings[0]) // 2))
        groups = [np.split(x, range(clip, len(x) - clip + 1, clip)) for x in recordings]
        if single:
            groups = [[x] for x in groups[0]]
            order = torch.arange(len(groups)).flip(0)  # the last clips are held out
        else:
            order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))
        held_out = order[: max(1, len(order) // 10)]
        self.clips = [x for group in groups for x in group]
        self.lengths = torch.tensor([len(x) for x in self.clips])
        group_of_clip = [i for i, group in enumerate(groups) for _ in group]
        held = torch.isin(torch.tensor(group_of_clip), held_out)
        self.held_out = held.nonzero().flatten()
        self.train = (~held).nonzero().flatten()

    def summarise(self, found, long):
        """A line that says what was read."""
        lengths = self.lengths
        frames = f"{lengths.min()} to {lengths.max()} frames, {lengths.sum()} in all"
        how = f"{self.recorded_size} -> {self.size} x {self.size}, {1 / self.dt:.4g} a second"
        names = ", ".join(self.passed_over[:3])
        passed = f"passed over: {len(self.passed_over)} file(s) {names}"
        found = f"recordings {found}, too short {found - long}"
        return f"{self.path}: {found}; {len(lengths)} clip(s) of {frames}, {how}; {passed}"

    def frames(self, clips, times):
        """Frames (B, n, C, size, size) in [0, 1] of clips (B,) at times (B, n)."""
        rows = zip(clips.tolist(), times.numpy(), strict=True)
        x = np.stack([unit_range(self.clips[i][t]) for i, t in rows])
        return torch.from_numpy(x).movedim(4, 2)

    def films(self):
        """Recordings (T, size, size, C), and the seconds between their frames, 0 if unknown."""
        if self.path.suffix.lower() in ARRAYS:
            return self.films_of_array()
        return self.films_of_files()

    def squared(self, frame):
        """The middle square of (H, W, C), resized: bytes (size, size, C).

        The first picture decides the size where none is asked for.
        """
        from PIL import Image, ImageOps

        height, width = frame.shape[:2]
        if self.size is None:
            side = min(height, width)
            self.size = side if side in range(16, 129, 8) else 32
        self.recorded_size = f"{width} x {height}"
        channels = []
        for channel in np.moveaxis(unit_range(frame), 2, 0):
            box = Image.Resampling.BOX  # a pixel is the mean of its area
            channels.append(ImageOps.fit(Image.fromarray(channel), (self.size, self.size), box))
        return np.rint(255 * np.dstack(channels)).astype("uint8")

    def films_of_array(self):
        array = read_array(self.path)
        films = []
        with reading(self.path):
            if 0 in array.shape:
                raise ValueError(f"its shape is {array.shape}: nothing is in it")
            for film in as_clips(array):
                self.squared(film[0])
                if film.shape[1:3] != (self.size, self.size):
                    film = np.stack([self.squared(frame) for frame in film])
                if film.dtype != "uint8":
                    for part in np.array_split(film, 1 + len(film) // 64):
                        unit_range(part)  # refuses values beyond
                films.append((film, 0.0))
        return films

    def films_of_files(self):
        """Films of a file, or of a folder and its folders, where pictures make up a film."""
        films = []
        top = entries(self.path)
        folders = [entries(x) for x in top if x.is_dir() and x.name[0] != "."]
        for folder in (top, *folders):
            stills = []
            for path in folder:
                if path.suffix.lower() in FILMS + PICTURES and path.name[0] != ".":
                    film, seconds = self.film_of_file(path)
                    if len(film) > 1:
                        films.append((film, seconds))
                    else:
                        stills.append(film)
                elif not path.is_dir():
                    self.passed_over.append(path.name)
            if stills:
                films.append((np.concatenate(stills), 0.0))
        grey = all((film == film[..., :1]).all() for film, _ in films)
        if grey:
            films = [(film[..., :1], seconds) for film, seconds in films]
        return films

    def film_of_file(self, path):
        """A film (T, size, size, 3), and the seconds between its frames.

        GIFs merge equal frames into one that lasts longer: these are given back.
        """
        frames = []
        durations = []
        with reading(path):
            decode = film_frames if path.suffix.lower() in FILMS else picture_frames
            for frame, milliseconds in decode(path):
                frames.append(self.squared(frame))
                durations.append(milliseconds)
        shortest = min(durations) or math.inf
        counts = [max(1, int(duration // shortest)) for duration in durations]
        film = np.repeat(np.stack(frames), counts, 0)
        return film, sum(durations) / sum(counts) / 1000
