"""
What the backbones of all families have in common.

A family is a subclass in a file of its own. It says how a prompt is encoded (`_encode_row`), what the denoiser is
called with (`_forward`), what its latents look like (`latent_shape`, `_to_latents`, `_to_vae`), and, mostly through
[`~trl_dgpo.backbones.flow.FlowBackbone`] or [`~trl_dgpo.backbones.ddpm.DDPMBackbone`], how latents are noised and
which schedulers walk back. Everything else is here: encoding once and remembering, moving and offloading, guidance,
the loop over a scheduler's timesteps, slices for the VAE, compiled blocks.

Conventions: latents are in the denoiser's space (scaled and shifted); `sigma` in [0, 1] is the noise level, 1 is
noise; `timestep` = 1000 `sigma` exists only where the denoiser is called. A conditioning is a dict of tensors with one
row a prompt or a latent. Autocast is the caller's business.
"""

import copy
import functools
import hashlib
import json
import math
import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn

from . import to_device


SAMPLERS = ("dpm", "euler", "sde")
SIGMAS = ("dpm", "model")
DECODED_PIXELS = 2**21  # at a time, where `decode_batch_size` does not say
EMBEDDED_GUIDANCE = 3.5  # FluxPipeline's default
ENCODE_CACHE_SIZE = 512  # prompts kept in host memory: 1.7 MB each for SD3.5 with T5 in bfloat16
# Graphs of the blocks' forward, which all blocks share: of three kinds of blocks, with and without gradient, for one
# batch size and then for any, in training and evaluation, with each view of a policy, merged or not. Torch's own limit
# is 8; beyond it everything runs uncompiled.
COMPILED_GRAPHS = 128


class Backbone(ABC):
    r"""
    Encode, sample, decode and predict with one pipeline of diffusers.

    `sample` and `decode` give the bits of the pipeline's own call for the same embeddings, latents and scheduler;
    `scheduler` is the one to put into a plain pipeline for that (`pipe.scheduler = backbone.scheduler`).

    Args:
        pipeline (`diffusers.DiffusionPipeline`):
            A pipeline of the family. It is used in place; VAE and text encoders are frozen, what is trained of the
            denoiser is not decided here.
        sampler (`str`, *optional*, defaults to `"dpm"`):
            `"dpm"`: second-order multistep DPM-Solver++ ([2211.01095](https://huggingface.co/papers/2211.01095)), the
            rollouts of DGPO ([2510.08425](https://huggingface.co/papers/2510.08425)). `"euler"`: Euler's method on the
            same ODE. `"sde"`: the stochastic steps of Flow-GRPO
            ([2505.05470](https://huggingface.co/papers/2505.05470)), for families of flow matching.
        sigmas (`str`, *optional*, defaults to `"dpm"`):
            The grid of levels. `"dpm"`: the DPM-Solver scheduler's, whole timesteps. `"model"`: that of the pipeline's
            own scheduler, which only `"euler"` and `"sde"` can walk.
        image_size (`tuple[int, int]`, *optional*):
            Height and width of the images that are rolled out, for a family whose levels depend on it.
        max_sequence_length (`int`, *optional*, defaults to `128`):
            Tokens of a text encoder of any length, such as T5.
        negative_prompt (`str`, *optional*, defaults to `""`):
            The prompt that guidance leads away from.
        embedded_guidance (`float`, *optional*):
            The guidance that a model with it distilled into its weights (FLUX.1-dev) is told, 3.5 if not given.
        offload_text_encoders (`bool`, *optional*, defaults to `False`):
            Keep the text encoders on the CPU, and on the denoiser's device only while they encode.
        decode_batch_size (`int`, *optional*):
            Latents decoded, or images encoded, at a time, a matter of memory: as many as make two megapixels if not
            given, 8 images of 512 x 512. Kernels may round differently for another batch size.
        vae_tiling (`bool`, *optional*, defaults to `False`):
            Decode images larger than the VAE's own (`sample_size` in its configuration) in overlapping tiles, which
            saves memory and may show in the pictures.

    Attributes:
        denoiser (`torch.nn.Module`):
            The component that is trained: the pipeline's transformer or UNet.
        prompt_embeds (`Mapping[str, dict[str, torch.Tensor]]`, *optional*):
            Rows by prompt that are asked for before the text encoders are, such as those of
            [`~trl_dgpo.prompt_embeds.precompute`].

    Raises:
        `ValueError`: for an unknown `sampler` or `sigmas` or a pair of them that does not go together, for a
            pipeline whose scheduler does not fit, for a `decode_batch_size` below 1, for tiles of a VAE that has none,
            and for an `embedded_guidance` that nothing reads.
    """

    PIPELINE: ClassVar[str]  # the pipeline's class
    DENOISER: ClassVar[str] = "transformer"  # its component that is trained
    ENCODERS: ClassVar[tuple[str, ...]]  # its text encoders
    TOKENIZERS: ClassVar[tuple[str, ...]]
    CONDITIONING: ClassVar[tuple[str, ...]]  # names of a conditioning's tensors
    LORA_TARGETS: ClassVar[tuple[str, ...]]
    LOADING: ClassVar[dict[str, Any]] = {}  # what a named pipeline is loaded with
    LATENTS_DTYPE: ClassVar[torch.dtype | None] = None  # of a rollout's latents; the conditioning's if not given

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        sampler: str = "dpm",
        sigmas: str = "dpm",
        image_size: tuple[int, int] | None = None,
        max_sequence_length: int = 128,
        negative_prompt: str = "",
        embedded_guidance: float | None = None,
        offload_text_encoders: bool = False,
        decode_batch_size: int | None = None,
        vae_tiling: bool = False,
    ):
        if sampler not in SAMPLERS:
            raise ValueError(f"`sampler` is {sampler!r}; it must be one of {', '.join(map(repr, SAMPLERS))}.")
        if sigmas not in SIGMAS:
            raise ValueError(f"`sigmas` is {sigmas!r}; it must be one of {', '.join(map(repr, SIGMAS))}.")
        if decode_batch_size is not None and decode_batch_size < 1:
            raise ValueError(f"`decode_batch_size` is {decode_batch_size}; it must be at least 1, or None.")
        if embedded_guidance is not None and not self._embeds_guidance(pipeline):
            raise ValueError(
                f"`embedded_guidance` is {embedded_guidance}, which only a model that has it distilled into its "
                f"weights reads, such as FLUX.1-dev, and this {type(pipeline).__name__} is none. Leave it out."
            )
        self.pipeline = pipeline
        self.denoiser: nn.Module = getattr(pipeline, self.DENOISER)
        self.vae = pipeline.vae
        self.sampler = sampler
        self.max_sequence_length = max_sequence_length
        self.negative_prompt = negative_prompt
        self.embedded_guidance = EMBEDDED_GUIDANCE if embedded_guidance is None else embedded_guidance
        self.offload_text_encoders = offload_text_encoders
        self.decode_batch_size = decode_batch_size
        self.prompt_embeds: Mapping[str, dict[str, Tensor]] | None = None
        self.shift_factor, self.scheduler = self._walk(sampler, sigmas, image_size)
        encoders = [getattr(pipeline, name) for name in self.ENCODERS]
        self._text_encoders = [encoder for encoder in encoders if encoder is not None]
        for module in (self.vae, *self._text_encoders):
            module.requires_grad_(False).eval()
        if vae_tiling:
            _enable_tiling(self.vae)
        self._encoded: OrderedDict[str, dict[str, Tensor]] = OrderedDict()  # rows on the host, the last used last
        self._negative: tuple[Any, dict[str, Tensor]] = (None, {})  # what it was made of, and its row on the device
        self._grids = functools.lru_cache(maxsize=16)(self._grid)

    # -- what a family says -------------------------------------------------------------------------------------------

    @abstractmethod
    def _walk(self, sampler: str, sigmas: str, image_size: tuple[int, int] | None) -> tuple[float, SchedulerMixin]:
        """The factor by which levels are shifted, and the scheduler that walks them."""

    @abstractmethod
    def _encode_row(self, prompt: str) -> dict[str, Tensor]:
        """A prompt's rows of `CONDITIONING`, by the pipeline's own `encode_prompt`."""

    @abstractmethod
    def _forward(self, model: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        """The denoiser's prediction; `timestep` of shape `(B,)` is 1000 times the level."""

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """
        Shape `(C, h, w)` of the latent of an image.

        Args:
            height (`int`):
                Image height in pixels.
            width (`int`):
                Image width in pixels.

        Raises:
            `ValueError`: if the model draws no such size.
        """

    @abstractmethod
    def noise(self, x0: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
        """Noised latent of this family."""

    @abstractmethod
    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
        """What `predict` should give there."""

    @abstractmethod
    def clean(self, x_t: Tensor, prediction: Tensor, sigma: Tensor | float) -> Tensor:
        """Clean latent that a prediction means."""

    @staticmethod
    def _embeds_guidance(pipeline: DiffusionPipeline) -> bool:
        """Whether the denoiser reads `embedded_guidance`."""
        return False

    def _check_size(self, height: int, width: int, multiple: int, largest: int | None = None) -> None:
        for name, size in (("height", height), ("width", width)):
            if size < multiple or size % multiple or (largest is not None and size > largest):
                limits = "" if largest is None else f" from {multiple} to {largest}"
                raise ValueError(f"`{name}` is {size}; this model takes multiples of {multiple}{limits} pixels.")

    def _timestep(self, sigma: Tensor | float) -> Tensor | float:
        """What the denoiser is told of a level."""
        # float64 until it is multiplied: 0.874 * 1000 is not 874 in float32
        return 1000 * (sigma.double() if isinstance(sigma, Tensor) else sigma)

    def _to_vae(self, latents: Tensor) -> Tensor:
        """What the VAE decodes."""
        return latents / self.vae.config.scaling_factor

    def _to_latents(self, encoded: Tensor) -> Tensor:
        """The inverse of `_to_vae`."""
        return encoded * self.vae.config.scaling_factor

    def _blocks(self) -> Iterator[nn.Module]:
        """The denoiser's repeated blocks, which are compiled."""
        names = self.denoiser._repeated_blocks
        return (module for module in self.denoiser.modules() if type(module).__name__ in names)

    def _steps(self, num_steps: int) -> dict[str, Any]:
        """What the pipeline calls `scheduler.set_timesteps` with, beside the device."""
        return {"num_inference_steps": num_steps}

    def _start(self, latents: Tensor, scheduler: SchedulerMixin) -> Tensor:
        """Standard normal noise as a walk begins with it."""
        return latents

    def _scaled(self, latents: Tensor, timestep: Tensor, scheduler: SchedulerMixin) -> Tensor:
        """Latents of the walk as the denoiser reads them."""
        return latents

    def _encode_negative(self) -> dict[str, Tensor]:
        """The row of the negative prompt, on the device."""
        return self.encode([self.negative_prompt])

    def _describe_embeds(self) -> list:
        """What decides an embedding beside the encoders, the tokenizers and `max_sequence_length`."""
        return []

    # -- what a trainer calls -----------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def place(self, device: torch.device | str) -> None:
        """
        Move denoiser, VAE and text encoders to where they work, or the text encoders to the CPU where they wait.

        Modules that were quantised, dispatched (`device_map`) or offloaded (`pipeline.enable_model_cpu_offload()`)
        stay where they were put.

        Args:
            device (`torch.device` or `str`):
                The device of the denoiser.
        """
        for module in (self.denoiser, self.vae, *self._text_encoders):
            if _is_movable(module):
                waits = self.offload_text_encoders and any(module is encoder for encoder in self._text_encoders)
                module.to("cpu" if waits else device)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """
        Conditioning of prompts, one row each.

        Every distinct prompt is looked for among those encoded last, then in `prompt_embeds`, and only then goes
        through the text encoders: once, alone and outside autocast, so that its row has the same bits whatever the
        order and the company of prompts. It is then kept on the host.

        Args:
            prompts (`list[str]`):
                P prompts, repetitions allowed.

        Returns:
            `dict[str, torch.Tensor]`: the family's `CONDITIONING` with P rows each, on the backbone's device and in
            the text encoders' dtype.
        """
        distinct = list(dict.fromkeys(prompts))
        rows = self._rows(distinct)
        conditioning = {
            name: to_device(torch.stack([row[name] for row in rows]), self.device) for name in self.CONDITIONING
        }
        if len(distinct) == len(prompts):
            return conditioning
        number = {prompt: i for i, prompt in enumerate(distinct)}
        index = to_device(torch.tensor([number[prompt] for prompt in prompts]), self.device)
        return {name: tensor.index_select(0, index) for name, tensor in conditioning.items()}

    def negative(self) -> dict[str, Tensor]:
        """
        Conditioning of the negative prompt, one row: what guidance leads away from, and a dropped prompt becomes.

        It stays on the device, since every guided prediction asks for it.
        """
        if self._negative[0] != (self.negative_prompt, self.device):
            self._negative = (self.negative_prompt, self.device), self._encode_negative()
        return self._negative[1]

    def pipeline_call(self, guidance_scale: float) -> dict[str, Any]:
        """
        Arguments by which a plain pipeline of the family encodes and guides as this backbone does.

        Args:
            guidance_scale (`float`):
                Classifier-free guidance; at most 1 is without.
        """
        arguments = {"guidance_scale": guidance_scale}
        if self.negative_prompt and guidance_scale > 1:
            arguments["negative_prompt"] = self.negative_prompt
        return arguments

    @torch.no_grad()
    def remember(self, prompts: list[str]) -> None:
        """
        Encode what is not known yet, for `encode` to find on the host: where the text encoders are offloaded, one
        journey for all prompts.

        Args:
            prompts (`list[str]`):
                Prompts, at most 512 different ones; of more the first are forgotten again.
        """
        self._rows(list(dict.fromkeys(prompts)))

    def embeds_key(self) -> str:
        """
        What decides the rows of `encode`: two backbones of one key, once they are placed, give the same but for what
        another GPU, or another setting of its kernels, rounds otherwise.

        It is a hash over the text encoders' configurations and weights, the tokenizers, `max_sequence_length`, the
        kind of device and the versions of torch, transformers and diffusers. Of the weights every byte is read, but
        only sums over sixteenths of each tensor are hashed, a second for ten gigabytes: it would not see values that
        change places within such a part.

        Raises:
            `ValueError`: if a text encoder's weights are not in memory.
        """
        described = [
            self.max_sequence_length,
            self._describe_embeds(),
            self.device.type,
            [version(library) for library in ("torch", "transformers", "diffusers")],
        ]
        for tokenizer in (getattr(self.pipeline, name) for name in self.TOKENIZERS):
            described.append(None if tokenizer is None else _describe_tokenizer(tokenizer))
        for encoder in (getattr(self.pipeline, name) for name in self.ENCODERS):
            described.append(None if encoder is None else _describe_encoder(encoder))
        return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()

    def sigmas(self, num_steps: int) -> Tensor:
        """
        Noise levels at which a rollout of `num_steps` steps calls the denoiser, noisiest first.

        They are what the denoiser is told, timestep / 1000, in float64 so that whole timesteps come back exactly: on
        DPM-Solver's grid the timesteps are cut to integers, so its first level is 0.999, not the 0.99967 it steps
        from.

        Returns:
            `torch.Tensor` of shape `(num_steps,)`, float64, on the CPU.
        """
        return self._prepared(num_steps, torch.device("cpu")).timesteps.double() / 1000

    @torch.no_grad()
    def sample(
        self,
        latents: Tensor,
        conditioning: dict[str, Tensor],
        *,
        num_steps: int,
        guidance_scale: float,
        step_noise: Callable[[int], Tensor | None] | None = None,
        noise_level: float = 0.7,
        keep: Callable[[int, Tensor, Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """
        Clean latents from noise, without gradient and with the denoiser in evaluation mode.

        Costs one forward of the denoiser a step, of twice the batch (negative, then positive) where `guidance_scale`
        is above 1. Latents are kept in the dtype that the pipeline keeps them in.

        Args:
            latents (`torch.Tensor` of shape `(B, C, h, w)`):
                Standard normal noise.
            conditioning (`dict[str, torch.Tensor]`):
                One row a latent.
            num_steps (`int`):
                Steps of the sampler.
            guidance_scale (`float`):
                Classifier-free guidance ([2207.12598](https://huggingface.co/papers/2207.12598)); at most 1 is
                without.
            step_noise (`Callable[[int], torch.Tensor]`, *optional*):
                For the `"sde"` sampler alone, see [`~trl_dgpo.backbones.flow.FlowBackbone`].
            noise_level (`float`, *optional*, defaults to `0.7`):
                Strength of that noise.
            keep (`Callable`, *optional*):
                Called after each step, see [`~trl_dgpo.backbones.flow.FlowBackbone`].

        Returns:
            `torch.Tensor` of shape `(B, C, h, w)`.

        Raises:
            `ValueError`: if `step_noise` or `keep` is given in vain, or the conditioning's rows do not match.
        """
        if step_noise is not None:
            raise ValueError(
                f"`step_noise` is given and `sampler` is {self.sampler!r}, which draws nothing; only 'sde' takes it."
            )
        if keep is not None:
            raise ValueError(
                f"`keep` is given and `sampler` is {self.sampler!r}, on {self.PIPELINE}; only steps along one "
                "velocity are shown, those of 'euler' and 'sde' on a pipeline of flow matching."
            )
        # It counts steps and keeps predictions: a fresh one for each call.
        scheduler = copy.deepcopy(self._prepared(num_steps, self.device))
        dtype = self._dtype(conditioning)
        latents = self._start(latents.to(self.device, self.LATENTS_DTYPE or dtype), scheduler)
        conditioning = self._guided(conditioning, len(latents), guidance_scale)
        with _evaluating(self.denoiser):
            for timestep in scheduler.timesteps:
                x_t = self._scaled(latents, timestep, scheduler).to(dtype)
                prediction = self._guided_prediction(self.denoiser, x_t, timestep, conditioning, guidance_scale)
                latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
        return latents.to(self.LATENTS_DTYPE or dtype)

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """
        Images of clean latents: those of the pipeline's PIL output to the bit.

        Runs in the VAE's own dtype and outside autocast, since VAEs lose quality in half precision.

        Args:
            x0 (`torch.Tensor` of shape `(B, C, h, w)`):
                Clean latents.

        Returns:
            `torch.Tensor` of shape `(B, 3, H, W)`, uint8, on the VAE's device.
        """
        batch_size = self._images_at_a_time(x0[0, 0].numel() * self.pipeline.vae_scale_factor**2)
        processor = self.pipeline.image_processor
        images = []
        with torch.autocast(self.vae.device.type, enabled=False):
            for latents in x0.to(self.vae.device, self.vae.dtype).split(batch_size):
                decoded = self.vae.decode(self._to_vae(latents), return_dict=False)[0]
                image = processor.postprocess(decoded, output_type="pt")
                images.append((image.float() * 255).round().to(torch.uint8))
        return torch.cat(images)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """
        Clean latents of images, scaled and shifted as the family's image-to-image pipeline does it.

        The mode of the VAE's distribution, not a draw from it as there: the same picture has the same latent in every
        round. Like `decode` it runs in slices, in the VAE's own dtype and outside autocast.

        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)`):
                uint8.

        Returns:
            `torch.Tensor` of shape `(B, C, h, w)`, in the VAE's dtype, on its device.
        """
        latents = []
        with torch.autocast(self.vae.device.type, enabled=False):
            for part in images.split(self._images_at_a_time(images[0, 0].numel())):
                pixels = part.to(self.vae.device).float() / 255
                pixels = self.pipeline.image_processor.normalize(pixels).to(self.vae.dtype)
                mode = self.vae.encode(pixels).latent_dist.mode()
                latents.append(self._to_latents(mode))
        return torch.cat(latents)

    def predict(
        self,
        x_t: Tensor,
        sigma: Tensor | float,
        conditioning: dict[str, Tensor],
        *,
        model: torch.nn.Module | None = None,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """
        The denoiser's prediction at a noised latent.

        Args:
            x_t (`torch.Tensor` of shape `(B, C, h, w)`):
                Noised latents; cast to the conditioning's dtype, as the pipeline does.
            sigma (`float` or `torch.Tensor` of shape `(B,)`):
                Noise level in [0, 1], of all latents or of each.
            conditioning (`dict[str, torch.Tensor]`):
                One row a latent.
            model (`torch.nn.Module`, *optional*):
                What is called in the denoiser's place, such as its DDP wrapper.
            guidance_scale (`float`, *optional*, defaults to `1.0`):
                Above 1 the guided prediction, for which the negative prompt is encoded and the batch doubled.

        Returns:
            `torch.Tensor` of shape `(B, C, h, w)`, in the dtype of the forward.

        Raises:
            `ValueError`: if the conditioning's rows do not match.
        """
        x_t, timestep = x_t.to(self.device, self._dtype(conditioning)), self._timesteps(sigma, len(x_t))
        conditioning = self._guided(conditioning, len(x_t), guidance_scale)
        return self._guided_prediction(model or self.denoiser, x_t, timestep, conditioning, guidance_scale)

    def predict_sides(
        self, x_t: Tensor, sigma: Tensor | float, conditioning: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """
        What guidance is made of, from one forward of twice the batch.

        Args:
            x_t (`torch.Tensor` of shape `(B, C, h, w)`):
                Noised latents, cast as in `predict`.
            sigma (`float` or `torch.Tensor` of shape `(B,)`):
                Noise level in [0, 1], of all latents or of each.
            conditioning (`dict[str, torch.Tensor]`):
                One row a latent.

        Returns:
            Two `torch.Tensor` of shape `(B, C, h, w)`: the predictions for the negative prompt, and for the
            conditioning.

        Raises:
            `ValueError`: if the conditioning's rows do not match.
        """
        x_t, timestep = x_t.to(self.device, self._dtype(conditioning)), self._timesteps(sigma, len(x_t))
        # any scale above 1 asks for both
        return self._sides(self.denoiser, x_t, timestep, self._guided(conditioning, len(x_t), math.inf))

    def save_lora(self, directory: str | os.PathLike, state_dict: dict[str, Tensor], metadata: dict) -> None:
        """
        Writes a LoRA as `pytorch_lora_weights.safetensors`, which `pipeline.load_lora_weights(directory)` reads.

        Args:
            directory (`str` or `os.PathLike`):
                Folder; made if it is not there.
            state_dict (`dict[str, torch.Tensor]`):
                LoRA tensors as `peft.get_peft_model_state_dict` names them.
            metadata (`dict`):
                `LoraConfig.to_dict()`; without it the loader would not know alpha.
        """
        layers = {name.removeprefix("base_model.model."): tensor.contiguous() for name, tensor in state_dict.items()}
        self.pipeline.save_lora_weights(
            directory,
            **{f"{self.DENOISER}_lora_layers": layers, f"{self.DENOISER}_lora_adapter_metadata": dict(metadata)},
        )

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward: diffusers' name, which `Trainer` does not know."""
        self.denoiser.enable_gradient_checkpointing()

    def compile_blocks(self, backend: str | None = None, mode: str | None = None) -> None:
        """
        Compile the denoiser's blocks in place, each at its first forward.

        Blocks of one kind share their graphs, so that this takes a fraction of the time of compiling the whole
        denoiser. It goes with adapters, with weights that are changed in place, and with gradient checkpointing.

        Args:
            backend (`str`, *optional*):
                Backend of `torch.compile`, inductor if not given.
            mode (`str`, *optional*):
                Mode of `torch.compile`, such as `"max-autotune-no-cudagraphs"`.
        """
        for block in self._blocks():
            block.compile(backend=backend, mode=mode, recompile_limit=COMPILED_GRAPHS)

    # -- within -------------------------------------------------------------------------------------------------------

    def _prepared(self, num_steps: int, device: torch.device) -> SchedulerMixin:
        """The scheduler at the start of its walk, to be copied."""
        return self._grids(self.scheduler, num_steps, device)

    def _grid(self, scheduler: SchedulerMixin, num_steps: int, device: torch.device) -> SchedulerMixin:
        scheduler = copy.deepcopy(scheduler)
        scheduler.set_timesteps(device=device, **self._steps(num_steps))
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)  # or it would look for the first timestep, on the device
        return scheduler

    def _timesteps(self, sigma: Tensor | float, num_latents: int) -> Tensor:
        """A level, or one a latent, as so many latents' forward takes it."""
        timestep = self._timestep(sigma)
        if isinstance(timestep, Tensor):
            return timestep.float().to(self.device).expand(num_latents)
        # filled in on the device: a copy would make the host wait
        return torch.full((num_latents,), timestep, dtype=torch.float32, device=self.device)

    def _dtype(self, conditioning: dict[str, Tensor]) -> torch.dtype:
        """In which the denoiser reads latents."""
        return conditioning[self.CONDITIONING[0]].dtype

    def _images_at_a_time(self, pixels: int) -> int:
        """How many images of so many pixels go through the VAE at once."""
        return self.decode_batch_size or max(1, DECODED_PIXELS // pixels)

    def _rows(self, prompts: list[str]) -> list[dict[str, Tensor]]:
        """Rows of distinct prompts, on the host."""
        rows = {}
        for prompt in prompts:
            if prompt in self._encoded:
                self._encoded.move_to_end(prompt)
                rows[prompt] = self._encoded[prompt]
            elif self.prompt_embeds is not None and prompt in self.prompt_embeds:
                rows[prompt] = self._encoded[prompt] = self.prompt_embeds[prompt]
        if missing := [prompt for prompt in prompts if prompt not in rows]:
            rows |= self._encode(missing)
        while len(self._encoded) > ENCODE_CACHE_SIZE:
            self._encoded.popitem(last=False)
        return [rows[prompt] for prompt in prompts]

    def _encode(self, prompts: list[str]) -> dict[str, dict[str, Tensor]]:
        negative = self.negative_prompt
        known = (prompts, self._encoded, self.prompt_embeds or ())
        if self.offload_text_encoders and not any(negative in rows for rows in known):
            prompts = [*prompts, negative]  # now that the encoders are here
        rows = {}
        with self._encoders_here(), torch.autocast(self.device.type, enabled=False):
            for prompt in prompts:
                _check_prompt(prompt)
                rows[prompt] = {name: row.cpu() for name, row in self._encode_row(prompt).items()}
        self._encoded |= rows
        return rows

    @contextmanager
    def _encoders_here(self) -> Iterator[None]:
        """The text encoders on the device, and where they are offloaded, on the CPU again afterwards."""
        moved = [m for m in self._text_encoders if _is_movable(m)] if self.offload_text_encoders else []
        on_host = [(p, p.data) for module in moved for p in module.parameters()]
        try:
            for module in moved:
                module.to(self.device)
            yield
        finally:
            for parameter, data in on_host:
                parameter.data = data  # it was frozen, so it need not be copied back
            for module in moved:
                module.to("cpu")  # buffers

    def _guided(self, conditioning: dict[str, Tensor], num_latents: int, guidance_scale: float) -> dict[str, Tensor]:
        """The conditioning of a forward: doubled, negative rows first, where there is guidance."""
        for name, rows in conditioning.items():
            if len(rows) != num_latents:
                raise ValueError(
                    f"`conditioning` has {len(rows)} rows of {name} for {num_latents} latents; give one each."
                )
        if guidance_scale <= 1:
            return conditioning
        negative = self.negative()
        return {
            name: torch.cat([negative[name].to(rows.dtype).expand_as(rows), rows])
            for name, rows in conditioning.items()
        }

    def _guided_prediction(
        self,
        model: nn.Module,
        x_t: Tensor,
        timestep: Tensor,
        conditioning: dict[str, Tensor],
        guidance_scale: float,
        precision: torch.dtype | None = None,
    ) -> Tensor:
        """
        One forward; `conditioning` comes from `_guided` with the same `guidance_scale`.

        Guidance and result are in `precision`, or in the forward's own.
        """
        timestep = timestep.expand(len(x_t))
        if guidance_scale <= 1:
            prediction = self._forward(model, x_t, timestep, conditioning)
            return prediction if precision is None else prediction.to(precision)
        negative, positive = self._sides(model, x_t, timestep, conditioning, precision)
        negative = negative.detach()  # as Flow-GRPO's code trains it: the negative side learns nothing by itself
        return negative + guidance_scale * (positive - negative)

    def _sides(
        self,
        model: nn.Module,
        x_t: Tensor,
        timestep: Tensor,
        conditioning: dict[str, Tensor],
        precision: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predictions for the two halves of a conditioning from `_guided`."""
        both = self._forward(model, torch.cat([x_t] * 2), torch.cat([timestep] * 2), conditioning)
        negative, positive = (both if precision is None else both.to(precision)).chunk(2)
        return negative, positive


def _check_prompt(prompt: str) -> None:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"The prompt {prompt!r:.200} has half a character (a lone surrogate) at position {error.start}, which no "
            "tokenizer takes. Leave it out, as `text.encode(errors='ignore').decode()` does."
        ) from None


def _is_movable(module: nn.Module) -> bool:
    """Whether a module is anyone's to move: quantised and dispatched weights know their place."""
    return not (
        getattr(module, "is_quantized", False) or hasattr(module, "hf_device_map") or hasattr(module, "_hf_hook")
    )


def _enable_tiling(vae: nn.Module) -> None:
    try:
        vae.enable_tiling()
    except (AttributeError, NotImplementedError) as error:
        raise ValueError(
            f"`vae_tiling` is True, and the VAE, a {type(vae).__name__}, cannot decode in tiles; leave it False."
        ) from error


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode of every part: `model.training` alone says nothing of adapters that came later."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _describe_tokenizer(tokenizer: Any) -> list:
    described = [tokenizer.model_max_length, tokenizer.padding_side, tokenizer.truncation_side]
    described += [tokenizer.special_tokens_map, getattr(tokenizer, "chat_template", None)]
    if not tokenizer.is_fast:
        return [type(tokenizer).__name__, *described, tokenizer.get_vocab(), tokenizer.init_kwargs]
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # what its last call asked for
    return [*described, {name: part for name, part in backend.items() if name not in ("truncation", "padding")}]


def _describe_encoder(encoder: nn.Module) -> list:
    # Not what says where it was loaded from, or is only set when it is saved.
    told_elsewhere = ("_name_or_path", "architectures", "dtype", "transformers_version")
    config = {name: value for name, value in encoder.config.to_dict().items() if name not in told_elsewhere}
    return [
        type(encoder).__name__,
        config,
        encoder.config._attn_implementation,
        *([name, list(t.shape), str(t.dtype), _checksums(name, t)] for name, t in encoder.state_dict().items()),
    ]


def _checksums(name: str, tensor: Tensor) -> list[int]:
    """Sums over parts of a tensor's bytes, in words of eight where they fit."""
    if tensor.is_meta:
        raise ValueError(
            f"The weights {name!r} of a text encoder are not in memory, so nothing tells what it computes. Load the "
            "pipeline without sequential offloading."
        )
    data = tensor.detach().contiguous().flatten().view(torch.uint8)
    words = data.view(torch.int64) if data.numel() % 8 == 0 else data.long()
    return torch.stack([part.sum() for part in words.chunk(16)]).tolist() if words.numel() else []
