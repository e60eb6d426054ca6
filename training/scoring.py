"""The steps of `score.py`: clips with their references, captions of a model, scores with intervals, beside controls."""

import csv
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import GenerationConfig
from transformers.utils import logging

from modeling_lamb import AudioCaptioningPipeline, LambForAudioCaptioning, LambProcessor

from .captioning_metrics import CaptioningMetrics
from .event_scores import bootstrap
from .readers import READERS, row_captions
from .run import processes

logger = logging.get_logger(__name__)
SCORED = ("cider_d", "meteor", "rouge_l", "bleu_4", "spice", "spider", "spider_fl", "fense")  # with an interval


def data_rows(reader: str, table: str, audio: str | None) -> list[dict[str, Any]]:
    """Rows to caption and score of one of the [`READERS`], one a clip with all its references."""
    clips, report = READERS[reader](table, *([audio] if audio else []))
    logger.warning(str(report))
    return [{"id": clip.id, "audio": clip.audio, "references": clip.captions} for clip in clips]


def read_predictions(file: str | Path) -> list[dict[str, Any]]:
    """
    Anyone's captions: a csv or jsonl with `id`, `caption` (or `prediction`), and `references` or `caption_1`, ...

    Raises:
        ValueError: when a column is missing or an id occurs twice; it names it.
    """
    file = Path(file)
    with open(file, newline="", encoding="utf-8-sig") as stream:
        table = list(csv.DictReader(stream)) if file.suffix == ".csv" else [json.loads(line) for line in stream]
    rows = []
    for number, row in enumerate(table):
        name = next((key for key in ("prediction", "caption") if key in row), None)
        references = row.get("references") or row_captions({k: v for k, v in row.items() if k != "caption"})
        if name is None or not references:
            raise ValueError(
                f"Row {number + 1} of {file} has the columns {sorted(row)}: it needs caption (or prediction) and references "
                "(a list, in jsonl) or caption_1, caption_2, ..."
            )
        rows.append(
            {
                **row,
                "id": str(row.get("id", row.get("file_name", number))),
                "caption": row[name],
                "references": references,
            }
        )
    if double := [name for name, count in Counter(row["id"] for row in rows).items() if count > 1]:
        raise ValueError(
            f"{file} holds {len(double)} ids more than once: {', '.join(double[:5])}. One row a clip is expected."
        )
    return rows


def own_settings(model: str) -> dict[str, Any]:
    """What of a model's own generation config changes its captions, and is to be told with its scores."""
    config = GenerationConfig.from_pretrained(model)
    own = {name: getattr(config, name, None) for name in ("num_beams", "num_candidates", "token_guide_weight")}
    return {name: value for name, value in own.items() if value is not None}


def caption_clips(model: str, rows: list[dict[str, Any]], batch_size: int, settings: dict[str, Any]) -> bool:
    """
    Adds `caption` to each row; None, and the `error`, where the clip cannot be read.

    Among several processes each captions its share. Returns whether this is the one that goes on with all rows.
    """
    state = processes()
    captioner = AudioCaptioningPipeline(
        model=LambForAudioCaptioning.from_pretrained(model),
        processor=LambProcessor.from_pretrained(model),
        device=state.device,
    )
    share = range(state.process_index, len(rows), state.num_processes)
    results = captioner(
        (rows[number]["audio"] for number in share),
        batch_size=batch_size,
        on_error="return",
        max_new_tokens=40,
        **settings,
    )
    found = [
        (number, result[0])
        for number, result in zip(share, tqdm(results, total=len(share), desc="captioning", disable=None), strict=True)
    ]
    if state.num_processes > 1:
        found = gather_object(found)
        state.destroy_process_group()  # a rank that ends with the group's threads still running may abort
    for number, result in found:
        rows[number]["caption"] = result["generated_text"]
        if "error" in result:
            rows[number]["error"] = result["error"]
    return state.is_main_process


def score_rows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Scores of captioned rows, as [`caption_scores`]; each row gets its own `scores`."""
    result = caption_scores([row["caption"] or "" for row in rows], [row["references"] for row in rows])
    for name, values in result.pop("per_clip").items():
        for row, value in zip(rows, values, strict=True):
            row.setdefault("scores", {})[name] = value
    return result | {"unread": [row["id"] for row in rows if row["caption"] is None]}


def write(folder: Path, rows: list[dict[str, Any]], scores: dict[str, Any]) -> None:
    """`predictions.jsonl` and `scores.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "predictions.jsonl", "w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps({name: value for name, value in row.items() if name != "audio"}) + "\n")
    finite = json.loads(
        json.dumps(scores), parse_constant=lambda _: None
    )  # JSON knows no NaN: what has no clips is null
    (folder / "scores.json").write_text(json.dumps(finite, indent=2), encoding="utf-8")


def caption_scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """
    Scores of the corpus with 95 % intervals over resampled clips, and `per_clip`, `skipped`, `tokenizer` as of
    [`CaptioningMetrics`].

    The interval is that of the mean of the clips' scores, moved by the difference where the corpus score is no mean.
    """
    result = CaptioningMetrics().compute(predictions=list(captions), references=[list(texts) for texts in references])
    for name in SCORED:
        if name in result["scores"]:
            interval = bootstrap(result["per_clip"][name])
            moved = result["scores"][name] - interval["value"]
            interval |= {key: interval[key] + moved for key in ("value", "low", "high")}
            result["scores"][name] = interval
    return result


def paired_differences(rows: list[dict[str, Any]], other: str | Path) -> dict[str, dict[str, float]]:
    """
    Mean difference of the scores of `rows` and of another predictions file over the same clips, by metric, with 95 %
    intervals over resampled clips.

    Raises:
        ValueError: when the two do not hold the same ids.
    """
    theirs = {row["id"]: row for row in read_predictions(other)}
    if set(theirs) != {row["id"] for row in rows}:
        odd = sorted(set(theirs) ^ {row["id"] for row in rows})
        raise ValueError(
            f"{other} is of other clips: {len(odd)} ids are in one file only, such as {', '.join(odd[:3])}."
        )
    ordered = [theirs[row["id"]] for row in rows]
    score_rows(ordered)
    return {
        name: bootstrap([row["scores"][name] - them["scores"][name] for row, them in zip(rows, ordered, strict=True)])
        for name in SCORED
        if name in rows[0]["scores"] and name in ordered[0]["scores"]
    }
