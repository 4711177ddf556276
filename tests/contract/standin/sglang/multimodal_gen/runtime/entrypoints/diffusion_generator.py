"""``DiffGenerator``: blocks for a whole video, logs what goes wrong and returns None, does not see its worker die."""

from __future__ import annotations

import logging
import multiprocessing
import tempfile
import time
from types import SimpleNamespace

from sglang.multimodal_gen.runtime.managers.worker import run

_PARAMETERS = {
    "request_id",
    "prompt",
    "negative_prompt",
    "width",
    "height",
    "num_frames",
    "fps",
    "num_inference_steps",
    "guidance_scale",
    "guidance_scale_2",
    "boundary_ratio",
    "seed",
    "num_outputs_per_prompt",
    "save_output",
    "adjust_frames",
    "suppress_logs",
    "return_frames",
    "image_path",
    "diffusers_kwargs",
}


class DiffGenerator:
    @classmethod
    def from_pretrained(cls, local_mode=True, **kwargs):
        made = cls()
        made.server_args = SimpleNamespace(
            pipeline_config=SimpleNamespace(dit_precision=kwargs["dit_precision"]),
            progress_endpoint=f"ipc://{tempfile.gettempdir()}/progress-{kwargs['port']}",
        )
        if kwargs.get("lora_path") == "missing":
            raise ValueError("no such adapter")
        context = multiprocessing.get_context("spawn")
        made._pipe, theirs = context.Pipe()
        arguments = (theirs, kwargs["backend"], made.server_args.progress_endpoint)
        process = context.Process(target=run, args=arguments, name="sglang-diffusionWorker-0", daemon=True)
        process.start()
        made.local_scheduler_process = [process]
        return made

    def generate(self, sampling_params_kwargs):
        options = dict(sampling_params_kwargs)
        if unknown := options.keys() - _PARAMETERS:
            raise TypeError(f"unexpected keyword arguments {unknown}")
        if "[raise]" in options["prompt"]:
            raise ValueError("the parameters are bad")
        if "[nothing]" in options["prompt"]:
            return None
        try:
            answer = self._send_to_scheduler_and_wait_for_response([SimpleNamespace(options=options)])
            if answer.error:
                raise RuntimeError(answer.error)
        except Exception:
            logging.exception("Generation failed")
            return None
        return SimpleNamespace(frames=answer.output, size=(options["height"], options["width"], options["num_frames"]))

    def _send_to_scheduler_and_wait_for_response(self, batch):
        request = batch[0]
        self._pipe.send({**request.options, "report_progress": request.report_progress})
        while not self._pipe.poll(1.0):  # nobody looks whether there is anybody
            time.sleep(0)
        try:
            error, frames = self._pipe.recv()
        except EOFError:
            time.sleep(600)
            raise
        return SimpleNamespace(error=error, output=frames)

    def shutdown(self):
        self._pipe.send(None)
        for process in self.local_scheduler_process:
            process.join(10)
