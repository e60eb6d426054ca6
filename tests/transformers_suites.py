"""
Transformers' own common test suites, to be run against LAMB's classes.

They are read, never copied: from the folder in $TRANSFORMERS_SOURCE (a checkout of the repository, which holds them all),
else from the source distribution on PyPI of the version that is installed. That carries the suites of models, pipelines,
processors, feature extractors and configurations; those of generation and export it does not (see `tests/modeling`).

    from transformers_suites import suite
    ModelTesterMixin = suite("test_modeling_common").ModelTesterMixin
"""

import importlib
import os
import subprocess
import sys
import tarfile
import types
from functools import cache
from pathlib import Path

import pytest
import transformers

# Imported by the suites, but not in the source distribution. A suite that is missing becomes an empty class, of which
# no test is ever reported.
NOT_SHIPPED = {
    "tests.exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "tests.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    # what ConfigTester sets on a configuration and expects to read again
    "tests.utils.test_configuration_utils": {
        "config_common_kwargs": {
            "return_dict": False,
            "output_hidden_states": True,
            "chunk_size_feed_forward": 5,
            "architectures": ["CedModel"],
            "id2label": {0: "silence"},
            "label2id": {"silence": 0},
            "problem_type": "regression",
        }
    },
    # where the files lie that its tests would else load from the Hub
    "fetch_hub_objects_for_ci": {
        "url_to_local_path": lambda url: str(
            Path(__file__).parents[1]
            / "examples"
            / {"glass-breaking-151256.mp3": "dog.mp3"}.get(Path(url).name, "cat.mp3")
        )
    },
}


@cache
def source() -> Path:
    """Root of the sources; downloads them once, and skips the tests of the calling module where they cannot be had."""
    if "TRANSFORMERS_SOURCE" in os.environ:
        return Path(os.environ["TRANSFORMERS_SOURCE"])
    name = f"transformers-{transformers.__version__}"
    folder = Path(os.environ.get("LAMB_CACHE", Path.home() / ".cache" / "lamb"))
    if not (folder / name / "tests").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        download += ["--no-binary", ":all:", "--no-build-isolation", "--dest", str(folder), name.replace("-", "==")]
        done = subprocess.run(download, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(
                f"{name} could not be downloaded for its test suites: {done.stderr[-300:]}", allow_module_level=True
            )
        with tarfile.open(folder / f"{name}.tar.gz") as archive:
            wanted = [member for member in archive if member.name.startswith(f"{name}/tests/")]
            archive.extractall(folder, wanted, filter="data")
        (folder / name / "tests" / "__init__.py").touch()  # a file that is not shipped either
        (folder / f"{name}.tar.gz").unlink()
    return folder / name


def shipped(module: str) -> bool:
    return (source() / f"{module.replace('.', '/')}.py").is_file()


def suite(name: str) -> types.ModuleType:
    """A module of Transformers' `tests` package, which is imported under that name."""
    if str(source()) not in sys.path:
        sys.path.insert(0, str(source()))
        for missing, content in NOT_SHIPPED.items():
            if not shipped(missing):
                module = types.ModuleType(missing)
                module.__dict__.update(content)
                sys.modules[missing] = module
    return importlib.import_module(f"tests.{name}")
