"""A script written for `DDPOTrainer` runs from its command line to a LoRA that plain diffusers loads."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from tiny_families import tiny_family
from tiny_models import tiny_random_pipeline


SCRIPT = Path(__file__).parent / "ddpo_script.py"

# Those that TRL documented, but for the epochs, the steps and the tracker.
DOCUMENTED = [
    "--num_epochs=2",
    "--train_gradient_accumulation_steps=1",
    "--sample_num_steps=10",
    "--sample_batch_size=6",
    "--train_batch_size=3",
    "--sample_num_batches_per_epoch=4",
    "--per_prompt_stat_tracking=True",
    "--per_prompt_stat_tracking_buffer_size=32",
    "--tracker_project_name=stable_diffusion_training",
    "--log_with=tensorboard",
]
SMALL = ["--use_cpu", "--resolution=32", "--max_sequence_length=4", "--ema_every=1", "--disable_tqdm=True"]


@pytest.fixture
def run_script(tmp_path, monkeypatch):
    """Runs the script in an empty folder, and gives what it left in its names."""
    monkeypatch.chdir(tmp_path)
    for variable in ("TENSORBOARD_LOGGING_DIR", "WANDB_PROJECT"):
        monkeypatch.setenv(variable, "")  # so that what the trainer sets is taken back
        monkeypatch.delenv(variable)
    tiny_random_pipeline().save_pretrained("model")

    def run(*flags):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--pretrained_model=model", *flags, *SMALL])
        return runpy.run_path(str(SCRIPT), run_name="__main__")

    return run


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_ddpo_script_trains(run_script, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.warns(UserWarning, match="1 group of 24 images, so `updates_per_round` is 1"):
        trainer = run_script(*DOCUMENTED, "--save_freq=1")["trainer"]
    assert trainer.state.global_step == 2
    assert (trainer.args.num_generations, trainer.args.prompts_per_round) == (24, 1)
    assert sorted(path.name for path in tmp_path.glob("save/checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]

    # The hook's pictures, one a file of the last call of the reward, under the step at which their round began.
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    assert folder.is_relative_to(tmp_path / "logs")
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    tags = [tag for tag in events.Tags()["images"] if " | " in tag]
    assert {event.step for tag in tags for event in events.Images(tag)} == {0, 1}
    assert {tag.split()[1] for tag in tags} <= {"ant", "bear", "crab", "dove", "eel"}

    def picture(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(0)
        return pipeline("crab", height=32, width=32, num_inference_steps=2, generator=noise, output_type="pt").images

    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "model", text_encoder_3=None, tokenizer_3=None)
    before = picture(pipeline)
    pipeline.load_lora_weights(tmp_path / "trainer_output")  # the script's `training_args.output_dir`
    assert not torch.equal(picture(pipeline), before)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_ddpo_script_trains_the_model_that_it_trained(run_script, tmp_path):
    tiny_family("sd15").save_pretrained("sd15")
    flags = ("--pretrained_model=sd15", "--num_epochs=1", "--sample_batch_size=4", "--sample_num_batches_per_epoch=1")
    trainer = run_script(*flags, "--sample_num_steps=10", "--save_strategy=no")["trainer"]
    assert trainer.state.global_step == 1
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "sd15", safety_checker=None)
    assert not hasattr(pipeline.unet, "peft_config")
    pipeline.load_lora_weights(tmp_path / "trainer_output")
    assert pipeline.unet.peft_config


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_ddpo_script_trains_everything(run_script, tmp_path):
    trainer = run_script(
        *("--use_lora=False", "--num_epochs=1", "--sample_batch_size=4", "--sample_num_batches_per_epoch=1"),
        *("--sample_num_steps=10", "--save_strategy=no"),
    )["trainer"]
    assert trainer.args.full_finetuning
    assert trainer.state.global_step == 1
    assert not list(tmp_path.rglob("pytorch_lora_weights.safetensors"))
