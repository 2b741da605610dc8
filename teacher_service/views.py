"""The encoder of a teacher that sees more than the student."""

from functools import lru_cache

import numpy as np

from video_opd.config import Config
from video_opd.config_teachers import TeacherModel
from video_opd.models.feed import Feed
from video_opd.models.prompting import PromptEncoder
from video_opd.types import EncodedPrompt, Prompt
from video_opd.video.clips import TEMPORAL_PATCH, describe_video
from video_opd.video.video_file import VideoInfo
from video_opd.video.views import viewed

INFOS_KEPT = 512  # of videos


class ViewEncoder(PromptEncoder):
    """Encodes a prompt as TeacherModel's `prompt`, `video` and `crop_margin_frac` say.

    It crops prompts that have their true spans: for answers the replica hides these.
    """

    def __init__(self, config: Config, teacher: TeacherModel):
        prompt, video = teacher.view(config.prompt, config.video)
        super().__init__(teacher.model, prompt, video, config.trust_remote_code)
        self._video, self._teacher = video, teacher
        self._multiple = self._patching.patch_size * self._patching.merge_size
        self._describe = lru_cache(INFOS_KEPT)(lambda path: describe_video(path, video))
        most_bytes = (
            video.max_video_tokens * TEMPORAL_PATCH * self._multiple**2 * 3
        )  # before a file is opened
        self._feed = Feed[Prompt](video.decode_workers, video.feed_bytes, lambda _: most_bytes)

    def encode(
        self,
        prompt: Prompt,
        blank_video: bool = False,
        frames: np.ndarray | None = None,
        digest: str | None = None,
    ) -> EncodedPrompt:
        return super().encode(self.seen(prompt), blank_video, frames, digest)

    def seen(self, prompt: Prompt) -> Prompt:
        """The prompt with the teacher's own clip. Raises ClipError."""
        info: VideoInfo = self._describe(prompt.clip.video_path)
        return viewed(prompt, self._teacher, self._video, self._multiple, info)
