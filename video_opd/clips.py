"""For scripts of users: which frames of a video a model sees, and their pixels.

clip = plan_clip("name", "video.mp4", VideoConfig(), multiple=32)
frames = read_frames(clip, VideoConfig())
"""

from video_opd.config_data import VideoConfig
from video_opd.video.clips import plan_clip, read_frames

__all__ = ["VideoConfig", "plan_clip", "read_frames"]
