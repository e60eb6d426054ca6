"""
The published CED checkpoints as a folder that `CedModel.from_pretrained` and `audio_model_id` read.

    python -m modeling_lamb.convert_ced audiotransformer_base_mAP_4999.pt OUT_DIR --size base

The file is an original `.pt` or the Hub port's `model.safetensors`. OUT_DIR then holds `config.json` and
`model.safetensors`, without the tagging head. CED's front end is `LambFeatureExtractor()`.
"""

import argparse

import torch
from safetensors.torch import load_file

from .configuration_ced import CED_SIZES, CedConfig
from .modeling_ced import CedModel, convert_ced_state_dict


def convert(file: str, size: str) -> CedModel:
    """
    The model of a published `size` with the weights of `file`.

    Raises:
        ValueError: when the file holds a weight that is not CED's, lacks one, or is of another size.
    """
    is_safetensors = file.endswith(".safetensors")
    published = load_file(file) if is_safetensors else torch.load(file, map_location="cpu", weights_only=True)
    model = CedModel(CedConfig.of_size(size)).eval()
    expected, weights = model.state_dict(), convert_ced_state_dict(published)
    counter = "patch_embed.init_bn.num_batches_tracked"  # no one reads it, and not every file has it
    weights.setdefault(counter, expected[counter])
    wrong = [key for key in expected if key not in weights or weights[key].shape != expected[key].shape]
    if wrong or len(weights) != len(expected):
        found = tuple(weights[wrong[0]].shape) if wrong and wrong[0] in weights else "not there"
        raise ValueError(
            f"{file} is not CED-{size}: {wrong[0] if wrong else 'the number of layers'} is "
            f"{found if wrong else 'another'}; choose another --size of {', '.join(CED_SIZES)}."
        )
    model.load_state_dict(weights)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="the published .pt or .safetensors file")
    parser.add_argument("out_dir")
    parser.add_argument("--size", choices=CED_SIZES, default="base")
    arguments = parser.parse_args()
    model = convert(arguments.file, arguments.size)
    model.save_pretrained(arguments.out_dir)
    print(f"CED-{arguments.size}, {model.num_parameters():,} parameters, is in {arguments.out_dir}")


if __name__ == "__main__":
    main()
