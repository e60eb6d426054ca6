"""The metrics, against aac-metrics' published example and against hand-made cases."""

import shutil
from pathlib import Path

import evaluate
import pytest
from training_lamb import captioning_metrics
from training_lamb.captioning_metrics import CaptioningMetrics, tokenize
from training_lamb.scoring import caption_scores, paired_differences, read_predictions, score_rows

# The example of aac-metrics' README and the scores that it prints there
CANDIDATES = ["a man is speaking", "rain falls"]
REFERENCES = [
    ["a man speaks.", "someone speaks.", "a man is speaking while a bird is chirping in the background"],
    ["rain is falling hard on a surface"],
]
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="METEOR and the PTB tokenizer need Java")


@pytest.fixture
def without_java(monkeypatch):
    monkeypatch.setattr(captioning_metrics.shutil, "which", lambda name: None)


def test_the_published_example_of_aac_metrics(without_java):
    result = CaptioningMetrics().compute(predictions=CANDIDATES, references=REFERENCES)
    assert result["scores"]["bleu_1"] == pytest.approx(0.4278, abs=5e-5)
    assert result["scores"]["cider_d"] == pytest.approx(0.9614, abs=5e-5)
    assert result["per_clip"]["cider_d"] == pytest.approx([1.3641, 0.5587], abs=5e-5)
    assert result["tokenizer"] == "python"
    assert "Java" in result["skipped"]["meteor"] and "meteor" not in result["scores"]


@needs_java
def test_with_java_the_same_and_meteor():
    result = CaptioningMetrics().compute(predictions=CANDIDATES, references=REFERENCES)
    assert result["scores"]["cider_d"] == pytest.approx(0.9614, abs=5e-5)
    assert 0 < result["scores"]["meteor"] < 1 and result["tokenizer"] == "ptb"
    assert tokenize(["A dog, barking!"], [["", "Rain;\nand wind."]]) == (["a dog barking"], [["", "rain and wind"]])


def test_what_cannot_be_computed_is_named_and_never_zero(without_java):
    result = CaptioningMetrics().compute(predictions=CANDIDATES, references=REFERENCES)
    for name in ("spice", "spider", "spider_fl", "fense"):
        assert name not in result["scores"] and "needs" in result["skipped"][name]


def test_perfect_captions_score_highest_and_empty_ones_nothing(without_java):
    texts = ["a dog barks at the door", "rain falls on a tin roof", "someone plays the old piano"]
    perfect = CaptioningMetrics().compute(predictions=texts, references=[[text] for text in texts])["scores"]
    assert perfect["cider_d"] == pytest.approx(10) and perfect["bleu_4"] == pytest.approx(1, abs=1e-6)
    empty = CaptioningMetrics().compute(predictions=["", "", ""], references=[[text] for text in texts])["scores"]
    assert empty["cider_d"] == empty["rouge_l"] == 0 and empty["vocabulary"] == 0


def test_a_clip_without_references_is_refused():
    with pytest.raises(ValueError, match="Clip number 1 has no reference"):
        CaptioningMetrics().compute(predictions=CANDIDATES, references=[REFERENCES[0], [" "]])


def test_it_loads_as_a_module_of_evaluate(without_java):
    module = evaluate.load(str(Path(captioning_metrics.__file__)))
    result = module.compute(predictions=CANDIDATES, references=REFERENCES)
    assert result["scores"]["cider_d"] == pytest.approx(0.9614, abs=5e-5)


def test_intervals_hold_the_score(without_java):
    result = caption_scores(CANDIDATES * 10, REFERENCES * 10)
    score = result["scores"]["cider_d"]
    assert score["low"] < score["value"] < score["high"] and score["n"] == 20


def write_predictions(file, captions):
    lines = ["id,caption,caption_1,caption_2"]
    lines += [f"{n},{text},{REFERENCES[n % 2][0]},{REFERENCES[n % 2][-1]}" for n, text in enumerate(captions)]
    file.write_text("\n".join(lines))
    return file


def test_two_prediction_files_are_compared_clip_by_clip(tmp_path, without_java):
    mine = read_predictions(write_predictions(tmp_path / "mine.csv", CANDIDATES * 4))
    other = write_predictions(tmp_path / "other.csv", ["a cat", "a cow"] * 4)
    score_rows(mine)
    difference = paired_differences(mine, other)["cider_d"]
    assert 0 < difference["low"] < difference["value"]
    with pytest.raises(ValueError, match="other clips: 1 ids"):
        paired_differences(mine[:-1], other)


def test_prediction_files_that_cannot_be_read_say_why(tmp_path):
    (tmp_path / "a.csv").write_text("id,caption\n1,a\n")
    with pytest.raises(ValueError, match="it needs caption"):
        read_predictions(tmp_path / "a.csv")
    (tmp_path / "b.jsonl").write_text('{"id": 1, "caption": "a", "references": ["b"]}\n' * 2)
    with pytest.raises(ValueError, match="more than once: 1"):
        read_predictions(tmp_path / "b.jsonl")
