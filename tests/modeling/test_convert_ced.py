"""The converter command: an original `.pt` in, a folder for `from_pretrained` out."""

import sys

import pytest
import torch
from safetensors.torch import save_file
from test_modeling_ced import log_mel, published

from modeling_lamb import CedConfig, CedModel, convert_ced

CED = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}


@pytest.fixture
def sizes(monkeypatch):
    """A published size that is quick to make."""
    monkeypatch.setattr(CedConfig, "of_size", classmethod(lambda cls, size: cls(**CED)))


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["convert_ced", *map(str, arguments)])
    convert_ced.main()


@pytest.mark.parametrize("form", ["original.pt", "wrapped.pt", "port.safetensors"])
@torch.no_grad()
def test_the_command_writes_a_folder_that_loads(tmp_path, monkeypatch, capsys, sizes, form):
    model = CedModel(CedConfig(**CED)).eval()
    file, out = tmp_path / form, tmp_path / "out"
    if form.startswith("port"):
        save_file(published(model, "port"), file)
    else:
        weights = published(model, "original")
        torch.save({"model": weights} if form.startswith("wrapped") else weights, file)
    run(monkeypatch, file, out, "--size", "tiny")
    assert "CED-tiny" in capsys.readouterr().out
    features = log_mel(1, 64, 200)
    loaded = CedModel.from_pretrained(out)
    assert torch.equal(loaded(features).last_hidden_state, model(features).last_hidden_state)


def test_a_file_of_another_size_is_refused(tmp_path, monkeypatch):
    torch.save(published(CedModel(CedConfig(**CED)), "original"), tmp_path / "file.pt")
    with pytest.raises(ValueError, match=r"is not CED-tiny: patch_embed.time_pos_embed is \(1, 32, 1, 63\)"):
        convert_ced.convert(str(tmp_path / "file.pt"), "tiny")


def test_a_file_with_too_few_or_too_many_layers_is_refused(tmp_path, sizes):
    for layers in (1, 3):
        config = CedConfig(**(CED | {"num_hidden_layers": layers}))
        torch.save(published(CedModel(config), "original"), tmp_path / "file.pt")
        with pytest.raises(ValueError, match="is not CED-tiny"):
            convert_ced.convert(str(tmp_path / "file.pt"), "tiny")


def test_pickled_code_is_not_run(tmp_path, sizes):
    class Attack:
        def __reduce__(self):
            return print, ("run",)

    torch.save({"model": Attack()}, tmp_path / "file.pt")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        convert_ced.convert(str(tmp_path / "file.pt"), "tiny")
