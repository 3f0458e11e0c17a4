import os
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig, PeftModel
from torch import nn
from torch.distributed.fsdp import fully_shard

from trl_dgpo.policy import Adapter, Policy, ema_decay, lora_config, old_decay


VIEWS = ("base", "reference", "old", "ema")
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
KINDS = ["lora", "full"]


def transformer(seed=0) -> SD3Transformer2DModel:
    torch.manual_seed(seed)
    return SD3Transformer2DModel(
        sample_size=4, pos_embed_max_size=4, patch_size=2, in_channels=2, out_channels=2, num_layers=2,
        attention_head_dim=4, num_attention_heads=2, caption_projection_dim=8, joint_attention_dim=6,
        pooled_projection_dim=6,
    )  # fmt: skip


def lora(**changes) -> LoraConfig:
    return LoraConfig(
        **{"r": 2, "lora_alpha": 4, "init_lora_weights": "gaussian", "target_modules": TARGETS} | changes
    )


def make(kind, views=VIEWS, seed=0, moved=True) -> Policy:
    """Policy whose weights and views, where `moved`, are all different, the base apart."""
    policy = Policy(transformer(seed), lora() if kind == "lora" else None, views)
    if moved:
        random = torch.Generator().manual_seed(seed + 100)
        for view in (None, *policy.views):
            if view != "base":
                randomise(policy.tensors(view), random)
    return policy


def randomise(tensors, random):
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=random).to(tensor.dtype))


def run(model, dtype=torch.float32):
    random = torch.Generator().manual_seed(1)
    inputs = [torch.randn(shape, generator=random).to(dtype) for shape in ((2, 2, 4, 4), (2, 3, 6), (2, 6))]
    return model(inputs[0], inputs[1], inputs[2], timestep=torch.tensor([500.0, 900.0]), return_dict=False)[0]


@torch.no_grad()
def output(policy, *views):
    with ExitStack() as stack:
        for view in views:
            stack.enter_context(getattr(policy, view)())
        return run(policy.model)


def close(actual, expected):
    # To rounding: torch.matmul goes another way for a weight that requires a gradient, also where none is taken, and a
    # view's weights never do.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def state(policy):
    """All that a view may not leave changed: bits, storage and flags of every weight."""
    named = policy.model.named_parameters()
    return {name: (p.detach().clone(), p.data_ptr(), p.requires_grad, p.grad is None) for name, p in named}


@contextmanager
def untouched(policy):
    before = state(policy)
    yield
    after = state(policy)
    assert before.keys() == after.keys()
    for name, (weight, *rest) in before.items():
        assert torch.equal(weight, after[name][0]), name
        assert rest == list(after[name][1:]), name


# -- views


@pytest.mark.parametrize("kind", KINDS)
def test_the_views_are_what_they_are_called(kind):
    policy = make(kind)
    plain = transformer().requires_grad_(kind == "full")
    with torch.no_grad():
        assert torch.equal(output(policy, "base"), run(plain))
        outputs = [output(policy), *(output(policy, view) for view in VIEWS)]
        assert all(not torch.allclose(a, b, atol=1e-3) for i, a in enumerate(outputs) for b in outputs[:i])
        for view in ("old", "ema", "reference"):  # the weights of the view, put into a policy of their own
            other = make(kind, views=())
            for name, tensor in other.tensors().items():
                tensor.copy_(policy.tensors(view)[name])
            close(output(policy, view), output(other))


@pytest.mark.parametrize("kind", KINDS)
def test_before_training_all_views_are_the_base(kind):
    policy, plain = make(kind, moved=False), transformer().requires_grad_(kind == "full")
    assert all(torch.equal(output(policy, *views), run(plain)) for views in [(), *((view,) for view in VIEWS)])
    for view in policy.views:  # also what the output does not show yet: LoRA's A while B is 0
        assert all(torch.equal(tensor, policy.tensors()[name]) for name, tensor in policy.tensors(view).items())


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_reference_view_the_reference_is_the_base(kind):
    policy = make(kind, views=("base",))
    assert torch.equal(output(policy, "reference"), output(policy, "base"))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_view_leaves_no_trace(kind, view):
    policy = make(kind)
    mine = output(policy)
    with untouched(policy):
        output(policy, view)
    with untouched(policy), pytest.raises(RuntimeError, match="should be the same"), getattr(policy, view)():
        run(policy.model, torch.float64)
    assert torch.equal(output(policy), mine)


@pytest.mark.parametrize("outer", VIEWS)
@pytest.mark.parametrize("inner", VIEWS)
@pytest.mark.parametrize("kind", KINDS)
def test_views_nest(kind, inner, outer):
    policy = make(kind)
    alone = {view: output(policy, view) for view in (inner, outer)}
    with untouched(policy):
        with getattr(policy, outer)():
            assert torch.equal(output(policy, inner), alone[inner])
            assert torch.equal(output(policy), alone[outer])
            with pytest.raises(ZeroDivisionError), getattr(policy, inner)():
                raise ZeroDivisionError
            assert torch.equal(output(policy), alone[outer])


@pytest.mark.parametrize("kind", KINDS)
def test_views_between_forward_and_backward_change_no_gradient(kind):
    policy, gradients = make(kind), []
    for visited in ((), VIEWS):
        policy.model.zero_grad()
        loss = run(policy.model).square().mean()
        for view in visited:
            output(policy, view)
        loss.backward()
        gradients.append({name: p.grad for name, p in policy.tensors().items()})
    plain, visited = ({name: g for name, g in grads.items() if g is not None and g.any()} for grads in gradients)
    assert len(plain) >= 2 * 2 * len(TARGETS)
    assert plain.keys() == visited.keys()
    assert all(torch.equal(g, visited[name]) for name, g in plain.items())
    for view in policy.views:
        assert all(tensor.grad is None for tensor in policy.tensors(view).values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_entered_before_autocast_is_seen_by_it(kind):
    # Autocast caches its casts of the weights for as long as its outermost context lasts.
    policy = make(kind)
    outputs = {}
    for view in (None, "old", "base", None):
        with getattr(policy, view)() if view else ExitStack(), torch.autocast("cpu", torch.bfloat16):
            out = run(policy.model)
            assert view not in outputs or torch.equal(outputs[view], out)
            outputs[view] = out
    for view, out in outputs.items():
        torch.testing.assert_close(out.float(), output(policy, *([view] if view else [])), rtol=0.1, atol=0.1)
    assert (outputs[None] - outputs["old"]).abs().max() > 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_views_are_made_only_if_asked_for(kind):
    sizes = []
    for views in ((), ("old",), ("old", "ema", "old")):
        policy = make(kind, views=views, moved=False)
        kept = [policy.tensors(), *(policy.tensors(view) for view in policy.views)]
        sizes.append(len(kept))
        adapters = sum("lora_" in name for name, _ in policy.model.named_parameters())
        assert adapters == (sum(len(tensors) for tensors in kept) if kind == "lora" else 0)
    assert sizes == [1, 2, 3]


@pytest.mark.parametrize(
    "use",
    [
        lambda policy: policy.old(),
        lambda policy: policy.ema(),
        lambda policy: policy.update_old(0),
        lambda policy: policy.refresh_reference(),
        lambda policy: policy.tensors("old"),
        lambda policy: policy.save_pretrained("nowhere", "old"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_view_that_is_not_kept(kind, use, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"is not kept; the views are \(\). Name it in `views`"):
        use(make(kind, views=()))
    if kind == "full":
        with pytest.raises(ValueError, match="'base' is not kept"):
            make(kind, views=()).base()


@pytest.mark.parametrize("kind", KINDS)
def test_the_policy_itself_can_be_entered_within_a_view(kind):
    policy = make(kind)
    mine, old = output(policy), output(policy, "old")
    with untouched(policy), policy.old():
        with policy.using():
            assert torch.equal(output(policy), mine)
        assert torch.equal(output(policy), old)


@pytest.mark.parametrize("kind", KINDS)
def test_handles_stay_those_of_the_living_weights(kind, tmp_path):
    policy = make(kind)
    policy.save(tmp_path)

    def check():
        living = {id(parameter) for parameter in policy.model.parameters()}
        assert all(id(tensor) in living for tensor in policy.tensors().values())
        if kind == "lora":
            assert all(id(tensor) in living for view in policy.views for tensor in policy.tensors(view).values())

    for change in (
        lambda: policy.load(tmp_path),
        lambda: policy.model.to(torch.float64),
        lambda: policy.model.to("meta"),  # puts new parameters in the place of the old ones
    ):
        change()
        check()
    for view in policy.views:  # also a copy has followed
        assert {tensor.device.type for tensor in policy.tensors(view).values()} == {"meta"}


def test_copies_stay_wider_than_weights_that_were_cast():
    policy = make("full")
    policy.model.to(torch.bfloat16)
    with untouched(policy), policy.old(), torch.no_grad():
        assert run(policy.model, torch.bfloat16).dtype == torch.bfloat16
        assert {tensor.dtype for tensor in policy.tensors("old").values()} == {torch.float32}


# -- merged


@torch.no_grad()
def merged_output(policy, view=None):
    with policy.using(view, merged=True):
        return run(policy.model)


def lora_forwards(policy):
    """How often an adapter's own layers are asked, while the list is open."""
    asked = []
    for name, module in policy.model.named_modules():
        if name.endswith(tuple(f"lora_B.{adapter}" for adapter in ("default", *policy.views))):
            module.register_forward_hook(lambda *_, name=name: asked.append(name))
    return asked


@pytest.mark.parametrize("view", [None, *VIEWS])
def test_a_merged_view_is_the_view(view):
    policy = make("lora")
    with untouched(policy):
        torch.testing.assert_close(merged_output(policy, view), output(policy, *([view] if view else [])))
    asked = lora_forwards(policy)
    merged_output(policy, view)
    assert not asked
    output(policy, "old")
    assert asked


def test_a_merged_weight_is_the_sum_in_float32():
    policy = make("lora")
    name, layer = next(iter(policy._views.adapted.items()))
    a, b = (policy.tensors("old")[f"{name}.lora_{x}.default.weight"].detach().double() for x in "AB")
    weight = layer.get_base_layer().weight
    expected = weight.double() + 4 / 2 * b @ a
    with torch.autocast("cpu", torch.bfloat16), policy.using("old", merged=True):
        assert layer.get_base_layer().weight is weight
        torch.testing.assert_close(weight.double(), expected, rtol=0, atol=1e-6)


def test_merged_into_bfloat16_is_rounded_once():
    policy = Policy(transformer().bfloat16(), lora(), ("old",))
    randomise(policy.tensors("old"), torch.Generator().manual_seed(0))
    name, layer = next(iter(policy._views.adapted.items()))
    a, b = (policy.tensors("old")[f"{name}.lora_{x}.default.weight"].detach() for x in "AB")
    expected = (layer.get_base_layer().weight.float() + 2 * b @ a).bfloat16()
    assert policy.can_merge
    assert not policy.merges_exactly
    with untouched(policy):
        with policy.using("old", merged=True):
            assert torch.equal(layer.get_base_layer().weight, expected)


def test_nested_merged_views():
    policy = make("lora")
    alone = {view: output(policy, *([view] if view else [])) for view in (None, "base", "old")}
    merged = {view: merged_output(policy, view) for view in (None, "old")}
    with untouched(policy):
        with policy.using("ema", merged=True), torch.no_grad():
            for view, expected in alone.items():
                with policy.using(view):
                    assert torch.equal(run(policy.model), expected), view
            for view, expected in merged.items():
                assert torch.equal(merged_output(policy, view), expected), view
            with pytest.raises(ZeroDivisionError), policy.using("old", merged=True):
                raise ZeroDivisionError
            assert torch.equal(run(policy.model), merged_output(policy, "ema"))
    with untouched(policy), pytest.raises(ZeroDivisionError), policy.using("old", merged=True):
        raise ZeroDivisionError
    assert torch.equal(output(policy), alone[None])


def test_a_merged_base_that_is_an_adapter():
    start = Policy(transformer(), lora())
    randomise(start.tensors(), torch.Generator().manual_seed(3))
    state = {name: tensor.clone() for name, tensor in start.lora_state_dict().items()}
    policy = Policy(transformer(), lora(), ("base",), Adapter(lora(), state))
    randomise(policy.tensors(), torch.Generator().manual_seed(4))
    asked = lora_forwards(policy)
    with untouched(policy):
        torch.testing.assert_close(merged_output(policy, "base"), output(start))
    assert not asked
    assert (output(policy) - output(start)).abs().max() > 0.01


def test_saved_modules_are_not_switched_off_by_merging():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    policy = Policy(network, LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]), ("old",))
    randomise(policy.tensors("old"), torch.Generator().manual_seed(0))
    x = torch.randn(2, 3)
    with policy.old():
        expected = policy.model(x)
    with policy.using("old", merged=True):
        torch.testing.assert_close(policy.model(x), expected)
    assert not torch.allclose(policy.model(x), expected)


def test_a_step_after_a_merged_rollout_has_the_same_bits():
    gradients = []
    for rollout in (False, True):
        policy = make("lora")
        if rollout:
            merged_output(policy), merged_output(policy, "old")
        loss = run(policy.model).square().mean()
        if rollout:
            merged_output(policy)  # also between forward and backward
        loss.backward()
        gradients.append({name: tensor.grad for name, tensor in policy.tensors().items() if tensor.grad is not None})
    plain, after = gradients
    assert plain.keys() == after.keys()
    assert sum(gradient.any() for gradient in plain.values()) >= 2 * 2 * len(TARGETS)
    assert all(torch.equal(gradient, after[name]) for name, gradient in plain.items())


def test_merged_without_an_adapter_changes_nothing():
    policy = make("full")
    assert not policy.can_merge
    assert not policy.merges_exactly
    with untouched(policy):
        assert torch.equal(merged_output(policy, "old"), output(policy, "old"))


def four_bit():
    return nn.Sequential(pytest.importorskip("bitsandbytes").nn.Linear4bit(64, 64))


@pytest.mark.parametrize(
    ("network", "changes", "reason"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4)), {"use_dora": True}, "not a product of two matrices alone"),
        (
            lambda: nn.Sequential(nn.Linear(4, 4)),
            {"lora_bias": True, "init_lora_weights": True},
            "not a product of two matrices alone",
        ),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 1)), {}, "'base_model.model.0' is a Conv2d on a Conv2d"),
        (four_bit, {}, "the weight of 'base_model.model.0' is a Params4bit"),
    ],
)
def test_what_cannot_be_merged(network, changes, reason):
    policy = Policy(network(), lora(target_modules=["0"], **changes), ("old",))
    assert not policy.can_merge
    assert not policy.merges_exactly
    with pytest.raises(ValueError, match=f"{reason}.*Use the view without `merged`"):
        policy.using("old", merged=True)
    with policy.using("old"):
        pass


def test_compiled_blocks_see_every_switch():
    policy = make("lora")
    assert policy.merges_exactly
    plain = {(view, merged): value for view, merged, value in _every(policy)}
    torch._dynamo.reset()
    for block in policy.transformer.transformer_blocks:
        block.compile(backend="eager")
    for _ in range(2):  # compiled, then from the cache
        for view, merged, value in _every(policy):
            torch.testing.assert_close(value, plain[view, merged], rtol=0, atol=1e-5)
    torch._dynamo.reset()


def _every(policy):
    for view in (None, "old", "base", "ema"):
        yield view, False, output(policy, *([view] if view else []))
        yield view, True, merged_output(policy, view)


# -- movement


def test_decays():
    assert [old_decay(step) for step in (0, 1, 100, 300, 1000)] == pytest.approx([0, 0.001, 0.1, 0.3, 0.3], abs=1e-12)
    assert [ema_decay(step) for step in (0, 8, 71, 1000)] == pytest.approx([0.1, 0.5, 72 / 81, 0.9], abs=1e-12)


@pytest.mark.parametrize(
    ("view", "step", "expected"),
    [
        ("old", 0, 2.0), ("old", 100, 1.9), ("old", 300, 1.7), ("old", 1000, 1.7),
        ("ema", 0, 1.9), ("ema", 8, 1.5), ("ema", 1000, 1.1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_averages_move(kind, view, step, expected):
    policy = make(kind)
    with torch.no_grad():
        for name, value in ((None, 2.0), ("old", 1.0), ("ema", 1.0), ("reference", 1.0)):
            for tensor in policy.tensors(name).values():
                tensor.fill_(value)
    base = output(policy, "base")
    getattr(policy, f"update_{view}")(step)
    for name, value in ((None, 2.0), ("old", 1.0), ("ema", 1.0), ("reference", 1.0)):
        value = expected if name == view else value
        for tensor in policy.tensors(name).values():
            torch.testing.assert_close(tensor.detach(), torch.full_like(tensor, value), rtol=0, atol=1e-6)
    assert torch.equal(output(policy, "base"), base)


@pytest.mark.parametrize("kind", KINDS)
def test_a_refreshed_reference_is_a_copy_that_stays(kind):
    policy = make(kind)
    old, ema, base, mine = output(policy, "old"), output(policy, "ema"), output(policy, "base"), output(policy)
    policy.refresh_reference()
    close(output(policy, "reference"), mine)
    mine = output(policy, "reference")
    randomise(policy.tensors(), torch.Generator().manual_seed(3))
    assert not torch.allclose(output(policy), mine, atol=1e-3)
    for view, expected in (("reference", mine), ("old", old), ("ema", ema), ("base", base)):
        assert torch.equal(output(policy, view), expected)


def test_step_zero_of_old_is_an_exact_copy():
    policy = make("lora")
    policy.update_old(0)
    assert all(torch.equal(tensor, policy.tensors("old")[name]) for name, tensor in policy.tensors().items())


# -- what trains


def trainable(policy):
    return {name for name, p in policy.model.named_parameters() if p.requires_grad}


def test_only_the_policys_adapter_trains(tmp_path):
    policy = make("lora")
    mine = {name for name, _ in policy.model.named_parameters() if ".default." in name}
    assert len(mine) == 2 * 2 * len(TARGETS)
    assert trainable(policy) == mine
    for view in VIEWS:
        with getattr(policy, view)():
            assert trainable(policy) == mine
    policy.update_old(0), policy.update_ema(0), policy.refresh_reference()
    policy.save(tmp_path)
    policy.load(tmp_path)
    assert trainable(policy) == mine


def test_without_an_adapter_everything_trains():
    network = transformer().requires_grad_(False)
    policy = Policy(network, views=("old",))
    assert policy.model is network
    assert trainable(policy) == {name for name, _ in network.named_parameters()}


def test_a_bfloat16_base_keeps_float32_adapters():
    policy = Policy(transformer().bfloat16(), lora(), views=("old",))
    dtypes = {name: p.dtype for name, p in policy.model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "lora_" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "lora_" not in name} == {torch.bfloat16}
    with policy.old(), torch.no_grad():
        assert run(policy.model, torch.bfloat16).dtype == torch.bfloat16


def test_the_authors_lora():
    config = lora_config(("to_q", "to_k"))
    assert (config.r, config.lora_alpha, config.lora_dropout, config.target_modules) == (
        64,
        128,
        0.0,
        {"to_q", "to_k"},
    )


@pytest.mark.parametrize("name", ["old", "default", "default_old"])
def test_modules_may_have_the_names_of_views(name):
    network = nn.ModuleDict({name: nn.Linear(3, 3), "head": nn.Linear(3, 3)})
    policy = Policy(network, LoraConfig(r=2, target_modules=[name], modules_to_save=["head"]), views=("old",))
    assert len(policy.tensors()) == len(policy.tensors("old")) == 4
    randomise(policy.tensors(), torch.Generator().manual_seed(0))
    assert not any(torch.equal(tensor, policy.tensors("old")[name]) for name, tensor in policy.tensors().items())
    policy.update_old(0)
    assert all(torch.equal(tensor, policy.tensors("old")[name]) for name, tensor in policy.tensors().items())


# -- files


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_policy_comes_back_to_the_bit(kind, tmp_path):
    policy = make(kind)
    policy.save(tmp_path)
    other = make(kind, seed=0)
    randomise(other.tensors(), torch.Generator().manual_seed(9))
    other.load(tmp_path)
    for view in (None, *policy.views):
        mine, theirs = policy.tensors(view), other.tensors(view)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items()), view
    assert all(torch.equal(output(policy, view), output(other, view)) for view in VIEWS)
    assert not list(tmp_path.rglob("*.bin"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_without_a_view(kind, tmp_path):
    make(kind, views=("old",)).save(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"ema.*is missing: this is not a checkpoint with the views"):
        make(kind, views=("ema",)).load(tmp_path)


def test_a_checkpoint_of_another_adapter(tmp_path):
    make("lora", views=()).save(tmp_path)
    other = Policy(transformer(), lora(target_modules=["to_q", "to_k"]))
    with pytest.raises(ValueError, match="8 weights are only there or only here"):
        other.load(tmp_path)


@pytest.mark.parametrize("view", [None, "ema"])
def test_peft_reads_the_adapter(view, tmp_path):
    policy = make("lora")
    policy.save_pretrained(tmp_path / "lora", view)
    loaded = PeftModel.from_pretrained(transformer(), tmp_path / "lora", is_trainable=view is None)
    with torch.no_grad():
        assert torch.equal(run(loaded), output(policy, *([view] if view else [])))


@pytest.mark.parametrize("view", [None, "ema", "base"])
def test_diffusers_reads_the_full_weights(view, tmp_path):
    policy = make("full")
    with untouched(policy):
        policy.save_pretrained(tmp_path / "model", view)
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(run(loaded), output(policy, *([view] if view else [])))


# -- sharded


@pytest.mark.slow
def test_views_of_a_sharded_model(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [*sys.path, environment.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    whole, restored = make("full"), make("full", moved=False)
    move(whole)
    restored.load(tmp_path / "all")
    for view in (None, *whole.views):
        assert all(torch.equal(tensor, restored.tensors(view)[n]) for n, tensor in whole.tensors(view).items()), view
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path / "ema")
    with torch.no_grad():
        assert torch.equal(run(loaded), output(whole, "ema"))


def move(policy):
    policy.update_old(300), policy.update_ema(3), policy.refresh_reference()


def sharded(directory: Path) -> None:
    """One of two processes: all that a view is for, on a model that is sharded after the policy was made."""
    torch.distributed.init_process_group("gloo")
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    whole, policy = make("full"), make("full")
    for block in policy.transformer.transformer_blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(policy.transformer, mesh=mesh)
    assert policy.is_sharded
    assert not whole.is_sharded

    def same(view):
        mine = {name: tensor.detach().full_tensor() for name, tensor in policy.tensors(view).items()}
        assert all(torch.equal(tensor, mine[name]) for name, tensor in whole.tensors(view).items()), view

    def check():
        for views in [(), *((view,) for view in VIEWS), ("old", "ema"), ()]:
            assert torch.equal(output(policy, *views), output(whole, *views)), views
        for view in (None, *VIEWS):
            same(view)

    check()
    with policy.old():
        with policy.using():
            assert torch.equal(output(policy), output(whole))
        assert torch.equal(output(policy), output(whole, "old"))
    gradients = []
    for each in (whole, policy):
        loss = run(each.model).square().mean()
        output(each, "old")
        loss.backward()
        gradients.append({name: tensor.grad for name, tensor in each.tensors().items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name].full_tensor(), gradient, rtol=1e-4, atol=1e-5)
    move(whole), move(policy)
    check()
    first = torch.distributed.get_rank() == 0
    policy.save(directory / "all", write=first)
    policy.save_pretrained(directory / "ema", "ema", write=first)
    torch.distributed.barrier()
    with torch.no_grad():
        for tensor in policy.tensors().values():
            tensor.zero_()
    policy.load(directory / "all")
    check()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sharded(Path(sys.argv[1]))


# -- companions -------------------------------------------------------------------------------------------------------


def accompanied(start=None, moved=True, **changes) -> Policy:
    config = lora(**changes)
    policy = Policy(
        transformer(), config, ("ema", "old", "base"), start, companions=("fake", "surrogate"), old_of="surrogate"
    )
    if moved:
        random = torch.Generator().manual_seed(7)
        for view in (None, *policy.views, *policy.companions):
            randomise(policy.tensors(view), random)
    return policy


def another_lora() -> Adapter:
    policy = make("lora", ())
    return Adapter(policy.peft_config, {name: t.clone() for name, t in policy.lora_state_dict().items()})


@pytest.mark.parametrize("init", ["gaussian", False])
def test_a_companion_starts_at_the_base(init):
    policy = accompanied(another_lora(), moved=False, init_lora_weights=init)
    plain = run(transformer())
    assert policy.kept_views == ("base", "ema", "old", "fake", "surrogate")
    for view in ("base", "fake", "surrogate", "old"):  # the old one is the surrogate's
        with policy.using(view):
            torch.testing.assert_close(run(policy.model), plain, rtol=0, atol=1e-6)
    with policy.ema():
        average = run(policy.model)
    torch.testing.assert_close(average, run(policy.model), rtol=0, atol=1e-6)
    assert (average - plain).abs().max() > 1e-2


def test_without_companions_the_base_has_the_adapter_on():
    policy = Policy(transformer(), lora(), ("base",), another_lora())
    with policy.base():
        before = run(policy.model)
    assert not torch.allclose(before, run(transformer()), atol=1e-3)


def test_a_gradient_is_of_the_one_that_is_on():
    policy = accompanied()
    assert {n.split(".")[-2] for n, p in policy.model.named_parameters() if p.requires_grad} == {
        "default",
        "fake",
        "surrogate",
    }
    for view, name in ((None, "default"), ("fake", "fake"), ("surrogate", "surrogate")):
        policy.model.zero_grad()
        with policy.using(view):
            run(policy.model).square().sum().backward()
        reached = {n for n, p in policy.model.named_parameters() if p.grad is not None}
        assert {n.split(".")[-2] for n in reached} == {name}
        assert len(reached) == len(policy.tensors(view))


def test_the_old_policy_follows_a_companion():
    policy = accompanied()
    old, surrogate = ({n: t.clone() for n, t in policy.tensors(view).items()} for view in ("old", "surrogate"))
    policy.update_old(200)
    for name, tensor in policy.tensors("old").items():
        torch.testing.assert_close(tensor, 0.2 * old[name] + 0.8 * surrogate[name])


def test_companions_are_saved_and_never_exported(tmp_path):
    policy, other = accompanied(), accompanied(moved=False)
    policy.save(tmp_path)
    other.load(tmp_path)
    for view in (None, "ema", "old", "fake", "surrogate"):
        mine, theirs = policy.tensors(view), other.tensors(view)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), view
    names = policy.lora_state_dict("ema").keys()
    assert not any("fake" in name or "surrogate" in name for name in names)
    (tmp_path / "surrogate" / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="surrogate"):
        other.load(tmp_path)


def test_companions_need_an_adapter_to_be_like():
    with pytest.raises(ValueError, match=r"The companions \('fake',\) are adapters, and the whole transformer"):
        Policy(transformer(), None, companions=("fake",))


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "corda"])
def test_a_start_that_changes_the_base_is_refused(kind):
    model = transformer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"`init_lora_weights` is '{kind}', which takes a part of the frozen"):
        Policy(model, lora(init_lora_weights=kind))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
