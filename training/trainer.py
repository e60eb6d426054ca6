"""The HF Trainer with LAMB's losses logged by name and an optional stage that trains the aligner without the LLM."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

LOGGED = (
    "decoder_loss",
    "guided_loss",
    "alignment_loss",
    "cs_global_loss",
    "cs_token_loss",
    "info_nce_loss",
    "modality_gap",
    "modality_cosine",
)


class LambTrainer(Trainer):
    """
    Trains [`LambForAudioCaptioning`].

    Args:
        alignment_only: train by the aligner's losses alone, without running the LLM: many times faster, for warming up the
            adapter.
        guide_learning_rate: learning rate of beta (Eq. 12); None takes that of everything else.
        kwargs: as of `transformers.Trainer`.
    """

    def __init__(
        self, *args: Any, alignment_only: bool = False, guide_learning_rate: float | None = None, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self.alignment_only, self.guide_learning_rate = alignment_only, guide_learning_rate
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.args.device))
        self._counts: dict[str, int] = defaultdict(int)

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        if self.alignment_only:
            inputs = inputs | {"alignment_only": True}
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        loss = outputs.loss
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        if outputs.alignment_loss is not None and num_items_in_batch is not None and model.training:
            # Given the number of caption tokens, the Trainer leaves out the division by the accumulation steps. That is
            # right for the sums over tokens, but the aligner's terms are means over the clips of each batch. DDP averages
            # over ranks what was divided by the tokens of all ranks, hence the factor for those alone.
            alignment = self.accelerator.unwrap_model(model).config.alignment_weight * outputs.alignment_loss
            loss = (loss - alignment) * ranks + alignment / self.current_gradient_accumulation_steps
        elif num_items_in_batch is not None:
            loss = loss * ranks
        if model.training:
            for name in LOGGED:
                if (value := getattr(outputs, name)) is not None:
                    if name in ("decoder_loss", "guided_loss") and num_items_in_batch is not None:
                        value = value * ranks * self.current_gradient_accumulation_steps
                    self._sums[name] += value.detach().float()
                    self._counts[name] += 1
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._sums:
            names = sorted(self._sums)
            means = torch.stack([self._sums[name] / self._counts[name] for name in names])
            means = self.accelerator.reduce(means, "mean")
            logs |= {name: round(value, 5) for name, value in zip(names, means.tolist(), strict=True)}
            logs["guide_weight"] = self.accelerator.unwrap_model(self.model).token_guide.beta.item()
            self._sums.clear()
            self._counts.clear()
        super().log(logs, *args, **kwargs)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith("token_guide.beta")]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        beta = self.accelerator.unwrap_model(self.model).token_guide.beta
        if self.guide_learning_rate is not None and beta.requires_grad:
            group = next(g for g in optimizer.param_groups if any(p is beta for p in g["params"]))
            group["params"] = [p for p in group["params"] if p is not beta]
            optimizer.add_param_group({**group, "params": [beta], "lr": self.guide_learning_rate})
        return optimizer
