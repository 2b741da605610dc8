"""Published prompts for temporal grounding, verbatim: results compare only under the same prompt.

Sources: TencentARC/TimeLens, MCG-NJU/TimeLens2 (evaluation), xiaomi-research/time-r1 (training).
"""

from typing import Any

_TIME_R1 = (
    'To accurately pinpoint the event "{query}" in the video, '
    "determine the precise time period of the event.\n\n"
)
_TIME_R1_ANSWER = (
    "the start and end times (in seconds, precise to two decimal places) in the format "
    '"start time to end time" within the <answer> </answer> tags. For example: "12.54 to 17.83".'
)

STYLES: dict[str, dict[str, Any]] = {
    "timelens": {
        "template": "Please find the visual event described by the sentence '{query}', "
        "determining its starting and ending times. "
        "The format should be: 'The event happens in <start time> - <end time> seconds'.",
        "answer_template": "The event happens in {start:.1f} - {end:.1f} seconds.",
        "video_first": True,
    },
    "time_r1": {
        "template": _TIME_R1 + "Provide " + _TIME_R1_ANSWER,
        "answer_template": "<answer>{start:.2f} to {end:.2f}</answer>",
        "video_first": False,
    },
    "time_r1_think": {
        "template": _TIME_R1
        + "Output your thought process within the <think> </think> tags, including analysis with either "
        "specific timestamps (xx.xx) or time ranges (xx.xx to xx.xx) in <timestep> </timestep> tags.\n\n"
        "Then, provide " + _TIME_R1_ANSWER,
        "answer_template": "<answer>{start:.2f} to {end:.2f}</answer>",
        "video_first": False,
    },
    "timelens2": {
        "template": 'Given the query: "{query}", return ALL time spans (in seconds) '
        "where the query is relevant.\nOutput format MUST be a JSON array of [start, end] pairs.",
        "answer_template": "[[{start:.1f}, {end:.1f}]]",
        "video_first": True,
    },
}
