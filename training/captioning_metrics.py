"""
The metrics of audio captioning as a module of `evaluate`, over pycocoevalcap (`pip install 'lamb-captioning[metrics]'`).

    metrics = evaluate.load("training/captioning_metrics.py")
    metrics.compute(predictions=["a man is speaking"], references=[["a man speaks.", "someone speaks."]])

A metric whose part is missing is named under `skipped` with the way to get it, and is never reported as 0.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np

_CITATION = (
    "BLEU, METEOR, ROUGE-L, CIDEr-D, SPICE: tylin/coco-caption; SPIDEr: Liu et al. 2017; FENSE: Zhou et al. 2022."
)
_DESCRIPTION = "Corpus scores and scores by clip of captions against one or several references each."
_INPUTS = "predictions: list of captions. references: list of lists of captions."
NEEDS_JAVA = "needs Java: install a Java runtime (11 or 17) and put `java` on the PATH"
NEEDS_CORENLP = (
    "needs the CoreNLP 3.6.0 jars and Java 8 or 11: unpack stanford-corenlp-full-2015-12-09.zip from nlp.stanford.edu and "
    "put stanford-corenlp-3.6.0.jar and stanford-corenlp-3.6.0-models.jar into pycocoevalcap/spice/lib, where pip installed it"
)
NEEDS_FENSE = "needs its models: `pip install aac-metrics` and `aac-metrics-download`"
ERROR_PENALTY = 0.9  # of FENSE and SPIDEr-FL


class CaptioningMetrics(evaluate.Metric):
    """BLEU-1..4, ROUGE-L, METEOR, CIDEr-D, SPICE, SPIDEr, SPIDEr-FL, FENSE and the size of the vocabulary."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, Any]:
        """
        Returns:
            `scores`: of the corpus, by name (BLEU to SPICE in 0..1, CIDEr-D in 0..10). `per_clip`: lists, by name.
            `skipped`: what could not be computed, and how to get it. `tokenizer`: `ptb`, or `python` without Java,
            whose scores cannot be compared with published ones.
        """
        try:
            from pycocoevalcap.bleu.bleu import Bleu
            from pycocoevalcap.cider.cider import Cider
            from pycocoevalcap.rouge.rouge import Rouge
        except ImportError as error:
            raise ImportError("Caption metrics need pycocoevalcap: pip install 'lamb-captioning[metrics]'") from error
        for number, texts in enumerate(references):
            if not any(text.strip() for text in texts):
                raise ValueError(f"Clip number {number} has no reference caption; every clip needs at least one.")
        java = shutil.which("java") is not None
        said, truths = tokenize(predictions, references, java)
        keys = [str(number) for number in range(len(said))]
        results = {key: [text] for key, text in zip(keys, said, strict=True)}
        truth = dict(zip(keys, truths, strict=True))

        scores: dict[str, float] = {}
        per_clip: dict[str, list[float]] = {}
        skipped: dict[str, str] = {}
        bleu, bleu_clips = Bleu(4).compute_score(truth, results, verbose=0)
        for order in range(4):
            scores[f"bleu_{order + 1}"], per_clip[f"bleu_{order + 1}"] = bleu[order], list(bleu_clips[order])
        for name, scorer in (("rouge_l", Rouge()), ("cider_d", Cider())):  # pycocoevalcap's CIDEr is CIDEr-D
            value, clips = scorer.compute_score(truth, results)
            scores[name], per_clip[name] = float(value), [float(clip) for clip in clips]
        if java:
            from pycocoevalcap.meteor.meteor import Meteor

            scores["meteor"], per_clip["meteor"] = Meteor().compute_score(truth, results)
        else:
            skipped["meteor"] = NEEDS_JAVA
        self._spice(truth, results, java, scores, per_clip, skipped)
        self._fense(predictions, references, scores, per_clip, skipped)
        scores["vocabulary"] = len({word for text in said for word in text.split()})
        return {
            "scores": {name: float(value) for name, value in scores.items()},
            "per_clip": per_clip,
            "skipped": skipped,
            "tokenizer": "ptb" if java else "python",
        }

    def _spice(self, truth: dict, results: dict, java: bool, scores: dict, per_clip: dict, skipped: dict) -> None:
        import pycocoevalcap.spice

        library = Path(pycocoevalcap.spice.__file__).parent / "lib"
        if not java or len(list(library.glob("stanford-corenlp-3.6.0*.jar"))) < 2:
            skipped["spice"] = skipped["spider"] = skipped["spider_fl"] = NEEDS_CORENLP
            return
        from pycocoevalcap.spice.spice import Spice

        scores["spice"], clips = Spice().compute_score(truth, results)
        by_key = dict(zip(sorted(truth), clips, strict=True))  # it sorts the keys as text
        per_clip["spice"] = [by_key[key]["All"]["f"] for key in truth]
        per_clip["spider"] = [(c + s) / 2 for c, s in zip(per_clip["cider_d"], per_clip["spice"], strict=True)]
        scores["spider"] = (scores["cider_d"] + scores["spice"]) / 2

    def _fense(
        self, predictions: list[str], references: list[list[str]], scores: dict, per_clip: dict, skipped: dict
    ) -> None:
        try:
            from aac_metrics.functional import fense

            _, clips = fense(predictions, references)
        except (ImportError, OSError, FileNotFoundError) as error:
            skipped["fense"] = f"{NEEDS_FENSE} ({error})"
            skipped.setdefault("spider_fl", skipped["fense"])
            return
        per_clip["fense"] = [float(value) for value in clips["fense"]]
        scores["fense"] = float(np.mean(per_clip["fense"]))
        scores["fluency_error"] = float(np.mean([float(value) for value in clips["fer"]]))
        if "spider" in per_clip:
            per_clip["spider_fl"] = [
                spider * (1 - ERROR_PENALTY * float(error))
                for spider, error in zip(per_clip["spider"], clips["fer"], strict=True)
            ]
            scores["spider_fl"] = float(np.mean(per_clip["spider_fl"]))


def tokenize(
    predictions: list[str], references: list[list[str]], java: bool = True
) -> tuple[list[str], list[list[str]]]:
    """
    Lower-cased words without punctuation, separated by blanks.

    With Java by the Penn Treebank tokenizer that the published scores use, in one process; without it by a rule that
    gives the same words for plain captions.
    """
    groups = [[text] for text in predictions] + references
    if java:
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        # A line that holds nothing would be lost between the tokenizer's lines.
        lines = {
            number: [{"caption": " ".join(text.split()) or "."} for text in texts]
            for number, texts in enumerate(groups)
        }
        tokens = PTBTokenizer().tokenize(lines)
        groups = [tokens[number] for number in range(len(groups))]
    else:
        groups = [
            [" ".join(re.findall(r"[a-z0-9]+(?:[-'][a-z0-9]+)*", text.lower())) for text in texts] for texts in groups
        ]
    return [texts[0] for texts in groups[: len(predictions)]], groups[len(predictions) :]
