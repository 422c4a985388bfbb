"""Drawn faces that talk: a look, an expression and chance -> RGB frames. Used by the demo's generator.

The expression shows in the curve of the mouth and the slant of the eyebrows, in every frame. The opening of the
mouth follows a rhythm of its own, drawn by chance, so that it tells nothing of the sound.
"""

from dataclasses import dataclass

import numpy as np

SIZE = 64

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Look:
    """What stays the same in all pictures of one speaker.

    Args:
        skin: colour of the face.
        hair: colour of hair and eyebrows.
        long_hair: whether the hair falls beside the face.
        width: half the width of the head in pixels.
    """

    skin: Colour
    hair: Colour
    long_hair: bool
    width: float


def talking_rhythm(num_frames: int, fps: float, rng: np.random.Generator) -> np.ndarray:
    """Opening of a mouth in [0, 1] at each frame, shape (T,): pseudo-syllables of 0.14 to 0.28 s.

    Args:
        num_frames: T.
        fps: frames per second.
        rng: chance, the only thing it depends on.
    """
    seconds = np.arange(num_frames) / fps
    opening = np.zeros(num_frames)
    middle = rng.uniform(0.05, 0.2)
    while middle < num_frames / fps:
        distance = np.clip(np.abs(seconds - middle) / 0.12, 0, 1)
        opening = np.maximum(opening, rng.uniform(0.25, 1.0) * np.cos(distance * np.pi / 2) ** 2)
        middle += rng.uniform(0.14, 0.28)
    return opening


def draw_face(look: Look, is_happy: bool, num_frames: int, fps: float, rng: np.random.Generator) -> np.ndarray:
    """Draw one clip of a talking face.

    Args:
        look: the speaker's.
        is_happy: the expression: mouth corners up and brows arched, or corners down and brows raised inside.
        num_frames: T.
        fps: frames per second.
        rng: place, size, background, blinking and the mouth's rhythm; drawn alike for both expressions.

    Returns:
        uint8, shape (T, 64, 64, 3).
    """
    background = rng.uniform(120, 200, size=3)
    scale = rng.uniform(0.95, 1.05)
    rows, columns = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    y = (rows - 34 - rng.uniform(-1.5, 1.5)) / scale
    x = (columns - 31.5 - rng.uniform(-1.5, 1.5)) / scale
    opening = talking_rhythm(num_frames, fps, rng).astype(np.float32)
    blink = _blinks(num_frames, fps, rng)

    still = np.broadcast_to(background.astype(np.float32), (SIZE, SIZE, 3)).copy()
    if look.long_hair:
        _paint(still, _ellipse(x, y - 4, look.width + 5, 31), look.hair)
    _paint(still, _ellipse(x, y + 3, look.width + 2, 26), look.hair)
    _paint(still, _ellipse(x, y - 1, look.width, 24), look.skin)
    side = np.abs(x)
    # In pictures y grows downwards: a brow's inner end at smaller y is a raised one.
    brow = -13 + 3.5 * ((side - 8) / 5) ** 2 if is_happy else -13 + 4.5 * (side - 8) / 5
    _paint(still, _edge(1.4 - np.abs(y - brow)) * _edge(5 - np.abs(side - 8)), look.hair)
    _paint(still, _ellipse(side - 8, y + 6, 3.6, 3.2), (245, 245, 245))
    _paint(still, _ellipse(side - 8, y + 6, 1.8, 1.8), (25, 25, 35))

    frames = np.repeat(still[None], num_frames, axis=0)  # (T, 64, 64, 3)
    lid = _edge(3.6 - np.abs(side - 8)) * _edge(3.4 - np.abs(y + 6))
    for index in np.flatnonzero(blink):
        _paint(frames[index], lid, look.skin)

    part = np.s_[36:60, 16:48]  # what moves, wherever the head is
    x, y, side = x[part], y[part], side[part]
    along = np.clip(x / 9.5, -1, 1)
    bend = 7.0 * (0.5 - along**2)  # lower in the middle
    middle = 12 + (bend if is_happy else -bend)
    height = np.sqrt(1 - along**2) * opening[:, None, None] * 3.0  # (T, 24, 32)
    across = np.abs(y - middle)
    inside_lips = _edge(9.5 - side)
    mouth = frames[:, part[0], part[1]]
    _paint(mouth, _edge(height + 1.5 - across) * inside_lips, (150, 35, 45))
    _paint(mouth, _edge(height - 0.4 - across) * inside_lips, (45, 10, 15))
    return np.round(frames).astype(np.uint8)


def _blinks(num_frames: int, fps: float, rng: np.random.Generator) -> np.ndarray:
    """1 where the eyes are shut, shape (T,): one frame or two, at times drawn by chance."""
    seconds = np.arange(num_frames) / fps
    shut = np.zeros(num_frames)
    start = rng.uniform(0, 2.5)
    while start < num_frames / fps:
        shut[(seconds >= start) & (seconds < start + 0.15)] = 1
        start += rng.uniform(1.2, 3.5)
    return shut


def _edge(depth: np.ndarray) -> np.ndarray:
    """Coverage of a pixel that lies `depth` pixels inside an edge."""
    return np.clip(depth + 0.5, 0, 1)


def _ellipse(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    radius = np.hypot(x / half_width, y / half_height)
    return _edge((1 - radius) * min(half_width, half_height))


def _paint(canvas: np.ndarray, coverage: np.ndarray, colour: Colour) -> None:
    """Lay a colour over a canvas, in place."""
    canvas += coverage[..., None] * (np.asarray(colour, dtype=np.float32) - canvas)
