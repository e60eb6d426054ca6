import pytest
from training_lamb.event_scores import bootstrap, event_f1, named_classes, right_order, score_soundscapes

KEYWORDS = {
    "dog": ["dog", "dogs", "barks"],
    "car": ["car"],
    "car_horn": ["car horn", "honks"],
    "rain": ["rain", "raining"],
}


def test_classes_are_named_by_whole_words_in_order():
    assert named_classes("Rain falls, then two DOGS bark.", KEYWORDS) == ["rain", "dog"]
    assert named_classes("A hotdog in a train carriage.", KEYWORDS) == []


def test_f1_counts_hits_misses_and_inventions():
    assert event_f1(["dog"], ["dog", "rain"]) == pytest.approx(2 / 3)
    assert event_f1(["dog", "car"], ["dog"]) == pytest.approx(2 / 3)
    assert event_f1([], ["dog"]) == 0
    assert event_f1([], []) == 1


def test_order_is_judged_only_where_two_events_are_named():
    assert right_order(["rain", "dog"], ["rain", "dog"]) == 1
    assert right_order(["dog", "rain"], ["rain", "dog"]) == 0
    assert right_order(["dog"], ["rain", "dog"]) is None


def test_interval_holds_the_value_and_narrows_with_more_clips():
    few, many = bootstrap([0, 1] * 10), bootstrap([0, 1] * 1000)
    for result in (few, many):
        assert result["low"] <= result["value"] == 0.5 <= result["high"]
    assert many["high"] - many["low"] < few["high"] - few["low"]


def test_scores_of_a_few_clips():
    scores = score_soundscapes(
        ["A dog barks.", "Silence.", "Rain, then a dog."],
        [["dog"], ["rain"], ["dog", "rain"]],
        ["single", "single", "sequence"],
        KEYWORDS,
    )
    assert scores["single_accuracy"]["value"] == 0.5
    assert scores["event_f1"]["value"] == 1
    assert scores["order"]["value"] == 0
