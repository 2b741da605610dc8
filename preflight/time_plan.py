"""The seconds of a step and of the passes over the pool, on GPUs of a kind: preflight/time.py by a device.

Assumed, beside the shares in Utilisation and what preflight/sharing.py says: a response has
max_response_tokens; the largest of several teachers scores every prompt; GPUS_A_NODE ranks are on one node.
Not counted: start-up, checkpoints, what Python and Ray do between calls, launches of kernels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil, inf

from preflight import time
from preflight.devices import Device, Utilisation
from preflight.memory import kv_bytes_per_token
from preflight.memory_fit import MemoryPlan
from preflight.model_shapes import DTYPE_BYTES, ModelShapes, count, parameters
from preflight.pools import Pool
from preflight.rounds import most_presented, steps_of_round
from preflight.sharing import learner_shares, prompts_of_a_clip, teacher_shares, tree_of
from preflight.time import Operations, Sizes
from preflight.zero import adds_on_host, trained
from video_opd.config import Config, RolloutConfig
from video_opd.config_data import Attention
from video_opd.config_teachers import TeacherConfig

FUSED = "flash_attention_2"  # vLLM's: no pairs are masked
SAMPLE = 1000  # prompts, where a pool is not here
GPUS_A_NODE = 8
NETWORK_BYTES_S = 50e9  # a GPU's, between nodes: assumed, 400 Gb/s
STORE_BYTES_S = 5e9  # Ray's object store, from put to get: measured on a CPU, docs/performance.md
HOST_BYTES_S = 5e9  # a CPU's share of its memory's bandwidth, for optimizer states on the host: assumed
ADAM_BYTES = 28  # moments and masters read and written, a float32 gradient read
# CPU seconds, measured on the machine of docs/performance.md: h264 of 360p; for each token of a prompt
# transformers' video processor, which vLLM calls; without it, frames from the node's cache and token ids.
DECODE_S_A_MEGAPIXEL = 1.0e-3
PIXELS_S_A_TOKEN = 4.8e-5
READ_S_A_TOKEN = 1e-6


@dataclass(frozen=True)
class Phase:
    """What the processes of one role do in a step. Seconds."""

    name: str
    processes: int
    unit: str
    num_units: int  # of the process that has most
    terms: Mapping[str, float]  # of a unit
    feed: float = 0.0  # of a unit: a CPU reads and encodes it while the engine computes others
    once: Mapping[str, float] = field(default_factory=dict)  # of a step

    @property
    def unit_s(self) -> float:
        return max(sum(self.terms.values()), self.feed)

    @property
    def seconds(self) -> float:
        return self.num_units * self.unit_s + sum(self.once.values())

    @property
    def waits_for_feed(self) -> bool:
        return self.feed > sum(self.terms.values())


@dataclass(frozen=True)
class Pass:
    """Answers to all prompts of a pool, or rollouts and their scores."""

    name: str
    times: int
    num_prompts: int
    seconds: float  # each time


@dataclass(frozen=True)
class TimePlan:
    """A configuration on GPUs of one kind."""

    config: Config
    memory: MemoryPlan
    device_name: str
    device: Device
    use: Utilisation
    train: Pool
    evaluation: Pool
    kv_caches: Mapping[str, float]  # bytes of an engine's shard, by role; inf: what it takes

    def of(self, config: Config) -> "TimePlan":
        """The plan of a variant of the configuration."""
        return replace(self, config=config)

    @property
    def phases(self) -> dict[str, Phase]:
        """By name, those that a step has."""
        needs = self.config.loss.needs
        found = [self._rollout()] if needs.rollouts else []
        found += [self._score()] if needs.teacher != "none" and self.memory.teacher else []
        found += [self._update()]
        found += [self._publish()] if self.config.rollout.num_actors and needs.rollouts else []
        return {phase.name: phase for phase in found}

    @property
    def step_s(self) -> float:
        """At max_policy_lag 0 the phases follow each other, but the score begins with the first results.

        Above 0: the slowest phase, or a step's way from end to end through lag + 1 steps in flight; the
        learner publishes after its update. Roles on shared GPUs take turns."""
        lag, phases = self.config.max_policy_lag, self.phases
        seconds = {name: phase.seconds for name, phase in phases.items()}
        rollout, score = seconds.get("rollout", 0.0), seconds.get("score", 0.0)
        learner = seconds["update"] + seconds.get("publish", 0.0)
        per_result = self.config.rollout.prompts_per_result
        parts = max(1.0, phases["rollout"].num_units / per_result) if "rollout" in phases else 1.0
        through = max(rollout + score / parts, rollout / parts + score) + learner
        shared = self._busy_s() if self.config.shares_gpus else 0.0
        if not lag:
            return max(through, shared)
        return max(rollout, score, learner, through / (lag + 1), shared)

    def at_lag(self, lag: int) -> "TimePlan":
        return self.of(self.config.model_copy(update={"max_policy_lag": lag}))

    def _busy_s(self) -> float:
        """Seconds that all processes compute in a step, divided by the number of GPUs."""
        gpus = ceil(sum(r.processes * r.gpu_share for r in self.memory.of(self.config)) - 1e-6)
        return sum(p.processes * p.num_units * sum(p.terms.values()) for p in self.phases.values()) / gpus

    # --- phases ---

    def _rollout(self) -> Phase:
        config, size = self.config, self.train.student
        rollout, number = config.rollout, config.rollout.rollouts_per_prompt
        num_units = self._largest_share(rollout.num_actors, rollout.prompts_per_call)
        shapes, responses = self.memory.student, num_units * number
        decode_s = self._decode_s(rollout, shapes, size, responses, rollout.max_num_seqs) / num_units
        prompts = prompts_of_a_clip(config, self.train)
        prefill_s = self._prefill_s(rollout, shapes, self._prompt(shapes, size, prompts), size)
        terms = {"prefill": prefill_s, "decode": decode_s}
        feed = self._feed_s(size, rollout.num_cpus, PIXELS_S_A_TOKEN, self.train.megapixels) / prompts
        return Phase("rollout", rollout.num_actors, "prompt", num_units, terms, feed)

    def _score(self) -> Phase:
        config, pool, shapes = self.config, self.config.teacher_pool, self.memory.teacher
        size, tree = self.train.teacher, teacher_shares(config, self.train).tree
        assert shapes and size, "asked only where the objective has a teacher"
        rows = tree.members * config.rollout.max_response_tokens
        of_tree = time.tree_forward(shapes, size, tree, rows, self._teacher_attention)
        operations = of_tree * (config.responses_per_prompt / tree.members)
        num_units = self._largest_share(pool.num_replicas, config.rollout.prompts_per_result)
        terms = {"prefill": self._views * self._prefill_s(pool, shapes, operations, size)}
        feed = self._feed_s(size, pool.num_cpus, self._views * self._teacher_pixels_s)
        return Phase("score", pool.num_replicas, "prompt", num_units, terms, feed)

    def _update(self) -> Phase:
        """ZeRO-3 gathers weights while it computes (overlap_comm), unless gathering takes longer."""
        config, learner, shapes = self.config, self.config.learner, self.memory.student
        size, response = self.train.student, config.rollout.max_response_tokens
        shared = learner_shares(config, self.train)
        tree = shared.tree
        operations = time.update(shapes, learner, size, tree, response).total / tree.members
        compute_s = operations / (self._operations_s(shapes, learner.dtype) * self.use.training)
        fit = min(learner.micro_batch / tree.members, (learner.tree_tokens or inf) / tree.tokens)
        of_pass = max(1, int(fit + 1e-9)) * tree.members  # trees are not divided to fill a pass
        passes = ceil(shared.sequences / (learner.world_size * of_pass) - 1e-9)
        moved_s, once = self._learner_transfers()
        moved_s /= of_pass
        overlaps = learner.zero_option("overlap_comm", learner.zero_stage == 3)
        waits_s = max(moved_s - compute_s, 0) if overlaps else moved_s
        terms = {"forward and backward": compute_s, "waits for links": waits_s}
        feed = self._feed_s(size, learner.num_cpus, READ_S_A_TOKEN)
        units = ceil(passes * of_pass - 1e-9)
        return Phase("update", learner.world_size, "response", units, terms, feed, once)

    def _learner_transfers(self) -> tuple[float, dict[str, float]]:
        """Seconds of a micro-batch, and of a step by what they are for. n ranks, P weights, T trained.

        Each micro-batch: ZeRO-3 gathers eP (n - 1) / n forward and again backward; ZeRO-2 and 3 reduce
        gradients of eT to their owners. Each step: ZeRO-0 and 1 sum them, twice as much; Adam reads and
        writes ADAM_BYTES T / n and the new weights, on the host with offload_optimizer. Offloads use PCIe."""
        learner, shapes = self.config.learner, self.memory.student
        e, n = DTYPE_BYTES[learner.dtype], learner.world_size
        weights, own = e * count(parameters(shapes)), count(trained(shapes, learner))
        link, pcie = (rate * self.use.bandwidth for rate in (self._link(n), self.device.pcie))
        others = (n - 1) / n
        batch_s = others * e * own / link if learner.zero_stage >= 2 else 0.0
        step_s = 0.0 if learner.zero_stage >= 2 else 2 * others * e * own / link
        if learner.zero_stage == 3:
            batch_s += 2 * others * weights / link
        if learner.offload("param") != "none":
            batch_s += 2 * weights / n / pcie
        part = own / (n if learner.zero_stage else 1)
        adam_s = (ADAM_BYTES + e) * part / (self.device.memory * self.use.bandwidth)
        if learner.offload("optimizer") != "none":
            adam_s = (ADAM_BYTES + e) * part / (HOST_BYTES_S * max(learner.num_cpus, 1))
            batch_s += 4 * part / pcie if adds_on_host(learner) else 0.0
            step_s += (4 + e) * part / pcie
        return batch_s, {"optimizer": adam_s} | ({"sums over ranks": step_s} if step_s else {})

    def _publish(self) -> Phase:
        """One version. Ranks of ZeRO-3 gather it first.

        object_store: to the host, through Ray, to each actor's GPU at the same time. collective: once over
        the links. ipc: once through the GPU's memory."""
        learner, shapes = self.config.learner, self.memory.student
        of = trained(shapes, learner) if learner.publishes_adapters else parameters(shapes)
        size = DTYPE_BYTES[learner.dtype] * count(of)
        link, pcie, memory = (
            size / (rate * self.use.bandwidth)
            for rate in (self._link(learner.world_size), self.device.pcie, self.device.memory)
        )
        gather = {"gather": link} if learner.zero_stage == 3 and learner.world_size > 1 else {}
        in_store = {"PCIe": 2 * pcie, "object store": size / STORE_BYTES_S}
        ways = {"collective": {"broadcast": link}, "ipc": {"copy": memory}, "object_store": in_store}
        return Phase("publish", 1, "version", 1, gather | ways[self.config.weight_transfer])

    # --- passes ---

    def student_answers_s(self, pool: Pool, num_prompts: int, number: int = 1) -> float:
        """`number` answers of the actors to each prompt, the prompts of a video one after another."""
        engine, shapes, size = self.config.rollout, self.memory.student, pool.student
        each = num_prompts / engine.num_actors
        operations = self._prompt(shapes, size, pool.prompts_a_video)
        prefill_s = each * self._prefill_s(engine, shapes, operations, size)
        decode_s = self._decode_s(engine, shapes, size, ceil(each) * number, engine.max_num_seqs)
        return max(prefill_s + decode_s, each * self._pass_feed_s(pool, engine.num_cpus, PIXELS_S_A_TOKEN))

    def teacher_answers_s(self, pool: Pool, num_prompts: int, number: int, more_replicas: int = 0) -> float:
        """`number` answers of the replicas to each prompt, which is computed once."""
        engine, shapes, size = self.config.teacher_pool, self.memory.teacher, pool.teacher
        assert shapes and size, "asked only where there is a teacher"
        each = num_prompts / (engine.num_replicas + more_replicas)
        of_pass, at_once = engine.micro_batch, engine.micro_batch * number
        if self.config.teacher_engine == "vllm":  # its caches outlast a pass
            of_pass, at_once = inf, engine.micro_batch
        operations = self._prompt(shapes, size, pool.prompts_a_video, self._teacher_attention, of_pass)
        prefill_s = each * self._prefill_s(engine, shapes, operations, size)
        decode_s = self._decode_s(engine, shapes, size, ceil(each) * number, at_once)
        feed_s = each * self._pass_feed_s(pool, engine.num_cpus, self._teacher_pixels_s)
        return max(prefill_s + decode_s, feed_s)

    def scored_rollouts_s(self, pool: Pool, num_prompts: int) -> float:
        """A rollout for each prompt while the teacher scores others; on shared GPUs in turns."""
        both = self.student_answers_s(pool, num_prompts), self.teacher_scores_s(pool, num_prompts)
        return sum(both) if self.config.shares_gpus else max(both)

    def teacher_scores_s(self, pool: Pool, num_prompts: int) -> float:
        """The replicas' scores of a response to each prompt, those of a video in one call."""
        engine, shapes, size = self.config.teacher_pool, self.memory.teacher, pool.teacher
        assert shapes and size, "asked only where there is a teacher"
        rollout = self.config.rollout
        most = inf if self.config.teacher_engine == "vllm" else engine.micro_batch
        prompts = min(pool.prompts_a_video, rollout.prompts_per_result)
        tree = tree_of(self.config, size, prompts, 1, rollout.max_response_tokens, most)
        rows = tree.members * rollout.max_response_tokens
        operations = time.tree_forward(shapes, size, tree, rows, self._teacher_attention)
        prefill_s = self._prefill_s(engine, shapes, operations * (1 / tree.members), size)
        feed_s = self._pass_feed_s(pool, engine.num_cpus, self._teacher_pixels_s)
        return num_prompts / engine.num_replicas * max(prefill_s, feed_s)

    def _pass_feed_s(self, pool: Pool, num_cpus: float, a_token_s: float) -> float:
        return self._feed_s(pool.student, num_cpus, a_token_s, pool.megapixels) / pool.prompts_a_video

    def _prompt(
        self, shapes: ModelShapes, size: Sizes, prompts: float, how: Attention = FUSED, most: float = inf
    ) -> Operations:
        """One of so many of a clip, up to its first token of an answer; most: prompts of a pass."""
        tree = tree_of(self.config, size, prompts, most=most)
        return time.tree_forward(shapes, size, tree, tree.members, how) * (1 / tree.members)

    @property
    def passes(self) -> list[Pass]:
        """Over the pools, or SAMPLE prompts where a pool is not here; at most: no prompt is dropped."""
        config, curriculum = self.config, self.config.curriculum
        whole, held_out = (of.num_prompts or SAMPLE for of in (self.train, self.evaluation))
        pool = min(whole, curriculum.pool_sample or whole)
        found = []
        if self.memory.teacher and curriculum.asks_teacher:
            number, later = curriculum.num_teacher_predictions, min(whole, self._rounds() * pool) - pool
            seconds = self.teacher_answers_s(self.train, pool, number, self._idle_replicas())
            found.append(Pass("teacher (TRPV)", 1, pool, seconds))
            if later:  # other samples of the pool
                seconds = self.teacher_answers_s(self.train, later, number)
                found.append(Pass("teacher in later rounds", 1, later, seconds))
        if curriculum.scores_student and self.memory.teacher:
            seconds = self.scored_rollouts_s(self.train, pool)
            found.append(Pass("scored rollouts (DBTP)", self._rounds(), pool, seconds))
        elif curriculum.asks_student:
            seconds = self.student_answers_s(self.train, pool, curriculum.num_student_predictions)
            name = "student (DBTP)" if curriculum.kind == "tvdf" else "student"
            found.append(Pass(name, self._rounds(), pool, seconds))
        if config.rollout.num_actors:  # before, after, without video, and every eval_every steps
            every = config.eval_every
            times = 3 + (config.num_steps // every - (config.num_steps % every == 0) if every else 0)
            seconds = self.student_answers_s(self.evaluation, held_out)
            found.append(Pass("evaluation", times, held_out, seconds))
        if self.memory.teacher:
            seconds = self.teacher_answers_s(self.evaluation, held_out, 1)
            found.append(Pass("teacher's evaluation", 1, held_out, seconds))
        return found

    def _idle_replicas(self) -> int:
        """More replicas, on the GPUs of a learner that waits for TRPV: where one node has all of them."""
        learner, rollout, pool = self.config.learner, self.config.rollout, self.config.teacher_pool
        shards = rollout.num_actors * rollout.tensor_parallel + pool.num_replicas * pool.tensor_parallel
        one_node = learner.world_size + shards <= GPUS_A_NODE and not self.config.shares_gpus
        fixed = len(self.config.teacher_models) == 1 and pool.max_replicas is None
        return learner.world_size // pool.tensor_parallel if one_node and fixed else 0

    def _rounds(self) -> int:
        config, curriculum = self.config, self.config.curriculum
        selected = curriculum.num_selected or curriculum.pool_sample or self.train.num_prompts
        if curriculum.kind != "tvdf" or not selected:
            return 1
        return ceil(config.num_steps / steps_of_round(config, selected))

    @property
    def knows_pools(self) -> bool:
        return bool(self.train.num_prompts and self.evaluation.num_prompts)

    @property
    def steps_s(self) -> float:
        """All steps; a step that has fewer prompts takes so much less time."""
        return most_presented(self.config) / self.config.groups_per_step * self.step_s

    @property
    def run_s(self) -> float:
        """All steps, and the passes if the prompts are here."""
        passes = sum(p.times * p.seconds for p in self.passes) if self.knows_pools else 0.0
        return self.steps_s + passes

    # --- what they share ---

    def _largest_share(self, processes: int, at_once: int) -> int:
        """Prompts of a step for the process that gets most; at lag 0 they come `at_once`."""
        prompts = self.config.groups_per_step
        if self.config.max_policy_lag:
            return ceil(prompts / processes)
        return min(prompts, ceil(ceil(prompts / at_once) / processes) * at_once)

    def _operations_s(self, shapes: ModelShapes, dtype: str) -> float:
        if shapes.fp8:
            return self.device.fp8
        return self.device.float32 if dtype == "float32" else self.device.bfloat16

    def _prefill_s(
        self, engine: RolloutConfig | TeacherConfig, shapes: ModelShapes, work: Operations, size: Sizes
    ) -> float:
        shards = engine.tensor_parallel
        operations_s = shards * self._operations_s(shapes, engine.dtype) * self.use.prefill
        sent = time.shard_bytes(shapes, engine.dtype, shards, size.tokens)
        return work.total / operations_s + sent / (self.device.link * self.use.bandwidth)

    def _decode_s(
        self,
        engine: RolloutConfig | TeacherConfig,
        shapes: ModelShapes,
        size: Sizes,
        number: int,
        at_once: int,
    ) -> float:
        """`number` responses of one engine, at most `at_once`, and as many as its KV cache holds."""
        response, shards = self.config.rollout.max_response_tokens, engine.tensor_parallel
        kv_cache = self.kv_caches["actors" if isinstance(engine, RolloutConfig) else "teacher"]
        fit = kv_cache // ((size.tokens + response) * kv_bytes_per_token(shapes, engine.dtype, shards))
        at_once = int(max(1, min(number, at_once, fit)))
        read = time.decode_bytes(shapes, engine.dtype, shards, size, (number, response), at_once)
        return read / (self.device.memory * self.use.bandwidth)

    @property
    def _views(self) -> int:
        """Passes to score a response that is trained on: one more on grey frames with loss.visual_weight."""
        return 2 if self.config.loss.visual_weight else 1

    @property
    def _teacher_attention(self) -> Attention:
        on_vllm = self.config.teacher_engine == "vllm"
        return FUSED if on_vllm else self.config.teacher_pool.attn_implementation

    @property
    def _teacher_pixels_s(self) -> float:
        return PIXELS_S_A_TOKEN if self.config.teacher_engine == "vllm" else READ_S_A_TOKEN

    def _feed_s(self, size: Sizes, num_cpus: float, a_token_s: float, megapixels: float = 0.0) -> float:
        return (a_token_s * size.tokens + DECODE_S_A_MEGAPIXEL * megapixels) / max(num_cpus, 1)

    def _link(self, ranks: int) -> float:
        return self.device.link if ranks <= GPUS_A_NODE else NETWORK_BYTES_S
