import pytest
import torch
from conftest import CAPTIONS, noise, randomized, tiny_config
from training_lamb.data import CaptionCollator
from training_lamb.trainer import LOGGED, LambTrainer
from transformers import TrainingArguments

from modeling_lamb import LambForAudioCaptioning


def rows(count=8):
    return [{"audio": noise(0.5, i), "caption": CAPTIONS[i % 4], "clip": i} for i in range(count)]


class Clips(list):
    """Clips of which each has one caption, as a data set of rows and of clips."""

    def clip_name(self, number):
        return f"clip {number}.wav"


def train(processor, tmp_path, model=None, trainer_settings=None, **settings):
    model = model or randomized(LambForAudioCaptioning(tiny_config()))
    settings = {"per_device_train_batch_size": 8, "max_steps": 1, "logging_steps": 1, "learning_rate": 1e-3} | settings
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
        **settings,
    )
    trainer = LambTrainer(
        model=model,
        args=arguments,
        train_dataset=Clips(rows()),
        data_collator=CaptionCollator(processor),
        **(trainer_settings or {}),
    )
    trainer.train()
    return trainer


def test_every_term_is_logged_by_name(processor, tmp_path):
    logs = train(processor, tmp_path).state.log_history[0]
    assert set(LOGGED) <= set(logs)
    total = logs["decoder_loss"] + logs["guided_loss"] + logs["alignment_loss"]
    assert float(logs["loss"]) == pytest.approx(total, rel=1e-3)


def test_alignment_alone_never_runs_the_llm(processor, tmp_path):
    model = randomized(LambForAudioCaptioning(tiny_config()))
    before = {name: value.clone() for name, value in model.named_parameters()}
    model.language_model.forward = None  # it would fail if it were called
    trainer = train(processor, tmp_path, model, {"alignment_only": True}, max_steps=2, save_strategy="no")
    changed = {name.split(".")[0] for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {"adapter"}
    assert "decoder_loss" not in trainer.state.log_history[0]


def test_parts_have_their_own_rates_and_beta_no_decay(processor, tmp_path):
    rates = {"token_guide.beta": 0.5, "adapter.": 0.25}
    trainer = train(processor, tmp_path, trainer_settings={"learning_rates": rates}, weight_decay=0.1)
    found = {id(p): group for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            group = found.pop(id(parameter))
            part = name.split(".")[0]
            assert group["initial_lr"] == {"token_guide": 0.5, "adapter": 0.25}.get(part, 1e-3), name
            assert group["weight_decay"] == (0 if parameter.dim() < 2 else 0.1), name
    assert not found
    with pytest.raises(ValueError, match="'adaptor'"):
        train(processor, tmp_path, trainer_settings={"learning_rates": {"adaptor": 0.1}})


def test_accumulation_does_not_change_the_weight_of_the_sums_over_tokens(processor, tmp_path):
    grads = []
    for batch, steps in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        config = tiny_config(cs_global_weight=0.0, info_nce_weight=0.0)  # these two see the batch as a whole
        model = randomized(LambForAudioCaptioning(config))
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "max_grad_norm": 1e9}
        trainer = train(processor, tmp_path, model, learning_rate=0.0, lr_scheduler_type="constant", **settings)
        grads.append(float(trainer.state.log_history[0]["grad_norm"]))
    assert grads[0] == pytest.approx(grads[1], rel=1e-4)


def test_evaluation_captions_every_clip_and_the_best_checkpoint_is_chosen_by_a_metric(processor, tmp_path):
    clips = [{"audio": noise(0.5, i), "captions": [CAPTIONS[i], CAPTIONS[0]]} for i in range(3)]
    settings = {"caption_dataset": clips, "generation": {"max_new_tokens": 3}, "processing_class": processor}
    model = randomized(LambForAudioCaptioning(tiny_config()))
    evaluation = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "max_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "rouge_l",
        "greater_is_better": True,
        "prediction_loss_only": True,
    }
    trainer = train(processor, tmp_path, model, settings | {"eval_dataset": rows()}, **evaluation)
    logged = [entry for entry in trainer.state.log_history if "eval_rouge_l" in entry]
    assert [entry["step"] for entry in logged] == [1, 2]
    assert trainer.state.best_metric == max(entry["eval_rouge_l"] for entry in logged)
    assert {"eval_cider_d", "eval_bleu_4", "eval_vocabulary"} <= set(logged[0])
    singly = [trainer.caption([clip])[0] for clip in clips]
    assert trainer.caption(clips) == singly


def test_a_loss_that_is_not_finite_names_step_term_and_clips(processor, tmp_path):
    model = randomized(LambForAudioCaptioning(tiny_config()))
    with torch.no_grad():
        model.token_guide.beta.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"step 1 .*guided_loss, on the clips .*clip 7\.wav"):
        train(processor, tmp_path, model)
