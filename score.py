"""
Caption clips and score the captions, or score captions that exist.

    python score.py MODEL --data table --table clotho/evaluation.csv --audio clotho/evaluation --out scores
    python score.py MODEL --soundscapes test --out scores
    python score.py --predictions captions.csv --out scores
    python score.py --predictions mine.jsonl --against theirs.jsonl --out scores

MODEL is a LAMB folder or Hub id; `--data` names a reader (table, audiocaps, coco, wavcaps) and takes its arguments. OUT
gets `predictions.jsonl` (id, caption, references, scores of the clip) and `scores.json`: corpus scores with bootstrap
95 % intervals, what was skipped and how to get it. Soundscapes add how often the right class is named, event F1 and
order, and five controls. Under `torchrun --nproc_per_node N` each process captions its share; the files are the same.
"""

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument(
        "--data", choices=("table", "audiocaps", "coco", "wavcaps"), help="reader of --table and --audio"
    )
    parser.add_argument("--table", help="a csv, jsonl, parquet or json file, or a folder with metadata.csv")
    parser.add_argument("--audio", help="the folder of its files")
    parser.add_argument("--soundscapes", metavar="SPLIT", help="a split of the composed soundscapes")
    parser.add_argument("--clips", type=int, default=400, help="mixtures to compose")
    parser.add_argument("--per_class", type=int, default=5, help="single events of each class")
    parser.add_argument(
        "--train_clips", type=int, default=4000, help="training clips of the soundscapes' controls; 0: none"
    )
    parser.add_argument(
        "--predictions", type=Path, help="csv or jsonl with id, caption and references or caption_1, ..."
    )
    parser.add_argument("--against", type=Path, help="another predictions file, of the same clips")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--beams", type=int, help="beams of the search")
    parser.add_argument("--candidates", type=int, help="captions to write, of which the nearest to the audio is kept")
    parser.add_argument("--guide_weight", type=float, help="instead of the learned one")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that encode the controls' clips")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if sum(bool(given) for given in (options.data, options.soundscapes, options.predictions)) != 1:
        parser.error("give one of --data, --soundscapes and --predictions")
    if options.data and not (options.table and options.model):
        parser.error("--data needs MODEL and --table")

    from training_lamb import scoring  # torch and transformers load only for real work

    settings = {
        "num_beams": options.beams,
        "num_candidates": options.candidates,
        "token_guide_weight": options.guide_weight,
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    if options.model:
        own = scoring.own_settings(options.model)
        if options.beams is not None:
            own.pop("num_candidates", None)
        settings = own | settings
    if options.predictions:
        rows = scoring.read_predictions(options.predictions)
    else:
        if options.data:
            rows = scoring.data_rows(options.data, options.table, options.audio)
        else:
            from training_lamb import soundscape_scoring  # its parts are installed by the extra `mini` only

            rows = soundscape_scoring.soundscape_rows(options.soundscapes, options.clips, options.per_class)
        if not scoring.caption_clips(options.model, rows, options.batch_size, settings):
            return  # another rank writes the files
    scores = {"model": options.model, "generation": settings, "clips": len(rows)} | scoring.score_rows(rows)
    scoring.write(options.out, rows, scores)  # what follows takes minutes
    if options.soundscapes:
        scores |= soundscape_scoring.soundscape_scores(options.model, rows, options.train_clips, options.num_workers)
    if options.against:
        scores["difference"] = scoring.paired_differences(rows, options.against)
    scoring.write(options.out, rows, scores)
    print(json.dumps({name: value for name, value in scores.items() if name != "controls"}, indent=2))


if __name__ == "__main__":
    main()
