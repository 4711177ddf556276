"""The process that runs the model. Words in the prompt say what goes wrong in it."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
from PIL import Image

from sglang.multimodal_gen.runtime.managers.progress_reporter import ReportingTqdm
from sglang.multimodal_gen.runtime.platforms.plugins import apply_plugin_hooks


def run(pipe, backend, endpoint):
    apply_plugin_hooks()
    while (options := pipe.recv()) is not None:
        try:
            pipe.send((None, _frames(options, backend, endpoint)))
        except Exception as exc:  # swallowed, as the library does
            pipe.send((f"Error executing request {options['request_id']}: {exc}", None))


def _frames(options, backend, endpoint):
    prompt, num_steps = options["prompt"], options["num_inference_steps"]
    height, width, num_frames = options["height"], options["width"], options["num_frames"]
    kwargs = options.get("diffusers_kwargs") or {}
    if backend == "diffusers":  # see ``_build_pipeline_kwargs``
        num_frames = kwargs.get("num_frames", num_frames if num_frames > 1 else 81)
    image = options.get("image_path")
    picture = None if image is None else np.asarray(Image.open(image).convert("RGB"))
    bar = None if backend == "diffusers" else ReportingTqdm(num_steps, [options["request_id"]], endpoint)
    for index in range(num_steps):
        time.sleep(0.02 if "[slow]" in prompt else 0.0)
        if index == 1:
            _misbehave(prompt)
        if backend == "diffusers":
            kwargs["callback_on_step_end"](None, index, None, {})
        else:
            assert options["report_progress"]
            bar._advance(1)
    if "[size]" in prompt:
        height -= 16
    if "[frames]" in prompt:
        num_frames -= 4
    seed = sum(f"{prompt} {options['negative_prompt']} {options['seed']} {options['guidance_scale']}".encode())
    frames = np.random.default_rng(seed).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)
    if picture is not None:
        frames[0] = picture
    return list(frames.astype(np.float32)) if "[float]" in prompt else list(frames)


def _misbehave(prompt):
    if "[error]" in prompt:
        raise ValueError(f"the tensor is sad about {prompt}")
    if "[oom]" in prompt:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if "[cuda]" in prompt:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if "[die]" in prompt:
        os.kill(os.getpid(), signal.SIGKILL)
    if "[hang]" in prompt:
        time.sleep(600)
