"""Every source of clips: simulated systems, exact and rendered, and the user's own recordings.

Stands alone on torch and numpy; films and pictures need imageio and Pillow. A system is one entry
of `SYSTEMS`: constants, initial states and colours follow Toth et al. (ICLR 2020), section 4, as
published with its reproduction (Balsells Rodas et al. 2021); from spring_pendulum on, our own.

    frames, q, p = clips(SYSTEMS["three_body"], n=16)   # (16, 30, 3, 32, 32), (16, 30, 3, 2) twice
    own = Recordings("pendulum.mp4")                    # own.read(clips (B,), times (B, n))
"""

import math
import re
import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Callable

import numpy as np
import torch

BACKGROUND = (81 / 255, 88 / 255, 93 / 255)
YELLOW, RED, GREEN = (173 / 255, 146 / 255, 0.0), (173 / 255, 0.0, 0.0), (0.0, 146 / 255, 0.0)

# Gauss and Legendre's method of six stages: symplectic, order 12 (Hairer, Lubich & Wanner, II.1.3).
_C = torch.from_numpy(np.polynomial.legendre.leggauss(6)[0] + 1).unsqueeze(1) / 2
_POWERS, _COUNT = _C ** torch.arange(6), torch.arange(1.0, 7.0, dtype=torch.float64)
A, B = (x @ _POWERS.inverse() for x in (_C * _POWERS / _COUNT, 1 / _COUNT))
LONGEST = 0.125  # step of the simulator, the paper's time between frames

ARRAYS, FILMS = (".npy", ".npz"), (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".wmv")
KNOWN = FILMS + (".gif", ".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm")


@dataclass(frozen=True)
class System:
    """A physical system, H(q, p) = p M^-1 p / 2 + V(q), where M may depend on q, and how it looks.
    States q and p have shape (..., bodies, dims). Units are the paper's: dt = 0.125 a frame."""

    colours: tuple  # RGB that each body adds to the background, in [0, 1]
    radius: float  # of a disc, world units
    half_width: float  # the picture shows [-half_width, half_width] squared, world units
    initial: Callable  # (n, uniform) -> q, p, where uniform(low, high, *shape) draws numbers
    noise: float = 0.1  # sigma of the paper's observation noise on every coordinate
    inertia: float = 0.5  # m, or m l^2 for an angle
    potential: Callable = None  # V(q): (..., bodies, dims) -> (...)
    force: Callable = None  # -dV/dq, same shape as q; written out: it is the simulator's hot loop
    motion: Callable = None  # (q, p) -> dq/dt, dp/dt, in place of force where M depends on q
    position: Callable = lambda q: q  # where the discs are, (..., bodies, 2), world units, y upward
    locate: Callable = lambda x: x  # the inverse of position
    periodic: bool = False  # q are angles
    friction: float = 0.0  # gamma of dp/dt = -dH/dq - gamma p

    def slope(self, q, p):  # dq/dt and dp/dt of states (..., bodies, dims)
        dq, dp = self.motion(q, p) if self.motion else (p / self.inertia, self.force(q))
        return dq, dp - self.friction * p

    def energy(self, q, p):  # H(q, p) of states (..., bodies, dims), shape (...)
        return (p * self.slope(q, p)[0]).sum((-2, -1)) / 2 + self.potential(q)


def _polar(low, high, n, uniform):
    """(q, p) = r (cos a, sin a) with r ~ U(low, high) and an exactly uniform angle."""
    r, a = uniform(low, high, n, 1, 1), uniform(0, 2 * math.pi, n, 1, 1)
    return r * a.cos(), r * a.sin()


def _orbit(bodies, low, high, speed, n, uniform):
    """Bodies evenly spaced on a circle of radius r ~ U(low, high), turning either way at the speed
    `speed` / sqrt(r), of a circle; then every component is scaled by 1 +- 0.1. Unit masses."""
    r, direction = uniform(low, high, n, 1, 1), uniform(-1, 1, n, 1, 1).sign()
    a = uniform(0, 2 * math.pi, n, 1) + torch.arange(bodies) * (2 * math.pi / bodies)
    q = r * torch.stack((a.cos(), a.sin()), -1)  # (n, bodies, 2)
    p = direction * speed / r.sqrt() * torch.stack((-a.sin(), a.cos()), -1)
    return q, p * (1 + 0.1 * uniform(-1, 1, n, bodies, 2))


def _pairs(q):
    """For every cyclic shift: the vector from each body to another, and 1 / distance."""
    for shift in range(1, q.shape[-2]):
        d = q.roll(-shift, -2) - q  # (..., bodies, 2)
        x, y = d.unbind(-1)
        yield d, torch.addcmul(x * x, y, y).rsqrt_().unsqueeze(-1)


def _angles(x):
    x, y = x.diff(dim=-2, prepend=torch.zeros_like(x[..., :1, :])).split(1, -1)
    return torch.atan2(x, -y)


_gravity = lambda q: -0.5 * sum(inverse.sum((-2, -1)) for _, inverse in _pairs(q))
_pull = lambda q: sum(d * (inverse * inverse * inverse) for d, inverse in _pairs(q))
_rods = lambda q: torch.cat((q.sin(), -q.cos()), -1).cumsum(-2)  # ends of a chain of rods


def _double(q, p):
    """Of the double pendulum, m 0.5 and l 1 both, g 3, whose M is ((1, c / 2), (c / 2, 1 / 2))."""
    sign, two = q.new_tensor((1.0, -1.0)).unsqueeze(1), q.new_tensor((1.0, 2.0)).unsqueeze(1)
    s, c = (f(q.diff(dim=-2)) for f in (torch.sin, torch.cos))  # (..., 1, 1)
    v = 2 * (two * p - c * p.flip(-2)) / (1 + s * s)
    return v, 0.5 * sign * s * v.prod(-2, keepdim=True) - 3 * q.sin() / two


SYSTEMS = {
    "mass_spring": System(  # m 0.5, k 2
        colours=(YELLOW,), radius=0.5, half_width=2.0, initial=partial(_polar, 0.1, 1.0),
        potential=lambda q: q.square().sum((-2, -1)), force=lambda q: -2 * q,
        position=lambda q: torch.cat((q, torch.zeros_like(q)), -1), locate=lambda x: x[..., :1],
    ),
    "pendulum": System(  # m 0.5, l 1, g 3
        colours=(YELLOW,), radius=0.5, half_width=2.0, initial=partial(_polar, 1.3, 2.3),
        potential=lambda q: 1.5 * (1 - q.cos()).sum((-2, -1)), force=lambda q: -1.5 * q.sin(),
        position=_rods, locate=_angles, periodic=True,
    ),
    "two_body": System(  # m 1, G 1
        colours=(YELLOW, RED), radius=0.375, half_width=3.0, noise=0.05, inertia=1.0,
        initial=partial(_orbit, 2, 0.5, 1.5, 0.5), potential=_gravity, force=_pull,
    ),
    "three_body": System(  # m 1, G 1
        colours=(YELLOW, RED, GREEN), radius=0.28125, half_width=3.0, noise=0.2, inertia=1.0,
        initial=partial(_orbit, 3, 0.9, 1.2, 3**-0.25), potential=_gravity, force=_pull,
    ),
    "spring_pendulum": System(  # m 0.5, k 4, rest length 1, g 3
        colours=(GREEN,), radius=0.4, half_width=2.5,
        initial=lambda n, uniform: (torch.tensor((0.0, -1.375)) + uniform(-0.5, 0.5, n, 1, 2),
                                    uniform(-0.5, 0.5, n, 1, 2)),
        potential=lambda q: (2 * (q.norm(dim=-1) - 1).square() + 1.5 * q[..., 1]).sum(-1),
        force=lambda q: -4 * (1 - 1 / q.norm(dim=-1, keepdim=True)) * q - q.new_tensor((0.0, 1.5)),
    ),
    "double_pendulum": System(  # chaotic, and K depends on q
        colours=(YELLOW, RED), radius=0.4, half_width=2.5,
        initial=lambda n, uniform: (uniform(-1.5, 1.5, n, 2, 1), uniform(-0.5, 0.5, n, 2, 1)),
        potential=lambda q: (q.new_tensor((3.0, 1.5)) * (1 - q[..., 0].cos())).sum(-1),
        motion=_double, position=_rods, locate=_angles, periodic=True,
    ),
}  # fmt: skip
SYSTEMS["damped_spring"] = replace(SYSTEMS["mass_spring"], friction=0.1)
SYSTEMS["damped_pendulum"] = replace(SYSTEMS["pendulum"], friction=0.1)


def initial_states(system, n, generator=None, device=None):
    """n random initial states q, p of shape (n, bodies, dims), float64, on `device`. Drawn on the
    generator's device: a CPU generator gives the same states on every device."""
    source = generator.device if generator is not None else "cpu"
    kind = {"generator": generator, "device": source, "dtype": torch.float64}
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(shape, **kind)
    with torch.device(source):
        return tuple(x.to(device or source) for x in system.initial(n, uniform))


def simulate(system, q, p, frames, dt=LONGEST):
    """True trajectories, in float64, by Gauss and Legendre's method. q, p: initial states (B,
    bodies, dims). frames: how many, with the initial one. dt: from frame to frame; negative runs
    backward. Returns: q, p (B, frames, bodies, dims). Raises: ValueError if frames < 1."""
    if frames < 1:
        raise ValueError(f"frames must be at least 1, not {frames}")
    path = [(q.double(), p.double())]
    for _ in range(frames - 1):
        path.append(_advance(system, *path[-1], dt))
    return tuple(torch.stack(x, 1) for x in zip(*path))


def _step(system, q, p, h, rounds=16):
    """One step of length h: q, p, and the energy (B,) that friction took. Slopes of the stages, k
    (2, 6, B, bodies, dims), are found by fixed-point iteration."""
    k = torch.stack(system.slope(q, p)).unsqueeze(1).expand(-1, 6, *q.shape)
    for _ in range(rounds):
        last, (dq, dp) = k, h * torch.einsum("ij,sj...->si...", A.to(q), k)
        k = torch.stack(system.slope(q + dq, p + dp))
        if (k - last).abs().max() < 1e-13:
            break
    lost = h * system.friction * torch.einsum("j,jb->b", B.to(q), ((p + dp) * k[0]).sum((2, 3)))
    dq, dp = h * torch.einsum("j,sj...->s...", B.to(q), k)
    return q + dq, p + dp, lost


def _advance(system, q, p, dt, refined=1, tolerance=1e-9):
    """The motion for dt; where energy changed, as when bodies meet, again in 4 to 256 parts."""
    start, energy, parts = (q, p), system.energy(q, p), math.ceil(abs(dt) / LONGEST) * refined
    for _ in range(parts):
        q, p, lost = _step(system, q, p, dt / parts)
        energy = energy - lost
    bad = ~((system.energy(q, p) - energy).abs() <= tolerance * (1 + energy.abs()))  # NaN is
    if refined < 256 and bad.any():
        q[bad], p[bad] = _advance(system, start[0][bad], start[1][bad], dt, 4 * refined)
    return q, p


def render(system, q, size=32):
    """Paint states q (B, T, bodies, dims) as pictures (B, T, 3, size, size), float32 in [0, 1], row
    0 on top: discs add colour by a pixel's share, linear in distance across the one-pixel edge."""
    centres = system.position(q).flatten(0, 1).float()  # (B*T, bodies, 2)
    frames = torch.empty(len(centres), 3, size, size, device=q.device)
    colours = torch.tensor((BACKGROUND, *system.colours)).to(q.device, non_blocking=True)
    pixels = size / (2 * system.half_width)  # per world unit
    grid = torch.arange(size, device=q.device, dtype=torch.float32) - (size - 1) / 2
    block = 256 if q.device.type == "cpu" else 2**15  # stays in a processor's cache
    for c, out in zip(centres.split(block), frames.split(block)):
        dx = (grid - pixels * c[..., 0:1]).square()  # (n, bodies, size)
        dy = (-grid - pixels * c[..., 1:2]).square()  # row 0 is the top
        distance = (dy.unsqueeze(-1) + dx.unsqueeze(-2)).sqrt_()  # (n, bodies, size, size)
        share = distance.neg_().add_(system.radius * pixels + 0.5).clamp_(0, 1)
        out.copy_(colours[0, :, None, None])
        for disc, colour in zip(share.split(1, 1), colours[1:]):
            out.addcmul_(disc, colour[:, None, None])
        out.clamp_(max=1)
    return frames.view(*q.shape[:2], 3, size, size)


def gauss_newton(f, x, target, rounds, h, most, damping):
    """x (n, ...) whose f(x) is target; slopes by central differences of h, steps to `most`."""
    shape, x, target = x.shape[1:], x.flatten(1), target.flatten(1)
    flat = lambda x: f(x.view(-1, *shape)).flatten(1)
    one = torch.eye(x.shape[1]).to(x)
    moves = h * torch.stack((one, -one)).unsqueeze(2)  # (2, dim, 1, dim)
    for _ in range(rounds):
        ahead, behind = flat((x + moves).flatten(0, 2)).to(x).unflatten(0, (2, -1, len(x)))
        J = (ahead - behind).permute(1, 2, 0) / (2 * h)  # (n, m, dim)
        wrong = (target - flat(x)).to(x).unsqueeze(2)
        step = torch.linalg.solve(J.mT @ J + damping * one, J.mT @ wrong)
        x = x + step.squeeze(2).clamp(-most, most)
    return x.view(-1, *shape)


def read_q(system, frames):
    """The true system's q (n, T, bodies, dims) that frames (n, T, 3, S, S) show: centroids of the
    pixels whose colour is nearest a body's, then Gauss-Newton steps towards the picture."""
    size, pictures = frames.shape[-1], frames.flatten(0, 1)
    light = pictures - torch.tensor(BACKGROUND).to(frames).view(3, 1, 1)
    colours = torch.nn.functional.normalize(torch.tensor(system.colours).to(frames))
    share = torch.einsum("ncyx,bc->nbyx", light, colours).clamp(min=1e-9)
    share = share * (share == share.amax(1, keepdim=True))
    side = (torch.arange(size).to(frames) - (size - 1) / 2) * 2 * system.half_width / size
    grid = torch.stack(torch.meshgrid(side, -side, indexing="xy"))  # (2, S, S), y upward
    centre = torch.einsum("nbyx,dyx->nbd", share, grid) / (share.sum((2, 3)) + 1e-9).unsqueeze(2)
    painted = lambda q: render(system, q.unsqueeze(1), size)
    q = gauss_newton(painted, system.locate(centre).double(), pictures, 2, 0.01, 0.2, 1e-3)
    return q.unflatten(0, frames.shape[:2])


def clips(system, n, frames=30, dt=LONGEST, noise=0.0, size=32, generator=None, device=None):
    """n random clips: frames (n, frames, 3, size, size), noise as of `jitter`, and true q and p."""
    q, p = simulate(system, *initial_states(system, n, generator, device), frames, dt)
    return render(system, jitter(system, q, noise, generator), size), q, p


def jitter(system, q, noise=0.0, generator=None):
    """q plus observation noise: a Gaussian of sigma `noise`, world units, or "paper" for its."""
    sigma = system.noise if noise == "paper" else noise
    source = generator.device if generator is not None else q.device
    noise = torch.randn(q.shape, generator=generator, device=source, dtype=q.dtype)
    return q + sigma * noise.to(q.device)


@contextmanager
def _reading(path):
    """One kind of error, in one line, of the many that files which cannot be read cause."""
    try:
        if not path.is_file():  # a pipe would be waited for
            raise ValueError("it is no regular file" if path.exists() else "it is not there")
        yield
    except Exception as error:
        why = " ".join(str(error).split()).split(". If you trust")[0] or type(error).__name__
        raise ValueError(f"{path} cannot be read: {why.strip('.')}. Mend or restore it") from error


def _array(path):
    """What an .npy file holds, left on disk; of an .npz file the clips or, without any, points."""
    with _reading(path):
        if path.suffix.lower() == ".npy":
            found = [np.load(path, mmap_mode="r", allow_pickle=False)]
        else:
            size = sum(x.file_size for x in zipfile.ZipFile(path).infolist())
            if size > min(2**31, max(2**28, 100 * path.stat().st_size)):
                raise ValueError(f"it unpacks to {size / 1e9:.1f} GB: save it as an .npy file")
            found = [*np.load(path, allow_pickle=False).values()]
            found = [x for x in found if x.ndim > 2] or [x for x in found if x.ndim == 2]
        if len(found) != 1 or found[0].dtype.kind not in "buif":
            raise ValueError("save one array of numbers in it, and only one of clips or points")
        return np.asarray(found[0])


def read_points(path):
    """Points (N, D), float64, of an array file; None where path holds clips. Raises ValueError."""
    array = _array(Path(path)) if Path(path).suffix.lower() in ARRAYS else np.empty(0)
    return array.astype("float64") if array.ndim == 2 else None


def _unit(x):
    """Pixels of any kind -> float32 in [0, 1]. Raises ValueError for values beyond."""
    white = {"b": 1, "f": 1}.get(x.dtype.kind, 65535 if x.dtype.str[1:] == "u2" else 255)
    x = np.asarray(x, "float32") / np.float32(white)
    if not (0 <= x.min() and x.max() <= 1):  # nor NaN
        raise ValueError(f"values {white * x.min():.3g} to {white * x.max():.3g}, not 0 to {white}")
    return x


def _frames(path):
    """Frames of a film or picture, (H, W, 3), and the milliseconds each lasts, 0 if unknown."""
    if path.suffix.lower() in FILMS:
        import imageio.v3 as iio

        with iio.imopen(path, "r", plugin="pyav") as film:
            yield from ((frame, 1000 / film.metadata()["fps"]) for frame in film.iter())
        return
    from PIL import Image, ImageOps

    with Image.open(path) as file:
        for i in range(1 if file.format == "MPO" else getattr(file, "n_frames", 1)):
            file.seek(i)
            x = ImageOps.exif_transpose(file)  # as the phone was held
            if x.mode[0] in "IF":  # grey, of 16 bits or floats
                x = np.dstack([np.asarray(x, "uint16" if x.mode[0] == "I" else "float32")] * 3)
            else:  # what is transparent shows white
                white = Image.new("RGBA", x.size, "white")
                x = np.asarray(Image.alpha_composite(white, x.convert("RGBA")))[..., :3]
            yield x, file.info.get("duration", 0)


class Recordings:
    """Clips of the user's own: squared, resized, and split into those to train on and a tenth held
    out: of one recording, which is cut, the last in time; of several, whole ones.

    path: an array, a film or GIF, or a folder of films, of pictures or of folders of pictures.
    size: pixels; default the pictures' own, 16 to 128, or 32. clip: frames of those cut. stride:
    take every k-th frame. dt: seconds between recorded ones; default 1 / fps, the files', 0.125.
    seed: of what is held out. least: frames that a clip must have. Raises: ValueError."""

    def __init__(self, path, size=None, clip=60, stride=1, dt=None, fps=None, seed=0, least=6):
        self.path, self.size, self.passed = Path(path), size, []
        read = self._of_array if self.path.suffix.lower() in ARRAYS else self._of_files
        films = [(film[::stride], rate) for film, rate in read()]
        long, rates = [*zip(*(x for x in films if len(x[0]) >= least))] or [(), ()]
        need = 2 * least if 1 in (len(films), len(long)) else least
        if not long or len(long[0]) < need:
            what = f"film or pictures of {need} frames, nor is it a .npy file (by numpy.save)"
            raise ValueError(f"{path} has no {what}. Passed over: {self.passed[:3]}")
        if not any(_unit(x[:: 1 + len(x) // 64]).max() > 0.1 for x in long):
            raise ValueError(f"{path} is dark: scale it; of 16-bit integers 65535 is white")
        if not (dt or fps) and max(rates) > 1.1 * min(rates):
            raise ValueError(f"{path} has films of unlike rates: convert them, or set all by --fps")
        self.dt = stride * (dt or (1 / fps if fps else rates[0] or 0.125))
        clip = max(least, min(clip, len(long[0]) // 2) if len(long) == 1 else clip)
        groups = [np.split(x, range(clip, len(x) - clip + 1, clip)) for x in long]
        order = torch.randperm(len(long), generator=torch.Generator().manual_seed(seed))
        if len(long) == 1:
            groups = [[x] for x in groups[0]]
            order = torch.arange(len(groups)).flip(0)  # the last first
        which = torch.tensor([i for i, group in enumerate(groups) for _ in group])
        held = torch.isin(which, order[: max(1, len(order) // 10)])
        self.held_out, self.train = held.nonzero().flatten(), (~held).nonzero().flatten()
        self.clips = [x for group in groups for x in group]
        crc = reduce(lambda crc, clip: zlib.crc32(clip.tobytes(), crc), self.clips, 0)
        self.digest = f"{sum(map(len, long))} frames, CRC {crc:x}"
        self.lengths, self.channels = torch.tensor([*map(len, self.clips)]), long[0].shape[3]
        self.summary = (
            f"{path}: recordings {len(films)}, too short {len(films) - len(long)}; {len(held)} "
            f"clip(s) of {self.lengths.min()} to {self.lengths.max()} frames, {self.lengths.sum()} "
            f"in all, {self.before} -> {self.size} x {self.size}, {1 / self.dt:.4g} a second; "
            f"passed over: {len(self.passed)} file(s) {', '.join(self.passed[:3])}"
        )

    def read(self, clips, times):
        """Frames (B, n, C, size, size) in [0, 1] of clips (B,) at times (B, n)."""
        x = [_unit(self.clips[i][t]) for i, t in zip(clips.tolist(), times.numpy())]
        return torch.from_numpy(np.stack(x)).movedim(4, 2)

    def _fit(self, frame):
        """Middle square of (H, W, C), (size, size, C) bytes; each pixel is the mean of its area."""
        from PIL import Image, ImageOps

        high, wide = frame.shape[:2]
        usual = min(high, wide) if min(high, wide) in range(16, 129, 8) else 32
        self.size, self.before = self.size or usual, f"{wide} x {high}"
        fit = lambda x: ImageOps.fit(Image.fromarray(x), (self.size,) * 2, Image.Resampling.BOX)
        return np.rint(255 * np.dstack([*map(fit, np.moveaxis(_unit(frame), 2, 0))])).astype("u1")

    def _of_array(self):
        """Recordings (T, H, W, C), and the seconds between their frames, 0 if unknown."""
        shape = (x := _array(self.path)).shape
        x = x[None] if x.ndim == 3 or x.ndim == 4 and {shape[1], shape[3]} & {1, 3} else x  # a film
        x = x[..., None] if x.ndim == 4 else x
        x = np.moveaxis(x, 2, 4) if x.ndim == 5 and x.shape[4] not in (1, 3) else x
        with _reading(self.path):
            if x.ndim != 5 or x.shape[4] not in (1, 3) or 0 in x.shape:
                raise ValueError(f"clips are (N, T, H, W[, 1 or 3]), points (N, D), not {shape}")
            self._fit(x[0, 0])
            for film in x:
                if film.shape[1:3] != (self.size, self.size):
                    film = np.stack([*map(self._fit, film)])
                for part in np.array_split(film, 1 + len(film) // 64) if x.dtype != "u1" else ():
                    _unit(part)  # refuses values beyond
                yield film, 0.0

    def _of_files(self):
        """The same, decoded: of each film in a folder, or of the folder's pictures."""
        natural = lambda x: [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", x.name)]
        shown = lambda x: sorted(x.iterdir(), key=natural) if x.is_dir() else [x]
        known = lambda x: x.suffix.lower() in KNOWN and x.name[0] != "."
        recordings, files = [], shown(self.path)
        for folder in (files, *(shown(x) for x in files if x.is_dir() and x.name[0] != ".")):
            self.passed += [x.name for x in folder if not known(x) and not x.is_dir()]
            films = [self._of_file(x) for x in filter(known, folder)]
            stills = [film for film, _ in films if len(film) == 1]
            recordings += [x for x in films if len(x[0]) > 1]
            recordings += [(np.concatenate(stills), 0.0)] if stills else []
        grey = all((film == film[..., :1]).all() for film, _ in recordings)
        return [(film[..., :1] if grey else film, rate) for film, rate in recordings]

    def _of_file(self, path):
        with _reading(path):
            frames, lasts = zip(*((self._fit(x), t) for x, t in _frames(path)))
        counts = [max(1, int(t // (min(lasts) or math.inf))) for t in lasts]  # merged ones
        return np.repeat(np.stack(frames), counts, 0), sum(lasts) / sum(counts) / 1000
