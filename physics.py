"""Every source of clips: simulated systems, exact and rendered, and the user's own recordings.

Needs torch and numpy, for recordings Pillow, and for films PyAV. The constants, initial states and
colours of the first four systems are those of Toth et al. (ICLR 2020), as published with its
reproduction (Balsells Rodas et al. 2021); the other systems are our own.

    frames, q, p = clips(SYSTEMS["three_body"], n=16)   # (16, 30, 3, 32, 32), (16, 30, 3, 2) twice
    own = Recordings("pendulum.mp4")
    frames = own.frames(torch.tensor([0]), torch.arange(5)[None])  # of clip 0: (1, 5, C, 32, 32)
"""

import math
import re
import warnings
import zlib
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------- systems

BACKGROUND = (81 / 255, 88 / 255, 93 / 255)  # grey: a black background makes training harder
YELLOW = (173 / 255, 146 / 255, 0.0)
RED = (173 / 255, 0.0, 0.0)
GREEN = (0.0, 146 / 255, 0.0)


def unchanged(x):
    return x


@dataclass(frozen=True)
class System:
    """A physical system, H(q, p) = p^2 / (2 inertia) + V(q), and how it looks.

    States q and p have shape (..., bodies, dims). Units are the paper's, in which 0.125 passes from
    frame to frame.

    Args:
        colours: for each body the RGB, in [0, 1], that it adds to the grey background.
        radius: of a disc, in world units.
        half_width: the picture shows [-half_width, half_width] squared, in world units.
        initial: a function of n and uniform that gives q and p, (n, bodies, dims) each, where
            uniform(low, high, *shape) draws random numbers.
        potential: V(q), (..., bodies, dims) -> (...), which autograd can differentiate.
        inertia: the mass m, or m l^2 for an angle.
        noise: sigma of the paper's observation noise on every coordinate of q.
        position: q -> the centres of the discs, (..., bodies, 2), y upward, unless q is just that.
        periodic: whether q are angles.
        friction: gamma of dp/dt = -dV/dq - gamma p.
    """

    colours: tuple
    radius: float
    half_width: float
    initial: Callable
    potential: Callable
    inertia: float = 0.5
    noise: float = 0.1
    position: Callable = unchanged
    periodic: bool = False
    friction: float = 0.0

    def energy(self, q, p):
        """H of states (..., bodies, dims), (...)."""
        return p.square().sum((-2, -1)) / (2 * self.inertia) + self.potential(q)

    @torch.enable_grad()
    def force(self, q):
        """-dV/dq of positions (..., bodies, dims), by autograd."""
        q = q.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.potential(q).sum(), q)
        return -slope

    def check(self, q):
        """Raises: ValueError where the functions of the system do not fit q (n, bodies, dims)."""
        n = len(q)
        centres = (n, len(self.colours), 2)
        if self.potential(q).shape != (n,) or self.position(q).shape != centres:
            raise ValueError(
                "potential of a System must give (...) for q (..., bodies, dims), and position "
                "(..., bodies, 2), with as many bodies as colours"
            )


# mass_spring: m = 0.5, k = 2. q is the displacement along x.


def polar_state(low, high, n, uniform):
    """(q, p) = r (cos a, sin a) with r ~ U(low, high) and a uniform angle a."""
    r = uniform(low, high, n, 1, 1)
    a = uniform(0, 2 * math.pi, n, 1, 1)
    return r * a.cos(), r * a.sin()


def spring_potential(q):
    return q.square().sum((-2, -1))


def along_x(q):
    return F.pad(q, (0, 1))


# pendulum: m = 0.5, l = 1, g = 3. q is the angle from the lowest point.


def pendulum_potential(q):
    return 1.5 * (1 - q.cos()).sum((-2, -1))


def rod_end(angle):
    """The end of a rod of length 1 at an angle (..., 1), (..., 2)."""
    return torch.cat((angle.sin(), -angle.cos()), -1)


# two_body and three_body: m = 1, G = 1. q are the positions.


def orbit(bodies, low, high, speed, n, uniform):
    """Bodies of unit mass evenly spaced on a circle of radius r ~ U(low, high), turning either way.

    The speed is `speed` / sqrt(r), of a circular orbit; then each of its components is multiplied
    by a random factor from 0.9 to 1.1.
    """
    r = uniform(low, high, n, 1, 1)
    direction = uniform(-1, 1, n, 1, 1).sign()
    first_angle = uniform(0, 2 * math.pi, n, 1)
    a = first_angle + torch.arange(bodies) * (2 * math.pi / bodies)  # (n, bodies)
    q = r * torch.stack((a.cos(), a.sin()), -1)  # (n, bodies, 2)
    p = direction * speed / r.sqrt() * torch.stack((-a.sin(), a.cos()), -1)
    return q, p * (1 + 0.1 * uniform(-1, 1, n, bodies, 2))


def gravity_potential(q):
    """The sum of -1 / distance over all pairs of bodies."""
    pairs = combinations(q.unbind(-2), 2)
    return -sum(1 / (a - b).norm(dim=-1) for a, b in pairs)


# A new system is one more entry here, see `System`.
SYSTEMS = {
    "mass_spring": System(
        colours=(YELLOW,), radius=0.5, half_width=2.0, initial=partial(polar_state, 0.1, 1.0),
        potential=spring_potential, position=along_x,
    ),
    "pendulum": System(
        colours=(YELLOW,), radius=0.5, half_width=2.0, initial=partial(polar_state, 1.3, 2.3),
        potential=pendulum_potential, position=rod_end, periodic=True,
    ),
    "two_body": System(
        colours=(YELLOW, RED), radius=0.375, half_width=3.0, inertia=1.0, noise=0.05,
        initial=partial(orbit, 2, 0.5, 1.5, 0.5), potential=gravity_potential,
    ),
    "three_body": System(
        colours=(YELLOW, RED, GREEN), radius=0.28125, half_width=3.0, inertia=1.0, noise=0.2,
        initial=partial(orbit, 3, 0.9, 1.2, 3**-0.25), potential=gravity_potential,
    ),
}  # fmt: skip
SYSTEMS["damped_spring"] = replace(SYSTEMS["mass_spring"], friction=0.1)
SYSTEMS["damped_pendulum"] = replace(SYSTEMS["pendulum"], friction=0.1)


# -------------------------------------------------------------------------------------- simulation

PAPER_DT = 0.125  # the paper's time between frames
LEAPFROGS = 5  # solutions of 1, 2, ..., 5 steps are extrapolated, a method of order 10
TOLERANCE = 1e-10  # the largest absolute or relative change by the last refinement
SHORTEST = PAPER_DT / 256  # step; where it does not resolve a close meeting, there is a warning
UNRESOLVED = (
    "a simulated motion is wrong: it is not finite, or does not settle however short the steps, as "
    "where bodies all but collide; start from other states, or leave such clips out"
)


def initial_states(system, n, generator=None, device="cpu"):
    """n random initial states q, p, (n, bodies, dims) each, float64, on `device`.

    They are drawn on the CPU, by a generator of the CPU, so that they are the same everywhere.
    """

    def uniform(low, high, *shape):
        numbers = torch.rand(shape, generator=generator, dtype=torch.float64)
        return low + (high - low) * numbers

    q, p = system.initial(n, uniform)
    return q.to(device), p.to(device)


def simulate(system, q, p, frames, dt=PAPER_DT):
    """True trajectories in float64, by extrapolated leapfrogs, see `advance`.

    q, p: initial states (B, bodies, dims). frames: how many, with the initial one. dt: from frame
    to frame; negative runs backward. Returns: q, p, (B, frames, bodies, dims) each.
    Raises: ValueError if frames < 1, and for a system whose functions do not fit each other.
    Warns: where a motion cannot be computed.
    Gradients do not go through the forces.
    """
    if frames < 1:
        raise ValueError(f"frames must be at least 1, not {frames}")
    system.check(q)
    path = [torch.stack((q, p)).double()]  # (2, B, bodies, dims)
    for _ in range(frames - 1):
        path.append(advance(system, path[-1], dt))
    q, p = torch.stack(path, 2)
    return q, p


def leapfrog(system, state, dt, steps):
    """States (q, p), stacked, after a time dt in so many steps. Friction acts between two kicks."""
    q, p = state
    h = dt / steps
    drift = h / (2 * system.inertia)
    damping = math.exp(-system.friction * h)
    for _ in range(steps):
        q = q + drift * p
        kick = h / 2 * system.force(q)
        p = damping * (p + kick) + kick
        q = q + drift * p
    return torch.stack((q, p))


def extrapolate(states):
    """The limit of states after 1, 2, ... steps, and what it was before the last refinement.

    A symmetric method such as the leapfrog errs by a series in 1 / steps^2. By Neville's scheme,
    each round takes the next term of it away.
    """
    for term in range(1, len(states)):
        before = states
        states = []
        for n, (coarse, fine) in enumerate(pairwise(before), 1):
            ratio = (n + term) / n
            states.append(fine + (fine - coarse) / (ratio**2 - 1))
    return states[0], before[-1]


def advance(system, start, dt):
    """States (q, p), stacked, after a time dt, by the method of Gragg, Bulirsch and Stoer.

    It extrapolates leapfrogs (Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I,
    II.9). Motions that the last refinement still changes by more than TOLERANCE are computed again
    in two halves.
    """
    states = [leapfrog(system, start, dt, n) for n in range(1, LEAPFROGS + 1)]
    end, before = extrapolate(states)
    settled = torch.isclose(end, before, TOLERANCE, TOLERANCE)  # which NaN never is
    bad = ~settled.all((0, 2, 3))  # (B,)
    if bad.any():
        if abs(dt) > SHORTEST:
            middle = advance(system, start[:, bad], dt / 2)
            end[:, bad] = advance(system, middle, dt / 2)
        else:
            warnings.warn(UNRESOLVED, stacklevel=2)
    return end


# --------------------------------------------------------------------------------------- rendering


CPU_BLOCK = 256  # frames painted at once on a CPU, which stay in its cache
GPU_BLOCK = 8192


def render(system, q, size=32):
    """Paint states q (B, T, bodies, dims): pictures (B, T, 3, size, size), float32 in [0, 1].

    Row 0 is on top. Each disc adds its colour to a pixel by the share of the pixel that it covers,
    which falls linearly with the distance across an edge of one pixel.
    """
    pixels = size / (2 * system.half_width)  # for each world unit
    centres = pixels * system.position(q).flatten(0, 1).float()  # (B * T, bodies, 2)
    line = torch.arange(size, device=q.device) - (size - 1) / 2  # of pixels, from left or top
    background = torch.tensor(BACKGROUND, device=q.device).view(3, 1, 1)
    colours = torch.tensor(system.colours, device=q.device).view(-1, 3, 1, 1)
    frames = torch.empty(len(centres), 3, size, size, device=q.device)
    block = CPU_BLOCK if q.device.type == "cpu" else GPU_BLOCK
    for part, out in zip(centres.split(block), frames.split(block), strict=True):
        out.copy_(background)
        for centre, colour in zip(part.unbind(1), colours, strict=True):
            x, y = centre.split(1, 1)  # (n, 1) each
            dx = (line - x).square().view(-1, 1, 1, size)
            dy = (line + y).square().view(-1, 1, size, 1)  # as y is upward
            distance = (dx + dy).sqrt_()  # (n, 1, size, size)
            share = distance.neg_().add_(system.radius * pixels + 0.5).clamp_(0, 1)
            out.addcmul_(share, colour)
        out.clamp_(max=1)
    return frames.view(*q.shape[:2], 3, size, size)


def jitter(system, q, noise=0.0, generator=None):
    """q plus observation noise: a Gaussian of sigma `noise`, or "paper" for the paper's sigma.

    It is drawn on the CPU, as the initial states are.
    """
    sigma = system.noise if noise == "paper" else noise
    gaussian = torch.randn(q.shape, generator=generator, dtype=q.dtype)
    return q + sigma * gaussian.to(q.device)


def clips(system, n, frames=30, dt=PAPER_DT, noise=0.0, size=32, generator=None, device="cpu"):
    """n random clips (n, frames, 3, size, size), and their true q and p (n, frames, bodies, dims).

    noise: as of `jitter`; q and p are without it.
    """
    q, p = initial_states(system, n, generator, device)
    q, p = simulate(system, q, p, frames, dt)
    return render(system, jitter(system, q, noise, generator), size), q, p


# ------------------------------------------------------------------------------- the user's files

ARRAYS = (".npy", ".npz", ".csv")
FILMS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")
PICTURES = (".gif", ".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
SMALLEST_SIDE = 8  # of pictures in an array: an axis that is shorter is another one, such as RGBA
# The value of white by the kind of number; of all other kinds, which are integers, it is 255.
WHITE = {
    "bool": 1, "float16": 1, "float32": 1, "float64": 1, "float128": 1, "uint16": 65535,
}  # fmt: skip
DARK = 0.1  # recordings in which nothing is brighter are taken to be of the wrong scale
ROUNDING = 0.0101  # seconds to which a GIF rounds the durations of its frames
DYING = 0.25  # held-out clips that move less than this share of the others are warned of
UNLIKE = 1.03  # ratio of the steps of two films from which they must not be mixed


@contextmanager
def reading(path):
    """Turn the many errors of files that cannot be read into a ValueError of one line."""
    try:
        yield
    except (MemoryError, ImportError):
        raise
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        # Numpy goes on to advise how to run the file's code, or to name every wrong line of it.
        why = text.split(". ")[0].strip(".")[:500]
        raise ValueError(f"{path} cannot be read: {why}. Mend or restore it") from error


def read_csv(path):
    """Numbers (N, D) separated by commas, below one line of names or none.

    Every column is a coordinate. Raises: ValueError, also where the first one numbers the rows.
    """
    # Spreadsheets begin a file with a mark, which this encoding drops. Words are read as NaN.
    table = np.genfromtxt(path, delimiter=",", comments=None, ndmin=2, encoding="utf-8-sig")
    if np.isnan(table[:1]).all():
        table = table[1:]
    if np.isnan(table).any():
        raise ValueError("below its first line, something between commas is no number like 0.5")
    if (np.diff(table[:, 0]) == 1).all():
        raise ValueError("its first column numbers the rows: leave that out, in pandas index=False")
    return table


def read_array(path):
    """The array in an .npy or .csv file; of an .npz file the clips, else the points."""
    with reading(path):
        if path.suffix.lower() == ".csv":
            return read_csv(path)
        arrays = np.load(path, mmap_mode="r", allow_pickle=False)  # an .npy file stays on disk
        arrays = [arrays] if isinstance(arrays, np.ndarray) else list(arrays.values())
        clips = [x for x in arrays if x.ndim > 2]
        arrays = clips or [x for x in arrays if x.ndim == 2]
        if len(arrays) != 1 or arrays[0].dtype.kind not in "buif":
            raise ValueError("save one array of numbers in it: points (N, D), or clips or a film")
        return arrays[0]


def read_points(path):
    """Points (N, D), float64, of an array file; None where path holds clips. Raises: ValueError."""
    path = Path(path)
    if path.suffix.lower() not in ARRAYS:
        return None
    array = read_array(path)
    return array.astype("float64") if array.ndim == 2 else None


@dataclass
class Film:
    """A recording: its frames (T, size, size, C), at even steps, and the seconds of a step."""

    frames: np.ndarray
    step: float = 0.0  # 0 if unknown


def as_films(array):
    """Films (N, T, H, W, C) of an array of clips or of one film. Raises: ValueError."""
    shape = array.shape
    time_last = False
    if array.ndim < 4 or not {1, 3} & {shape[-1], shape[-3]}:
        # There are no channels. Frames have two equal sides: these are not the last two axes here.
        time_last = array.ndim > 2 and shape[-3] == shape[-2] != shape[-1]
        array = array[..., None]
    if array.shape[-1] not in (1, 3):
        array = np.moveaxis(array, -3, -1)
    if array.ndim == 4:
        array = array[None]
    if array.ndim != 5 or min(array.shape[2:4]) < SMALLEST_SIDE or 0 in shape or time_last:
        raise ValueError(
            "clips are (N, T, H, W), one film is (T, H, W), with channels C, 1 or 3, after W or T, "
            f"and H and W at least {SMALLEST_SIDE}; points are (N, D); its shape is {shape}; if "
            "time is last, as in (H, W, T), save np.moveaxis(x, -1, -3), else x[..., None]"
        )
    return array


def read_array_films(path, size):
    """A Film of every clip in an array file, and a list of what to say about them."""
    array = read_array(path)
    films = []
    with reading(path):
        clips = as_films(array)
        for frames in clips:
            size = size_of(frames[0], size)
            if frames.shape[1:3] != (size, size):
                frames = np.stack([square(frame, size) for frame in frames])
            films.append(Film(frames))
    name = array.dtype.name
    return films, [
        f"shape {array.shape} read as clips, time, rows, columns, channels {clips.shape}",
        f"of {name}, white is {WHITE.get(name, 255)}",
    ]


def film_frames(path):
    """Frames (H, W, 3) of a film, upright, and the second each begins at, None if unknown."""
    try:
        import av
    except ImportError:
        raise ImportError("films need `pip install av`") from None
    with av.open(path) as film:
        for frame in film.decode(video=0):
            pixels = frame.to_ndarray(format="rgb24")
            yield np.rot90(pixels, frame.rotation // 90), frame.time


def rgb(picture):
    """The pixels (H, W, 3) of a picture of Pillow. What is transparent shows white."""
    from PIL import Image

    if picture.mode[0] in "IF":  # grey, integers of 16 or more bits or floats
        white = 65535 if picture.mode[0] == "I" else 1
        grey = np.asarray(picture, "float32") / white
        return np.dstack([grey, grey, grey])
    white = Image.new("RGBA", picture.size, "white")
    opaque = Image.alpha_composite(white, picture.convert("RGBA"))
    return np.asarray(opaque.convert("RGB"))


def picture_frames(path):
    """Frames (H, W, 3) of a picture or GIF, and the second each begins at, 0 if unknown."""
    from PIL import Image, ImageOps, ImageSequence

    seconds = 0.0
    with Image.open(path) as file:
        for picture in ImageSequence.Iterator(file):
            upright = ImageOps.exif_transpose(picture)  # as the camera was held
            yield rgb(upright), seconds
            seconds += file.info.get("duration", 0) / 1000


def read_frames(path, size):
    """Frames (n, size, size, 3) of a film or picture, and the second each begins at, (n,)."""
    frames = []
    times = []
    with reading(path):
        decode = picture_frames if path.suffix.lower() in PICTURES else film_frames
        for frame, seconds in decode(path):
            size = size_of(frame, size)
            frames.append(square(frame, size))
            times.append(seconds)
        return np.stack(frames), np.array(times, float)  # NaN where unknown


def even_steps(times):
    """Choose frames at even steps, of those that begin at times (n,).

    The step is the median of the frames' durations, averaged over those that differ by rounding.
    Each step shows the frame that was there in its middle.
    Returns: the indices of the frames to show, and the step in seconds, 0 where times are unknown.
    """
    durations = np.diff(times)
    median = np.median(durations) if len(durations) else 0
    if not median > 0:  # as NaN is not either
        return np.arange(len(times)), 0.0
    off = abs(durations - median)
    # A GIF rounds times to 0.01 s, half of a step of 0.02 s. In a faster film that would be a gap.
    rounding = max(0.2 * median, min(ROUNDING, 0.51 * median), off.min())
    step = durations[off <= rounding].mean().item()
    steps = round((times[-1] - times[0]) / step)
    middles = times[0] + step * (0.5 + np.arange(1 + steps))
    return np.searchsorted(times, middles, side="right") - 1, step


def unit_range(x):
    """Pixels of any kind -> float32 in [0, 1]. Raises: ValueError for values beyond."""
    white = WHITE.get(x.dtype.name, 255)
    x = np.asarray(x, "float32") / np.float32(white)
    if not 0 <= x.min() <= x.max() <= 1:  # nor is NaN
        raise ValueError(
            f"its values are NaN or not from 0, which is black, to {white}, white: scale them"
        )
    return x


def size_of(frame, size=None):
    """The size to give pictures: the one asked for, else that of (H, W, C) if it suits, else 32."""
    if size is not None:
        return size
    side = min(frame.shape[:2])
    return side if side in range(16, 129, 8) else 32


def square(frame, size):
    """The middle square of (H, W, C), resized: bytes (size, size, C)."""
    from PIL import Image, ImageOps

    channels = []
    for channel in np.moveaxis(unit_range(frame), 2, 0):
        box = Image.Resampling.BOX  # a pixel is the mean of its area
        channels.append(ImageOps.fit(Image.fromarray(channel), (size, size), box))
    return np.rint(255 * np.dstack(channels)).astype("uint8")


def in_order(paths):
    """Paths in the order of the whole numbers in their names: frame10 after frame9."""

    def words_and_numbers(path):
        parts = re.split(r"(\d+)", path.name)
        return [int(part) if part.isdecimal() else part for part in parts]

    return sorted(paths, key=words_and_numbers)


def is_known(path):
    """Whether path is a film or picture that is not hidden. To read a pipe would never end."""
    return path.is_file() and path.suffix.lower() in FILMS + PICTURES and path.name[0] != "."


def list_files(path):
    """The films and pictures in a folder and in the folders in it, and how much else is there."""
    if path.is_file():
        return [path], 0
    with reading(path):
        top = in_order(path.iterdir())
        folders = [x for x in top if x.is_dir() and x.name[0] != "."]
        inside = [x for folder in folders for x in in_order(folder.iterdir())]
    files = [x for x in top + inside if is_known(x)]
    return files, len(top) + len(inside) - len(folders) - len(files)


def read_films(path, size):
    """The Films of all files, and a list of what to say about them.

    A film is what a file holds; the single pictures in a folder are another one.
    """
    files, others = list_files(path)
    notes = [f"passed over: {others} file(s) or folder(s)"]
    recordings = defaultdict(list)  # by the file or folder: frames, times, numbers in the names
    for file in files:
        frames, times = read_frames(file, size)
        size = frames.shape[1]  # the first picture decides it
        name = file if len(frames) > 1 else file.parent
        last_number = re.findall(r"\d+", file.stem)[-1:]
        recordings[name].append((frames, times, last_number))
    films = []
    for name, parts in recordings.items():
        frames, times, numbers = map(np.concatenate, zip(*parts, strict=True))
        shown, step = even_steps(times)
        films.append(Film(frames[shown], step))
        if not np.array_equal(shown, np.arange(len(frames))):
            notes.append(f"{name.name}: uneven frames brought to steps of {step:.3g} s")
        if len(set(np.diff(numbers.astype(float)))) > 1:
            notes.append(f"{name.name}: the numbers in the names skip: are pictures missing?")
    return films, notes


def moving_clips(films, length):
    """Clips of `length` to almost twice as many frames, or of as many as a film has.

    Returns: those in which something moves, the number of the film that each is of, and how many
    clips stand still.
    """
    clips = []
    film_of = []
    still = 0
    for i, film in enumerate(films):
        ends = range(length, len(film.frames) - length + 1, length)
        for clip in np.split(film.frames, ends):
            if (clip == clip[0]).all():
                still += 1
            else:
                clips.append(clip)
                film_of.append(i)
    return clips, film_of, still


def hold_out(films, seed):
    """Which of some clips to train on, and which to hold out: those of a tenth of the films.

    films: the film that each clip is of. Of a single film the last tenth of the clips is held out.
    """
    films = torch.tensor(films)
    order = films.unique()
    if len(order) == 1:
        films = torch.arange(len(films))
        order = films.flip(0)
    else:
        generator = torch.Generator().manual_seed(seed)
        order = order[torch.randperm(len(order), generator=generator)]
    held_out = torch.isin(films, order[: max(1, len(order) // 10)])
    return (~held_out).nonzero().flatten(), held_out.nonzero().flatten()


def motion(clip):
    """The mean squared change of the pixels of a clip (T, H, W, C) from frame to frame."""
    return np.square(np.diff(unit_range(clip), axis=0)).mean()


def frame_time(path, films, dt):
    """Seconds between frames, as asked for or as the files say. Raises: ValueError."""
    if dt:
        return dt
    steps = [film.step for film in films]
    if max(steps) > UNLIKE * min(steps):
        raise ValueError(f"{path} has films of unlike rates: convert them, or set all by --dt")
    return steps[0] or PAPER_DT


class Recordings:
    """Clips of the user's own recordings: squared, resized, some to train on and a tenth held out.

    Of several recordings whole ones are held out. A single one is cut, and its last clips are.

    Args:
        path: an array file, a film, a GIF, or a folder of films, pictures or folders of pictures.
        size: pixels; default the pictures' own, if 16 to 128 and a multiple of 8, else 32.
        clip: frames of the clips that a recording is cut into, to almost twice as many.
        stride: take every k-th frame.
        dt: seconds between recorded frames; default the files', or 0.125.
        seed: of what is held out.
        least: frames that a clip must have.
    Attributes: `size`, `channels`; `dt`, seconds between frames; `lengths` of the clips (clips,);
        `train` and `held_out`, the numbers of the clips; `digest` of all frames; `summary`, a line.
    Raises: ValueError, in one line, for what cannot be read or is too short.
    """

    def __init__(self, path, size=None, clip=60, stride=1, dt=None, seed=0, least=6):
        path = Path(path)
        read = read_array_films if path.suffix.lower() in ARRAYS else read_films
        films, notes = read(path, size)
        films = [Film(film.frames[::stride], film.step) for film in films]
        long = [film for film in films if len(film.frames) >= least]
        if len(long) == 1:
            clip = min(clip, len(long[0].frames) // 2)  # of two clips, one is held out
        if not long or clip < least:
            raise ValueError(
                f"{path} must hold pictures or films: one recording of {2 * least} frames, or "
                f"several of {least}, after --stride, and --clip at least {least}; {notes[0]}"
            )
        self.dt = stride * frame_time(path, long, dt)
        self.clips, film_of, still = moving_clips(long, clip)
        if len(self.clips) < 2:
            raise ValueError(f"nothing moves in most of {path}: cut out what stands still")
        if all((x == x[..., :1]).all() for x in self.clips):  # all are grey
            self.clips = [x[..., :1] for x in self.clips]
        self.size, self.channels = self.clips[0].shape[2:]
        self.lengths = torch.tensor([len(x) for x in self.clips])
        self.train, self.held_out = hold_out(film_of, seed)
        crc = 0
        for x in self.clips:
            crc = zlib.crc32(x.tobytes(), crc)
        total = self.lengths.sum()
        self.digest = f"{total} frames, CRC {crc:x}"
        found = (
            f"{path}: recordings {len(set(film_of))}, clips {len(film_of)}, frames {total} of "
            f"{self.size} x {self.size}, taken as {1 / self.dt:.4g} a second; "
            f"left out: {len(films) - len(long)} too short, {still} in which nothing moves"
        )
        self.summary = "; ".join((found, *notes, *self.check_motion(path)))

    def check_motion(self, path):
        """What makes errors on the held-out clips say little, a list of one line or none.

        Raises: ValueError for pixels beyond white and where all clips are almost black.
        """
        with reading(path):
            motions = torch.tensor([motion(clip) for clip in self.clips])
        if not any(unit_range(clip).max() > DARK for clip in self.clips):
            raise ValueError(
                f"{path} is dark: scale it. Masks are to be bool, and 65535 is white in uint16"
            )
        if motions[self.held_out].mean() > DYING * motions[self.train].mean():
            return []
        return ["the clips held out hardly move: record again, or several times"]

    def frames(self, clips, times):
        """Frames (B, n, C, size, size) in [0, 1] of clips (B,) at times (B, n)."""
        rows = zip(clips.tolist(), times.numpy(), strict=True)
        x = np.stack([unit_range(self.clips[i][t]) for i, t in rows])  # (B, n, size, size, C)
        return torch.from_numpy(x).movedim(4, 2)
