"""The progress bar shows the reward and the evaluations."""

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from trl_dgpo.callbacks import RewardProgressCallback


class Bar:
    def __init__(self):
        self.postfix, self.lines = None, []

    def set_postfix(self, **postfix):
        self.postfix = postfix

    def write(self, line):
        self.lines.append(line)


@pytest.fixture
def show(tmp_path):
    callback, args = RewardProgressCallback(), TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    callback.training_bar = Bar()

    def log(state=None, **logs):
        callback.on_log(args, state or TrainerState(global_step=7), TrainerControl(), logs=logs)
        return callback.training_bar

    return log


def test_reward_and_loss_stand_beside_the_bar(show):
    assert show(reward=0.61234, loss=0.00123).postfix == {"reward": "0.612", "loss": "1.23e-03"}


def test_a_step_without_rollouts_leaves_the_last_reward(show):
    show(reward=0.5, loss=0.1)
    assert show(loss=0.2).postfix["reward"] == "0.500"


def test_an_evaluation_is_a_line(show):
    assert show(**{"eval_reward": 0.7, "eval_images/contrast": 0.1}).lines == ["step 7: eval_reward 0.700"]


def test_evaluations_of_several_data_sets_are_lines_too(show):
    logs = {"eval_short_reward": 0.7, "eval_short_reward_stderr": 0.01, "eval_short_rewards/ocr/mean": 0.8}
    assert show(**logs).lines == ["step 7: eval_short_reward 0.700, eval_short_rewards/ocr/mean 0.800"]


def test_other_processes_show_nothing(show):
    bar = show(TrainerState(is_world_process_zero=False), reward=0.5, loss=0.1)
    assert bar.postfix is None


def test_no_bar_no_line():
    RewardProgressCallback().on_log(None, TrainerState(), TrainerControl(), logs={"reward": 0.5, "loss": 0.1})


def test_on_a_terminal(tmp_path, capsys):
    from tiny_trainers import prompt_dataset, tiny_trainer

    trainer = tiny_trainer(tmp_path, disable_tqdm=False, eval_dataset=prompt_dataset("x"))
    trainer.train()
    out, err = capsys.readouterr()
    assert "reward=0." in err
    assert "step 0: eval_reward 0." in out + err
