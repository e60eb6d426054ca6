"""Does a caption name what sounds, and in the right order? Scores of captions of composed soundscapes, with intervals."""

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np


def named_classes(caption: str, keywords: Mapping[str, Sequence[str]]) -> list[str]:
    """
    The classes that a caption names, in the order of their first key word.

    Args:
        caption: any sentence.
        keywords: of each class the words or phrases of which one names it; they match whole words, in any case.
    """
    found = {}
    for name, words in keywords.items():
        pattern = r"\b(?:" + "|".join(re.escape(word) for word in words) + r")\b"
        if match := re.search(pattern, caption, flags=re.IGNORECASE):
            found[name] = match.start()
    return sorted(found, key=found.__getitem__)


def event_f1(named: Sequence[str], truth: Sequence[str]) -> float:
    """F1 of the classes named against the classes that sound; 1 where both are empty."""
    if not named and not truth:
        return 1.0
    hits = len(set(named) & set(truth))
    return 2 * hits / (len(set(named)) + len(set(truth)))


def right_order(named: Sequence[str], truth: Sequence[str]) -> float | None:
    """1 or 0 for a sequence of which at least two events are named, None where fewer are."""
    order = [name for name in dict.fromkeys(truth) if name in named]
    if len(order) < 2:
        return None
    return float([name for name in named if name in order] == order)


def bootstrap(
    values: Sequence[float], statistic: Callable[[np.ndarray], float] = np.mean, rounds: int = 2000, seed: int = 0
) -> dict[str, float]:
    """A statistic of per-clip values and its 95 % percentile interval over resampled clips."""
    array = np.asarray(values, dtype=float)
    if not len(array):
        return {"value": float("nan"), "low": float("nan"), "high": float("nan"), "n": 0}
    draws = np.random.default_rng(seed).integers(0, len(array), (rounds, len(array)))
    low, high = np.percentile([statistic(array[draw]) for draw in draws], [2.5, 97.5])
    return {"value": float(statistic(array)), "low": float(low), "high": float(high), "n": len(array)}


def score_soundscapes(
    captions: Sequence[str],
    events: Sequence[Sequence[str]],
    kinds: Sequence[str],
    keywords: Mapping[str, Sequence[str]],
) -> dict[str, dict[str, float]]:
    """
    Args:
        captions: one predicted for each clip.
        events: the classes of each clip's events, by onset.
        kinds: of each clip, `single`, `sequence`, ...
        keywords: as of [`named_classes`].

    Returns:
        `single_accuracy` (clips of one event that name its class), `event_f1` (clips of several), `order` (sequences with
        two events named), each with its interval.
    """
    single, f1, order = [], [], []
    for caption, truth, kind in zip(captions, events, kinds, strict=True):
        named = named_classes(caption, keywords)
        if len(set(truth)) == 1:
            single.append(float(truth[0] in named))
        elif truth:
            f1.append(event_f1(named, truth))
            if kind == "sequence" and (right := right_order(named, truth)) is not None:
                order.append(right)
    return {"single_accuracy": bootstrap(single), "event_f1": bootstrap(f1), "order": bootstrap(order)}
