"""Publishing and downloading through the real client, over HTTP, against a Hub on loopback that can be told to fail."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
import yaml
from conftest import noise, randomized, tiny_config
from hub_server import TOKEN, Hub
from safetensors.torch import load_file, save_file
from training_lamb.publishing import STRANGER, problems, render_card

from modeling_lamb import LambForAudioCaptioning

ROOT = Path(__file__).parents[1]
REPO = "org/lamb-tiny"
SCORE = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 40}


@pytest.fixture
def hub():
    server = Hub()
    yield server
    server.close()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, trained_tokenizer):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from modeling_lamb import LambFeatureExtractor, LambProcessor

    folder = tmp_path_factory.mktemp("run")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained_tokenizer), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    model = randomized(LambForAudioCaptioning(tiny_config()))
    halves = {name: value.half() if value.numel() > 1 else value for name, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=halves)  # as `save_dtype: float16` does
    LambProcessor(LambFeatureExtractor(), tokenizer, num_audio_tokens=4).save_pretrained(folder)
    stage = {
        "name": "captioning",
        "training": {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3},
    }
    card = {"license": "apache-2.0", "limits": "It is tiny and random.", "licences": [["weights", "Apache-2.0"]]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"model": {}, "stages": [stage], "card": card}))
    environment = {"parameters": 1000, "trainable_parameters": {"adapter": 10}, "torch": "2", "python": "3"}
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "data.json").write_text(json.dumps([{"name": "tones", "clips": 4, "left_out": {"missing": 1}}]))
    log = [{"step": n, "loss": 3.0 - n, "decoder_loss": 2.0 - n, "modality_gap": 1.0} for n in (1, 2)]
    (folder / "captioning").mkdir()
    pace = {"train_runtime": 90.0, "train_steps_per_second": 1 / 90}  # it was interrupted after the first step
    state = {"global_step": 2, "log_history": [*log, pace]}
    (folder / "captioning" / "trainer_state.json").write_text(json.dumps(state))
    (folder / "scores").mkdir()
    scores = {
        "clips": 40,
        "generation": {},
        "tokenizer": "ptb",
        "scores": {"cider_d": SCORE},
        "skipped": {"spice": "needs Java"},
    }
    (folder / "scores" / "scores.json").write_text(json.dumps(scores))
    return folder


@pytest.fixture
def sound(tmp_path):
    soundfile.write(tmp_path / "sound.wav", noise(0.5), 16000)
    return str(tmp_path / "sound.wav")


def environment(hub, cache, token=TOKEN):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return kept | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(cache),
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
    }


def push(hub, folder, cache, *flags, token=TOKEN):
    command = [sys.executable, str(ROOT / "push_to_hub.py"), str(folder), REPO, *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(hub, cache, token), check=False)
    assert TOKEN not in done.stdout + done.stderr
    return done


def pull(hub, cache, code="", **variables):
    script = f"from huggingface_hub import snapshot_download\nprint(snapshot_download({REPO!r}))\n{code}"
    return run_python(hub, cache, script, **variables)


def run_python(hub, cache, script, *arguments, cwd=None, **variables):
    command, settings = [sys.executable, "-c", script, *arguments], environment(hub, cache) | variables
    done = subprocess.run(command, capture_output=True, text=True, env=settings, cwd=cwd, check=False)
    assert TOKEN not in done.stdout + done.stderr
    return done


def as_a_stranger(hub, cache, sound, revision="main"):
    return run_python(hub, cache, STRANGER, REPO, revision, sound)


@pytest.mark.slow
def test_a_stranger_loads_what_was_published(hub, run_folder, sound, tmp_path):
    done = push(hub, run_folder, tmp_path / "cache", "--tag", "v1", "--verify", sound)
    assert done.returncode == 0, done.stderr
    assert "Verified:" in done.stdout
    assert len(hub.repositories[REPO]) == 2  # made, and one commit
    assert hub.names[REPO]["v1"] == hub.names[REPO]["main"]
    weights = hub.files(REPO)["model.safetensors"]
    assert hashlib.sha256(weights).digest() == hashlib.sha256((run_folder / "model.safetensors").read_bytes()).digest()
    card = hub.files(REPO)["README.md"].decode()
    assert "CIDEr-D" in card and TOKEN not in card
    again = push(hub, run_folder, tmp_path / "cache")
    assert again.returncode == 0, again.stderr


@pytest.mark.slow
def test_merged_weights_load_without_peft(hub, run_folder, sound, tmp_path):
    done = push(hub, run_folder, tmp_path / "cache", "--merge", "--verify", sound, "--max_shard_size", "100KB")
    assert done.returncode == 0, done.stderr
    shards = [content for name, content in hub.files(REPO).items() if name.endswith(".safetensors")]
    assert len(shards) > 1 and not any(b"lora" in content[:20000] for content in shards)


@pytest.mark.slow
def test_the_quick_start_of_the_card_runs_as_printed(hub, run_folder, sound, tmp_path):
    assert push(hub, run_folder, tmp_path / "cache").returncode == 0
    code = re.search(r"```python\n(.*?)```", hub.files(REPO)["README.md"].decode(), re.DOTALL)[1]
    hidden = STRANGER.partition("from transformers")[0]
    script = f"{hidden}\n{code}\nprint(captioner('sound.wav'))"
    done = run_python(hub, tmp_path / "other", script, cwd=Path(sound).parent)
    assert done.returncode == 0 and "generated_text" in done.stdout, done.stderr


@pytest.mark.slow
def test_branches_and_pull_requests_leave_main_alone(hub, run_folder, sound, tmp_path):
    done = push(hub, run_folder, tmp_path / "cache", "--revision", "trial", "--verify", sound)
    assert done.returncode == 0, done.stderr
    done = push(hub, run_folder, tmp_path / "cache", "--create_pr")
    assert done.returncode == 0 and "/discussions/1" in done.stdout, done.stderr
    assert all("model.safetensors" in hub.files(REPO, branch) for branch in ("trial", "refs/pr/1"))
    assert list(hub.files(REPO)) == [".gitattributes"]
    both = push(hub, run_folder, tmp_path / "cache", "--create_pr", "--revision", "trial")
    assert both.returncode == 2 and "leave --revision out" in both.stderr


PUSHED_BY_HAND = """
import sys
from modeling_lamb import LambForAudioCaptioning, LambProcessor

run, repo = sys.argv[1:]
LambForAudioCaptioning.from_pretrained(run).push_to_hub(repo)
LambProcessor.from_pretrained(run).push_to_hub(repo)
"""

PUSHED_BY_THE_TRAINER = """
import sys, numpy
from modeling_lamb import LambForAudioCaptioning, LambProcessor
from training_lamb.data import CaptionCollator
from training_lamb.trainer import LambTrainer
from transformers import TrainingArguments

run, repo = sys.argv[1:]
processor = LambProcessor.from_pretrained(run)
settings = {"max_steps": 1, "use_cpu": True, "report_to": "none", "remove_unused_columns": False}
trainer = LambTrainer(
    model=LambForAudioCaptioning.from_pretrained(run),
    args=TrainingArguments(output_dir="out", hub_model_id=repo, **settings),
    train_dataset=[{"audio": numpy.random.rand(8000) - 0.5, "caption": "A dog barks.", "clip": 0}] * 2,
    data_collator=CaptionCollator(processor),
    processing_class=processor,
)
trainer.train()
trainer.push_to_hub()
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", [PUSHED_BY_HAND, PUSHED_BY_THE_TRAINER])
def test_the_methods_of_the_library_publish_what_a_stranger_loads(hub, run_folder, sound, tmp_path, script):
    done = run_python(hub, tmp_path / "cache", script, str(run_folder), REPO, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    loaded = as_a_stranger(hub, tmp_path / "other", sound)
    assert loaded.returncode == 0, loaded.stderr


PINNED = """
import sys
from modeling_lamb import LambConfig, LambForAudioCaptioning

small = sys.argv[1]
config = LambConfig.from_backbones("org/ced", "org/llm", num_audio_tokens=2)
LambForAudioCaptioning.from_backbones(config).save_pretrained(small)
print(config.audio_model_revision, config.text_model_revision)
"""

LOADED = """
import sys
from modeling_lamb import LambForAudioCaptioning

model = LambForAudioCaptioning.from_pretrained(sys.argv[1])
print(float(model.audio_encoder.norm.weight[0]), float(model.language_model.model.norm.weight[0]))
"""


@pytest.mark.slow
def test_small_checkpoints_pin_the_commits_of_their_backbones(hub, run_folder, tmp_path):
    model = LambForAudioCaptioning.from_pretrained(run_folder).merge_adapters()
    backbones = {"org/ced": model.audio_encoder, "org/llm": model.language_model}

    def publish(value):
        commits = []
        for repo, part in backbones.items():
            hub.repositories.setdefault(repo, [])
            hub.names.setdefault(repo, {})
            torch.nn.init.constant_(part.base_model.norm.weight, value)
            part.save_pretrained(tmp_path / f"{repo}-{value}")
            files = {file.name: file.read_bytes() for file in (tmp_path / f"{repo}-{value}").iterdir()}
            commits.append(hub.commit(repo, "main", files))
        return commits

    first = publish(1.0)
    done = run_python(hub, tmp_path / "cache", PINNED, str(tmp_path / "small"))
    assert done.stdout.split() == first, done.stderr
    publish(2.0)  # which must not be loaded
    done = run_python(hub, tmp_path / "other", LOADED, str(tmp_path / "small"))
    assert done.stdout.split() == ["1.0", "1.0"], done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (("POST", "repos/create", 401), "401"),
        (("POST", "/commit/", 403), "403"),
        (("POST", "/commit/", 409), "409"),
        (("PUT", "/lfs/", 400), "uploading 'model.safetensors'"),
    ],
)
def test_a_refusal_is_one_sentence_and_the_next_run_succeeds(hub, run_folder, tmp_path, fault, sentence):
    hub.faults.append(fault)
    done = push(hub, run_folder, tmp_path / "cache")
    assert done.returncode != 0 and sentence in done.stderr and "Traceback" not in done.stderr
    assert "model.safetensors" not in (hub.files(REPO) if REPO in hub.repositories else {})
    assert push(hub, run_folder, tmp_path / "cache").returncode == 0
    assert "model.safetensors" in hub.files(REPO)
    sent = [status for method, path, status in hub.requests if method == "PUT"]
    assert sent.count(200) == 1  # what had arrived before the refusal was not sent again


@pytest.mark.slow
@pytest.mark.parametrize("fault", [("PUT", "/lfs/", 500), ("POST", "objects/batch", (429, {"Retry-After": "1"}))])
def test_passing_faults_are_waited_out(hub, run_folder, tmp_path, fault):
    hub.faults += [fault, fault]
    done = push(hub, run_folder, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert not hub.faults and "model.safetensors" in hub.files(REPO)


@pytest.mark.slow
def test_downloads_resume_survive_faults_and_work_offline(hub, run_folder, tmp_path):
    assert push(hub, run_folder, tmp_path / "cache").returncode == 0
    large = os.urandom(24_000_000)  # the client keeps what came in pieces of 10 MB
    hub.commit(REPO, "main", hub.files(REPO) | {"large.bin": large})
    hub.faults += [("GET", r"resolve/.*/large\.bin", "cut"), ("GET", r"resolve/.*/tokenizer\.json", 500)]
    failed = pull(hub, tmp_path / "other")  # the client waits out a cut connection, but not this
    assert failed.returncode != 0 and "500" in failed.stderr
    done = pull(hub, tmp_path / "other")
    assert done.returncode == 0 and not hub.faults, done.stderr
    statuses = [status for method, path, status in hub.requests if method == "GET" and path.endswith("/large.bin")]
    assert 206 in statuses  # only the rest was fetched
    folder = Path(done.stdout.split()[-1])
    assert (folder / "large.bin").read_bytes() == large
    assert (folder / "model.safetensors").read_bytes() == (run_folder / "model.safetensors").read_bytes()
    hub.close()
    offline = pull(hub, tmp_path / "other", HF_HUB_OFFLINE="1")
    assert offline.stdout.split()[-1] == str(folder)
    loaded, local = (LambForAudioCaptioning.from_pretrained(place).state_dict() for place in (folder, run_folder))
    assert all(torch.equal(loaded[name], value) for name, value in local.items())


@pytest.mark.slow
def test_a_repository_that_is_closed_is_named_and_can_be_had_later(hub, run_folder, sound, tmp_path):
    assert push(hub, run_folder, tmp_path / "cache").returncode == 0
    for status, code, sentence in (
        (403, "GatedRepo", "gated repo"),
        (401, "RepoNotFound", "not a valid model identifier"),
        (404, "RepoNotFound", "not a valid model identifier"),
    ):
        hub.faults[:] = [("HEAD", "/resolve/", (status, {"X-Error-Code": code}))] * 20
        failed = as_a_stranger(hub, tmp_path / "other", sound)
        assert failed.returncode != 0 and REPO in failed.stderr and sentence in failed.stderr, failed.stderr
    hub.faults.clear()
    assert as_a_stranger(hub, tmp_path / "other", sound).returncode == 0


@pytest.mark.slow
def test_damaged_files_of_the_cache_are_noticed(hub, run_folder, sound, tmp_path):
    assert push(hub, run_folder, tmp_path / "cache").returncode == 0
    hub.faults.append(("GET", r"resolve/.*/model\.safetensors", "damage"))  # a wrong byte on the way
    folder = Path(pull(hub, tmp_path / "other").stdout.split()[-1])

    def check():
        verify = [sys.executable, "-m", "huggingface_hub.cli.hf", "cache", "verify", REPO]
        return subprocess.run(
            verify, capture_output=True, text=True, env=environment(hub, tmp_path / "other"), check=False
        )

    found = check()
    assert found.returncode != 0 and "model.safetensors" in found.stdout + found.stderr
    file = (folder / "model.safetensors").resolve()
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(OSError, match=r"damaged .* fetch it again"):
        LambForAudioCaptioning.from_pretrained(folder)
    file.unlink()
    assert as_a_stranger(hub, tmp_path / "other", sound).returncode == 0
    found = check()
    assert found.returncode == 0, found.stdout + found.stderr


def test_dry_run_writes_the_repository_and_sends_nothing(hub, run_folder, tmp_path):
    done = push(hub, run_folder, tmp_path / "cache", "--dry_run", str(tmp_path / "repo"))
    assert done.returncode == 0, done.stderr
    assert problems(tmp_path / "repo") == [] and not hub.requests
    assert {"README.md", "recipe.yaml", "scores.json", "modeling_lamb.py", "training.png", "modality_gap.png"} <= {
        f.name for f in (tmp_path / "repo").iterdir()
    }


def test_the_card_says_what_was_measured_and_nothing_else(run_folder):
    card = render_card(run_folder, REPO)
    assert "| CIDEr-D | 0.500 | 0.400 to 0.600 | 40 |" in card.text
    assert "2 steps of 2 clips at a rate of 0.001, 3 minutes." in card.text
    assert "tones, 4 clips, 1 missing" in card.text and "It is tiny and random." in card.text
    assert "Not computed: SPICE" in card.text and "| CIDEr-D | 91.1 |" in card.text  # the paper's, in its own column
    (result,) = card.data.eval_results
    assert result.metric_value == 0.5 and "greedy decoding, n 40" in result.metric_name
    assert not any(residue in card.content for residue in ("{{", "{%", "None", "TODO"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "`, a Two-Stream Adapter"),
        ({"num_trained_audio_layers": 1}, "` (last layers that were trained here: 1), a Two-Stream Adapter"),
        ({"freeze_audio_encoder": False}, "` (trained here), a Two-Stream Adapter"),
        ({"audio_peft_config": {"r": 4}}, "` with LoRA of rank 4, a Two-Stream Adapter"),
    ],
)
def test_the_card_says_how_much_of_the_encoder_was_trained(run_folder, tmp_path, fields, said):
    run = shutil.copytree(run_folder, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | fields))
    assert said in render_card(run, REPO).text


@pytest.fixture
def repository(hub, run_folder, tmp_path):
    push(hub, run_folder, tmp_path / "cache", "--dry_run", str(tmp_path / "repo"))
    return tmp_path / "repo"


def test_what_must_not_be_published_is_named(repository):
    weights = load_file(repository / "model.safetensors")
    name = next(name for name, value in weights.items() if value.is_floating_point())
    save_file(weights | {name: weights[name] * torch.nan}, repository / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((repository / "config.json").read_text())
    (repository / "config.json").write_text(json.dumps(config | {"text_model_id": "meta-llama/Llama-2-7b-hf"}))
    (repository / "adapter_config.json").write_text("{}")
    (repository / "tokenizer.json").unlink()
    (repository / "scores.json").unlink()
    card = (repository / "README.md").read_text().replace("license: apache-2.0\n", "") + "\n{{ residue }}"
    (repository / "README.md").write_text(card)
    found = "\n".join(problems(repository))
    for words in (
        "NaN",
        "gated",
        "adapter_config.json",
        "tokenizer.json is missing",
        "no scores.json",
        "licence",
        "{{",
    ):
        assert words in found, words
