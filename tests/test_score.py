"""score.py from the outside: one process and two write the very same files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
from conftest import CAPTIONS, noise, write_table

SCRIPT = Path(__file__).parents[1] / "score.py"


@pytest.fixture
def clips(model, processor, tmp_path):
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    for number in range(5):
        soundfile.write(tmp_path / f"{number}.wav", noise(0.3 + 0.1 * number, number), 16000)
    (tmp_path / "broken.wav").write_bytes(b"")
    rows = [(f"{n}.wav", CAPTIONS[n % 4], CAPTIONS[(n + 1) % 4]) for n in range(5)] + [("broken.wav", "A.", "B.")]
    write_table(tmp_path / "metadata.csv", rows, ("file_name", "caption_1", "caption_2"))
    return tmp_path


def score(folder, out, ranks=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    arguments = [
        str(folder / "model"),
        "--data",
        "table",
        "--table",
        str(folder),
        "--out",
        str(out),
        "--batch_size",
        "1",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(SCRIPT), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return (out / "predictions.jsonl").read_text(), json.loads((out / "scores.json").read_text())


@pytest.mark.slow
def test_two_ranks_write_the_files_of_one(clips, tmp_path):
    predictions, scores = score(clips, tmp_path / "one")
    assert (predictions, scores) == score(clips, tmp_path / "two", 2)
    rows = [json.loads(line) for line in predictions.splitlines()]
    assert [row["id"] for row in rows] == [*(f"{n}.wav" for n in range(5)), "broken.wav"]
    assert rows[-1]["caption"] is None and "error" in rows[-1] and scores["unread"] == ["broken.wav"]
    assert scores["clips"] == 6 and scores["scores"]["cider_d"]["n"] == 6 and "spice" in scores["skipped"]
    assert all("cider_d" in row["scores"] for row in rows)
