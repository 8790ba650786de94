"""A detection set to train on in minutes: a simulated camera pans over squares and discs, so their boxes are known.

`python tests/moving_shapes.py DIR` writes DIR/train and DIR/val, 32 and 6 recordings of a second, for `preprocess`.
"""

import sys
from pathlib import Path

import numpy as np
from preprocess_files import save_h5
from test_preprocess_labels import BOX

from evkernels.events import simulate

SIZE, FRAME_US = 64, 50_000


def save_recordings(folder: Path, count: int, frames: int, seed: int) -> None:
    """`count` recordings of `frames` windows of 50 ms, 64 x 64, each with boxes of squares (0) and discs (1)."""
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        velocity = rng.uniform(60, 140, 2) * rng.choice([-1, 1], 2)
        # Room for the whole way, so that the view never turns back.
        room = np.ceil(np.abs(velocity) * frames * FRAME_US * 1e-6).astype(int) + 2
        image, shapes = _scene(SIZE + room[1], SIZE + room[0], rng)
        duration = frames * FRAME_US
        events = simulate(
            image, width=SIZE, height=SIZE, duration_us=duration, velocity=tuple(velocity), noise_hz=0.5, seed=index
        )
        events.t[0], events.t[-1] = 0, duration - 1
        save_h5(folder / f"{index:03d}_td.h5", events)
        np.save(folder / f"{index:03d}_bbox.npy", _boxes(shapes, velocity, room, frames))


def _scene(height: int, width: int, rng: np.random.Generator):
    """A grey image with bright and dark shapes that do not touch, and (class, left, top, side) of each."""
    image, shapes = np.full((height, width), 0.4), []
    row, column = np.mgrid[:height, :width]
    for _ in range(height * width // 1500):
        side = int(rng.integers(10, 21))
        left, top = rng.integers(0, width - side), rng.integers(0, height - side)
        if any(max(abs(left - x), abs(top - y)) < max(side, s) + 3 for _, x, y, s in shapes):
            continue
        kind = int(rng.integers(2))
        if kind == 0:
            inside = (column >= left) & (column < left + side) & (row >= top) & (row < top + side)
        else:
            radius = side / 2
            inside = np.hypot(column - left - radius + 0.5, row - top - radius + 0.5) < radius
        image[inside] = rng.choice([0.1, 0.9])
        shapes.append((kind, left, top, side))
    return image, shapes


def _boxes(shapes, velocity, room, frames: int) -> np.ndarray:
    """What of each shape is in view at the end of every window, if it is more than half of it."""
    rows = []
    for frame in range(1, frames + 1):
        view = velocity * (frame - frames / 2) * FRAME_US * 1e-6 + room / 2
        for kind, left, top, side in shapes:
            low = np.clip(np.array([left, top]) - view, 0, SIZE - 1)
            high = np.clip(np.array([left, top]) + side - view, 0, SIZE - 1)
            if np.all(high > low) and np.prod(high - low) > side * side / 2:
                rows.append((frame * FRAME_US, *low, *(high - low), kind, len(rows), 1))
    return np.array(rows, BOX)


if __name__ == "__main__":
    for name, count, seed in (("train", 32, 1), ("val", 6, 2)):
        save_recordings(Path(sys.argv[1]) / name, count, 20, seed)
