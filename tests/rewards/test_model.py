import ast
import inspect
import pickle
import sys

import pytest
import torch
from PIL import Image
from tiny_checkpoints import picture
from torch import nn

from trl_dgpo.rewards import clip, image_reward, jpeg, model
from trl_dgpo.rewards.model import ModelReward, as_pictures, build, read_checkpoint, renamed
from trl_dgpo.rewards.scoring import RewardScorer


class Eye(nn.Module):
    """Sees mean brightness; notes where it is sent and in which state it is called."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(100_000))
        self.dropout = nn.Dropout(0.5)
        self.sent_to, self.batches, self.states = [], [], []

    def to(self, device, *args, **kwargs):
        self.sent_to.append(str(device))
        return super().to(device, *args, **kwargs)

    def forward(self, pictures):
        self.batches.append(len(pictures))
        self.states.append((torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), self.training))
        means = torch.tensor([torch.tensor(list(image.tobytes())).float().mean() for image in pictures])
        return means * self.weight[0]


class Brightness(ModelReward):
    __name__ = "brightness"
    loads = 0

    def _load(self):
        self.loads += 1
        return Eye()

    def _score(self, model, pictures, prompts, columns):
        assert all(image.mode == "RGB" for image in pictures)
        return torch.cat([model(batch) for batch in self._batches(pictures)]).tolist()


PICTURES = [picture(12, 8, seed) for seed in range(5)]
PROMPTS = list("abcde")


def brightness(image):
    return torch.tensor(list(image.tobytes())).float().mean().item()


# -- the base


def test_it_loads_once_at_the_first_call():
    reward = Brightness()
    assert reward._model is None
    for _ in range(2):
        assert reward(PROMPTS, PICTURES) == pytest.approx([brightness(image) for image in PICTURES])
    assert reward.loads == 1


def test_the_model_is_frozen_and_runs_outside_autocast():
    reward = Brightness(batch_size=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reward(PROMPTS, PICTURES)
    eye = reward._model
    assert eye.states == [(True, False, False)] * 3
    assert eye.batches == [2, 2, 1]
    assert not any(parameter.requires_grad for parameter in eye.parameters())


def test_where_the_model_is():
    kept, offloaded = Brightness(device="cpu:0"), Brightness(device="cpu:0", offload=True)
    for reward in (kept, offloaded):
        reward(PROMPTS, PICTURES)
        reward(PROMPTS, PICTURES)
    assert kept._model.sent_to == ["cpu:0", "cpu:0"]
    assert offloaded._model.sent_to == ["cpu:0", "cpu"] * 2


def test_it_is_offloaded_after_a_failure_too():
    class Broken(Brightness):
        def _score(self, *args):
            raise RuntimeError("broken")

    reward = Broken(device="cpu:0", offload=True)
    with pytest.raises(RuntimeError, match="broken"):
        reward(PROMPTS, PICTURES)
    assert reward._model.sent_to == ["cpu:0", "cpu"]


def test_a_model_that_cannot_be_loaded_is_no_images_fault():
    class Broken(Brightness):
        def _load(self):
            super()._load()
            raise OSError("no such file")

    reward = Broken()
    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="The model of reward `brightness` cannot be loaded: no such file"):
        RewardScorer(reward)(images, ["a", "b", "c"], {})
    assert reward.loads == 1  # not once more for every image


def test_weights_do_not_travel():
    reward = Brightness(batch_size=3, dtype=torch.bfloat16)
    reward(PROMPTS, PICTURES)
    data = pickle.dumps(reward)
    assert len(data) < 1000
    copy = pickle.loads(data)
    assert (copy._model, copy.batch_size, copy.dtype) == (None, 3, torch.bfloat16)
    assert copy(PROMPTS, PICTURES) == reward(PROMPTS, PICTURES)


def test_both_forms_of_images_score_alike():
    pixels = torch.stack([torch.tensor(list(image.tobytes())).reshape(8, 12, 3) for image in PICTURES])
    tensor = pixels.permute(0, 3, 1, 2).to(torch.uint8)
    assert Brightness()(PROMPTS, tensor) == Brightness()(PROMPTS, PICTURES)
    scores = RewardScorer([Brightness()])(tensor, PROMPTS, {"text": PROMPTS})
    assert scores.by_name["brightness"].tolist() == Brightness()(PROMPTS, PICTURES)


def test_other_modes_become_rgb():
    images = [image.convert(mode) for image, mode in zip(PICTURES, ["RGBA", "L", "P", "CMYK", "RGB"])]
    assert len(Brightness()(PROMPTS, images)) == 5


def test_no_images_no_model():
    reward = Brightness()
    assert reward([], []) == []
    assert reward._model is None


@pytest.mark.parametrize("images", [torch.rand(2, 3, 4, 4), torch.zeros(2, 4, 4, 3, dtype=torch.uint8)])
def test_other_tensors_are_refused(images):
    with pytest.raises(ValueError, match=r"must be uint8 and \(B, 3, H, W\)"):
        as_pictures(images)


def test_bad_arguments():
    with pytest.raises(ValueError, match="`batch_size` is 0"):
        Brightness(batch_size=0)
    with pytest.raises(TypeError):
        Brightness(batchsize=4)
    with pytest.raises(ValueError, match="5 images for 4 prompts"):
        Brightness()(PROMPTS[:4], PICTURES)


@pytest.mark.parametrize("module", [clip, image_reward, jpeg, model])
def test_importing_a_reward_is_cheap(module):
    body = ast.parse(inspect.getsource(module)).body
    names = {
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in body if is_import(node)
    }
    outside = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"clip", "model", "scoring"}
    assert outside <= {"torch", "PIL"}


def is_import(node):
    return isinstance(node, ast.Import | ast.ImportFrom)


# -- checkpoints


class Trap:
    """Something in a file that acts when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_read_checkpoint_from_a_file_or_its_folder(tmp_path):
    torch.save({"weight": torch.arange(3)}, tmp_path / "named.pt")
    for source in (tmp_path, tmp_path / "named.pt"):
        assert read_checkpoint(str(source), "named.pt")["weight"].tolist() == [0, 1, 2]


def test_nothing_in_a_checkpoint_is_run(tmp_path):
    torch.save({"weight": torch.arange(3), "trap": Trap(str(tmp_path / "sprung"))}, tmp_path / "trap.pt")
    with pytest.raises(ValueError, match="not a file of tensors alone"):
        read_checkpoint(str(tmp_path / "trap.pt"), "trap.pt")
    assert not (tmp_path / "sprung").exists()
    torch.load(tmp_path / "trap.pt", weights_only=False)
    assert (tmp_path / "sprung").exists()  # so the trap is one


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no .named\.pt."):
        read_checkpoint(str(tmp_path), "named.pt")
    torch.save(torch.zeros(2), tmp_path / "named.pt")
    with pytest.raises(ValueError, match="holds a Tensor; it must hold a dict"):
        read_checkpoint(str(tmp_path), "named.pt")


def test_a_checkpoint_that_is_not_there_is_looked_for_on_the_hub(monkeypatch, tmp_path):
    torch.save({"weight": torch.ones(1)}, tmp_path / "named.pt")
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a: asked.append(a) or str(tmp_path / "named.pt"))
    assert read_checkpoint("someone/something", "named.pt").keys() == {"weight"}
    assert asked == [("someone/something", "named.pt")]


def test_build_takes_the_weights_and_no_others():
    weights = {"weight": torch.full((2, 3), 0.5, dtype=torch.float16), "bias": torch.ones(2)}
    layer = build(lambda: nn.Linear(3, 2), weights, "here")
    assert {name: tensor.tolist() for name, tensor in layer.state_dict().items()} == {
        "weight": [[0.5] * 3] * 2,
        "bias": [1.0] * 2,
    }
    assert {tensor.dtype for tensor in layer.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"weight": torch.ones(2, 3)}, 'Missing key.*"bias"'),
        ({"weight": torch.ones(2, 3), "bias": torch.ones(2), "more": torch.ones(1)}, 'Unexpected key.*"more"'),
        ({"weight": torch.ones(2, 4), "bias": torch.ones(2)}, "size mismatch for weight"),
    ],
)
def test_build_names_what_does_not_fit(weights, message):
    with pytest.raises(ValueError, match=f"(?s)weights in 'here' are not those.*{message}"):
        build(lambda: nn.Linear(3, 2), weights, "here")


def test_renamed():
    beginnings = {"a.b.": "x.", "a.": "y.", "x.": "z."}
    assert renamed("a.b.c", beginnings, {}) == "x.c"
    assert renamed("a.c.c2", beginnings, {".c.": ".d."}) == "y.d.c2"
    assert renamed("other.c.a.b.", beginnings, {}) == "other.c.a.b."


def test_pictures_are_images():
    assert all(isinstance(image, Image.Image) for image in as_pictures(torch.zeros(2, 3, 4, 4, dtype=torch.uint8)))
