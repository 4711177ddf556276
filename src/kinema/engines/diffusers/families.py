"""What diffusers 0.42.1 can make videos with, as a table: one row for each kind of checkpoint.

A row is read from the library's own code: the signature and the checks of its pipelines, and the example in their
documentation. Rows hold no weights and no torch. A pipeline without a row runs from its signature
(``model_folder.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from kinema.engines.base import Inputs
from kinema.request.capabilities import Preset
from kinema.request.geometry import Geometry
from kinema.request.shapes import Size

# What the pipelines call the networks that denoise; the second is for the other half of the noise levels.
DENOISERS = ("transformer", "transformer_2", "unet")


@dataclass(frozen=True)
class FrameClass:
    """The class of the library for a picture of one frame: where it is, and the names of its two fields.

    Its index counts every ``step`` frames after the first.
    """

    module: str
    name: str
    picture: str
    index: str
    step: int = 1


@dataclass(frozen=True)
class Family:
    """One kind of checkpoint.

    ``text``, ``image``, ``first_last`` and ``film`` are the classes of the pipelines for these inputs, all over the
    same weights; ``first_last`` also takes a last frame. ``control`` is that for films of control, whose arguments are
    ``controls`` with the words for each; with ``needs_control`` there is no video without them. ``references`` is its
    argument for reference images. ``frames`` is the class for pictures of single frames, in objects of
    ``frame_class``. ``also`` are classes that a checkpoint may name besides, and ``needs`` says which inputs no request
    has: then nothing is served.
    Videos have ``frame_step * n + frame_offset`` frames, and sides that are multiples of ``size_multiple``, or one of
    ``sizes``. A token of the network that denoises is a square of ``token_side`` pixels in ``token_frames`` frames.
    The first ``prompt_tokens`` of a prompt are read; None where the library has no bound.
    A pipeline that makes a long video by parts makes ``window`` frames at a time, of which ``overlap`` are those
    before, in a loop for each or, with ``has_one_loop``, in one. Each may take its steps in ``stages`` of growing
    pictures. ``window_argument`` is the pipeline's name for the frames of a part, and the most of them.
    ``names`` has the pipeline's names of arguments where they differ from ours, ``always`` what is always given, and
    ``preset_from`` says where the preset is from. ``packages`` must be installed besides. ``checkpoint`` is a
    published one, under ``licence``; ``billions`` are the parameters of what denoises in it and of what reads texts and
    pictures, where they are known.
    """

    name: str
    preset: Preset
    preset_from: str
    checkpoint: str
    licence: str
    text: str | None = None
    image: str | None = None
    first_last: str | None = None
    film: str | None = None
    control: str | None = None
    frames: str | None = None
    frame_class: FrameClass | None = None
    controls: Mapping[str, str] = field(default_factory=dict)
    needs_control: bool = False
    references: str | None = None
    also: tuple[str, ...] = ()
    needs: str | None = None
    frame_step: int = 4
    frame_offset: int = 1
    size_multiple: int = 16
    token_side: int = 16
    token_frames: int = 4
    max_frames: int = 161
    prompt_tokens: int | None = 512
    min_steps: int = 1
    window: int | None = None
    window_argument: tuple[str, int] | None = None
    overlap: int = 0
    has_one_loop: bool = False
    stages: int | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    always: Mapping[str, object] = field(default_factory=dict)
    packages: tuple[str, ...] = ()
    billions: tuple[float, float] | None = None
    has_masks: bool = False
    has_strength: bool = True
    has_prompt: bool = True
    has_guidance: bool = True
    has_negative_prompt: bool = True
    has_sound: bool = False
    is_vae_float32: bool = False
    is_tiled: bool = False
    sizes: tuple[str, ...] = ()

    @property
    def pipelines(self) -> tuple[str, ...]:
        """The classes that a checkpoint of this kind may name."""
        named = (self.text, self.image, self.first_last, self.film, self.control, self.frames, *self.also)
        return tuple(dict.fromkeys(name for name in named if name is not None))

    @property
    def weights_gb(self) -> tuple[float, float] | None:
        """The weights in bfloat16, two bytes each: what denoises, and what reads texts and pictures."""
        return None if self.billions is None else (2 * self.billions[0], 2 * self.billions[1])

    @property
    def modes(self) -> tuple[str, ...]:
        """The inputs that it takes, in words."""
        words = {
            "text": self.text,
            "image": self.image,
            "first and last frame": self.first_last,
            "film": self.film,
            "control": self.control,
            "reference images": self.references,
            "frames": self.frames,
        }
        return tuple(word for word, pipeline in words.items() if pipeline is not None)

    def pipeline_for(self, inputs: Inputs) -> str | None:
        """The class that takes these inputs; None for inputs that none takes."""
        if inputs.conditioning:
            return self.frames
        if inputs.control_video:
            return self.control
        if inputs.film is not None:
            return self.film
        if inputs.last_frame is not None:
            return self.first_last
        return self.text if inputs.first_frame is None else self.image

    @property
    def geometry(self) -> Geometry:
        """How its videos are cut into tokens and parts. A pipeline decodes them in one turn."""
        tokens = {"token_pixels": self.token_side**2, "token_frames": self.token_frames}
        if self.window is None:
            return Geometry(**tokens, chunk_frames=None)
        first, step = self.window, self.window - self.overlap
        if self._is_made_of_windows:
            first, step = self.frame_step + 1, self.frame_step
        return Geometry(**tokens, part_frames=first, part_step=step, chunk_frames=None)

    def num_loops(self, num_frames: int) -> int:
        """How many loops of denoising steps make a video of this length, by the bars that the pipeline draws."""
        return 1 if self.has_one_loop else self.geometry.num_parts(num_frames)

    def asked_frames(self, num_frames: int) -> int:
        """The number of frames to ask the pipeline for: FramePack makes more than that, and Helios up to three less."""
        if self.window is None or not self._is_made_of_windows:
            return num_frames
        return self.window * math.ceil((num_frames - 1) / self.frame_step)

    @property
    def _is_made_of_windows(self) -> bool:
        return self.window is not None and self.frame_step + 1 >= self.window


def _preset(size: str, num_frames: int, fps: int, steps: int, guidance: float) -> Preset:
    return Preset(
        size=Size.parse(size),
        num_frames=num_frames,
        fps=fps,
        num_inference_steps=steps,
        guidance_scale=guidance,
    )


_SIGNATURE, _EXAMPLE = "the pipeline's signature", "the pipeline's example"
_APACHE = "Apache-2.0"
_TENCENT = "Tencent Hunyuan Community"
_NVIDIA = "NVIDIA Open Model"

# The pipelines of Cosmos use the one, and make no video without NVIDIA's guardrail, which is the other.
_GUARDED = ("torchvision", "cosmos_guardrail")

# Billions of parameters. What denoises was counted in the library's classes, with their own sizes where these are the
# checkpoint's and with those of its converters elsewhere. 19 for Kandinsky 5 Pro is of its report (arXiv 2511.14993),
# and 29 for Kandinsky 6 Pro, 12 for EasyAnimate and 2 for Motif-Video are of their model cards. The encoders are
# UMT5-XXL, T5-XXL, Llama 3 8B with CLIP-L, Qwen2.5-VL or Qwen2-VL 7B, Gemma 3 12B, Gemma 2 2B, that of T5Gemma 2 4B
# (with its part for pictures), CLIP-L and CLIP-G for texts, and CLIP-H for pictures. HunyuanVideo 1.5 has the part of
# Qwen2.5-VL that reads texts, and Glyph-ByT5.
_UMT5, _T5, _LLAMA, _QWEN, _GEMMA_3, _GEMMA_2, _CLIP_L, _CLIP_H = 5.68, 4.76, 8.15, 8.29, 12.19, 2.61, 0.12, 0.63
_QWEN_TEXTS, _CLIP_G, _T5GEMMA_2 = 7.29, 0.69, 4.30

FAMILIES: tuple[Family, ...] = (
    Family(
        name="Wan",
        billions=(1.42, _UMT5),
        text="WanPipeline",
        preset=_preset("832x480", 81, 16, 50, 5.0),
        preset_from=_SIGNATURE,
        checkpoint="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        licence=_APACHE,
        is_vae_float32=True,
    ),
    Family(
        name="Wan image-to-video",
        billions=(16.39, _UMT5 + _CLIP_H),
        image="WanImageToVideoPipeline",
        preset=_preset("832x480", 81, 16, 50, 5.0),
        preset_from=_SIGNATURE,
        checkpoint="Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
        licence=_APACHE,
        is_vae_float32=True,
    ),
    Family(
        name="Wan VACE",
        billions=(2.15, _UMT5),
        text="WanVACEPipeline",
        image="WanVACEPipeline",
        first_last="WanVACEPipeline",
        has_masks=True,
        control="WanVACEPipeline",
        controls={"video": "a film of control (edges, depth, poses, scribbles)"},
        references="reference_images",
        preset=_preset("832x480", 81, 16, 30, 5.0),
        preset_from=_EXAMPLE,
        checkpoint="Wan-AI/Wan2.1-VACE-1.3B-diffusers",
        licence=_APACHE,
        is_vae_float32=True,
    ),
    Family(
        name="Wan Animate",
        billions=(17.27, _UMT5 + _CLIP_H),
        image="WanAnimatePipeline",
        control="WanAnimatePipeline",
        controls={"pose_video": "a film of poses", "face_video": "a film of faces"},
        needs_control=True,
        preset=_preset("1280x720", 77, 30, 20, 1.0),
        preset_from=_SIGNATURE,
        checkpoint="Wan-AI/Wan2.2-Animate-14B-Diffusers",
        licence=_APACHE,
        frame_offset=5,  # the first frame of a part is the last one of that before, so a part of one is none
        window=77,
        overlap=1,
        window_argument=("segment_frame_length", 77),
        is_vae_float32=True,
    ),
    Family(
        name="AnyFlow",
        billions=(1.42, _UMT5),
        text="AnyFlowPipeline",
        preset=_preset("832x480", 33, 16, 4, 1.0),
        preset_from=_EXAMPLE,
        checkpoint="nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers",
        licence=_NVIDIA,
        is_vae_float32=True,
    ),
    Family(
        name="Lucy Edit",
        billions=(5.00, _UMT5),
        film="LucyEditPipeline",
        has_strength=False,
        size_multiple=32,
        token_side=32,
        preset=_preset("832x480", 81, 24, 50, 5.0),
        preset_from=_EXAMPLE,
        checkpoint="decart-ai/Lucy-Edit-Dev",
        licence="Lucy Edit Dev (not for commerce)",
        is_vae_float32=True,
    ),
    Family(
        name="LTX-Video",
        prompt_tokens=128,
        billions=(1.92, _T5),
        text="LTXPipeline",
        image="LTXImageToVideoPipeline",
        first_last="LTXConditionPipeline",
        frames="LTXConditionPipeline",
        frame_class=FrameClass("ltx.pipeline_ltx_condition", "LTXVideoCondition", "image", "frame_index"),
        frame_step=8,
        size_multiple=32,
        max_frames=257,
        names={"fps": "frame_rate"},
        token_side=32,
        token_frames=8,
        preset=_preset("704x480", 161, 24, 50, 3.0),
        preset_from=_EXAMPLE,
        checkpoint="Lightricks/LTX-Video",
        licence="LTX-Video Open Weights",
    ),
    Family(
        name="LTX-2",
        prompt_tokens=1024,
        billions=(18.88, _GEMMA_3),
        text="LTX2Pipeline",
        image="LTX2ImageToVideoPipeline",
        first_last="LTX2ConditionPipeline",
        frames="LTX2ConditionPipeline",
        frame_class=FrameClass("ltx2.pipeline_ltx2_condition", "LTX2VideoCondition", "frames", "index", step=8),
        frame_step=8,
        size_multiple=32,
        max_frames=257,
        names={"fps": "frame_rate"},
        has_sound=True,
        token_side=32,
        token_frames=8,
        preset=_preset("768x512", 121, 24, 30, 3.0),
        preset_from=_EXAMPLE,
        checkpoint="Lightricks/LTX-2",
        licence="LTX-2 Community",
    ),
    Family(
        name="HunyuanVideo",
        prompt_tokens=256,
        billions=(12.82, _LLAMA),
        text="HunyuanVideoPipeline",
        has_negative_prompt=False,
        preset=_preset("1280x720", 129, 15, 50, 6.0),
        preset_from=_SIGNATURE,
        checkpoint="hunyuanvideo-community/HunyuanVideo",
        licence=_TENCENT,
    ),
    Family(
        name="HunyuanVideo image-to-video",
        prompt_tokens=256,
        billions=(12.82, _LLAMA),
        image="HunyuanVideoImageToVideoPipeline",
        has_negative_prompt=False,
        preset=_preset("1280x720", 129, 15, 50, 1.0),
        preset_from=_SIGNATURE,
        checkpoint="hunyuanvideo-community/HunyuanVideo-I2V",
        licence=_TENCENT,
    ),
    Family(
        name="SkyReels V1 image-to-video",
        prompt_tokens=256,
        billions=(12.82, _LLAMA),
        image="HunyuanSkyreelsImageToVideoPipeline",
        names={"guidance_scale": "true_cfg_scale"},
        preset=_preset("960x544", 97, 24, 50, 6.0),
        preset_from=_SIGNATURE,
        checkpoint="Skywork/SkyReels-V1-Hunyuan-I2V",
        licence=_TENCENT,
    ),
    Family(
        name="HunyuanVideo FramePack",
        prompt_tokens=256,
        billions=(12.82, _LLAMA),
        image="HunyuanVideoFramepackPipeline",
        first_last="HunyuanVideoFramepackPipeline",
        has_negative_prompt=False,
        frame_step=36,
        frame_offset=37,
        window=33,
        preset=_preset("832x480", 109, 30, 30, 9.0),
        preset_from=_EXAMPLE,
        checkpoint="lllyasviel/FramePackI2V_HY",
        licence=_TENCENT,
    ),
    Family(
        name="HunyuanVideo 1.5",
        prompt_tokens=1000,
        billions=(8.33, _QWEN_TEXTS),
        text="HunyuanVideo15Pipeline",
        preset=_preset("848x480", 121, 24, 50, 6.0),
        preset_from=_EXAMPLE,
        checkpoint="hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v",
        licence=_TENCENT,
    ),
    Family(
        name="HunyuanVideo 1.5 image-to-video",
        prompt_tokens=1000,
        billions=(8.33, _QWEN_TEXTS),
        image="HunyuanVideo15ImageToVideoPipeline",
        preset=_preset("848x480", 121, 24, 50, 6.0),
        preset_from=_EXAMPLE,
        checkpoint="hunyuanvideo-community/HunyuanVideo-1.5-480p_i2v",
        licence=_TENCENT,
    ),
    Family(
        name="CogVideoX",
        prompt_tokens=226,
        billions=(1.69, _T5),
        frame_step=8,
        text="CogVideoXPipeline",
        film="CogVideoXVideoToVideoPipeline",
        preset=_preset("720x480", 49, 8, 50, 6.0),
        preset_from=_EXAMPLE,
        checkpoint="THUDM/CogVideoX-2b",
        licence=_APACHE,
    ),
    Family(
        name="CogVideoX image-to-video",
        prompt_tokens=226,
        billions=(5.57, _T5),
        frame_step=8,
        image="CogVideoXImageToVideoPipeline",
        preset=_preset("720x480", 49, 8, 50, 6.0),
        preset_from=_EXAMPLE,
        checkpoint="THUDM/CogVideoX-5b-I2V",
        licence="CogVideoX",
    ),
    Family(
        name="CogVideoX Fun Control",
        prompt_tokens=226,
        billions=(5.57, _T5),
        frame_step=8,
        control="CogVideoXFunControlPipeline",
        controls={"control_video": "a film of poses or edges"},
        needs_control=True,
        preset=_preset("720x480", 49, 8, 50, 6.0),
        preset_from=_SIGNATURE,
        checkpoint="alibaba-pai/CogVideoX-Fun-V1.1-5b-Pose",
        licence="CogVideoX",
    ),
    Family(
        name="ConsisID",
        billions=(6.16, _T5),
        prompt_tokens=226,
        also=("ConsisIDPipeline",),
        needs="a picture of a face with its features",
        preset=_preset("720x480", 49, 8, 50, 6.0),
        preset_from=_SIGNATURE,
        checkpoint="BestWishYsh/ConsisID-preview",
        licence=_APACHE,
    ),
    Family(
        name="Mochi",
        prompt_tokens=256,
        billions=(10.03, _T5),
        text="MochiPipeline",
        min_steps=2,
        frame_step=6,
        max_frames=163,
        token_frames=6,
        preset=_preset("848x480", 19, 30, 28, 3.5),
        preset_from=_EXAMPLE,
        checkpoint="genmo/mochi-1-preview",
        licence=_APACHE,
    ),
    Family(
        name="Kandinsky 5",
        billions=(2.15, _QWEN),
        text="Kandinsky5T2VPipeline",
        max_frames=241,
        preset=_preset("768x512", 121, 24, 50, 5.0),
        preset_from=_EXAMPLE,
        checkpoint="kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers",
        licence="MIT",
    ),
    Family(
        name="Kandinsky 5 image-to-video",
        billions=(19.0, _QWEN),
        image="Kandinsky5I2VPipeline",
        frame_offset=17,
        max_frames=241,
        preset=_preset("768x512", 121, 24, 50, 5.0),
        preset_from=_EXAMPLE,
        checkpoint="kandinskylab/Kandinsky-5.0-I2V-Pro-sft-5s-Diffusers",
        licence="MIT",
    ),
    Family(
        name="Kandinsky 6",
        billions=(29.0, _QWEN),
        prompt_tokens=1024,
        text="Kandinsky6TI2VAPipeline",
        image="Kandinsky6TI2VAPipeline",
        names={"fps": "frame_rate"},
        has_sound=True,
        preset=_preset("864x480", 121, 24, 16, 1.0),
        preset_from=_EXAMPLE,
        checkpoint="kandinskylab/Kandinsky-6.0-Pro-distill-5s-Diffusers",
        licence="MIT",
    ),
    Family(
        name="Cosmos 1 text-to-world",
        billions=(7.24, _T5),
        text="CosmosTextToWorldPipeline",
        frame_step=8,
        token_frames=8,
        preset=_preset("1280x704", 121, 30, 36, 7.0),
        preset_from=_SIGNATURE,
        checkpoint="nvidia/Cosmos-1.0-Diffusion-7B-Text2World",
        licence=_NVIDIA,
        packages=_GUARDED,
    ),
    Family(
        name="Cosmos 1 video-to-world",
        billions=(7.24, _T5),
        image="CosmosVideoToWorldPipeline",
        frame_step=8,
        token_frames=8,
        preset=_preset("1280x704", 121, 30, 36, 7.0),
        preset_from=_SIGNATURE,
        checkpoint="nvidia/Cosmos-1.0-Diffusion-7B-Video2World",
        licence=_NVIDIA,
        packages=_GUARDED,
    ),
    Family(
        name="Cosmos 2 video-to-world",
        billions=(1.96, _T5),
        image="Cosmos2VideoToWorldPipeline",
        preset=_preset("1280x704", 93, 16, 35, 7.0),
        preset_from=_SIGNATURE,
        checkpoint="nvidia/Cosmos-Predict2-2B-Video2World",
        licence=_NVIDIA,
        packages=_GUARDED,
        is_vae_float32=True,
    ),
    Family(
        name="Cosmos 2.5",
        billions=(2.06, _QWEN),
        text="Cosmos2_5_PredictBasePipeline",
        image="Cosmos2_5_PredictBasePipeline",
        preset=_preset("1280x704", 93, 16, 36, 7.0),
        preset_from=_SIGNATURE,
        checkpoint="nvidia/Cosmos-Predict2.5-2B",
        licence=_NVIDIA,
        packages=_GUARDED,
    ),
    Family(
        name="Cosmos 2.5 Transfer",
        billions=(2.38, _QWEN),
        control="Cosmos2_5_TransferPipeline",
        controls={"controls": "a film of edges, depth, blur or segments"},
        needs_control=True,
        packages=_GUARDED,
        preset=_preset("1280x704", 93, 16, 36, 3.0),
        preset_from=_SIGNATURE,
        checkpoint="nvidia/Cosmos-Transfer2.5-2B",
        licence=_NVIDIA,
        frame_offset=5,  # a part has 5 frames at least
        window=93,
        overlap=1,
        has_one_loop=True,
        window_argument=("num_frames_per_chunk", 93),
    ),
    Family(
        name="Cosmos 3",
        prompt_tokens=None,
        billions=(15.16, 0.0),
        text="Cosmos3OmniPipeline",
        image="Cosmos3OmniPipeline",
        max_frames=189,
        token_side=32,
        preset=_preset("1280x720", 189, 24, 35, 6.0),
        preset_from=_SIGNATURE,
        checkpoint="nvidia/Cosmos3-Nano",
        licence=_NVIDIA,
        packages=("cosmos_guardrail",),
    ),
    Family(
        name="SkyReels V2",
        billions=(14.29, _UMT5),
        text="SkyReelsV2Pipeline",
        preset=_preset("960x544", 97, 24, 50, 6.0),
        preset_from=_EXAMPLE,
        checkpoint="Skywork/SkyReels-V2-T2V-14B-540P-Diffusers",
        licence="Skywork",
        is_vae_float32=True,
    ),
    Family(
        name="SkyReels V2 image-to-video",
        billions=(16.39, _UMT5 + _CLIP_H),
        image="SkyReelsV2ImageToVideoPipeline",
        preset=_preset("960x544", 97, 24, 50, 5.0),
        preset_from=_EXAMPLE,
        checkpoint="Skywork/SkyReels-V2-I2V-14B-540P-Diffusers",
        licence="Skywork",
        is_vae_float32=True,
    ),
    Family(
        name="SkyReels V2 diffusion forcing",
        billions=(1.42, _UMT5),
        text="SkyReelsV2DiffusionForcingPipeline",
        image="SkyReelsV2DiffusionForcingImageToVideoPipeline",
        first_last="SkyReelsV2DiffusionForcingImageToVideoPipeline",
        also=("SkyReelsV2DiffusionForcingVideoToVideoPipeline",),
        max_frames=257,
        window=97,
        overlap=17,
        always={"overlap_history": 17, "addnoise_condition": 20},
        preset=_preset("960x544", 97, 24, 30, 6.0),
        preset_from=_EXAMPLE,
        checkpoint="Skywork/SkyReels-V2-DF-1.3B-540P-Diffusers",
        licence="Skywork",
        is_vae_float32=True,
    ),
    Family(
        name="SANA-Video",
        prompt_tokens=300,
        billions=(1.91, _GEMMA_2),
        text="SanaVideoPipeline",
        image="SanaImageToVideoPipeline",
        size_multiple=32,
        names={"num_frames": "frames"},
        always={"use_resolution_binning": False},
        preset=_preset("832x480", 81, 16, 50, 6.0),
        preset_from=_EXAMPLE,
        checkpoint="Efficient-Large-Model/SANA-Video_2B_480p_diffusers",
        licence=_NVIDIA,
        is_vae_float32=True,
    ),
    Family(
        name="Allegro",
        billions=(2.77, _T5),
        text="AllegroPipeline",
        frame_step=16,
        frame_offset=24,
        max_frames=88,
        is_tiled=True,
        sizes=("1280x720",),
        preset=_preset("1280x720", 88, 15, 100, 7.5),
        preset_from=_EXAMPLE,
        checkpoint="rhymes-ai/Allegro",
        licence=_APACHE,
        is_vae_float32=True,
    ),
    Family(
        name="Helios",
        billions=(14.31, _UMT5),
        text="HeliosPipeline",
        image="HeliosPipeline",
        frame_step=32,
        frame_offset=33,
        window=33,
        max_frames=129,
        preset=_preset("640x384", 129, 24, 50, 5.0),
        preset_from=_EXAMPLE,
        checkpoint="BestWishYsh/Helios-Base",
        licence=_APACHE,
        is_vae_float32=True,
    ),
    Family(
        name="Helios pyramid",
        billions=(14.31, _UMT5),
        text="HeliosPyramidPipeline",
        image="HeliosPyramidPipeline",
        frame_step=32,
        frame_offset=33,
        window=33,
        max_frames=129,
        min_steps=3,
        size_multiple=64,  # the first stage has a quarter of the sides
        stages=3,
        preset=_preset("640x384", 129, 24, 30, 5.0),
        preset_from=_SIGNATURE,
        checkpoint="BestWishYsh/Helios-Mid",
        licence=_APACHE,
        is_vae_float32=True,
    ),
    Family(
        name="Motif-Video",
        billions=(2.0, _T5GEMMA_2),
        text="MotifVideoPipeline",
        preset=_preset("1280x736", 121, 24, 50, 5.0),
        preset_from=_EXAMPLE,
        checkpoint="Motif-Technologies/Motif-Video-2B",
        licence=_APACHE,
    ),
    Family(
        name="Motif-Video image-to-video",
        billions=(2.0, _T5GEMMA_2),
        image="MotifVideoImage2VideoPipeline",
        preset=_preset("1280x736", 121, 24, 50, 5.0),
        preset_from=_SIGNATURE,
        checkpoint="Motif-Technologies/Motif-Video-2B",
        licence=_APACHE,
    ),
    Family(
        name="EasyAnimate",
        prompt_tokens=256,
        billions=(12.0, _QWEN),
        text="EasyAnimatePipeline",
        preset=_preset("512x512", 49, 8, 50, 6.0),
        preset_from=_EXAMPLE,
        checkpoint="alibaba-pai/EasyAnimateV5.1-12b-zh-diffusers",
        licence=_APACHE,
    ),
    Family(
        name="AnimateDiff",
        prompt_tokens=77,
        billions=(1.31, _CLIP_L),
        text="AnimateDiffPipeline",
        film="AnimateDiffVideoToVideoPipeline",
        frame_step=1,
        size_multiple=8,
        max_frames=32,
        token_side=8,
        token_frames=1,
        preset=_preset("512x512", 16, 8, 25, 7.5),
        preset_from=_EXAMPLE,
        checkpoint="guoyww/animatediff-motion-adapter-v1-5-2 with a Stable Diffusion 1.5",
        licence="CreativeML OpenRAIL-M",
    ),
    Family(
        name="AnimateDiff SDXL",
        prompt_tokens=77,
        billions=(2.80, _CLIP_L + _CLIP_G),
        text="AnimateDiffSDXLPipeline",
        frame_step=1,
        size_multiple=8,
        max_frames=32,
        token_side=8,
        token_frames=1,
        preset=_preset("1024x1024", 16, 8, 50, 5.0),
        preset_from=_SIGNATURE,
        checkpoint="guoyww/animatediff-motion-adapter-sdxl-beta with a Stable Diffusion XL",
        licence="CreativeML OpenRAIL++-M",
    ),
    Family(
        name="ModelScope text-to-video",
        prompt_tokens=77,
        billions=(1.41, 0.34),
        text="TextToVideoSDPipeline",
        frame_step=1,
        size_multiple=8,
        max_frames=64,
        token_side=8,
        token_frames=1,
        preset=_preset("256x256", 16, 8, 50, 9.0),
        preset_from=_SIGNATURE,
        checkpoint="ali-vilab/text-to-video-ms-1.7b",
        licence="CC-BY-NC-4.0",
    ),
    Family(
        name="AnimateDiff control",
        prompt_tokens=77,
        billions=(1.67, _CLIP_L),
        control="AnimateDiffControlNetPipeline",
        controls={"conditioning_frames": "a film of edges, depth or poses"},
        needs_control=True,
        frame_step=1,
        size_multiple=8,
        max_frames=32,
        token_side=8,
        token_frames=1,
        preset=_preset("512x512", 16, 8, 50, 7.5),
        preset_from=_SIGNATURE,
        checkpoint="guoyww/animatediff-motion-adapter-v1-5-2 with a ControlNet",
        licence="CreativeML OpenRAIL-M",
    ),
    Family(
        name="Latte",
        prompt_tokens=120,
        billions=(1.06, _T5),
        text="LattePipeline",
        frame_step=16,
        frame_offset=0,
        max_frames=16,
        names={"num_frames": "video_length"},
        token_frames=1,
        preset=_preset("512x512", 16, 8, 50, 7.5),
        preset_from=_SIGNATURE,
        checkpoint="maxin-cn/Latte-1",
        licence=_APACHE,
    ),
    Family(
        name="Stable Video Diffusion",
        prompt_tokens=None,
        billions=(1.52, _CLIP_H),
        image="StableVideoDiffusionPipeline",
        has_prompt=False,
        has_negative_prompt=False,
        names={"guidance_scale": "max_guidance_scale"},
        max_frames=25,
        frame_step=1,
        frame_offset=2,
        size_multiple=8,
        token_side=8,
        token_frames=1,
        preset=_preset("1024x576", 25, 7, 25, 3.0),
        preset_from=_SIGNATURE,
        checkpoint="stabilityai/stable-video-diffusion-img2vid-xt",
        licence="Stability AI Community",
    ),
)

_BY_PIPELINE = {pipeline: family for family in FAMILIES for pipeline in family.pipelines}


def family_of(pipeline: str) -> Family | None:
    """The row of a class of pipeline; None for one that has none."""
    return _BY_PIPELINE.get(pipeline)
