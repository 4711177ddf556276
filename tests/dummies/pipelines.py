"""The tiny pipeline of each kind of checkpoint, by the name of its row in ``engines/diffusers/families.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import (
    AllegroTransformer3DModel,
    AnyFlowTransformer3DModel,
    AutoencoderKL,
    AutoencoderKLAllegro,
    AutoencoderKLCosmos,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    AutoencoderKLMagvit,
    AutoencoderKLMochi,
    AutoencoderKLTemporalDecoder,
    CogVideoXDDIMScheduler,
    CogVideoXTransformer3DModel,
    ConfigMixin,
    ControlNetModel,
    Cosmos3OmniTransformer,
    CosmosControlNetModel,
    CosmosTransformer3DModel,
    DDIMScheduler,
    EasyAnimateTransformer3DModel,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMapEulerDiscreteScheduler,
    HeliosScheduler,
    HeliosTransformer3DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    Kandinsky5Transformer3DModel,
    Kandinsky6Transformer3DModel,
    LatteTransformer3DModel,
    LTX2VideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    MMAudioVAE,
    MMAudioVocoder,
    MochiTransformer3DModel,
    ModelMixin,
    MotifVideoTransformer3DModel,
    MotionAdapter,
    SanaVideoTransformer3DModel,
    SkyReelsV2Transformer3DModel,
    UNet2DConditionModel,
    UNet3DConditionModel,
    UNetSpatioTemporalConditionModel,
    WanAnimateTransformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

from kinema.engines.diffusers.families import FAMILIES
from tests.dummies import texts
from tests.dummies.parts import (
    WAN,
    clip_processor,
    clip_vision,
    cogvideox_vae,
    flow_euler,
    flow_unipc,
    hunyuan_vae,
    siglip_processor,
    siglip_vision,
    stand_in_for_torchvision,
    wan_like,
    wan_vae,
)

Components = dict[str, Any]


def wan() -> Components:
    return wan_like(WanTransformer3DModel(**WAN))


def wan_image() -> Components:
    return wan_like(WanTransformer3DModel(**WAN, in_channels=36), image_encoder=None, image_processor=None)


def wan_vace() -> Components:
    return wan_like(WanVACETransformer3DModel(**WAN, vace_layers=[0], vace_in_channels=96))


def wan_animate() -> Components:
    sizes = {"motion_encoder_size": 16, "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 8}
    transformer = WanAnimateTransformer3DModel(
        **WAN,
        **sizes,
        image_dim=texts.WIDTH,
        motion_encoder_channel_sizes={"4": 4, "8": 4, "16": 4},
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=1,
    )
    return wan_like(transformer, image_encoder=clip_vision(), image_processor=clip_processor())


def lucy() -> Components:
    return wan_like(WanTransformer3DModel(**WAN, in_channels=32))


def anyflow() -> Components:
    return wan_like(AnyFlowTransformer3DModel(**WAN), FlowMapEulerDiscreteScheduler(shift=5.0))


def skyreels() -> Components:
    return wan_like(SkyReelsV2Transformer3DModel(**WAN))


def skyreels_image() -> Components:
    transformer = SkyReelsV2Transformer3DModel(**WAN, in_channels=36, image_dim=texts.WIDTH, added_kv_proj_dim=24)
    return wan_like(transformer, image_encoder=clip_vision(), image_processor=clip_processor())


def skyreels_forcing() -> Components:
    return wan_like(SkyReelsV2Transformer3DModel(**WAN, inject_sample_info=True))


def helios() -> Components:
    size = {**WAN, "rope_dim": (4, 4, 4)}
    del size["rope_max_seq_len"]
    transformer = HeliosTransformer3DModel(**size)
    scheduler = HeliosScheduler(stage_range=[0, 1], stages=1, use_dynamic_shifting=True)
    return wan_like(transformer, scheduler)


def ltx() -> Components:
    return {
        "scheduler": flow_euler(),
        "vae": AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
        ),
        "text_encoder": texts.t5(),
        "tokenizer": texts.tokenizer(),
        "transformer": LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=1,
            caption_channels=texts.WIDTH,
        ),
    }


def hunyuan() -> Components:
    return {
        "text_encoder": texts.llama(),
        "tokenizer": texts.tokenizer(),
        "text_encoder_2": texts.clip(),
        "tokenizer_2": texts.tokenizer(77),
        "transformer": _hunyuan_transformer(4),
        "vae": hunyuan_vae(),
        "scheduler": flow_euler(shift=7.0),
    }


def _hunyuan_transformer(in_channels: int, **more: Any) -> HunyuanVideoTransformer3DModel:
    return HunyuanVideoTransformer3DModel(
        in_channels=in_channels,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=texts.WIDTH,
        pooled_projection_dim=texts.WIDTH,
        rope_axes_dim=(2, 4, 4),
        **more,
    )


def hunyuan_image() -> Components:
    made = {**hunyuan(), "text_encoder": texts.llava(), "tokenizer": texts.llava_tokenizer()}
    return {
        **made,
        "transformer": _hunyuan_transformer(4, image_condition_type="token_replace"),
        "image_processor": clip_processor(48),
    }


def skyreels_v1() -> Components:
    return {**hunyuan(), "transformer": _hunyuan_transformer(8)}


def hunyuan_15() -> Components:
    return {
        "text_encoder": texts.qwen_text(),
        "tokenizer": texts.tokenizer(1200),
        "text_encoder_2": texts.t5(vocabulary=400),
        "tokenizer_2": texts.byt5_tokenizer(),
        "transformer": _hunyuan_15_transformer("t2v"),
        "vae": AutoencoderKLHunyuanVideo15(
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8, 8),
            layers_per_block=1,
        ),
        "scheduler": flow_euler(shift=7.0),
        "guider": ClassifierFreeGuidance(guidance_scale=6.0),
    }


def _hunyuan_15_transformer(task: str) -> HunyuanVideo15Transformer3DModel:
    return HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=texts.WIDTH,
        text_embed_2_dim=texts.WIDTH,
        image_embed_dim=texts.WIDTH,
        rope_axes_dim=(2, 2, 4),
        target_size=32,
        task_type=task,
    )


def cogvideox() -> Components:
    return _cogvideox(4)


def cogvideox_image() -> Components:
    return _cogvideox(8)


def _cogvideox(in_channels: int) -> Components:
    return {
        "tokenizer": texts.tokenizer(),
        "text_encoder": texts.t5(),
        "vae": cogvideox_vae(),
        "transformer": CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=in_channels,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=texts.WIDTH,
            num_layers=1,
            sample_width=8,
            sample_height=8,
            sample_frames=9,
            use_rotary_positional_embeddings=True,
        ),
        "scheduler": CogVideoXDDIMScheduler(),
    }


def mochi() -> Components:
    return {
        "scheduler": flow_euler(),
        "vae": AutoencoderKLMochi(
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
        ),
        "text_encoder": texts.t5(),
        "tokenizer": texts.tokenizer(),
        "transformer": MochiTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            pooled_projection_dim=16,
            text_embed_dim=texts.WIDTH,
            time_embed_dim=4,
        ),
    }


def kandinsky() -> Components:
    return _kandinsky(is_from_image=False)


def kandinsky_image() -> Components:
    return _kandinsky(is_from_image=True)


def _kandinsky(*, is_from_image: bool) -> Components:
    return {
        "transformer": Kandinsky5Transformer3DModel(
            in_visual_dim=4,
            in_text_dim=texts.WIDTH,
            in_text_dim2=texts.WIDTH,
            time_dim=16,
            out_visual_dim=4,
            model_dim=24,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=1,
            axes_dims=(4, 4, 4),
            visual_cond=is_from_image,
        ),
        "vae": hunyuan_vae(),
        "text_encoder": texts.qwen_vl(),
        "tokenizer": texts.tokenizer(2048),
        "text_encoder_2": texts.clip(),
        "tokenizer_2": texts.tokenizer(77),
        "scheduler": flow_euler(shift=5.0),
    }


class NoChecker(ModelMixin, ConfigMixin):
    """Stands for Cosmos' guardrail, which is a large model of its own: it lets everything through."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("nothing", torch.zeros(1))  # from which its device is known

    def check_text_safety(self, _prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def _cosmos_transformer(in_channels: int, text_width: int = texts.WIDTH) -> CosmosTransformer3DModel:
    return CosmosTransformer3DModel(
        in_channels=in_channels,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        mlp_ratio=2,
        text_embed_dim=text_width,
        adaln_lora_dim=4,
        max_size=(8, 32, 32),
    )


def _cosmos(transformer: Any, vae: Any, scheduler: Any) -> Components:
    stand_in_for_torchvision()
    return {
        "text_encoder": texts.t5(),
        "tokenizer": texts.tokenizer(),
        "transformer": transformer,
        "vae": vae,
        "scheduler": scheduler,
        "safety_checker": NoChecker(),
    }


def _cosmos_vae() -> AutoencoderKLCosmos:
    return AutoencoderKLCosmos(
        latent_channels=16,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
    )


def cosmos_text() -> Components:
    return _cosmos(_cosmos_transformer(16), _cosmos_vae(), EDMEulerScheduler())


def cosmos_video() -> Components:
    return _cosmos(_cosmos_transformer(17), _cosmos_vae(), EDMEulerScheduler())


def cosmos_2() -> Components:
    return _cosmos(_cosmos_transformer(17), wan_like(None)["vae"], flow_euler(use_karras_sigmas=True))


def cosmos_25() -> Components:
    text_encoder = texts.qwen_vl()  # whose layers are all given
    transformer = _cosmos_transformer(17, texts.WIDTH * text_encoder.config.text_config.num_hidden_layers)
    return {**_cosmos(transformer, wan_like(None)["vae"], flow_unipc()), "text_encoder": text_encoder}


def cosmos_3() -> Components:
    tokenizer = texts.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|vision_start|>"]})
    return {
        "transformer": Cosmos3OmniTransformer(
            hidden_size=16,
            intermediate_size=32,
            head_dim=8,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_hidden_layers=1,
            latent_channel=16,
            patch_latent_dim=64,
            rope_axes_dim=(2, 1, 1),
            vocab_size=texts.VOCABULARY,
        ),
        "text_tokenizer": tokenizer,
        "vae": wan_vae(),
        "scheduler": flow_unipc(flow_shift=3.0),
        "enable_safety_checker": False,  # which is of another package
    }


def cosmos_25_transfer() -> Components:
    text_encoder = texts.qwen_vl()  # whose layers are all given
    text_width = texts.WIDTH * text_encoder.config.text_config.num_hidden_layers
    sizes: Any = {"num_attention_heads": 2, "attention_head_dim": 12, "adaln_lora_dim": 4, "text_embed_dim": 8}
    crossing: Any = {"crossattn_proj_in_channels": text_width, "encoder_hidden_states_channels": 8}
    transformer = CosmosTransformer3DModel(
        **sizes,
        **crossing,
        use_crossattn_projection=True,
        in_channels=17,
        out_channels=16,
        num_layers=1,
        mlp_ratio=2,
        max_size=(32, 32, 32),
        controlnet_block_every_n=1,
        extra_pos_embed_type=None,
    )
    controlnet = CosmosControlNetModel(
        **sizes,
        **crossing,
        use_crossattn_projection=True,
        n_controlnet_blocks=1,
        in_channels=18,
        latent_channels=18,
        model_channels=24,
        mlp_ratio=2,
        max_size=(32, 32, 32),
    )
    parts = _cosmos(transformer, wan_like(None)["vae"], flow_unipc())
    return {**parts, "text_encoder": text_encoder, "controlnet": controlnet}


def sana() -> Components:
    return {
        "tokenizer": texts.tokenizer(),
        "text_encoder": texts.t5(),
        "vae": wan_like(None)["vae"],
        "transformer": SanaVideoTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=1,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=texts.WIDTH,
            sample_size=8,
        ),
        "scheduler": flow_euler(shift=7.0),
    }


def allegro() -> Components:
    vae = AutoencoderKLAllegro(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2, sample_size=128
    )
    vae.enable_tiling()  # it decodes in no other way
    vae.kernel, vae.stride = (24, 32, 32), (16, 16, 16)
    return {
        "tokenizer": texts.tokenizer(),
        "text_encoder": texts.t5(),
        "vae": vae,
        "transformer": AllegroTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=1,
            cross_attention_dim=24,
            sample_height=8,
            sample_width=8,
            sample_frames=8,
            caption_channels=texts.WIDTH,
        ),
        "scheduler": DDIMScheduler(),
    }


def _image_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )


def animatediff() -> Components:
    return {
        "vae": _image_vae(),
        "text_encoder": texts.clip(),
        "tokenizer": texts.tokenizer(77),
        "unet": UNet2DConditionModel(
            block_out_channels=(8, 8),
            layers_per_block=1,
            sample_size=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=texts.WIDTH,
            norm_num_groups=2,
            attention_head_dim=4,
        ),
        "motion_adapter": MotionAdapter(
            block_out_channels=(8, 8), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=2
        ),
        "scheduler": DDIMScheduler(beta_schedule="linear", clip_sample=False),
    }


def animatediff_control() -> Components:
    controlnet = ControlNetModel(
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        cross_attention_dim=texts.WIDTH,
        norm_num_groups=2,
        attention_head_dim=4,
        conditioning_embedding_out_channels=(4, 4, 4, 4),
    )
    return {**animatediff(), "controlnet": controlnet}


def latte() -> Components:
    return {
        "tokenizer": texts.tokenizer(),
        "text_encoder": texts.t5(),
        "vae": _image_vae(),
        "transformer": LatteTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            cross_attention_dim=16,
            attention_bias=True,
            sample_size=8,
            patch_size=2,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            caption_channels=texts.WIDTH,
        ),
        "scheduler": DDIMScheduler(),
    }


def framepack() -> Components:
    transformer = HunyuanVideoFramepackTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=texts.WIDTH,
        pooled_projection_dim=texts.WIDTH,
        rope_axes_dim=(2, 4, 4),
        has_image_proj=True,
        image_proj_dim=texts.WIDTH,
        has_clean_x_embedder=True,
    )
    made = {**hunyuan(), "transformer": transformer}
    return {**made, "image_encoder": siglip_vision(), "feature_extractor": siglip_processor()}


def svd() -> Components:
    return {
        "vae": AutoencoderKLTemporalDecoder(
            down_block_types=("DownEncoderBlock2D",) * 4, block_out_channels=(32, 32, 32, 32), layers_per_block=1
        ),
        "image_encoder": clip_vision(224, 56),
        "unet": UNetSpatioTemporalConditionModel(
            block_out_channels=(32, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            cross_attention_dim=texts.WIDTH,
            num_attention_heads=2,
            projection_class_embeddings_input_dim=24,
            addition_time_embed_dim=8,
        ),
        "scheduler": EulerDiscreteScheduler(prediction_type="v_prediction"),
        "feature_extractor": clip_processor(),
    }


def hunyuan_15_image() -> Components:
    made = hunyuan_15()
    made["transformer"] = _hunyuan_15_transformer("i2v")
    return {**made, "image_encoder": siglip_vision(), "feature_extractor": siglip_processor()}


def kandinsky_6() -> Components:
    made = _kandinsky(is_from_image=True)
    del made["transformer"]
    return {
        **made,
        "transformer": Kandinsky6Transformer3DModel(
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=texts.WIDTH,
            in_text_dim2=texts.WIDTH,
            time_dim=16,
            model_dim=12,
            ff_dim=24,
            num_text_blocks=1,
            num_visual_blocks=1,
            axes_dims=(2, 2, 2),
            in_audio_dim=4,
            out_audio_dim=4,
            visual_token_type_num_embeddings=2,
        ),
        "audio_vae": MMAudioVAE(
            mel_bins=8,
            latent_channels=4,
            hidden_channels=8,
            channel_multipliers=(1, 2),
            layers_per_block=1,
            sample_rate=64,
            n_fft=16,
            hop_length=4,
        ),
        "vocoder": MMAudioVocoder(
            num_mels=8,
            upsample_initial_channel=8,
            upsample_rates=(2, 2),
            upsample_kernel_sizes=(4, 4),
            resblock_kernel_sizes=(3,),
            resblock_dilation_sizes=((1, 3),),
        ),
    }


def ltx_2() -> Components:
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_learnable_registers": None}
    connectors = {f"{kind}_connector_{key}": value for kind in ("video", "audio") for key, value in heads.items()}
    return {
        "scheduler": flow_euler(),
        "vae": AutoencoderKLLTX2Video(
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(16, 32, 64),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1),
            spatial_compression_ratio=32,
            temporal_compression_ratio=8,
        ),
        "audio_vae": AutoencoderKLLTX2Audio(
            base_channels=4,
            ch_mult=(1,),
            num_res_blocks=1,
            resolution=32,
            latent_channels=2,
            mel_bins=8,
        ),
        "text_encoder": texts.gemma3(),
        "tokenizer": texts.tokenizer(1024),
        "connectors": LTX2TextConnectors(
            caption_channels=texts.WIDTH,
            text_proj_in_factor=3,
            connector_rope_base_seq_len=32,
            rope_type="split",
            **connectors,
        ),
        "transformer": LTX2VideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=2,
            audio_attention_head_dim=8,
            audio_cross_attention_dim=16,
            num_layers=1,
            caption_channels=texts.WIDTH,
            rope_type="split",
        ),
        "vocoder": LTX2Vocoder(
            in_channels=16,
            hidden_channels=8,
            upsample_kernel_sizes=[4, 4],
            upsample_factors=[2, 2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3, 5]],
        ),
    }


def animatediff_xl() -> Components:
    return {
        **animatediff(),
        "text_encoder_2": texts.clip_with_projection(),
        "tokenizer_2": texts.tokenizer(77),
        "unet": UNet2DConditionModel(
            block_out_channels=(8, 8),
            layers_per_block=1,
            sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=2 * texts.WIDTH,
            norm_num_groups=2,
            attention_head_dim=4,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + texts.WIDTH,
        ),
    }


def text_to_video() -> Components:
    return {
        "vae": _image_vae(),
        "text_encoder": texts.clip(),
        "tokenizer": texts.tokenizer(77),
        "unet": UNet3DConditionModel(
            block_out_channels=(4, 8),
            layers_per_block=1,
            sample_size=8,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            cross_attention_dim=texts.WIDTH,
            norm_num_groups=2,
            attention_head_dim=4,
        ),
        "scheduler": DDIMScheduler(),
    }


def motif() -> Components:
    return _motif(texts.t5())


def motif_image() -> Components:
    """The encoder of texts also sees the picture."""
    made = _motif(texts.t5_gemma2(), image_embed_dim=texts.WIDTH)
    return {**made, "feature_extractor": siglip_processor()}


def _motif(text_encoder: Any, **network: Any) -> Components:
    return {
        "scheduler": flow_euler(),
        "vae": wan_vae(),
        "text_encoder": text_encoder,
        "tokenizer": texts.tokenizer(),
        "transformer": MotifVideoTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=1,
            num_single_layers=1,
            text_embed_dim=texts.WIDTH,
            rope_axes_dim=(4, 4, 4),
            **network,
        ),
        "guider": ClassifierFreeGuidance(guidance_scale=6.0),
    }


def helios_pyramid() -> Components:
    # With the library's own gamma of 1/3 a matrix has a root by rounding alone, on some processors and not on others.
    return {**helios(), "scheduler": HeliosScheduler(gamma=0.25)}


def easyanimate() -> Components:
    return {
        "vae": AutoencoderKLMagvit(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
        ),
        "text_encoder": texts.qwen_vl(),
        "tokenizer": texts.tokenizer(),
        "transformer": EasyAnimateTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            patch_size=2,
            sample_width=8,
            sample_height=8,
            num_layers=1,
            mmdit_layers=1,
            time_embed_dim=8,
            text_embed_dim=texts.WIDTH,
        ),
        "scheduler": flow_euler(),
    }


DUMMIES: dict[str, Callable[[], Components]] = {
    "Wan": wan,
    "Wan image-to-video": wan_image,
    "Wan VACE": wan_vace,
    "Wan Animate": wan_animate,
    "Lucy Edit": lucy,
    "CogVideoX Fun Control": cogvideox_image,
    "Cosmos 2.5 Transfer": cosmos_25_transfer,
    "AnimateDiff control": animatediff_control,
    "AnyFlow": anyflow,
    "LTX-Video": ltx,
    "LTX-2": ltx_2,
    "HunyuanVideo 1.5 image-to-video": hunyuan_15_image,
    "Kandinsky 6": kandinsky_6,
    "AnimateDiff SDXL": animatediff_xl,
    "ModelScope text-to-video": text_to_video,
    "Motif-Video": motif,
    "Motif-Video image-to-video": motif_image,
    "Helios pyramid": helios_pyramid,
    "EasyAnimate": easyanimate,
    "HunyuanVideo": hunyuan,
    "HunyuanVideo image-to-video": hunyuan_image,
    "SkyReels V1 image-to-video": skyreels_v1,
    "HunyuanVideo FramePack": framepack,
    "HunyuanVideo 1.5": hunyuan_15,
    "CogVideoX": cogvideox,
    "CogVideoX image-to-video": cogvideox_image,
    "Mochi": mochi,
    "Kandinsky 5": kandinsky,
    "Kandinsky 5 image-to-video": kandinsky_image,
    "Cosmos 1 text-to-world": cosmos_text,
    "Cosmos 1 video-to-world": cosmos_video,
    "Cosmos 2 video-to-world": cosmos_2,
    "Cosmos 2.5": cosmos_25,
    "Cosmos 3": cosmos_3,
    "SkyReels V2": skyreels,
    "SkyReels V2 image-to-video": skyreels_image,
    "SkyReels V2 diffusion forcing": skyreels_forcing,
    "SANA-Video": sana,
    "Allegro": allegro,
    "Helios": helios,
    "AnimateDiff": animatediff,
    "Latte": latte,
    "Stable Video Diffusion": svd,
}


def make(name: str) -> Any:
    """The pipeline of a row, with the same weights each time."""
    family = next(family for family in FAMILIES if family.name == name)
    with torch.random.fork_rng():
        texts.seeded()
        pipeline = getattr(diffusers, family.pipelines[0])(**DUMMIES[name]())
        _open_gates(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def _open_gates(pipeline: Any) -> None:
    """Networks begin with parts that are zero, and what goes through these would change nothing."""
    networks = (one for one in pipeline.components.values() if isinstance(one, torch.nn.Module))
    for parameter in (one for network in networks for one in network.parameters()):
        if parameter.dim() > 1 and not parameter.any():
            parameter.normal_(std=0.1)
