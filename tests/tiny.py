"""Pipelines of diffusers with tiny random weights, built without any download, for the tests of `piadm.diffusers`."""

from __future__ import annotations

import copy
import inspect
from functools import cache
from typing import Any

import diffusers
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

WORDS = ["a", "the", "red", "blue", "cat", "dog", "boat", "piano", "rain"]
STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@cache
def fast_tokenizer() -> Any:
    """A tokenizer of words, padding to any length."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<eos>", "<bos>", "<unk>", *WORDS]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        model_max_length=16,
    )


def seeded(build: Any) -> Any:
    """A module with weights that do not depend on what was built before it, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = build()
    return module.eval().requires_grad_(False)


def clip_text(hidden: int = 32, projection: int | None = None) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
        hidden_size=hidden,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=32,
        max_position_embeddings=16,
        projection_dim=projection or hidden,
        hidden_act="gelu",
    )
    return seeded(lambda: CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config))


def t5(hidden: int = 32) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=32, d_model=hidden, d_kv=8, d_ff=37, num_layers=1, num_heads=4, pad_token_id=0, eos_token_id=1)
    return seeded(lambda: T5EncoderModel(config))


def vae(channels: int = 4, blocks: int = 2, **more: Any) -> Any:
    return seeded(
        lambda: diffusers.AutoencoderKL(
            block_out_channels=[8] * blocks,
            in_channels=3,
            out_channels=3,
            down_block_types=["DownEncoderBlock2D"] * blocks,
            up_block_types=["UpDecoderBlock2D"] * blocks,
            latent_channels=channels,
            norm_num_groups=4,
            sample_size=16,
            **more,
        )
    )


def unet2d_condition(in_channels: int = 4, cross: int = 32, **more: Any) -> Any:
    return seeded(
        lambda: diffusers.UNet2DConditionModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            sample_size=8,
            in_channels=in_channels,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=cross,
            attention_head_dim=4,
            norm_num_groups=4,
            **more,
        )
    )


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ddim(**more: Any) -> Any:
    return diffusers.DDIMScheduler(**STABLE, clip_sample=False, set_alpha_to_one=False, **more)


def stable_diffusion(cls: Any = None, in_channels: int = 4, **more: Any) -> Any:
    cls = cls or diffusers.StableDiffusionPipeline
    return quiet(
        cls(
            vae=vae(),
            text_encoder=clip_text(),
            tokenizer=fast_tokenizer(),
            unet=unet2d_condition(in_channels),
            scheduler=ddim(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **more,
        )
    )


def unidiffuser() -> Any:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=37,
        projection_dim=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    decoder = seeded(
        lambda: diffusers.UniDiffuserTextDecoder(
            prefix_length=16,
            prefix_inner_dim=32,
            prefix_hidden_dim=32,
            vocab_size=32,
            n_positions=128,
            n_embd=32,
            n_layer=1,
            n_head=4,
        )
    )
    unet = seeded(
        lambda: diffusers.UniDiffuserModel(
            text_dim=32,
            clip_img_dim=32,
            num_text_tokens=16,
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=1000,
            norm_type="unidi",
            norm_num_groups=4,
            activation_fn="gelu",
        )
    )
    return quiet(
        diffusers.UniDiffuserPipeline(
            vae=vae(),
            text_encoder=clip_text(),
            image_encoder=seeded(lambda: CLIPVisionModelWithProjection(vision)),
            clip_image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16),
            clip_tokenizer=fast_tokenizer(),
            text_decoder=decoder,
            text_tokenizer=fast_tokenizer(),
            unet=unet,
            scheduler=ddim(),
        )
    )


def controlnet() -> Any:
    net = seeded(
        lambda: diffusers.ControlNetModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            in_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            cross_attention_dim=32,
            conditioning_embedding_out_channels=(8, 16),
            norm_num_groups=4,
            attention_head_dim=4,
        )
    )
    generator = torch.Generator().manual_seed(1)
    for block in [*net.controlnet_down_blocks, net.controlnet_mid_block]:  # zero when made, and then of no influence
        block.weight.copy_(0.1 * torch.randn(block.weight.shape, generator=generator))
    return net


def stable_diffusion_control() -> Any:
    return stable_diffusion(diffusers.StableDiffusionControlNetPipeline, controlnet=controlnet())


def bert(hidden: int = 32) -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=32,
        hidden_size=hidden,
        intermediate_size=37,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=77,
        pad_token_id=0,
    )
    return seeded(lambda: BertModel(config))


HUNYUAN: dict[str, Any] = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "hidden_size": 16,
    "mlp_ratio": 2.0,
    "cross_attention_dim": 32,
    "cross_attention_dim_t5": 32,
    "pooled_projection_dim": 16,
    "text_len": 77,
    "text_len_t5": 256,
}


def hunyuan_dit(cls: Any = None, **more: Any) -> Any:
    return quiet(
        (cls or diffusers.HunyuanDiTPipeline)(
            vae=vae(blocks=4),  # its rotary embedding takes a factor of 8 for granted
            text_encoder=bert(),
            tokenizer=fast_tokenizer(),
            text_encoder_2=t5(),
            tokenizer_2=fast_tokenizer(),
            transformer=seeded(lambda: diffusers.HunyuanDiT2DModel(**HUNYUAN, num_layers=4)),
            scheduler=ddim(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **more,
        )
    )


def hunyuan_dit_control() -> Any:
    net = seeded(lambda: diffusers.HunyuanDiT2DControlNetModel(**HUNYUAN, transformer_num_layers=4))
    generator = torch.Generator().manual_seed(1)
    for block in [net.input_block, *net.controlnet_blocks]:  # zero when made, and then of no influence
        block.weight.copy_(0.1 * torch.randn(block.weight.shape, generator=generator))
    return hunyuan_dit(diffusers.HunyuanDiTControlNetPipeline, controlnet=net)


def aura_flow() -> Any:
    transformer = seeded(
        lambda: diffusers.AuraFlowTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            out_channels=4,
            pos_embed_max_size=16,
        )
    )
    tokenizer = copy.deepcopy(fast_tokenizer())
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return quiet(
        diffusers.AuraFlowPipeline(
            transformer=transformer,
            vae=vae(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73),
            text_encoder=t5(),
            tokenizer=tokenizer,
        )
    )


def easy_animate(cls: Any = None, in_channels: int = 4, scheduler: Any = None) -> Any:
    """Without its text encoder, a language model with eyes: give `prompt_embeds`, of 32 features."""
    transformer = seeded(
        lambda: diffusers.EasyAnimateTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=in_channels,
            out_channels=4,
            patch_size=2,
            num_layers=1,
            mmdit_layers=1,
            time_embed_dim=2,
            text_embed_dim=32,
        )
    )
    autoencoder = seeded(
        lambda: diffusers.AutoencoderKLMagvit(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=2,
            spatial_group_norm=False,
        )
    )
    return quiet(
        (cls or diffusers.EasyAnimatePipeline)(
            transformer=transformer,
            vae=autoencoder,
            scheduler=scheduler or diffusers.FlowMatchEulerDiscreteScheduler(),
            text_encoder=None,
            tokenizer=None,
        )
    )


def stable_diffusion_xl() -> Any:
    unet = unet2d_condition(
        cross=64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
        transformer_layers_per_block=(1, 1),
        use_linear_projection=True,
    )
    return quiet(
        diffusers.StableDiffusionXLPipeline(
            vae=vae(),
            text_encoder=clip_text(),
            text_encoder_2=clip_text(projection=32),
            tokenizer=fast_tokenizer(),
            tokenizer_2=fast_tokenizer(),
            unet=unet,
            scheduler=diffusers.EulerDiscreteScheduler(**STABLE),
            add_watermarker=False,
        )
    )


def stable_diffusion_3() -> Any:
    transformer = seeded(
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=64,
            caption_projection_dim=32,
            pooled_projection_dim=64,
            out_channels=4,
        )
    )
    return quiet(
        diffusers.StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae(shift_factor=0.1, scaling_factor=1.5),
            text_encoder=clip_text(projection=32),
            tokenizer=fast_tokenizer(),
            text_encoder_2=clip_text(projection=32),
            tokenizer_2=fast_tokenizer(),
            text_encoder_3=t5(64),
            tokenizer_3=fast_tokenizer(),
        )
    )


def flux() -> Any:
    transformer = seeded(
        lambda: diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=[4, 4, 8],
            guidance_embeds=True,
        )
    )
    return quiet(
        diffusers.FluxPipeline(
            transformer=transformer,
            vae=vae(shift_factor=0.0, scaling_factor=1.0),
            text_encoder=clip_text(),
            tokenizer=fast_tokenizer(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            text_encoder_2=t5(),
            tokenizer_2=fast_tokenizer(),
        )
    )


def pixart() -> Any:
    transformer = seeded(
        lambda: diffusers.PixArtTransformer2DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            caption_channels=32,
            in_channels=4,
            cross_attention_dim=24,
            out_channels=8,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
        )
    )
    return quiet(
        diffusers.PixArtAlphaPipeline(
            transformer=transformer,
            vae=vae(),
            scheduler=diffusers.DPMSolverMultistepScheduler(),
            text_encoder=t5(),
            tokenizer=fast_tokenizer(),
        )
    )


def dit() -> Any:
    transformer = seeded(
        lambda: diffusers.DiTTransformer2DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            in_channels=4,
            out_channels=8,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_zero",
            norm_elementwise_affine=False,
        )
    )
    return quiet(
        diffusers.DiTPipeline(transformer=transformer, vae=vae(), scheduler=diffusers.DDIMScheduler(clip_sample=False))
    )


def unet2d() -> Any:
    return seeded(
        lambda: diffusers.UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
        )
    )


def stable_audio() -> Any:
    transformer = seeded(
        lambda: diffusers.StableAudioDiTModel(
            sample_size=4,
            in_channels=3,
            num_layers=2,
            attention_head_dim=4,
            num_attention_heads=2,
            num_key_value_attention_heads=2,
            out_channels=3,
            cross_attention_dim=4,
            time_proj_dim=8,
            global_states_input_dim=8,
            cross_attention_input_dim=4,
        )
    )
    projection = seeded(
        lambda: diffusers.pipelines.stable_audio.modeling_stable_audio.StableAudioProjectionModel(
            text_encoder_dim=32, conditioning_dim=4, min_value=0, max_value=32
        )
    )
    oobleck = seeded(
        lambda: diffusers.AutoencoderOobleck(
            encoder_hidden_size=6,
            downsampling_ratios=[1, 2],
            decoder_channels=3,
            decoder_input_channels=3,
            audio_channels=2,
            channel_multiples=[2, 4],
            sampling_rate=4,
        )
    )
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(
        solver_order=2, prediction_type="v_prediction", sigma_data=1.0, sigma_min=0.3, sigma_max=50
    )
    return quiet(
        diffusers.StableAudioPipeline(
            transformer=transformer,
            scheduler=scheduler,
            vae=oobleck,
            text_encoder=t5(),
            tokenizer=fast_tokenizer(),
            projection_model=projection,
        )
    )


def cogvideox() -> Any:
    transformer = seeded(
        lambda: diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            time_embed_dim=2,
            text_embed_dim=32,
            num_layers=1,
            sample_width=2,
            sample_height=2,
            sample_frames=9,
            patch_size=2,
            temporal_compression_ratio=4,
            max_text_seq_length=16,
        )
    )
    autoencoder = seeded(
        lambda: diffusers.AutoencoderKLCogVideoX(
            in_channels=3,
            out_channels=3,
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
        )
    )
    return quiet(
        diffusers.CogVideoXPipeline(
            transformer=transformer,
            vae=autoencoder,
            scheduler=diffusers.CogVideoXDDIMScheduler(),
            text_encoder=t5(),
            tokenizer=fast_tokenizer(),
        )
    )


def ltx() -> Any:
    transformer = seeded(
        lambda: diffusers.LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            patch_size=1,
            patch_size_t=1,
            num_attention_heads=4,
            attention_head_dim=8,
            cross_attention_dim=32,
            num_layers=1,
            caption_channels=32,
        )
    )
    autoencoder = seeded(
        lambda: diffusers.AutoencoderKLLTXVideo(
            in_channels=3,
            out_channels=3,
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            decoder_inject_noise=(False,) * 5,
            upsample_residual=(False,) * 4,
            upsample_factor=(1,) * 4,
            timestep_conditioning=False,
            patch_size=1,
            patch_size_t=1,
            encoder_causal=True,
            decoder_causal=False,
        )
    )
    return quiet(
        diffusers.LTXPipeline(
            transformer=transformer,
            vae=autoencoder,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            text_encoder=t5(),
            tokenizer=fast_tokenizer(),
        )
    )


def wan() -> Any:
    transformer = seeded(
        lambda: diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        )
    )
    autoencoder = seeded(
        lambda: diffusers.AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        )
    )
    return quiet(
        diffusers.WanPipeline(
            transformer=transformer,
            vae=autoencoder,
            scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
            text_encoder=t5(),
            tokenizer=fast_tokenizer(),
        )
    )


class Linear(diffusers.ModelMixin, diffusers.ConfigMixin):
    """Predicts a multiple of its input as the noise: what it samples is Gaussian, with a variance that can be computed."""

    config_name = "config.json"

    @diffusers.configuration_utils.register_to_config
    def __init__(self, sample_size: int = 4, in_channels: int = 4) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    @staticmethod
    def gain(t: torch.Tensor) -> torch.Tensor:
        return 0.9 + 0.1 * torch.cos(t / 100.0)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> Any:
        rows = self.gain(timestep.reshape(-1, 1, 1, 1)) * self.scale * sample
        return diffusers.models.unets.unet_2d.UNet2DOutput(sample=rows)


class PolicyPipeline(diffusers.DiffusionPipeline):
    """A diffusion policy as robots run it: a 1-D UNet denoises a sequence of actions, given what was observed."""

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self, observation: torch.Tensor, num_inference_steps: int = 100, generator: Any = None, output_type: str = "pt"
    ) -> tuple[torch.Tensor]:
        actions = torch.randn(len(observation), 2, 16, generator=generator)
        condition = observation[:, :, None].expand(-1, -1, 16)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            output = self.unet(torch.cat([actions, condition], 1), t).sample
            actions = self.scheduler.step(output, t, actions, generator=generator).prev_sample
        return (actions,)


def policy() -> Any:
    unet = seeded(
        lambda: diffusers.UNet1DModel(
            in_channels=6,
            out_channels=2,
            block_out_channels=(16, 32, 32),
            layers_per_block=1,
            norm_num_groups=8,
            act_fn="swish",
            time_embedding_type="positional",
            use_timestep_embedding=True,
            flip_sin_to_cos=False,
            freq_shift=1,
            down_block_types=("DownResnetBlock1D",) * 3,
            up_block_types=("UpResnetBlock1D",) * 2,
            mid_block_type="MidResTemporalBlock1D",
            out_block_type="OutConv1DBlock",
        )
    )
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2", clip_sample_range=3.0)
    return PolicyPipeline(unet, scheduler)


class Small(Linear):
    """Likewise with an output that saturates: contractive whatever the scheduler, and not linear."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> Any:
        rows = self.gain(timestep.reshape(-1, 1, 1, 1).float()) * self.scale * torch.tanh(sample)
        return diffusers.models.unets.unet_2d.UNet2DOutput(sample=rows.to(sample.dtype))


class LoopPipeline(diffusers.DiffusionPipeline):
    """The loop that all pipelines share, for any scheduler."""

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self, num_inference_steps: int = 10, generator: Any = None, batch_size: int = 2, **step_options: Any
    ) -> tuple[torch.Tensor]:
        self.scheduler.set_timesteps(num_inference_steps)
        timesteps = self.scheduler.timesteps
        latents = randn_tensor((batch_size, 4, 4, 4), generator) * getattr(self.scheduler, "init_noise_sigma", 1.0)
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            step_options["generator"] = generator
        for t in self.progress_bar(timesteps):
            scaled = self.scheduler.scale_model_input(latents, t) if hasattr(self.scheduler, "scale_model_input") else latents
            output = self.unet(scaled, t).sample
            latents = self.scheduler.step(output, t, latents, **step_options, return_dict=False)[0]
        return (latents,)
