"""
Trains tiny LAMBs for the tests of many processes: `python train_tiny.py RUNS`, or under torchrun.

RUNS is a JSON list of `out`, `ranks` that must be there, `model` (fields of LambConfig), `training` (of TrainingArguments),
`rows`, and where wanted `resume`, `dies` (the step after which it is killed), `save` and `fsdp`. Rank 0 writes the trained
parameters (`trained.safetensors`) and what was logged (`log.json`) to `out`.
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from accelerate import PartialState
from conftest import CAPTIONS, VOCAB_SIZE, noise, randomized, tiny_config, tokenizer_json
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from training_lamb.data import CaptionCollator
from training_lamb.trainer import LambTrainer
from transformers import PreTrainedTokenizerFast, TrainerCallback, TrainingArguments

from modeling_lamb import LambFeatureExtractor, LambForAudioCaptioning, LambProcessor


class DiesAtStep(TrainerCallback):
    """Every rank is killed after `step`, as by a machine that goes away."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(settings: dict) -> None:
    out = Path(settings["out"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer_json()), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    processor = LambProcessor(LambFeatureExtractor(), tokenizer, num_audio_tokens=4)
    assert processor.audio_token_id == VOCAB_SIZE
    torch.manual_seed(0)
    model = randomized(LambForAudioCaptioning(tiny_config(**settings["model"])))
    arguments = TrainingArguments(
        output_dir=str(out),
        use_cpu=True,
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        **settings["training"],
    )
    assert arguments.world_size == settings["ranks"], arguments.world_size
    rows = [
        {"audio": noise(0.3 + 0.1 * (i % 4), i), "caption": f"{CAPTIONS[i % 4]} {i}", "clip": i}
        for i in range(settings["rows"])
    ]
    trainer = LambTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=CaptionCollator(processor),
        processing_class=processor,
        callbacks=[DiesAtStep(settings.get("dies"))],
    )
    if settings.get("fsdp"):
        save_sharded_step(
            model, [trainer.data_collator(rows[r :: settings["ranks"]]) for r in range(settings["ranks"])], out
        )
        return
    trainer.train(resume_from_checkpoint=settings.get("resume"))
    if settings.get("save"):
        trainer.save_model(str(out / "final"))
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        trained = {name: p.detach().clone().contiguous() for name, p in model.named_parameters() if p.requires_grad}
        save_file(trained, out / "trained.safetensors")
        (out / "log.json").write_text(json.dumps(trainer.state.log_history))


def save_sharded_step(model: LambForAudioCaptioning, batches: list[dict], out: Path) -> None:
    """One step of plain SGD at rate 1 with FSDP2, whose shards the Trainer does not make on a CPU."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for part in (*model.language_model.model.layers, model.adapter, model):
        fully_shard(part)
    tokens = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    outputs = model.train()(**batches[rank], num_items_in_batch=tokens)
    alignment = outputs.alignment_loss  # FSDP averages over ranks, as DDP does
    ((outputs.loss - alignment) * ranks + alignment).backward()
    updated = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert isinstance(p, DTensor), name
            updated[name] = (p - p.grad).full_tensor().detach().contiguous()
    if rank == 0:
        save_file(updated, out / "trained.safetensors")
        (out / "log.json").write_text("[]")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for run in json.loads(sys.argv[1]):
        train(run)
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
