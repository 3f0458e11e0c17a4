"""Evaluation noise is a function of prompt and number; grids and numbers hold what was given."""

import pytest
import torch

from trl_dgpo.evaluation import (
    evaluation_latents,
    evaluation_metrics,
    image_grid,
)
from trl_dgpo.image_measures import measure_images
from trl_dgpo.rewards.scoring import Scores


SHAPE = (4, 3, 5)


def test_latents_depend_on_prompt_and_number_alone():
    latents = evaluation_latents(["a", "b"], 3, SHAPE)
    assert latents.shape == (6, *SHAPE)
    assert latents.dtype == torch.float32
    torch.manual_seed(5)
    assert torch.equal(evaluation_latents(["b", "c", "a"], 2, SHAPE)[[4, 5, 0, 1]], latents[[0, 1, 3, 4]])
    assert len(latents.flatten(1).unique(dim=0)) == 6


def test_latents_are_standard_normal():
    latents = evaluation_latents([str(i) for i in range(20)], 5, (4, 16, 16))
    assert abs(latents.mean().item()) < 0.01
    assert abs(latents.std().item() - 1) < 0.01


def test_latents_are_pinned():
    """Evaluations of two releases can be compared."""
    first = evaluation_latents(['A sign that says "CAFE"'], 1, (1, 1, 4)).flatten()
    torch.testing.assert_close(first, torch.tensor([-1.297836, 0.552543, 0.710719, 2.13115]), atol=1e-6, rtol=0)


def test_drawing_latents_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    evaluation_latents(["a"], 1, SHAPE)
    assert torch.equal(torch.random.get_rng_state(), before)


def flat(*colours):
    return torch.stack([torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1).expand(3, 8, 8) for colour in colours])


def test_grid_has_a_row_a_model_and_a_column_a_prompt():
    rows = {"before": flat((255, 0, 0), (0, 255, 0)), "after": flat((0, 0, 255), (90, 9, 9))}
    grid = image_grid(rows, ["first", "second"], min_height=32)
    areas = {colour: count for count, colour in grid.getcolors(1 << 16)}
    assert {(255, 0, 0), (0, 255, 0), (0, 0, 255), (90, 9, 9)} <= areas.keys()
    assert areas[255, 0, 0] == areas[90, 9, 9] == 32 * 32  # 8 pixels enlarged four times
    assert grid.width > 2 * 32
    assert grid.height > 2 * 32


@pytest.mark.parametrize("name", ["reward", "reward_stderr", "rewards/sharp/mean", "images/contrast", "failed"])
def test_a_rewards_own_metric_cannot_take_the_evaluations_names(name):
    rewards = torch.tensor([0.5, 1.0], dtype=torch.float64)
    scores = Scores(rewards, {"sharp": rewards}, torch.zeros(2, dtype=torch.bool), {name: [123.0]}, {})
    measures = measure_images(flat((0, 0, 0), (9, 9, 9)))
    with pytest.raises(ValueError, match=f"A reward logs .'{name}'. by `log_metric`"):
        evaluation_metrics(scores, measures)
    assert evaluation_metrics(scores._replace(metrics={"sharpness": [1.0, 2.0]}), measures)["eval_sharpness"] == 1.5
