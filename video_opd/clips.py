"""The public names of clips."""

from video_opd.video.clips import describe_video, plan_clip, read_frames

__all__ = ["describe_video", "plan_clip", "read_frames"]
