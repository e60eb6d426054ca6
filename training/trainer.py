"""The HF Trainer with LAMB's losses logged by name and an optional stage that trains the aligner without the LLM."""

from collections import defaultdict
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import Trainer

from .captioning_metrics import CaptioningMetrics
from .data import prompt_inputs

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
        learning_rates: rates of parts that differ from everything else's, by the beginning of the parameters' names
            (`{"adapter.": 1e-4, "token_guide.beta": 1e-3}`).
        caption_dataset: clips with all their `captions`; every evaluation captions them and adds the scores of
            [`CaptioningMetrics`] (`eval_cider_d`, ...), by which `metric_for_best_model` may choose. Needs the LAMB
            processor as `processing_class`.
        generation: arguments of `generate` for them.
        kwargs: as of `transformers.Trainer`.
    """

    def __init__(
        self,
        *args: Any,
        alignment_only: bool = False,
        learning_rates: dict[str, float] | None = None,
        caption_dataset: Dataset | None = None,
        generation: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.caption_dataset, self.generation = caption_dataset, {"max_new_tokens": 64} | (generation or {})
        self.alignment_only, self.learning_rates = alignment_only, learning_rates or {}
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
            if not loss.isfinite():
                raise ValueError(self._where_it_broke(outputs, inputs.get("clip_ids")))
            for name in LOGGED:
                if (value := getattr(outputs, name)) is not None:
                    if name in ("decoder_loss", "guided_loss") and num_items_in_batch is not None:
                        value = value * ranks * self.current_gradient_accumulation_steps
                    self._sums[name] += value.detach().float()
                    self._counts[name] += 1
        return (loss, outputs) if return_outputs else loss

    def _where_it_broke(self, outputs: Any, clip_ids: Tensor | None) -> str:
        terms = [name for name in LOGGED if (value := getattr(outputs, name)) is not None and not value.isfinite()]
        numbers = [] if clip_ids is None else clip_ids.tolist()
        name_of = getattr(self.train_dataset, "clip_name", str)
        names = [name_of(number) for number in numbers]
        return (
            f"The loss of step {self.state.global_step + 1} is not finite: {', '.join(terms) or 'the logits'}, on the clips "
            f"{', '.join(names)}. Look at these clips; else lower the learning rate, or train in bfloat16 instead of float16."
        )

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

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.caption_dataset is None or self.alignment_only:
            return metrics
        captions = self.caption(self.caption_dataset)
        scores: list[Any] = [None]
        if self.is_world_process_zero():
            references = [self.caption_dataset[number]["captions"] for number in range(len(captions))]
            scores = [CaptioningMetrics().compute(predictions=captions, references=references)["scores"]]
        (found,) = broadcast_object_list(scores)
        named = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(named)
        return metrics | named

    @torch.inference_mode()
    def caption(self, clips: Any) -> list[str]:
        """Captions of a data set's clips, in its order; each rank writes its share of them."""
        model: Any = self.accelerator.unwrap_model(self.model).eval()
        processor: Any = self.processing_class
        ranks, size = self.accelerator.num_processes, self.args.per_device_eval_batch_size
        share = list(range(self.accelerator.process_index, len(clips), ranks))
        found: list[tuple[int, str]] = []
        for start in tqdm(range(0, len(share), size), desc="captioning", disable=self.args.disable_tqdm):
            numbers = share[start : start + size]
            inputs = prompt_inputs([clips[number] for number in numbers], processor)
            with self.compute_loss_context_manager():
                tokens = model.generate(**self._prepare_inputs(inputs), **self.generation)
            found += zip(numbers, processor.batch_decode(tokens, skip_special_tokens=True), strict=True)
        return [caption for _, caption in sorted(gather_object(found) if ranks > 1 else found)]

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith("token_guide.beta")]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        for beginning, rate in self.learning_rates.items():
            chosen = {id(p) for name, p in model.named_parameters() if p.requires_grad and name.startswith(beginning)}
            if not chosen:
                raise ValueError(f"learning_rates: no trained parameter's name begins with {beginning!r}.")
            for group in list(optimizer.param_groups):
                if parameters := [p for p in group["params"] if id(p) in chosen]:
                    group["params"] = [p for p in group["params"] if id(p) not in chosen]
                    optimizer.add_param_group({**group, "params": parameters, "lr": rate})
        return optimizer
