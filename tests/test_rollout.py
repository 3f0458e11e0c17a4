import pytest
import torch

from trl_dgpo.rollout import GroupRolloutBuffer, Preferences, Rollout, Trajectory


NAN = float("nan")


def rollout(record_type=Rollout, **changes):
    """Groups 3, 4, 7 and 9 of 2, 3, 1 and 2 rollouts; every value tells its row."""
    fields = {
        "x0": torch.arange(8.0).view(8, 1, 1, 1).expand(8, 2, 3, 3).clone(),
        "conditioning": {
            "embeds": torch.arange(4.0).view(4, 1, 1).expand(4, 5, 6).clone(),
            "pooled": torch.arange(4.0),
        },
        "rewards": torch.tensor([0, NAN, 2, 3, 4, 5, NAN, NAN], dtype=torch.float64),
        "advantages": torch.arange(8.0),
        "group_index": torch.tensor([3, 3, 4, 4, 4, 7, 9, 9]),
    }
    return record_type(**fields | changes)


def same(a: Rollout, b: Rollout) -> bool:
    a, b = ({**r.state_dict(), **r.conditioning} for r in (a, b))
    a.pop("conditioning"), b.pop("conditioning")
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k].nan_to_num(-1), b[k].nan_to_num(-1)) for k in a
    )


def test_what_follows_from_the_fields():
    r = rollout()
    assert r.num_groups == 4
    assert r.groups.tolist() == [3, 4, 7, 9]
    assert r.local_index.tolist() == [0, 0, 1, 1, 1, 2, 3, 3]
    assert r.valid.tolist() == [True, False, True, True, True, True, False, False]
    assert r.group_sizes.tolist() == [1, 3, 1, 0]


@pytest.mark.parametrize(
    ("num_parts", "groups"),
    [
        (1, [[0, 1, 2, 3]]),
        (2, [[0, 1], [1, 2, 3]]),
        (4, [[0], [1], [1, 2], [3]]),
        (8, [[0], [0], [1], [1], [1], [2], [3], [3]]),
    ],
)
def test_parts_are_consecutive_and_know_their_whole_groups(num_parts, groups):
    r, size = rollout(), 8 // num_parts
    for index in range(num_parts):
        part = r.part(index, num_parts)
        rows = list(range(index * size, (index + 1) * size))
        assert part.advantages.tolist() == rows
        assert part.x0[:, 1, 2, 2].tolist() == rows
        assert part.groups.tolist() == [[3, 4, 7, 9][g] for g in groups[index]]
        assert part.conditioning["pooled"].tolist() == groups[index]
        assert part.conditioning["embeds"].shape == (len(groups[index]), 5, 6)
        assert part.group_sizes.tolist() == [[1, 3, 1, 0][g] for g in groups[index]]  # of the whole groups


def test_parts_are_views():
    r = rollout()
    part = r.part(1, 4)
    assert part.x0.data_ptr() == r.x0[2:].data_ptr()
    assert part.conditioning["embeds"].data_ptr() == r.conditioning["embeds"][1:].data_ptr()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": torch.zeros(7)}, "lengths are .*'rewards': 7"),
        ({"x0": torch.zeros(9, 2, 3, 3)}, "lengths are .*'x0': 9"),
        ({"advantages": torch.zeros(8, 1)}, r"shapes are .*'advantages': \(8, 1\)"),
        ({"group_index": torch.tensor([3, 3, 4, 4, 3, 7, 9, 9])}, "must ascend"),
        ({"group_index": torch.tensor([3, 3, 4, 4, 4, 4, 9, 9])}, "3 groups, but the rows are .*'embeds': 4"),
        ({"conditioning": {"pooled": torch.zeros(8, 2)}}, "4 groups, but the rows are .*'pooled': 8"),  # one an image
        ({"group_sizes": torch.ones(3)}, "4 groups, but the rows are .*'group_sizes': 3"),
    ],
)
def test_bad_shapes(changes, message):
    with pytest.raises(ValueError, match=message):
        rollout(**changes)


def test_rollouts_that_do_not_divide():
    with pytest.raises(ValueError, match="8 rollouts cannot be divided into 3 equal parts"):
        rollout().part(0, 3)


def test_a_rollout_is_whole_and_stays_so():
    with pytest.raises(AttributeError):
        rollout().rewards = torch.zeros(8)


def test_buffer():
    buffer = GroupRolloutBuffer()
    with pytest.raises(ValueError, match="buffer is empty"):
        _ = buffer.record
    first, second = rollout(), rollout(advantages=torch.ones(8))
    buffer.fill(first, round=0)
    buffer.fill(second, round=1)
    assert buffer.record is second
    assert buffer.round == 1
    buffer.clear()
    with pytest.raises(ValueError, match="buffer is empty"):
        _ = buffer.record


@pytest.mark.parametrize("filled", [True, False])
def test_a_saved_buffer_comes_back_to_the_bit(tmp_path, filled):
    buffer, restored = GroupRolloutBuffer(), GroupRolloutBuffer()
    if filled:
        buffer.fill(rollout(x0=torch.randn(8, 2, 3, 3).bfloat16()), round=5)
    else:
        restored.fill(rollout(), round=4)
    torch.save(buffer.state_dict(), tmp_path / "buffer.pt")
    restored.load_state_dict(torch.load(tmp_path / "buffer.pt", weights_only=True))
    assert restored.round == buffer.round
    if filled:
        assert same(restored.record, buffer.record)
    else:
        with pytest.raises(ValueError, match="buffer is empty"):
            _ = restored.record


class Numbers(list):
    def part(self, index, num_parts):
        return Numbers(self[index::num_parts])

    def to(self, device):
        return self

    def state_dict(self):
        return {"numbers": list(self)}

    @classmethod
    def from_state_dict(cls, state):
        return cls(state["numbers"])


def test_a_buffer_takes_other_records():
    buffer, restored = GroupRolloutBuffer(Numbers), GroupRolloutBuffer(Numbers)
    buffer.fill(Numbers(range(8)), round=2)
    restored.load_state_dict(buffer.state_dict())
    assert restored.record.part(1, 2) == [1, 3, 5, 7]
    assert isinstance(restored.record, Numbers)


# -- trajectories


def trajectory(**changes):
    """Of three steps, the second to fourth of the sampler; latents and log-probabilities tell their row."""
    rows = torch.arange(8.0)
    steps = {
        "latents": rows.view(8, 1, 1, 1, 1) + torch.arange(4.0).view(4, 1, 1, 1) / 10 + torch.zeros(8, 4, 2, 3, 3),
        "log_probs": rows[:, None] + torch.tensor([0.0, 0.25, 0.5]),
        "steps": torch.tensor([1, 2, 3]).repeat(8, 1),
    }
    return rollout(Trajectory, **steps | changes)


def test_a_part_of_trajectories_has_its_own_steps():
    part = trajectory().part(1, 4)
    assert isinstance(part, Trajectory)
    assert part.latents[:, :, 0, 0, 0].tolist() == pytest.approx(
        torch.tensor([[2, 2.1, 2.2, 2.3], [3, 3.1, 3.2, 3.3]])
    )
    assert part.log_probs.tolist() == [[2, 2.25, 2.5], [3, 3.25, 3.5]]
    assert part.steps.tolist() == [[1, 2, 3]] * 2
    assert part.groups.tolist() == [4]


def test_saved_trajectories_come_back_to_the_bit(tmp_path):
    buffer, restored = GroupRolloutBuffer(Trajectory), GroupRolloutBuffer(Trajectory)
    buffer.fill(trajectory(latents=torch.randn(8, 4, 2, 3, 3)), round=3)
    torch.save(buffer.state_dict(), tmp_path / "buffer.pt")
    restored.load_state_dict(torch.load(tmp_path / "buffer.pt", weights_only=True))
    assert isinstance(restored.record, Trajectory)
    assert same(restored.record, buffer.record)


def test_what_the_model_reads_of_a_trajectory_moves():
    moved = trajectory().to("meta")
    assert {name: getattr(moved, name).device.type for name in ("x0", "latents", "log_probs", "steps")} == {
        **dict.fromkeys(("x0", "latents", "log_probs"), "meta"),
        "steps": "cpu",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": torch.zeros(7, 4, 2, 3, 3)}, "lengths are .*'latents': 7"),
        ({"log_probs": torch.zeros(8, 4)}, r"4 latents has 3 steps, but the shapes are .*'log_probs': \(8, 4\)"),
        ({"steps": torch.zeros(8)}, r"3 steps, but the shapes are .*'steps': \(8,\)"),
    ],
)
def test_bad_trajectories(changes, message):
    with pytest.raises(ValueError, match=message):
        trajectory(**changes)


# -- preferences


def test_a_part_of_preferences_keeps_what_its_images_are_preferred_to(tmp_path):
    whole = rollout(Preferences, preferences=torch.arange(24.0).view(8, 3))
    part = whole.part(1, 4)
    assert isinstance(part, Preferences)
    assert part.preferences.tolist() == [[6, 7, 8], [9, 10, 11]]
    assert part.number_in_group.tolist() == [0, 1]  # of the whole group
    torch.save(whole.state_dict(), tmp_path / "record.pt")
    restored = Preferences.from_state_dict(torch.load(tmp_path / "record.pt", weights_only=True))
    assert same(restored, whole)
    with pytest.raises(ValueError, match="one row an image"):
        rollout(Preferences, preferences=torch.zeros(7, 3))
    with pytest.raises(TypeError, match="preferences"):
        rollout(Preferences)
