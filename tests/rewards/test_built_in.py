"""The table of built-in rewards: every line of it can be had, and names in a log do not collide."""

import pickle

import pytest

from trl_dgpo import rewards
from trl_dgpo.rewards import BUILT_IN, get_reward
from trl_dgpo.rewards.scoring import RewardScorer


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_name_gives_a_reward_that_can_be_pickled_and_called(name):
    reward = get_reward(name)
    assert pickle.loads(pickle.dumps(reward)).__name__ == reward.__name__
    RewardScorer(reward)


def test_all_names_in_the_log_differ():
    # `ocr-recognition` is `ocr` for small pictures: nobody asks for both.
    every = [get_reward(name) for name in BUILT_IN if name != "ocr-recognition"]
    assert RewardScorer(every).names == [reward.__name__ for reward in every]


def test_every_export_is_there():
    for name in rewards._EXPORTS:
        assert getattr(rewards, name).__name__ == name
        assert name in rewards.__all__


@pytest.mark.parametrize(("name", "scale"), [("jpeg-compressibility", True), ("ocr", None)])
def test_the_training_scale_is_asked_for_where_there_is_one(name, scale):
    assert getattr(get_reward(name, normalize=True), "normalize", None) is scale
    assert not getattr(get_reward(name), "normalize", None)


def test_an_unknown_name_is_told_which_there_are():
    with pytest.raises(ValueError, match=r"no reward 'beauty'\. Give a name .*pickscore"):
        get_reward("beauty")
