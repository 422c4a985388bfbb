"""The generated worlds by their names, and what `data.generate` of a world's config builds."""

from pathlib import Path

from msenc.demo import beats, graded
from msenc.demo.frame import World, write_folder
from msenc.demo.world import DEMO
from msenc.types import MsencError

MAKERS = {"beats": (beats.make_beats, beats.VERSION), "graded": (graded.make_graded, graded.VERSION)}
"""Worlds with variants -> how one is made, and the version of its generator. The demo has one set of cue values."""


def find_world(name: str, variant: int = 1) -> World:
    """A world by its name.

    Args:
        name: ``demo``, ``beats`` or ``graded``.
        variant: other cue values under the same words; the demo has none.

    Raises:
        MsencError: no world has this name.
    """
    if name == DEMO.name:
        return DEMO
    if name not in MAKERS:
        raise MsencError(f"Found the world {name!r}; expected one of {', '.join((DEMO.name, *MAKERS))}.")
    return MAKERS[name][0](variant)


def write_world(root: Path, world: str, sizes: dict[str, int], seed: int, variant: int, num_workers: int) -> None:
    """Write a world's clips and tables, as `frame.write_folder` does.

    Args:
        root: the folder to write.
        world: ``beats`` or ``graded``.
        sizes: dialogues per split.
        seed: of words, states and all that tells nothing; not negative.
        variant: of the cue values; not negative.
        num_workers: processes that render; 0 does it in this one.

    Raises:
        MsencError: no such world or variant, and what `frame.write_folder` refuses.
    """
    if world not in MAKERS:
        raise MsencError(f"Found the world {world!r} in data.generate; expected one of {', '.join(MAKERS)}.")
    if variant < 0:
        raise MsencError(f"Found the variant {variant}; expected a non-negative integer.")
    settings = {"world": world, "version": MAKERS[world][1], "seed": seed, "variant": variant}
    write_folder(find_world(world, variant), root, "world.json", settings, sizes, num_workers)
