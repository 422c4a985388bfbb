"""Dialogues -> train, val or test: as MSenC's authors drew them, by whole videos, or at random."""

import random
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

from msenc.types import SPLITS, MsencError

RULES = ("official", "by_video", "random")
# Both from MSenC's published split: one draw per dialogue, in the order of timestamp.json.
_OFFICIAL_SEED = 123
_OFFICIAL_TRAIN, _OFFICIAL_VAL = 0.8, 0.9


def split_dialogues(
    rule: str,
    videos: Sequence[str],
    fractions: Mapping[str, float],
    seed: int,
    has_target: Sequence[bool] | None = None,
    key: str = "data.recordings.split",
) -> list[str]:
    """The split of every dialogue, of which only the video that it comes from is known.

    Args:
        rule: ``official`` is how MSenC was split, and means something for its ``timestamp.json`` alone; ``by_video``
            keeps all dialogues of a video in one split; ``random`` draws each dialogue on its own.
        videos: of each dialogue, in the dialogues' order.
        fractions: wanted share of dialogues per split, summing to 1; `official` has its own.
        seed: of the drawing; `official` has its own.
        has_target: whether each dialogue has one, two turns or more; None: all have. ``random`` gives every
            wanted split its share of those, and its share of the others.
        key: of the config that says all this, for messages.

    Returns:
        ``train``, ``val`` or ``test``, for each dialogue.

    Raises:
        MsencError: for another rule, fractions that are none, or fewer dialogues (or videos) than wanted splits.
    """
    if rule == "official":
        return _official_splits(len(videos))
    if rule == "by_video":
        return _split_groups(videos, fractions, seed, "videos", key)
    if rule == "random":
        kinds = has_target or [True] * len(videos)
        if sum(kinds) < sum(fraction > 0 for fraction in fractions.values()):
            kinds = [True] * len(videos)  # too few for every split, whoever gets them
        found: dict[int, str] = {}
        for kind in (True, False):
            numbers = [number for number, has in enumerate(kinds) if has == kind]
            if kind or numbers:
                splits = _split_groups(numbers, fractions, seed, "dialogues", key, may_lack=not kind)
                found |= zip(numbers, splits, strict=True)
        return [found[number] for number in range(len(videos))]
    raise MsencError(f"{key}.rule={rule}: no such rule. Expected one of {', '.join(RULES)}.")


def _official_splits(num: int) -> list[str]:
    draw = random.Random(_OFFICIAL_SEED).random
    draws = [draw() for _ in range(num)]
    return ["train" if d < _OFFICIAL_TRAIN else "val" if d > _OFFICIAL_VAL else "test" for d in draws]


def _split_groups(
    groups: Sequence[Hashable], fractions: Mapping[str, float], seed: int, what: str, key: str, may_lack: bool = False
) -> list[str]:
    """Groups in random order, each to the split that is filled least so far; so every wanted split gets one."""
    wanted = {split: fractions.get(split, 0) for split in SPLITS}
    if set(fractions) - set(SPLITS) or min(wanted.values()) < 0 or abs(sum(wanted.values()) - 1) > 1e-6:
        raise MsencError(
            f"{key}.fractions: found {dict(fractions)}; expected shares of {', '.join(SPLITS)} that sum to 1."
        )
    wanted = {split: fraction for split, fraction in wanted.items() if fraction > 0}
    sizes = Counter(groups)
    if not may_lack and len(sizes) < len(wanted):
        raise MsencError(
            f"{key}: found {len(sizes)} {what}; expected at least one for each of {', '.join(wanted)}. Add material, "
            f"set a share to 0, or take {key}.rule=random, which splits single dialogues."
        )
    order = list(sizes)
    random.Random(seed).shuffle(order)
    filled = dict.fromkeys(wanted, 0)
    split_of = {}
    for group in order:
        split = min(wanted, key=lambda s: filled[s] / wanted[s])
        split_of[group] = split
        filled[split] += sizes[group]
    return [split_of[group] for group in groups]
