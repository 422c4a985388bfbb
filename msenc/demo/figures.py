"""Drawn figures that move over a plain ground: centres and chance -> RGB frames. Used by the generated worlds."""

import numpy as np

SIZE = 64
SHAPES = ("disc", "square", "diamond")


def draw_figure(shape: str, radius: float, centres: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw one figure, bright on dark, at the given places.

    Args:
        shape: one of `SHAPES`.
        radius: of the disc in pixels; the other shapes have its area.
        centres: x and y in pixels for each frame, shape (T, 2).
        rng: colours of figure and ground.

    Returns:
        uint8, shape (T, 64, 64, 3).
    """
    ground, ink = rng.uniform(20, 80, size=3), rng.uniform(160, 250, size=3)
    rows, columns = np.mgrid[0:SIZE, 0:SIZE]
    x = np.abs(columns - centres[:, 0, None, None])  # (T, 64, 64)
    y = np.abs(rows - centres[:, 1, None, None])
    half = radius * np.sqrt(np.pi) / 2  # of the sides of a square with the disc's area
    depth = {
        "disc": lambda: radius - np.hypot(x, y),
        "square": lambda: half - np.maximum(x, y),
        "diamond": lambda: half - (x + y) / np.sqrt(2),
    }[shape]()
    coverage = np.clip(depth + 0.5, 0, 1)[..., None]
    return np.round(ground + coverage * (ink - ground)).astype(np.uint8)
