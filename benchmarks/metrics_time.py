"""Seconds that the metrics of 1,000 clips with five references take, without SPICE and FENSE."""

import random
import time

from training_lamb.captioning_metrics import CaptioningMetrics

CLIPS, REFERENCES, GOAL = 1000, 5, 60
WORDS = [
    "a",
    "the",
    "dog",
    "cat",
    "rain",
    "man",
    "woman",
    "car",
    "engine",
    "bird",
    "barks",
    "falls",
    "speaks",
    "runs",
    "sings",
    "while",
    "and",
    "then",
    "loudly",
    "softly",
]


def sentence(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(6, 16))) + "."


def main() -> None:
    draw = random.Random(0)
    predictions = [sentence(draw) for _ in range(CLIPS)]
    references = [[sentence(draw) for _ in range(REFERENCES)] for _ in range(CLIPS)]
    start = time.perf_counter()
    result = CaptioningMetrics().compute(predictions=predictions, references=references)
    seconds = time.perf_counter() - start
    print(
        f"metrics of {CLIPS} clips x {REFERENCES}, {result['tokenizer']}: {seconds:.0f} s / {GOAL} s = {seconds / GOAL:.2f} (goal: at most 1)"
    )


if __name__ == "__main__":
    main()
