"""Publishing and downloading through the real client, over HTTP, against a Hub on loopback that can be told to fail."""

import hashlib
import json
import os
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
from training_lamb.publishing import problems, render_card

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
    randomized(LambForAudioCaptioning(tiny_config())).save_pretrained(folder)
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
    log = [{"step": n, "loss": 3.0 - n, "decoder_loss": 2.0 - n} for n in (1, 2)]
    (folder / "captioning").mkdir()
    state = {"global_step": 2, "log_history": [*log, {"train_runtime": 90.0}]}
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
    settings = environment(hub, cache) | variables
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=settings, check=False)


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
    done = push(hub, run_folder, tmp_path / "cache", "--merge", "--verify", sound)
    assert done.returncode == 0, done.stderr
    assert b"lora" not in hub.files(REPO)["model.safetensors"][:20000]


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


def test_dry_run_writes_the_repository_and_sends_nothing(hub, run_folder, tmp_path):
    done = push(hub, run_folder, tmp_path / "cache", "--dry_run", str(tmp_path / "repo"))
    assert done.returncode == 0, done.stderr
    assert problems(tmp_path / "repo") == [] and not hub.requests
    assert {"README.md", "recipe.yaml", "scores.json", "modeling_lamb.py"} <= {
        f.name for f in (tmp_path / "repo").iterdir()
    }


def test_the_card_says_what_was_measured_and_nothing_else(run_folder):
    card = render_card(run_folder, REPO)
    assert "| CIDEr-D | 0.500 | 0.400 to 0.600 | 40 |" in card.text
    assert "tones, 4 clips, 1 missing" in card.text and "It is tiny and random." in card.text
    assert "Not computed: SPICE" in card.text and "| CIDEr-D | 91.1 |" in card.text  # the paper's, in its own column
    (result,) = card.data.eval_results
    assert result.metric_value == 0.5 and "n 40" in result.metric_name
    assert not any(residue in card.content for residue in ("{{", "{%", "None", "TODO"))


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
