"""The configuration: strict, overridable from the command line, one line per problem."""

import pytest
import yaml

import launch
from video_opd import ROOT
from video_opd.answers import parse_spans
from video_opd.config import Config
from video_opd.config_data import STYLES
from video_opd.config_file import describe_keys, dump_config, load_config, resolve_paths
from video_opd.errors import ConfigError, InputError

SPLIT = {"annotations": "a.txt", "lengths": "l.csv", "videos": "v"}
MINIMAL = {"student": "s", "teacher": "t", "num_steps": 3, "data": {"train": SPLIT, "eval": dict(SPLIT)}}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def problem(path, *overrides: str) -> str:
    """The one line that load_config fails with."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message and message
    assert isinstance(caught.value, InputError)  # the program ends with code 2
    return message


@pytest.mark.parametrize(
    ("override", "unknown", "nearest"),
    [
        ("learner.learning_rat=1", "learner.learning_rat", None),
        ("learner.lrr=1", "learner.lrr", "learner.lr"),
        ("num_step=1", "num_step", "num_steps"),
        ("rollout.max_respons_tokens=4", "rollout.max_respons_tokens", "rollout.max_response_tokens"),
        ("data.train.anotations=x", "data.train.anotations", "data.train.annotations"),
        ("lerner.lr=1", "lerner", "learner"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(path, override, unknown, nearest):
    message = problem(path, override)
    assert f"unknown key {unknown};" in message
    assert str(path) in message
    if nearest:
        assert message.endswith(f"did you mean {nearest}?")


@pytest.mark.parametrize(
    ("section", "key"), [("", "student"), ("", "num_steps"), ("data.eval", "videos"), ("data", "train")]
)
def test_a_missing_key_is_named_in_full(path, section, key):
    tree = yaml.safe_load(path.read_text())
    node = tree
    for part in filter(None, section.split(".")):
        node[part] = dict(node[part])
        node = node[part]
    del node[key]
    path.write_text(yaml.safe_dump(tree))
    assert f"missing key {section}.{key}".replace(" .", " ") in problem(path)


@pytest.mark.parametrize(
    "override",
    [
        "num_steps=many",
        "num_steps=0",
        "num_steps=1.5",
        "num_steps=",
        "learner.lr=fast",
        "learner.lr=-1",
        "learner.lr=.nan",
        "learner.zero_stage=4",
        "learner.num_gpus=2",
        "rollout.num_gpus=1.5",
        "rollout={tensor_parallel: 2, num_gpus: 0.5}",
        "learner.dtype=float16",
        "learner.betas=[0.9]",
        "learner.freeze_vision=sometimes",
        "learner=3",
        "learner.lora_targets=(",
        "learner.lora_rank=513",
        "loss.kind=grpo",
        "loss.kl_coef=0.1",
        "loss={kind: sft, visual_weight: 0.5}",
        "loss.visual_frac=0.3",
        "loss.visual_weight=0",
        "rollout.num_actors=0",
        "rollout.temperature=0.001",
        "rollout.temperature=2.1",
        "curriculum.teacher_threshold=1.5",
        "curriculum={pool_sample: 10, num_selected: 11}",
        "curriculum={kind: tvdf, trpv: false, dbtp: false, pool_sample: 10}",
        "curriculum.select_by=video",
        "curriculum={kind: scc, select_by: video}",
        "prompt.template=When?",
        "prompt.answer_template={begin}",
        "prompt.style=own",
        "prompt.answer_template='{spans:.1f} {start}'",
        "prompt.answer_template='{spans:x}'",
        "data.eval.unreadable=drop",
        "data.eval.faulty=drop",
        "video.min_frames=1000",
        "max_policy_lag=-1",
        "worker_env=[1]",
    ],
)
def test_a_bad_value_is_named_by_its_key(path, override):
    key = override.partition("=")[0]
    section = key.rpartition(".")[0]
    message = problem(path, override)
    assert f" {key}" in message or f" {section}: " in message  # checks over several keys name the section
    assert message.startswith(f"config {path}: ")


@pytest.mark.parametrize("style", STYLES)
def test_a_prompt_style_sets_what_is_not_given_and_its_answers_are_understood(path, style, tmp_path):
    prompt = load_config(path, [f"prompt.style={style}"]).prompt
    assert {key: getattr(prompt, key) for key in STYLES[style]} == STYLES[style]
    truth = ((3.5, 12.0), (20.0, 21.5))
    text, written = prompt.answer(truth)
    assert written == (truth if style == "timelens2" else truth[:1])
    assert parse_spans(text, prompt.asks_for_sets) == written
    own = load_config(
        path, [f"prompt.style={style}", "prompt.template=When {query}?", "prompt.video_first=false"]
    )
    assert (own.prompt.template, own.prompt.video_first) == ("When {query}?", False)
    assert own.prompt.answer_template == STYLES[style]["answer_template"]
    (tmp_path / "again.yaml").write_text(dump_config(own, {}))
    assert load_config(tmp_path / "again.yaml").prompt == own.prompt


def test_cached_vision_features_ask_for_a_frozen_tower(path):
    assert "set freeze_vision" in problem(
        path, "learner.vision_cache_bytes=1000", "learner.freeze_vision=false"
    )
    assert "use zero_stage=2" in problem(
        path,
        "learner.vision_cache_bytes=1000",
        "learner.zero_stage=3",
        "learner.world_size=2",
        "learner.freeze_vision=true",
    )


def test_adapters_that_vllm_cannot_take_are_refused_unless_they_are_merged(path):
    on_gpu = ("learner.lora_rank=4", "rollout.num_gpus=1", "rollout.dtype=float32")
    assert "adapters on GPUs are bfloat16" in problem(path, *on_gpu)
    assert load_config(path, [*on_gpu, "learner.lora_publish=merged"])
    assert load_config(path, ["learner.lora_rank=513", "learner.lora_publish=merged"])


@pytest.mark.parametrize(
    ("overrides", "warnings"),
    [
        ([], []),
        (["rollout.num_actors=2", "max_policy_lag=1"], []),
        (
            ["rollout.num_actors=2"],
            [
                "rollout.num_actors=2, but 32 prompts in flight and rollout.prompts_per_call=32 give work "
                "to 1: set it to 16, or lower num_actors"
            ],
        ),
        (["rollout.num_actors=3", "rollout.prompts_per_call=10"], []),
        (["rollout.num_actors=5", "rollout.prompts_per_call=10"], ["give work to 4: set it to 6"]),
        (["rollout.num_actors=9", "groups_per_step=4"], ["give work to 1: lower num_actors"]),
        (["rollout.num_actors=9", "loss.kind=sft"], []),
        (["teacher_pool.num_replicas=8"], []),
        (
            ["teacher_pool.num_replicas=9"],
            ["num_replicas=9, but 32 prompts in flight are scored in 8 calls of 4"],
        ),
        (["teacher_pool.num_replicas=9", "loss.kind=off_policy_rkd"], ["are scored in 1 calls of 32"]),
        (["teacher_pool.num_replicas=9", "loss.kind=sft"], []),
        (
            ["learner.world_size=8", "groups_per_step=4"],
            ["learner.world_size=8, but an update has 4 responses"],
        ),
        (["learner.world_size=8", "groups_per_step=4", "rollout.rollouts_per_prompt=2"], []),
        (["learner.zero_stage=1"], ["zero_stage=1 adds gradients of 32 micro-batches in bfloat16: use"]),
        (["learner.zero_stage=0", "learner.micro_batch=16"], ["adds gradients of 2 micro-batches"]),
        (["learner.zero_stage=0", "learner.micro_batch=16", "learner.world_size=2"], []),
        (["learner.zero_stage=1", "learner.grad_accum_dtype=bfloat16"], []),
        (["learner.zero_stage=1", "learner.dtype=float32"], []),
    ],
)
def test_processes_that_would_never_have_work_are_warned_of(path, overrides, warnings):
    found = list(load_config(path, overrides).warnings())
    assert len(found) == len(warnings) and all(w in f for w, f in zip(warnings, found, strict=True)), found
    assert not any("\n" in line for line in found)


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_the_configs_that_come_along_give_work_to_all_processes(config):
    assert not list(load_config(config).warnings())


def test_every_problem_of_a_file_is_reported_at_once_in_one_line(path):
    message = problem(path, "num_steps=0", "learner.lrr=1", "loss.kind=x")
    assert message.count(f"config {path}: ") == 3
    assert all(key in message for key in ("num_steps=0", "learner.lrr", "loss.kind='x'"))


@pytest.mark.parametrize("override", ["num_steps", "=3", "", "learner.lr: 3"])
def test_an_override_without_key_or_value_says_how_to_write_one(path, override):
    assert "section.key=value" in problem(path, override)


@pytest.mark.parametrize("override", ["student.name=x", "data.train.videos.more=x"])
def test_an_override_cannot_go_inside_a_value(path, override):
    assert "is a value, not a section" in problem(path, override)


@pytest.mark.parametrize("override", ["learner.betas=[0.9,", "student={", 'student="open'])
def test_an_override_that_is_not_yaml_is_named(path, override):
    message = problem(path, override)
    assert repr(override) in message and "not YAML" in message


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["loss.kind=grpo", "rollout.rollouts_per_prompt=2"], "use merged_iou"),
        (["loss.task_weight=1", "loss.rewards=[video_opd.rewards:time_r1]"], "use merged_iou"),
        (
            ["loss.task_weight=1", "loss.rewards=[video_opd.rewards:merged_iou]", "loss.task_gate=0.5"],
            "task_gate",
        ),
        (["curriculum.kind=tvdf"], "multi_span_iou=best"),
    ],
)
def test_sets_are_not_scored_by_their_first_interval(path, overrides, told):
    assert told in problem(path, "prompt.style=timelens2", *overrides)


@pytest.mark.parametrize("text", ["a: [1,\nb: 2", "\tkey: value", "a: b: c", "key: \x00"])
def test_a_file_that_is_not_yaml_is_named(path, text):
    path.write_text(text)
    message = problem(path)
    assert str(path) in message and "not YAML" in message


def test_a_file_that_is_not_text_is_named(path):
    path.write_bytes(b"\xff\xfe\x00\x81binary")
    assert str(path) in problem(path)


@pytest.mark.parametrize("text", ["", "just words", "- 1\n- 2\n", "3"])
def test_a_file_that_is_no_mapping_is_named(path, text):
    path.write_text(text)
    message = problem(path)
    assert str(path) in message and "mapping" in message


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    assert f"{tmp_path / 'none.yaml'}: No such file" in problem(tmp_path / "none.yaml")
    assert f"{tmp_path}: Is a directory" in problem(tmp_path)


def test_overrides_reach_nested_keys_and_leave_the_rest(path):
    config = load_config(
        path, ["data.train.max_prompts=7", "learner.betas=[0.8, 0.95]", "loss.clamp=3", "run_name=a=b"]
    )
    assert config.data.sources[""].max_prompts == 7 and config.data.eval.max_prompts is None
    assert config.data.sources[""].annotations == "a.txt"
    assert config.learner.betas == (0.8, 0.95)
    assert config.loss.clamp == 3.0
    assert config.run_name == "a=b"
    assert config.num_steps == 3 and config.groups_per_step == Config.model_fields["groups_per_step"].default


def test_an_override_of_a_section_that_another_repeats_by_reference_changes_that_one_alone(path):
    path.write_text(
        "student: s\nteacher: t\nnum_steps: 3\n"
        "data:\n  train: &split {annotations: a.txt, lengths: l.csv, videos: v}\n  eval: *split\n"
    )
    config = load_config(path, ["data.train.max_prompts=7"])
    assert config.data.sources[""].max_prompts == 7 and config.data.eval.max_prompts is None


def test_later_overrides_win_and_null_unsets(path):
    assert load_config(path, ["num_steps=4", "num_steps=5"]).num_steps == 5
    assert load_config(path, ["checks.max_logprob_gap=null"]).checks.max_logprob_gap is None


@pytest.mark.parametrize("text", ["1e-6", "1E-6", "0.000001", "1.0e-6"])
def test_a_number_in_scientific_notation_is_a_number(path, text):
    """YAML 1.1 reads 1e-6 as text."""
    lr = load_config(path, [f"learner.lr={text}"]).learner.lr
    assert isinstance(lr, float) and lr == pytest.approx(1e-6, rel=1e-12)


LIKE_NUMBERS = [
    "20260101",
    "0123",
    "1.10",
    "1e3",
    "0x1F",
    "1_000",
    "12:30",
    "true",
    "no",
    "2026-01-01",
]


@pytest.mark.parametrize("text", [*LIKE_NUMBERS, "2026-13-45", "a #b", "1."])
def test_text_that_looks_like_something_else_is_as_it_is_written(path, text):
    """A key that holds text, one that may be unset, one of a choice, and the values of a mapping."""
    overrides = ("run_name", "student", "data.train.videos", "worker_env.A", "video.quarantine")
    config = load_config(path, [f"{key}={text}" for key in overrides])
    found = (config.run_name, config.student, config.data.sources[""].videos, config.worker_env["A"])
    assert {*found, config.video.quarantine} == {text}


@pytest.mark.parametrize("text", [*LIKE_NUMBERS, "2026-13-45", ".inf"])
def test_text_in_files_lists_and_sections_is_as_it_is_written(path, text, tmp_path):
    path.write_text(
        f"student: {text}\nnum_steps: 3\nteachers: [{{name: '7', model: {text}, prompts: {text}}}]\n"
        f"loss: {{kind: grpo, rewards: [{text}, a:b], kl_coef: 0.1}}\n"
        "rollout: {rollouts_per_prompt: 2}\n"
        f"worker_env: {{1: {text}, B: {text}}}\n"
        "data:\n  train: &split {annotations: a.txt, lengths: l.csv, videos: v}\n"
        f"  eval: {{<<: *split, videos: {text}}}\n"
    )
    config = load_config(path)
    assert config.student == config.teachers[0].model == config.teachers[0].prompts == text
    assert config.loss.rewards == (text, "a:b") and config.worker_env == {"1": text, "B": text}
    assert config.data.eval.videos == text and config.data.eval.lengths == "l.csv"
    (tmp_path / "again.yaml").write_text(dump_config(config, {"commit": text}))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize("text", ["'0123'", '"0123"', "  0123 "])
def test_quotes_and_space_around_text_do_not_belong_to_it(path, text):
    assert load_config(path, [f"student={text}"]).student == "0123"


@pytest.mark.parametrize("unset", ["null", "~", ""])
def test_null_unsets_text_that_may_be_unset_and_is_no_value_of_other_text(path, unset):
    config = load_config(path, ["run_name=a", f"run_name={unset}", "video.quarantine='null'"])
    assert config.run_name is None and config.video.quarantine == "null"
    assert "student=None" in problem(path, f"student={unset}")
    assert "worker_env.A=None" in problem(path, f"worker_env.A={unset}")


def test_numbers_and_choices_are_read_as_before(path):
    given = [
        "num_steps=7 # a week",
        "seed=0x10",
        "learner.freeze_vision=no",
        "loss.top_k=1_0",
        "loss.clamp=.5",
    ]
    config = load_config(path, given)
    assert (config.num_steps, config.seed, config.learner.freeze_vision) == (7, 16, False)
    assert (config.loss.top_k, config.loss.clamp) == (10, 0.5)
    assert "num_steps='2026-13-45'" in problem(path, "num_steps=2026-13-45")
    assert "loss.center='no'" in problem(path, "loss.center=no")  # as it is written, not False


def test_text_that_yaml_cannot_read_is_told_to_be_quoted(path):
    for text in ("*secret", "a: b: c", "@home", "<<", "="):
        assert "between single quotes" in problem(path, f"worker_env.A={text}")
        assert load_config(path, [f"worker_env.A='{text}'"]).worker_env["A"] == text


def test_many_problems_are_counted_and_a_long_value_is_cut(path):
    message = problem(path, *(f"key{i}=1" for i in range(1000)))
    assert message.count("unknown key") == 8 and message.endswith("; 992 more") and len(message) < 2000
    assert len(problem(path, f"num_steps={[1] * 5000}")) < 400


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "configs").glob("qwen*.yaml")))
def test_the_configs_for_real_models_start_on_charades_sta_as_it_is_published(name):
    """Four of its training intervals are reversed; others end up to two seconds after the video."""
    data = load_config(ROOT / "configs" / name).data
    train = data.sources[""]
    assert "charades_sta_train" in train.annotations
    assert (train.faulty, train.clamp_s, data.eval.faulty) == ("drop", 2.0, "error")


def test_a_configuration_cannot_be_changed(path):
    config = load_config(path)
    with pytest.raises(ValueError, match="frozen"):
        config.num_steps = 9
    with pytest.raises(ValueError, match="frozen"):
        config.learner.lr = 1.0


def test_what_is_dumped_is_loaded_again_whole(path, tmp_path):
    config = load_config(
        path, ["learner.lr=1e-6", "worker_env={A: '1'}", "loss.clamp=2", "prompt.template='At {query}: ä?'"]
    )
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config, {"python": "3.11", "versions": {"torch": "2"}}))
    assert load_config(copy) == config
    assert yaml.safe_load(copy.read_text())["environment"]["versions"] == {"torch": "2"}
    assert load_config(copy, ["num_steps=8"]).num_steps == 8


def test_relative_paths_are_resolved_against_the_working_directory(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = resolve_paths(load_config(path, ["teacher=/abs/teacher"]), tmp_path)
    assert config.student == str(tmp_path / "s") and config.teacher == "/abs/teacher"
    assert config.data.eval.videos == str(tmp_path / "v") and config.data.eval.lengths == str(
        tmp_path / "l.csv"
    )


def test_a_dataset_needs_no_lengths(path, tmp_path):
    config = resolve_paths(
        load_config(path, ["data.eval={annotations: m.parquet, videos: v, format: manifest}"]), tmp_path
    )
    assert config.data.eval.lengths is None and config.data.eval.annotations == str(tmp_path / "m.parquet")


def leaves() -> list[str]:
    """Dotted names of all keys that hold a value, found by walking an instance's dump."""
    tree = Config.model_validate(MINIMAL).model_dump()

    def walk(node, name):
        if isinstance(node, dict) and name not in ("worker_env", "learner.deepspeed"):
            return [
                leaf for key, value in node.items() for leaf in walk(value, f"{name}.{key}" if name else key)
            ]
        return [name]

    return walk(tree, "")


def test_help_lists_every_key_once_with_its_default(capsys):
    with pytest.raises(SystemExit) as ended:
        launch.parse_arguments(["--help"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for key in leaves():
        assert sum(line.startswith(f"  {key}=") for line in lines) == 1, key
    assert "  student=required  transformers folder, or ORG/NAME[@REVISION] of the Hugging Face hub" in lines
    assert any(line.startswith("  learner.lr=1e-06") for line in lines)


def test_values_and_options_come_in_any_order():
    parsed = launch.parse_arguments(["seed=1", "--dry-run", "num_steps=2", "--config", "c.yaml", "lr=3"])
    assert parsed.overrides == ["seed=1", "num_steps=2", "lr=3"] and parsed.dry_run


def test_every_described_key_can_be_overridden(path):
    described = [line.strip().partition("=")[0] for line in describe_keys()]
    described = [name for name in described if ".N." not in name]  # of the items of data.train as a list
    assert sorted(described) == sorted(leaves())


@pytest.mark.parametrize(
    ("overrides", "engine"),
    [
        ([], "vllm"),
        (["num_gpus=0.25"], "vllm"),
        (["num_gpus=0"], "transformers"),
        (["num_gpus=0", "tensor_parallel=2"], "vllm"),
        (["num_gpus=0", "engine=vllm"], "vllm"),
        (["engine=transformers"], "transformers"),
        (["attn_implementation=flash_attention_2"], "transformers"),
        (["engine=transformers", "attn_implementation=eager"], "transformers"),
    ],
)
def test_auto_is_vllm_on_gpus_and_transformers_where_that_alone_can(path, overrides, engine):
    config = load_config(path, [f"teacher_pool.{o}" for o in overrides])
    assert config.teacher_engine == engine
    for loss, can_choose in (("opd_full", False), ("off_policy_fkd", False), ("opd_topk", True)):
        if overrides in ([], ["num_gpus=0"]):
            other = load_config(path, [*(f"teacher_pool.{o}" for o in overrides), f"loss.kind={loss}"])
            assert other.teacher_engine == (engine if can_choose else "transformers")


@pytest.mark.parametrize("pool", ["engine=vllm", "tensor_parallel=2"])
def test_hidden_states_and_vllm_are_refused_in_one_line(path, pool):
    message = problem(path, "loss.kind=opd_full", f"teacher_pool.{pool}")
    assert message.count("use teacher_pool.engine=transformers and tensor_parallel=1") == 1


@pytest.mark.parametrize("pool", ["engine=vllm", "tensor_parallel=2"])
def test_given_tokens_and_vllm_without_gpus_are_refused_in_one_line(path, pool):
    student = "loss={kind: opd_topk, top_k_of: student}"
    assert load_config(path, [student, f"teacher_pool.{pool}"]).loss.student_top_k == 64
    message = problem(path, student, f"teacher_pool.{pool}", "teacher_pool.num_gpus=0")
    assert message.count("use teacher_pool.engine=transformers and tensor_parallel=1") == 1
