"""What the curriculum presents, as far as a config says it."""

from math import ceil

from video_opd.config import Config


def steps_of_round(config: Config, num_selected: int) -> int:
    """With kind=tvdf. The last step of a round has what is left."""
    return ceil(num_selected * config.curriculum.passes_per_round / config.groups_per_step)


def most_presented(config: Config) -> int:
    """Prompts of all steps, at most; one that is sampled twice counts twice."""
    curriculum, room = config.curriculum, config.schedule_room
    selected, whole = curriculum.num_selected, config.num_steps * config.groups_per_step
    if room:
        return (selected or room.most) + room.num_repeats
    if curriculum.kind != "tvdf" or not selected:
        return whole
    rounds, steps = divmod(config.num_steps, steps_of_round(config, selected))
    of_round = selected * curriculum.passes_per_round
    return rounds * of_round + min(steps * config.groups_per_step, of_round)
