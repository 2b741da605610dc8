"""What a user would write instead of this system: on-policy distillation in one process of transformers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from decord import VideoReader
from torch.nn.functional import interpolate
from transformers import AutoModelForImageTextToText, AutoProcessor

from learner.loss import divergence, with_tail
from video_opd.config import Config
from video_opd.models.prompting import chat_messages, video_metadata
from video_opd.types import Clip, Prompt

Inputs = dict[str, torch.Tensor]


class PlainLoop:
    """Decodes, generates, computes the teacher's top-K and the student's loss, and updates, in turn."""

    def __init__(self, config: Config):
        torch.manual_seed(config.seed)
        self._config = config
        self._processor: Any = AutoProcessor.from_pretrained(config.student)
        load: Any = AutoModelForImageTextToText.from_pretrained
        self._student: Any = load(config.student, dtype=torch.float32)
        self._teacher: Any = load(config.teacher, dtype=torch.float32).eval().requires_grad_(False)
        self._optimizer = torch.optim.AdamW(self._student.parameters(), config.learner.lr, weight_decay=0.0)
        self._end_ids = self._student.generation_config.eos_token_id
        self._pad_ids = [self._student.config.video_token_id, self._student.config.image_token_id]
        self._frames: dict[str, np.ndarray] = {}  # by path: a clip is decoded once

    def step(self, prompts: Sequence[Prompt]) -> tuple[float, int]:
        """One update on one response to each prompt; its loss, and the number of response tokens."""
        inputs = self.encode(prompts)
        responses = self._sample(inputs)
        num_tokens, size = sum(map(len, responses)), self._config.learner.micro_batch
        self._student.train()
        total = 0.0
        for first in range(0, len(prompts), size):
            part = slice(first, first + size)
            loss = self.loss_sum(_rows(inputs, part), responses[part]) / num_tokens
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self._student.parameters(), self._config.learner.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return total, num_tokens

    def read(self, clip: Clip) -> np.ndarray:
        """uint8[F, H, W, 3]."""
        if clip.video_path not in self._frames:
            reader = VideoReader(clip.video_path, num_threads=1)
            frames = reader.get_batch(clip.frame_indices).asnumpy()
            if frames.shape[1:3] != clip.frame_size:
                pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
                pixels = interpolate(pixels, clip.frame_size, mode="bicubic", antialias=True)
                frames = pixels.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
            self._frames[clip.video_path] = frames
        return self._frames[clip.video_path]

    def encode(self, prompts: Sequence[Prompt]) -> Inputs:
        """Padded on the left, so that all responses begin in one column."""
        messages = [chat_messages(self._config.prompt, p.query, p.style) for p in prompts]
        texts = self._processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return dict(
            self._processor(
                text=texts,
                videos=[self.read(p.clip) for p in prompts],
                video_metadata=[video_metadata(p.clip) for p in prompts],
                do_sample_frames=False,
                padding=True,
                padding_side="left",
                return_tensors="pt",
            )
        )

    @torch.inference_mode()
    def _sample(self, inputs: Inputs) -> list[torch.Tensor]:
        """The response to each prompt, int64[N], with its end token."""
        self._student.eval()
        sampled = self._student.generate(
            **inputs,
            max_new_tokens=self._config.rollout.max_response_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            suppress_tokens=self._pad_ids,
        )
        responses = []
        for row in sampled[:, inputs["input_ids"].shape[1] :]:
            ends = torch.isin(row, torch.tensor(self._end_ids)).nonzero()
            responses.append(row[: int(ends[0]) + 1] if len(ends) else row)
        return [response.clone() for response in responses]

    def loss_sum(self, inputs: Inputs, responses: Sequence[torch.Tensor]) -> torch.Tensor:
        """The loss of all response tokens, with the student's gradient; responses int64[N]."""
        pad_id = self._processor.tokenizer.pad_token_id
        padded = torch.nn.utils.rnn.pad_sequence(list(responses), batch_first=True, padding_value=pad_id)
        lengths = torch.tensor([len(response) for response in responses])
        is_token = torch.arange(padded.shape[1]) < lengths[:, None]
        more = {"input_ids": padded, "attention_mask": is_token.long()}
        more["mm_token_type_ids"] = torch.zeros_like(padded)
        both = inputs | {name: torch.cat([inputs[name], values], 1) for name, values in more.items()}
        kept = {"logits_to_keep": padded.shape[1] + 1, "use_cache": False}
        with torch.no_grad():
            teacher = self._without_pads(self._teacher(**both, **kept).logits[:, :-1][is_token])
            top = teacher.log_softmax(-1).topk(self._config.loss.top_k)
        student = self._without_pads(self._student(**both, **kept).logits[:, :-1][is_token])
        both = with_tail(student, top.indices, top.values)
        return divergence(*both, clamp=self._config.loss.clamp).sum()

    def _without_pads(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits of the tokens that can be sampled, changed in place."""
        return logits.index_fill_(-1, torch.tensor(self._pad_ids), -torch.inf)


def _rows(inputs: Inputs, part: slice) -> Inputs:
    """The inputs of some of the prompts."""
    patches = inputs["video_grid_thw"].prod(1).tolist()
    of_prompt = inputs["pixel_values_videos"].split(patches)
    rows = {name: values[part] for name, values in inputs.items() if name != "pixel_values_videos"}
    return rows | {"pixel_values_videos": torch.cat(of_prompt[part])}
