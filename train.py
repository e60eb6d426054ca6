"""
Train or fine-tune LAMB from a recipe file.

    python train.py configs/recipes/mini.yaml
    python train.py configs/recipes/finetune_folder.yaml --train.folder my_sounds --output_dir runs/mine

Every value of the recipe can be overridden by a flag of its dotted name (`--stages.0.training.max_steps 100`). Run it
again after an interruption and it goes on where it stopped. `torchrun --nproc_per_node N train.py ...` uses N devices.
`--dry_run` prints the resolved recipe, its data, steps, parameters and the memory that it needs, and stops.
"""

import sys
from pathlib import Path

import yaml


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return
    file, flags = arguments[0], [flag for flag in arguments[1:] if flag != "--dry_run"]
    names, values = flags[::2], flags[1::2]
    if len(names) != len(values) or not all(name.startswith("--") for name in names):
        raise SystemExit(f"Flags come in pairs of --name value; got {flags}.")

    from training_lamb.recipe import load_recipe  # torch and transformers load only for real work
    from training_lamb.run import encode_sources, plan, processes, run_stages, save_result
    from transformers import set_seed

    recipe = load_recipe(file, {n.removeprefix("--"): yaml.safe_load(v) for n, v in zip(names, values, strict=True)})
    if "--dry_run" in arguments:
        print(plan(recipe))
        return
    set_seed(recipe.seed)
    model, processor = recipe.build()
    with processes().main_process_first():  # one process fills the caches, the others read them
        train, validation = encode_sources(recipe, model, processor)
    run_stages(recipe, model, processor, train, validation)
    save_result(recipe, model, processor)
    processes().wait_for_everyone()
    processes().destroy_process_group()  # a rank that ends with the group's threads still running may abort
    print(f"The trained model is in {Path(recipe.output_dir)}")


if __name__ == "__main__":
    main(sys.argv[1:])
