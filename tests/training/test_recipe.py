from pathlib import Path

import pytest
import yaml
from training_lamb.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "configs" / "recipes"


@pytest.mark.parametrize("file", sorted(RECIPES.rglob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_is_valid(file):
    recipe = load_recipe(file, {"data_root": "data"})
    assert recipe.stages and recipe.output_dir


def test_flags_override_by_dotted_name():
    recipe = load_recipe(RECIPES / "mini.yaml", {"stages.1.training.max_steps": 7, "train.soundscapes.clips": 9})
    assert recipe.stages[1].training["max_steps"] == 7
    assert recipe.train[0].soundscapes["clips"] == 9


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"sead": 1}, "Did you mean 'seed'"),
        ({"stages.0.training.learning_rat": 1}, "learning_rate"),
        ({"train.folders": "x"}, "Did you mean 'folder'"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest(override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(RECIPES / "mini.yaml", override)


def test_a_recipe_without_stages_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"output_dir": "x", "train": {"folder": "y"}}))
    with pytest.raises(ValueError, match="lacks stages"):
        load_recipe(tmp_path / "r.yaml")
