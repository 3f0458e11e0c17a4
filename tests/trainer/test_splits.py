"""
A group on any split: whatever the micro-batches and processes, the gradient is that of one process with one batch.

One process is this one; the runs on two and four are forked from one other process that has imported everything. All
runs take one optimiser step from weights at which the gates differ and the clip acts, with rewards from
a table and rollouts sampled one by one, so that nothing but the split can differ.
"""

import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch


NAN = float("nan")
REWARDS = ((0.1, 0.9, 0.3, 0.2), (0.0, 1.0, 0.4, 0.7), (0.0, 0.0, 0.0, 1.0), (0.7, 0.2, 0.9, 0.1))
GROUP = len(REWARDS[0])
LEVELS = 2


def table(**groups) -> tuple:
    """The table of rewards with other rows for some groups, by their numbers after a `g`."""
    return tuple(groups.get(f"g{number}", row) for number, row in enumerate(REWARDS))


MASKED, FLAT, UNSCORED = (0.0, 1.0, NAN, 0.7), (0.5,) * GROUP, (None,) * GROUP
# What the loss is made of, with what is added to the defaults of `tiny_trainers` to get it.
CASES = {
    "dgpo": {},
    "gpo": {"method": "GPO"},
    "gpo-logsigmoid": {"method": "GPO", "loss_type": "logsigmoid"},
    "dgpo-logsigmoid": {"loss_type": "logsigmoid", "kl_coef": 0.1},
    "kl": {"kl_coef": 0.1},
    "clip": {"clip_range": 1e-3},
    "masked": {"rewards": table(g1=MASKED)},
    "zero-variance": {"rewards": table(g2=FLAT)},
    "all": {"kl_coef": 0.1, "clip_range": 1e-3, "rewards": table(g1=MASKED, g2=FLAT, g3=UNSCORED)},
}
SCALE = 0.8  # of the LoRA's B
START = {
    "beta": 100.0,
    "max_grad_norm": 0.0,
    "sample_batch_size": 1,
    "sample_num_steps": 1,  # quick: any pictures will do
    "timestep_sampling": "continuous",
}
# Images of a micro-batch, by groups of the step and processes.
SPLITS = {
    # 16 images: a process has whole groups, a micro-batch one image, half a group or a group
    4: {1: (1, 2, GROUP), 2: (1, 2, GROUP), 4: (1, 2, GROUP)},
    # 12 images: a micro-batch of 3 has the end of one group and the start of the next; of two processes, with 6 images
    # each, both have a half of the second group; of four, with 3 images each, every group lies on two
    3: {1: (3,), 2: (3, 6), 4: (1, 3)},
}
# What is run in every split by default; of the others only that of three groups in one process.
QUICK = ("dgpo", "gpo", "dgpo-logsigmoid", "all")
TABLE = [
    pytest.param(
        *(case, groups, processes, batch),
        id=f"{case}-{groups}-groups-on-{processes}-by-{batch}",
        marks=[pytest.mark.slow] if case not in QUICK and (processes > 1 or groups > 3) else [],
    )
    for groups, by_processes in SPLITS.items()
    for processes, batches in by_processes.items()
    for batch in batches
    for case in CASES
]
WHOLE = [  # one batch holds all groups
    pytest.param(case, groups, groups * GROUP, marks=[pytest.mark.slow] if case not in QUICK and groups > 3 else [])
    for case in CASES
    for groups in SPLITS
]
# A round of two passes with two optimiser steps each; three groups a step.
ROUND = {
    "num_iterations": 2,
    "updates_per_round": 2,
    "max_steps": 4,
    "old_policy_after": 1,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "linear",
    "clip_range": 1e-3,
    "kl_coef": 0.1,
    "rewards": table(g1=MASKED, g2=FLAT)[:3] + REWARDS[:3],
}


def is_dgpo(case: str) -> bool:
    return CASES[case].get("method") != "GPO"


def has_gate(case: str) -> bool:
    return is_dgpo(case) or CASES[case].get("loss_type") == "logsigmoid"


# -- the runs ---------------------------------------------------------------------------------------------------------


def by_table(rewards: tuple, config) -> Callable:
    """A reward that knows only where in the round an image stands, whichever process has it."""
    count = config["prompts_per_round"] * len(rewards[0])
    places = torch.arange(count).view(config.get("updates_per_round", 1), int(os.environ.get("WORLD_SIZE", "1")), -1)
    mine = places[:, int(os.environ.get("RANK", "0"))].flatten().tolist()
    values = itertools.cycle(rewards[place // len(rewards[0])][place % len(rewards[0])] for place in mine)

    def at_its_place(images, **kwargs):
        return [next(values) for _ in images]

    return at_its_place


def active_trainer(directory, groups: int, batch: int, *, method="DGPO", rewards=REWARDS, callbacks=None, **config):
    """A trainer with policy, averages and reference all apart from one another, in every split the same."""
    from peft import LoraConfig
    from tiny_trainers import prompt_dataset, scramble, tiny_trainer

    import trl_dgpo

    config = {**START, "prompts_per_round": groups, **config}
    trainer = tiny_trainer(
        directory,
        getattr(trl_dgpo, f"{method}Trainer"),
        per_device_train_batch_size=batch,
        reward_funcs=by_table(rewards, config),
        train_dataset=prompt_dataset("a", "b", "c", "d", "e"),
        callbacks=callbacks,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=["attn.to_q", "attn.to_out.0"]),  # few: quick
        **config,
    )
    for seed, view in enumerate((None, *trainer.policy.views)):
        scramble(trainer, view, seed=seed, scale=SCALE)
    if "reference" in trainer.policy.views:  # the policy at the round's start: too near for the gates to differ
        trainer.policy.refresh_reference = lambda: scramble(trainer, "reference", seed=9, scale=SCALE)
    return trainer


def one_step(
    directory, groups: int, batch: int, fault: Callable | None = None, also: Callable | None = None, **config
):
    """The gradient of one optimiser step, its log, and what an update did for it besides."""
    from tiny_trainers import Gradient

    gradient = Gradient(None if also is None else lambda: also(trainer))
    trainer = active_trainer(directory, groups, batch, callbacks=[gradient], **config)
    gates, forwards, begun = [], [], []
    group_loss, roll_out = trainer._group_loss, trainer._roll_out

    def watch_gates(*args, **kwargs):
        group = group_loss(*args, **kwargs)
        gates.append(group.gate.tolist())
        return group

    def watch_rollouts(*args):
        roll_out(*args)
        begun.append(True)  # what comes now belongs to the update

    trainer._group_loss, trainer._roll_out = watch_gates, watch_rollouts
    trainer.backbone.denoiser.proj_out.register_forward_pre_hook(
        lambda module, inputs: forwards.append((len(inputs[0]), torch.is_grad_enabled())) if begun else None
    )
    if fault is not None:
        fault(trainer)
    with counted_collectives(during=lambda: begun and gradient.value is None) as collectives:
        trainer.train()
    return {
        "gradient": gradient.value,
        "log": trainer.state.log_history[0],
        "gates": gates,
        "forwards": forwards,
        "collectives": collectives,
    }


@contextmanager
def counted_collectives(during: Callable):
    """Names and sizes of what is called in `torch.distributed`; DDP calls its own from C++."""
    calls, honest = [], {}

    def watched(name):
        def call(*args, **kwargs):
            if during():
                calls.append((name, args[0].numel() if args and isinstance(args[0], torch.Tensor) else 0))
            return honest[name](*args, **kwargs)

        return call

    names = ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast", "barrier")
    names += ("broadcast_object_list", "reduce", "reduce_scatter_tensor", "gather", "scatter", "all_to_all")
    for name in names:
        honest[name] = getattr(torch.distributed, name)
        setattr(torch.distributed, name, watched(name))
    try:
        yield calls
    finally:
        for name, function in honest.items():
            setattr(torch.distributed, name, function)


def no_reduction(trainer):
    """A planted fault: each process has the gates of its own part."""
    trainer.accelerator.reduce = lambda tensor, *args, **kwargs: tensor


def whole_round(directory, batch: int) -> dict:
    """Weights of the policy and its averages after a whole round."""
    from tiny_trainers import weights

    trainer = active_trainer(directory, 6, batch, **ROUND)
    trainer.train()
    return {view or "policy": weights(trainer, view) for view in (None, "old", "ema")}


def interrupted(directory, groups: int, batch: int) -> list[bool]:
    """Whether runs that go on from within a round of cut groups end as if they had never stopped."""
    from tiny_trainers import everything, same

    updates = 1 if groups % 2 else 2  # an optimiser step has whole groups
    config = {**ROUND, "rewards": ROUND["rewards"][:groups], "updates_per_round": updates, "max_steps": 2 * updates}
    trainer = active_trainer(directory, groups, batch, save_strategy="steps", save_steps=1, **config)
    trainer.train()
    expected, equal = everything(trainer), []
    for step in {1, 2 * updates - 1}:
        again = active_trainer(directory / "again", groups, batch, **config)
        again.train(resume_from_checkpoint=str(directory / f"checkpoint-{step}"))
        equal.append(same(everything(again), expected))
    return equal


def on_several_processes(directory: Path, processes: int, cases: list[str]) -> dict:
    """What one of several processes finds."""
    found = {
        f"{case} {groups} {batch}": one_step(directory, groups, batch, **CASES[case])
        for groups, by_processes in SPLITS.items()
        for batch in by_processes[processes]
        for case in cases
    }
    if processes == 2:
        found["no reduction"] = one_step(directory, 3, 6, fault=no_reduction)
        found["round"] = whole_round(directory, 2)
        found["interrupted"] = interrupted(directory / "interrupted", 3, 3)
    if processes == 4:
        found["one group"] = one_step(directory, 1, 1, **CASES["all"])
    return found


def fork(directory: Path, processes: int, cases: list[str]) -> None:
    """Run on several processes and wait for them; each leaves what it found in a file."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
                found = on_several_processes(directory / str(processes), processes, cases)
                torch.save(found, directory / f"{processes}.{rank}.pt")
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        raise RuntimeError(f"{processes} processes ended with {codes}.")


@pytest.fixture(scope="module")
def others(request, tmp_path_factory):
    """The process that forks, while this one goes on; asked for a number of processes, what each of them found."""
    directory = tmp_path_factory.mktemp("processes")
    cases = QUICK if "not slow" in request.config.option.markexpr else CASES
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [*sys.path, environment.get("PYTHONPATH")]))
    with open(directory / "log", "w") as log:
        command = [sys.executable, __file__, str(directory), *cases]
        child = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    found = {}

    def get(processes: int) -> list[dict]:
        if not found:
            assert child.wait(timeout=600) == 0, (directory / "log").read_text()[-4000:]
            for number in (2, 4):
                files = [directory / f"{number}.{rank}.pt" for rank in range(number)]
                found[number] = [torch.load(file, weights_only=True) for file in files]
        return found[processes]

    yield get
    child.kill()
    child.wait()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, others):
    """One optimiser step of each kind in this process, made when first asked for, or on others."""
    directory, found = tmp_path_factory.mktemp("one"), {}

    def get(case: str, groups: int, batch: int, processes: int = 1) -> list[dict]:
        key = f"{case} {groups} {batch}"
        if processes > 1:
            return [rank[key] for rank in others(processes)]
        if key not in found:
            hand = {}
            is_whole = batch == groups * GROUP
            also = (lambda trainer: hand.update(by_hand(trainer))) if is_whole and is_dgpo(case) else None
            found[key] = {**one_step(directory, groups, batch, also=also, **CASES[case]), "hand": hand}
        return [found[key]]

    return get


def by_hand(trainer) -> dict:
    import test_dgpo_trainer  # its formula knows nothing of splits

    return test_dgpo_trainer.by_hand(trainer)


# -- one process, one batch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "groups", "batch"), WHOLE)
def test_the_comparison_starts_where_things_act(runs, case, groups, batch):
    [run] = runs(case, groups, batch)
    assert len(run["gates"]) == LEVELS
    if has_gate(case):
        # A group without preference has exactly one half.
        learned = [[gate for gate in gates if gate != 0.5] for gates in run["gates"]]
        assert all(max(gates) - min(gates) >= 0.2 for gates in learned)
    if CASES[case].get("clip_range"):
        assert 0.2 <= run["log"]["clip_ratio"] <= 0.8
    if CASES[case].get("kl_coef"):
        assert run["log"]["kl"] > 0


@pytest.mark.parametrize(("case", "groups", "batch"), [row for row in WHOLE if is_dgpo(row.values[0])])
def test_one_batch_has_the_gradient_of_the_definition(runs, case, groups, batch):
    from tiny_trainers import relative_error

    [run] = runs(case, groups, batch)
    assert relative_error(run["gradient"], run["hand"]["gradient"]) < 1e-5


# -- every split ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "groups", "processes", "batch"), TABLE)
def test_every_split_has_the_gradient_of_one_batch(runs, case, groups, processes, batch):
    from tiny_trainers import relative_error

    [whole] = runs(case, groups, groups * GROUP)
    for rank in runs(case, groups, batch, processes):
        assert relative_error(rank["gradient"], whole["gradient"]) < 1e-5
        assert rank["log"]["reward"] == pytest.approx(whole["log"]["reward"], rel=1e-6)
        assert rank["log"]["frac_reward_zero_std"] == whole["log"]["frac_reward_zero_std"]


def test_a_group_of_one_image_a_process(tmp_path, others):
    from tiny_trainers import relative_error

    whole = one_step(tmp_path, 1, GROUP, **CASES["all"])
    for rank in others(4):
        assert relative_error(rank["one group"]["gradient"], whole["gradient"]) < 1e-5


@pytest.mark.parametrize(("case", "groups", "processes", "batch"), TABLE)
def test_every_split_logs_the_same(runs, case, groups, processes, batch):
    [whole] = runs(case, groups, groups * GROUP)
    for rank in runs(case, groups, batch, processes):
        assert rank["log"].keys() == whole["log"].keys()
        for name in {"loss", "grad_norm", "objective", "kl", "gate_mean", "clip_ratio"} & whole["log"].keys():
            assert rank["log"][name] == pytest.approx(whole["log"][name], rel=1e-4, abs=1e-7), name


@pytest.mark.parametrize(("case", "groups", "processes", "batch"), TABLE)
def test_processes_talk_once_where_a_group_is_on_several(runs, case, groups, processes, batch):
    is_shared = groups * GROUP // processes % GROUP != 0
    for rank in runs(case, groups, batch, processes):
        if is_shared and has_gate(case):
            [(name, numbers)] = rank["collectives"]
            assert name == "all_reduce"
            assert numbers <= (LEVELS + 1) * groups
        else:
            assert rank["collectives"] == []


FORWARDS = {"dgpo": 1, "gpo": 0, "gpo-logsigmoid": 1, "dgpo-logsigmoid": 1, "kl": 1, "clip": 2}


@pytest.mark.parametrize(
    ("case", "groups", "processes", "batch"),
    [row for row in TABLE if row.values[0] in FORWARDS],
)
def test_a_cut_group_costs_one_more_forward_if_there_is_a_gate(runs, case, groups, processes, batch):
    images = groups * GROUP // processes
    is_cut = batch % GROUP != 0
    for rank in runs(case, groups, batch, processes):
        learning = [rows for rows, with_graph in rank["forwards"] if with_graph]
        fixed = [rows for rows, with_graph in rank["forwards"] if not with_graph]
        assert learning == [batch] * (images // batch * LEVELS)
        assert fixed == learning * (FORWARDS[case] + (is_cut and has_gate(case)))


# -- several optimiser steps ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def round_of_whole_batches(tmp_path_factory):
    return whole_round(tmp_path_factory.mktemp("round"), 3 * GROUP)


def test_a_round_of_several_steps_ends_alike_in_every_split(tmp_path, others, round_of_whole_batches):
    from tiny_trainers import relative_error

    ends = [whole_round(tmp_path, 1), *(rank["round"] for rank in others(2))]
    for end in ends:
        for view, expected in round_of_whole_batches.items():
            assert relative_error(end[view], expected) < 1e-5, view


def test_that_round_moves_every_view(tmp_path, round_of_whole_batches):
    from tiny_trainers import relative_error, weights

    trainer = active_trainer(tmp_path, 6, 3 * GROUP, **ROUND)
    for view, end in round_of_whole_batches.items():
        assert relative_error(end, weights(trainer, None if view == "policy" else view)) > 1e-3


# -- going on ---------------------------------------------------------------------------------------------------------


def test_a_round_of_cut_groups_is_resumed_to_the_bit(tmp_path):
    assert interrupted(tmp_path, 2, 1) == [True, True]


def test_a_round_of_shared_groups_is_resumed_to_the_bit(others):
    assert [rank["interrupted"] for rank in others(2)] == [[True]] * 2


# -- that the comparison finds faults ---------------------------------------------------------------------------------


def own_gate(trainer):
    """The gate of the micro-batch's part alone."""
    honest = trainer._group_loss
    trainer._group_loss = lambda *args, scores, **kwargs: honest(*args, scores=None, **kwargs)


def fixed_gate(trainer):
    honest = trainer._group_loss
    trainer._group_loss = lambda *args, scores, **kwargs: honest(*args, scores=torch.zeros_like(scores), **kwargs)


def changed_batches(change: Callable) -> Callable:
    def fault(trainer):
        honest = trainer._micro_batches
        trainer._micro_batches = lambda part: [change(batch) for batch in honest(part)]

    return fault


def noise_of_micro_batch(trainer):
    honest = trainer._predict

    def fault(part, rows, level, **how):
        stream = torch.Generator().manual_seed(int(torch.arange(len(part.group_index))[rows][0]))
        noise = [torch.randn(table.shape, generator=stream) for table in part.noise]
        return honest(replace(part, noise=noise), rows, level, **how)

    trainer._predict = fault


def size_of_part(batch):
    sizes = torch.bincount(batch.group_index, minlength=batch.sizes["num_groups"])
    return replace(batch, sizes={**batch.sizes, "group_sizes": sizes})


def share_of_own_groups(batch):
    """The mean over the groups of the micro-batch, as if no other had any of them."""
    return replace(batch, share=1.0)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(own_gate, id="own-gate"),
        pytest.param(fixed_gate, id="fixed-gate"),
        pytest.param(noise_of_micro_batch, id="noise-of-micro-batch"),
        pytest.param(changed_batches(size_of_part), id="size-of-part"),
        pytest.param(changed_batches(share_of_own_groups), id="share-of-own-groups"),
    ],
)
def test_that_comparison_finds_planted_faults(tmp_path, runs, fault):
    from tiny_trainers import relative_error

    [whole], [honest] = runs("dgpo", 3, 3 * GROUP), runs("dgpo", 3, 3)
    assert relative_error(honest["gradient"], whole["gradient"]) < 1e-5
    assert relative_error(one_step(tmp_path, 3, 3, fault=fault)["gradient"], whole["gradient"]) > 1e-2


def test_that_comparison_finds_a_gate_of_one_process(runs, others):
    from tiny_trainers import relative_error

    [whole] = runs("dgpo", 3, 3 * GROUP)
    for rank in others(2):
        assert relative_error(rank["no reduction"]["gradient"], whole["gradient"]) > 1e-2


# -- numbers that do not divide ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("processes", "config", "message"),
    [
        (4, {"prompts_per_round": 1, "num_generations": 6}, r"has 6 images .*4 processes.*prompts_per_round=2`"),
        (4, {"prompts_per_round": 3, "num_generations": 6}, r"has 18 images .*prompts_per_round=2 or 4`.* 3 proc"),
        (3, {"prompts_per_round": 4, "num_generations": 4}, r"has 16 images .*prompts_per_round=3 or 6`.* 2 proc"),
        (1, {"prompts_per_round": 3, "per_device_train_batch_size": 5}, r"\(5\) must divide .*\(12: .*Use 4 or 6\."),
        (2, {"prompts_per_round": 3, "per_device_train_batch_size": 4}, r"\(4\) must divide .*\(6: .*Use 3 or 6\."),
        (4, {"prompts_per_round": 3, "per_device_train_batch_size": 4}, r"\(4\) must divide .*\(3: .*Use 3\."),
    ],
)
def test_numbers_that_do_not_divide_are_told_with_the_nearest_that_do(
    tmp_path, monkeypatch, processes, config, message
):
    from tiny_trainers import tiny_config

    from trl_dgpo import DGPOConfig

    monkeypatch.setattr(DGPOConfig, "world_size", processes)
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, **config)


if __name__ == "__main__":
    import gc

    import tiny_trainers  # noqa: F401
    import trl  # noqa: F401

    gc.freeze()
    torch.set_num_threads(1)
    for number in (2, 4):
        fork(Path(sys.argv[1]), number, sys.argv[2:])
