"""The memory plan: counts that are exact, activations as autograd saves them, and what fits."""

import contextlib
import copy
import dataclasses
import json
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel
from peft import get_peft_model
from tiny_models import tiny_random_pipeline
from tiny_trainers import Gradient, tiny_config, tiny_trainer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import CLIPTextConfig, T5Config, TrainerCallback

from trl_dgpo import DGPOConfig, DGPOTrainer, DiffusionDPOTrainer, FlowGRPOTrainer, GPOTrainer, TDMR1Trainer
from trl_dgpo.backbones import load_backbone
from trl_dgpo.backbones.sd3 import SD3Backbone
from trl_dgpo.plan import (
    GIB,
    PHASES,
    ModelSizes,
    backward_bytes,
    decoding_bytes,
    fit,
    forward_bytes,
    plan_memory,
    read_model,
    saved_bytes,
    what_would_fit,
    words,
)
from trl_dgpo.policy import lora_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_random_pipeline(third_text_encoder=True, sd35=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sd35(tmp_path_factory):
    """The published configurations of Stable Diffusion 3.5 Medium: a folder of JSON, without a weight."""
    folder = tmp_path_factory.mktemp("sd35")
    clip = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "vocab_size": 49408, "hidden_act": "gelu"}
    configs = {
        "transformer": {
            "_class_name": "SD3Transformer2DModel",
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "num_attention_heads": 24,
            "attention_head_dim": 64,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384,
            "dual_attention_layers": list(range(13)),
            "qk_norm": "rms_norm",
        },
        "vae": {
            "_class_name": "AutoencoderKL",
            "sample_size": 1024,
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "layers_per_block": 2,
            "latent_channels": 16,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "scaling_factor": 1.5305,
            "shift_factor": 0.0609,
        },
        "text_encoder": CLIPTextConfig(
            **clip | {"hidden_act": "quick_gelu"},
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            projection_dim=768,
        ).to_dict(),
        "text_encoder_2": CLIPTextConfig(
            **clip,
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=20,
            projection_dim=1280,
        ).to_dict(),
        "text_encoder_3": T5Config(
            d_model=4096,
            d_kv=64,
            d_ff=10240,
            num_layers=24,
            num_heads=64,
            vocab_size=32128,
            feed_forward_proj="gated-gelu",
        ).to_dict(),
    }
    index = {
        "_class_name": "StableDiffusion3Pipeline",
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": ["transformers", "T5EncoderModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    for name, config in configs.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def cuda_rules(monkeypatch):
    """Autocast on the CPU leaves layer norms in bfloat16; on CUDA they compute in float32, as is planned."""
    layer_norm = F.layer_norm

    def in_float32(x, *args, **kwargs):
        if not torch.is_autocast_enabled("cpu"):
            return layer_norm(x, *args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return layer_norm(x.float(), *args, **kwargs)

    monkeypatch.setattr(F, "layer_norm", in_float32)


class Live(TorchDispatchMode):
    """Bytes of the tensors that were made and are alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if (key := storage._cdata) not in self.sizes and key not in given:
                self.sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, key)
        self.peak = max(self.peak, self.now)
        return out

    def _free(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def transformer(full=False, half=False, **config):
    config = {"num_layers": 3, "heads": 4, "qk_norm": "rms_norm", "dual": (0, 1), **config}
    width = config["heads"] * 32
    model = SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=config["num_layers"],
        num_attention_heads=config["heads"],
        attention_head_dim=32,
        joint_attention_dim=64,
        caption_projection_dim=width,
        pooled_projection_dim=32,
        pos_embed_max_size=32,
        dual_attention_layers=config["dual"],
        qk_norm=config["qk_norm"],
    )
    if half and not full:
        model.to(torch.bfloat16)
    if not full:
        model.requires_grad_(False)
        get_peft_model(model, lora_config(SD3Backbone.LORA_TARGETS))
    return model.train()


def sizes_of(model):
    """As `read_model` gives them; what activations depend on alone."""
    rank = max((m.r["default"] for m in model.modules() if hasattr(m, "lora_A")), default=0)
    config = dict(model.config)
    return SimpleNamespace(
        transformer=config, rank=rank, width=config["num_attention_heads"] * config["attention_head_dim"]
    )


def predict(model, rows, side, text, half, grad=True):
    dtype = torch.bfloat16 if half else torch.float32
    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if half else contextlib.nullcontext()
    with torch.set_grad_enabled(grad), autocast:
        return model(
            hidden_states=torch.randn(rows, 16, side, side, dtype=dtype),
            encoder_hidden_states=torch.randn(rows, text, 64, dtype=dtype),
            pooled_projections=torch.randn(rows, 32, dtype=dtype),
            timestep=torch.rand(rows) * 1000,
            return_dict=False,
        )[0]


def saved_by_autograd(model, *shape):
    """Bytes that a forward saves, each storage once, without the weights and the copies autocast makes of them."""
    weights = [*model.parameters(), *model.buffers()]
    known = {t.untyped_storage()._cdata for t in weights}
    matrices = {tuple(t.shape) for t in weights} | {tuple(t.shape[::-1]) for t in weights}
    saved = {}

    def pack(tensor):
        if tensor.untyped_storage()._cdata not in known and tuple(tensor.shape) not in matrices:
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        predict(model, *shape)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


# -- activations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("config", "rows", "side", "text"),
    [
        ({}, 3, 16, 20),
        ({"qk_norm": None, "dual": ()}, 2, 24, 9),
        ({"num_layers": 5, "heads": 6, "dual": (0, 1, 2)}, 2, 24, 50),
        ({"num_layers": 4, "heads": 8}, 2, 24, 50),
    ],
)
def test_saved_activations_are_what_autograd_saves(cuda_rules, half, full, config, rows, side, text):
    model = transformer(full, half, **config)
    measured = saved_by_autograd(model, rows, side, text, half)
    planned = rows * saved_bytes(sizes_of(model), (side // 2) ** 2, text, half=half, full=full)
    # The first block and the last save less than is counted, which matters the less the more there are.
    assert planned == pytest.approx(measured, rel=0.12)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("config", "full"), [({}, False), ({"qk_norm": None, "dual": (), "num_layers": 4}, False), ({}, True)]
)
def test_the_peak_of_an_update(cuda_rules, half, checkpointing, config, full):
    rows, side, text = 4, 24, 60
    model = transformer(full, half, **config)
    (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
    for _ in range(2):  # the second finds the gradients there, as all micro-batches but the first
        with Live() as live:
            predict(model, rows, side, text, half).float().square().mean().backward()
    sizes, image = sizes_of(model), (side // 2) ** 2
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    planned = rows * saved_bytes(sizes, image, text, half=half, full=full, checkpointing=checkpointing)
    planned += rows * backward_bytes(sizes, image, text, half=half)
    # The copies that autocast makes: all are kept, or those of the block that is computed anew.
    planned += 2 * trained * half // (model.config.num_layers if checkpointing else 1)
    assert planned == pytest.approx(live.peak, rel=0.12)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    ("config", "side", "text"),
    [
        ({}, 32, 20),
        ({}, 32, 200),
        ({}, 16, 130),
        ({"dual": ()}, 32, 20),
        ({"dual": (0, 1, 2)}, 32, 20),
        ({"qk_norm": None, "dual": ()}, 32, 200),
    ],
)
def test_the_peak_of_a_forward_without_gradient(cuda_rules, half, config, side, text):
    model = transformer(False, half, **config)
    with Live() as live:
        predict(model, 4, side, text, half, grad=False)
    planned = 4 * forward_bytes(sizes_of(model), (side // 2) ** 2, text, half=half)
    planned += 2 * sum(p.numel() for p in model.parameters() if p.requires_grad) * half
    assert planned == pytest.approx(live.peak, rel=0.1)


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("channels", [(32, 64, 128, 128), (16, 16, 32), (8, 32)])
def test_the_peak_of_decoding(channels, tiled):
    vae = AutoencoderKL(
        sample_size=8 * 2 ** (len(channels) - 1),
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    if tiled:
        vae.enable_tiling()
    with Live() as live, torch.no_grad():
        vae.decode(torch.randn(2, 16, 32, 16), return_dict=False)
    sizes = SimpleNamespace(vae=vae.config, vae_scale=2 ** (len(channels) - 1))
    planned = 2 * decoding_bytes(sizes, 32, 16, tiled=tiled)
    assert planned == pytest.approx(live.peak, rel=0.15 if tiled else 0.05)


# -- what is counted exactly ------------------------------------------------------------------------------------------


def parts(model, args):
    """Bytes of each part, of a model or of what was read of it."""
    sizes = model if isinstance(model, ModelSizes) else read_model(model, args)
    return {part.name: part.bytes for part in plan_memory(sizes, args).parts}


def size(tensors):
    return sum(tensor.nbytes for tensor in tensors)


def numbers(module):
    return size(t for t in [*module.parameters(), *module.buffers()] if t.is_floating_point())


@pytest.mark.parametrize("full", [False, True])
def test_every_part_of_a_trainer_is_counted(folder, tmp_path, monkeypatch, full):
    seen = {}

    def keep(trainer, part):
        fixed = fix(trainer, part)
        seen["base's predictions"] = size(fixed.base_predictions)
        seen["noise"] = size(part.noise)
        seen["rollouts of the round"] = size([trainer.buffer.record.x0, *trainer.buffer.record.conditioning.values()])
        return fixed

    fix = DGPOTrainer._fix
    monkeypatch.setattr(DGPOTrainer, "_fix", keep)
    gradient = Gradient()
    config = {"full_finetuning": full, "clip_range": 1e-3, "kl_coef": 0.01, "per_device_train_batch_size": 8}
    trainer = tiny_trainer(tmp_path, model=str(folder), callbacks=[gradient], **config)
    trainer.train()
    state = trainer.optimizer.state.values()
    seen["optimiser's moments"] = size(moments[name] for moments in state for name in ("exp_avg", "exp_avg_sq"))
    seen["gradients"] = size(gradient.value.values())
    seen["trained weights"] = size(trainer.policy.tensors().values())
    seen["views"] = size(t for view in trainer.policy.views for t in trainer.policy.tensors(view).values())
    pipeline = trainer.backbone.pipeline
    seen["VAE"] = numbers(pipeline.vae)
    seen["text encoders"] = sum(
        map(numbers, (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3))
    )
    adapters = seen["trained weights"] + (0 if full else seen["views"])
    seen["transformer's constants" if full else "transformer"] = numbers(pipeline.transformer) - adapters
    if not full:
        seen["merged weights"] = size(trainer.policy._views.weights())
    planned = parts(folder, trainer.args)
    assert {name: planned[name] for name in seen} == seen
    assert planned.keys() - seen.keys() == {
        "forward of a rollout",
        "decoding",
        "forward without gradient",
        "saved activations",
        "backward's own",
    }


@pytest.mark.parametrize(
    ("trainer_class", "config"),
    [
        (DGPOTrainer, {}),
        (DGPOTrainer, {"clip_range": 1e-3, "num_log_images": 2}),
        (DGPOTrainer, {"reference": "old", "save_ema": False}),
        (DGPOTrainer, {"reference": "refreshed", "old_policy_after": 3}),
        (DGPOTrainer, {"full_finetuning": True, "kl_coef": 0.1}),
        (DGPOTrainer, {"full_finetuning": True, "reference": "refreshed"}),
        (GPOTrainer, {}),
        (GPOTrainer, {"loss_type": "logsigmoid", "reference": "frozen", "full_finetuning": True}),
        (FlowGRPOTrainer, {}),
        (FlowGRPOTrainer, {"full_finetuning": True, "kl_coef": 0.1, "old_policy_after": 3}),
        (DiffusionDPOTrainer, {"reference": "refreshed"}),
        (TDMR1Trainer, {"clip_range": 1e-3, "kl_coef": 0.1}),
        (TDMR1Trainer, {"reference": "old"}),
    ],
)
def test_views_are_the_trainers(folder, tmp_path, trainer_class, config):
    trainer = tiny_trainer(tmp_path, trainer_class, model=str(folder), **config)
    kept = size(t for view in trainer.policy.views for t in trainer.policy.tensors(view).values())
    assert parts(folder, trainer.args)["views"] == kept


class Gradients(TrainerCallback):
    def __init__(self):
        self.sizes = set()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.sizes.add(size(p.grad for p in model.parameters() if p.grad is not None))


def test_adapters_that_learn_in_turn_are_all_counted(folder, tmp_path, monkeypatch):
    seen = {}

    def keep(trainer, part):
        directions = directions_of(trainer, part)
        seen["directions"] = size(revision.direction for level in directions for revision in level.values())
        seen["noise"] = size(part.noise)
        return directions

    directions_of = TDMR1Trainer._directions
    monkeypatch.setattr(TDMR1Trainer, "_directions", keep)
    watched = Gradients()
    trainer = tiny_trainer(tmp_path, TDMR1Trainer, model=str(folder), callbacks=[watched], max_steps=3)
    trainer.train()
    record = trainer.buffer.record
    adapters = [trainer.policy.tensors(name).values() for name in (None, *trainer.policy.companions)]
    state = trainer.optimizer.state.values()
    seen["rollouts of the round"] = size([record.x0, record.latents, *record.conditioning.values()])
    seen["trained weights"] = sum(map(size, adapters))
    seen["optimiser's moments"] = size(moments[name] for moments in state for name in ("exp_avg", "exp_avg_sq"))
    (seen["gradients"],) = watched.sizes
    planned = parts(folder, trainer.args)
    assert {name: planned[name] for name in seen} == seen
    started = dataclasses.replace(read_model(folder, trainer.args), goes_on=True)
    assert parts(started, trainer.args)["views"] == planned["views"]  # the base is no adapter there either


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_a_guided_policy_is_trained_with_two_rows_an_image(folder, tmp_path, guidance_scale):
    trainer = tiny_trainer(tmp_path, FlowGRPOTrainer, model=str(folder), sample_guidance_scale=guidance_scale)
    rows = set()
    trainer.backbone.denoiser.proj_out.register_forward_pre_hook(
        lambda module, inputs: rows.add(len(inputs[0])) if torch.is_grad_enabled() else None
    )
    trainer.train()
    plan = plan_memory(read_model(folder, trainer.args), trainer.args)
    formulas = {part.name: part.formula for part in plan.parts}
    assert rows == {4 if guidance_scale == 1 else 8}
    for name in ("saved activations", "backward's own"):
        assert formulas[name].startswith(f"{max(rows)} rows of"), name


def test_half_precision_is_counted_as_it_is_loaded(folder, tmp_path):
    pipeline = load_backbone(folder, dtype=torch.bfloat16).pipeline
    planned = parts(folder, tiny_config(tmp_path, bf16=True))
    assert planned["transformer"] == numbers(pipeline.transformer)
    assert planned["VAE"] == numbers(pipeline.vae)
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3)
    assert planned["text encoders"] == sum(map(numbers, encoders))


def test_a_lora_that_training_goes_on_from_has_a_base_of_its_own(folder, tmp_path):
    config = lora_config(SD3Backbone.LORA_TARGETS)
    config.r, config.base_model_name_or_path = 4, str(folder)
    config.save_pretrained(tmp_path)
    args = tiny_config(tmp_path)
    new, goes_on = (parts(source, args) for source in (folder, tmp_path))
    assert goes_on["trained weights"] * 16 == new["trained weights"]
    assert (goes_on["views"], new["views"]) == (2 * goes_on["trained weights"], new["trained weights"])


def test_a_quantised_layer_is_half_a_byte_and_its_scales():
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(128, 96, bias=False, compress_statistics=False, quant_type="nf4").to("cpu")
    weights = 128 * 96
    assert layer.weight.nbytes + layer.weight.quant_state.absmax.nbytes == weights // 2 + 4 * weights // 64


def test_published_sizes(sd35, tmp_path):
    sizes = read_model(sd35, tiny_config(tmp_path))
    positions = 384**2 * 1536
    assert sizes.weights - positions == 2_243_171_520
    assert sizes.vae_weights == 83_819_683
    assert sizes.text_weights == 123_650_304 + 694_659_840 + 4_762_310_656
    # 191 projections of the joint attention: the last block has no output for the text
    assert (sizes.rank, sizes.trained) == (64, 191 * 2 * 64 * 1536)
    assert sizes.adapted_weights == 191 * 1536**2


def test_a_component_that_is_left_out_is_not_counted(sd35, tmp_path):
    without = tiny_config(tmp_path, model_init_kwargs={"text_encoder_3": None})
    assert read_model(sd35, without).text_weights == 123_650_304 + 694_659_840


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        ("/no/where", {}, "'/no/where' does not exist"),
        ("folder", {"resolution": 36}, "`resolution` is 36; this model takes multiples of 8 from 8 to 64 pixels"),
        ("folder", {"optim": "adafactor"}, "`optim` is 'adafactor', whose memory this plan does not know"),
    ],
)
def test_what_cannot_be_planned(folder, tmp_path, model, config, message):
    args = tiny_config(tmp_path, **config)
    with pytest.raises(ValueError, match=message):
        plan_memory(read_model(folder if model == "folder" else model, args), args)


def test_a_folder_without_a_components_configuration_is_told(sd35, tmp_path):
    (tmp_path / "model_index.json").write_text((sd35 / "model_index.json").read_text())
    with pytest.raises(ValueError, match="has no configuration of its transformer"):
        read_model(tmp_path, tiny_config(tmp_path))


def test_nobody_trains_four_bits(folder, tmp_path):
    args = tiny_config(tmp_path, full_finetuning=True)
    sizes = read_model(folder, args)
    with pytest.raises(ValueError, match="4-bit weights cannot be trained"):
        plan_memory(sizes, args, quantized=True)
    assert not fit(sizes, args, 0.001).changes.get("load_in_4bit")  # nor proposes it


# -- phases and what fits ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(sd35, tmp_path_factory):
    """Sizes of SD3.5-Medium and the defaults on a GPU."""
    args = DGPOConfig(output_dir=str(tmp_path_factory.mktemp("run")), use_cpu=True, bf16=True)
    return read_model(sd35, args), args


def test_a_run_needs_its_largest_phase(published):
    plan = plan_memory(*published)
    assert plan.peak_phase == "encode"  # 10 GiB of text encoders beside the transformer
    counted = sum(part.bytes for part in plan.parts if "encode" in part.phases)
    assert plan.total() == plan.total("encode") == counted + GIB + math.ceil(counted / 10)
    assert all(plan.total(phase) <= plan.total() for phase in PHASES)
    assert plan.total("update") > plan.total("no-grad")


def test_where_each_saving_acts(published):
    sizes, args = published

    def saved(**changes):
        changed = copy.copy(args)
        for name, value in changes.items():
            setattr(changed, name, value)
        before, after = plan_memory(sizes, args), plan_memory(sizes, changed)
        return {phase for phase in PHASES if after.total(phase) < before.total(phase)}

    assert saved(per_device_train_batch_size=4) == {"update"}
    assert saved(sample_batch_size=8) == {"rollout", "no-grad"}
    assert saved(vae_tiling=True) == set()  # the VAE's own size is larger
    assert saved(decode_batch_size=2) == {"decode"}
    assert saved(offload_reference=True) == {"no-grad", "update"}
    assert saved(precompute_prompt_embeds=True) == {"encode"}
    assert saved(optim="adamw_bnb_8bit") == set(PHASES)
    assert saved(sample_guidance_scale=1.0, eval_guidance_scale=1.0) == {"rollout", "no-grad"}
    assert saved(kl_coef=0.0) == {"no-grad", "update"}
    args.offload_text_encoders, before = False, args.offload_text_encoders
    assert saved(offload_text_encoders=True) == set(PHASES) - {"encode"}
    args.offload_text_encoders = before


@pytest.mark.parametrize("vram", [11, 12, 14, 16, 20, 24, 48, 80])
def test_what_fits_is_what_it_takes_and_no_more(published, vram):
    sizes, args = published
    fitted = fit(sizes, args, vram)
    assert fitted.fits == (fitted.plan.total() <= vram * GIB)
    assert fitted.asked.total() == plan_memory(sizes, args).total()
    images = args.prompts_per_round * args.num_generations
    assert images % fitted.plan.args.per_device_train_batch_size == 0
    assert bool(fitted.changes) == (fitted.asked.total() > vram * GIB)
    assert all(getattr(args, name, False) != value for name, value in fitted.changes.items())
    if fitted.fits and fitted.largest["per_device_train_batch_size"] < images:  # the next divisor is too much
        largest = fitted.largest["per_device_train_batch_size"]
        changed = copy.copy(args)
        for name, value in fitted.changes.items():
            setattr(changed, name, value)
        changed.per_device_train_batch_size = next(n for n in range(largest + 1, images + 1) if images % n == 0)
        plan = plan_memory(sizes, changed, quantized=fitted.changes.get("load_in_4bit", False))
        assert plan.total() > vram * GIB


def test_the_cheapest_saving_is_taken_first(published):
    sizes, args = published
    without = dataclasses.replace(sizes, text_weights=0)
    assert fit(without, args, 24).changes == {}
    assert fit(without, args, 13.5).changes == {"decode_batch_size": 7}
    assert fit(without, args, 11).changes.keys() == {"decode_batch_size", "per_device_train_batch_size"}
    tight = fit(without, args, 9).changes
    assert "load_in_4bit" not in tight
    assert tight["sample_batch_size"] < 24
    least = fit(without, args, 5).changes
    assert least["load_in_4bit"]
    assert "precompute_prompt_embeds" not in least  # nothing is gained where the peak is


def test_what_does_not_fit_is_said_with_what_it_would_take(published):
    fitted = fit(*published, 6)
    assert not fitted.fits
    options = {name: value for option in fitted.options for name, value in option.flag.items()}
    assert options.items() <= fitted.changes.items()
    assert f"still needs {fitted.plan.total() / GIB:.2f} GiB" in fitted.verdict()
    with pytest.raises(ValueError, match="`vram` is 0"):
        fit(*published, 0)


def test_an_option_is_listed_with_what_it_saves_where_it_saves_most(published):
    sizes, args = published
    fitted = fit(sizes, args, 16)
    listed = {name: option for option in fitted.options for name in option.flag}
    assert (listed["load_in_4bit"].phase, listed["optim"].phase) == (fitted.asked.peak_phase,) * 2  # all are smaller
    assert (listed["gradient_checkpointing"].phase if "gradient_checkpointing" in listed else "update") == "update"
    assert listed["sample_batch_size"].phase == "rollout"
    smaller = plan_memory(sizes, args, quantized=True).total()
    assert listed["load_in_4bit"].bytes == fitted.asked.total() - smaller
    assert not {"vae_tiling", "merge_adapter", "offload_text_encoders"} & listed.keys()  # nothing to save
    marked = {line.split("--")[1].split()[0] for line in fitted.ladder().splitlines() if "* --" in line}
    assert marked == listed.keys() & fitted.changes.keys()
    assert " 0.00 " not in fitted.ladder()


def test_several_gpus_divide_the_round_and_keep_buckets(published, monkeypatch):
    sizes, args = published
    alone = parts(sizes, args)
    monkeypatch.setattr(DGPOConfig, "world_size", 2)
    shared = parts(sizes, args)
    assert shared["DDP's buckets"] == shared["gradients"] == 4 * sizes.trained
    assert "DDP's buckets" not in alone
    assert shared["rollouts of the round"] * 2 == alone["rollouts of the round"]


def test_tiles_are_for_images_above_the_vaes_own(published):
    sizes = published[0]
    assert decoding_bytes(sizes, 128, 128, tiled=True) == decoding_bytes(sizes, 128, 128)
    assert decoding_bytes(sizes, 128, 256, tiled=True) < decoding_bytes(sizes, 128, 256)


def test_what_is_said_to_a_run_that_ran_out_of_memory(sd35, tmp_path):
    args = DGPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)
    args.bf16 = True  # planned for a GPU
    asked = fit(read_model(sd35, args), args, 16.0)
    assert asked.fits
    assert asked.changes
    needs = f"{asked.asked.total() / GIB:.2f} GiB ({asked.asked.peak_phase})"
    assert what_would_fit(str(sd35), args, 16.0) == (
        f"By `trl-dgpo plan` this run needs {needs} of 16.0 GiB, and fits with {words(asked.changes)}."
    )
    assert "something else is on the GPU" in what_would_fit(str(sd35), args, 999.0)
    assert "no configuration of it fits 1.0 GiB" in what_would_fit(str(sd35), args, 1.0)
    knobs = "What saves memory, the cheapest first: --decode_batch_size 1, --per_device_train_batch_size 12,"
    for model, vram in ((None, 16.0), (str(sd35), None), (str(tmp_path), 16.0)):
        assert what_would_fit(model, args, vram).startswith(knobs)
    assert "There is no plan: " in what_would_fit(str(tmp_path), args, 16.0)
    assert "--load_in_4bit" not in what_would_fit(None, args, None, quantized=True)


def test_a_plan_fits_a_terminals_width(published):
    fitted = fit(*published, 16)
    text = "\n".join(
        [fitted.plan.title(), fitted.plan.formulas(), fitted.plan.table(), fitted.verdict(), fitted.ladder()]
    )
    assert max(map(len, text.replace(published[0].name, "model").splitlines())) <= 100
    assert all(part.name in fitted.plan.table() for part in fitted.plan.parts if part.bytes)
