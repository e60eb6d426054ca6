"""
Caption clips and score the captions.

    python score.py MODEL --soundscapes test --clips 400 --out runs/mini/scores
    python score.py MODEL --folder my_sounds --out scores

MODEL is a LAMB folder or Hub id. OUT gets `predictions.jsonl` (id, caption, references, and for soundscapes the events)
and, for soundscapes, `scores.json`: how often the right class is named, event F1 and order, with bootstrap 95 % intervals,
beside the controls (a random class, the same captions shuffled over the clips, a linear probe on the same encoder).
"""

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--folder", help="sound files with a metadata.csv or metadata.jsonl")
    parser.add_argument("--soundscapes", help="a split of the composed soundscapes")
    parser.add_argument(
        "--clips", type=int, default=400, help="mixtures to compose; single events come evenly from all classes"
    )
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--guide_weight", type=float, help="instead of the learned one")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if (options.folder is None) == (options.soundscapes is None):
        parser.error("give either --folder or --soundscapes")

    from training_lamb.scoring import caption_clips, folder_rows, score_rows, soundscape_rows

    options.out.mkdir(parents=True, exist_ok=True)
    rows = folder_rows(options.folder) if options.folder else soundscape_rows(options.soundscapes, options.clips)
    settings = {"num_beams": options.beams, "token_guide_weight": options.guide_weight}
    caption_clips(options.model, rows, options.batch_size, {k: v for k, v in settings.items() if v is not None})
    with open(options.out / "predictions.jsonl", "w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps({name: value for name, value in row.items() if name != "audio"}) + "\n")
    if options.soundscapes:
        scores = score_rows(options.model, rows) | {"model": options.model, "generation": settings}
        (options.out / "scores.json").write_text(json.dumps(scores, indent=2), encoding="utf-8")
        for name, score in scores.items():
            if isinstance(score, dict) and "value" in score:
                print(f"{name}: {score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}], n = {score['n']}")
    failed = sum(row["caption"] is None for row in rows)
    print(f"{len(rows) - failed} clips were captioned, {failed} could not be read; see {options.out}")


if __name__ == "__main__":
    main()
