"""TRL's side of `bench step`: one whole step of its GRPOTrainer on our environment, replaying given tokens.

It is driven through `rollout_func`, the one hook whose loop can hold several user turns. Every assistant
message is written by the trainer's own `_generate_single_turn`, as in its own tool loop: transformers'
generate, left-padded, on all ids so far. Tokens, masks and rewards are asserted to be those of the given
trajectories. Settings are those of our config; the loss is "dapo", the mean over all sampled tokens.
"""

import os
import tempfile
import time

import transformers

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when they are imported: no telemetry
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from datasets import Dataset
from transformers import LogitsProcessorList, PreTrainedModel, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from bench.replay import ReplayProcessor
from nanotoolrl.env import Episode, Task
from nanotoolrl.model import Policy
from nanotoolrl.trajectory import Trajectory


class TrlStep:
    """Called, it makes one step from the initial weights and returns its seconds, without those of setting
    the trainer up; `grad_norm` is what TRL logged of the last. model: the policy as transformers has it."""

    def __init__(
        self,
        config: object,
        tasks: list[Task],
        rows: list[Trajectory],
        policy: Policy,
        model: PreTrainedModel,
    ) -> None:
        transformers.logging.set_verbosity_error()
        self.config, self.rows, self.tasks = config, rows, {task.id: task for task in tasks}
        self.chat, self.model, self.grad_norm = policy.chat, model, float("nan")
        self.started = self.ended = 0.0
        self.initial = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.generation_config.eos_token_id = self.chat.stop_ids
        generate, self.replay = self.model.generate, None
        # GRPOTrainer has no setting for a logits processor.
        self.model.generate = lambda **arguments: generate(
            **arguments, logits_processor=LogitsProcessorList([self.replay])
        )
        self.tokenizer, self.device = policy.tokenizer, policy.device

    def __call__(self) -> float:
        config = self.config
        self.model.load_state_dict(self.initial)
        with tempfile.TemporaryDirectory() as out:
            settings = GRPOConfig(
                output_dir=out,
                max_steps=1,
                per_device_train_batch_size=1,  # fastest on a CPU: its forward computes padding
                gradient_accumulation_steps=len(self.rows),
                num_generations=config.group,
                shuffle_dataset=False,
                max_completion_length=config.max_new_tokens,
                temperature=config.temperature,
                top_p=1.0,
                top_k=0,
                loss_type="dapo",
                scale_rewards="group",
                beta=0.0,
                epsilon=config.clip,
                epsilon_high=config.clip_high,
                delta=config.dual_clip,
                learning_rate=config.lr,
                weight_decay=config.weight_decay,
                lr_scheduler_type="constant",
                max_grad_norm=config.grad_clip,
                use_cpu=self.device.type == "cpu",
                bf16=False,
                gradient_checkpointing=False,
                dataloader_pin_memory=False,
                report_to="none",
                logging_steps=1,
                save_strategy="no",
                disable_tqdm=True,
            )
            trainer = GRPOTrainer(
                model=self.model,
                args=settings,
                processing_class=self.tokenizer,
                reward_funcs=lambda episode_reward, **_: episode_reward,
                train_dataset=Dataset.from_dict({"prompt": list(self.tasks)}),
                rollout_func=self._rollout,
                callbacks=[_Log(self)],
            )
            for callback in list(trainer.callback_handler.callbacks):
                if "Printer" in type(callback).__name__:
                    trainer.remove_callback(type(callback))
            trainer.train()
        return self.ended - self.started

    def _rollout(self, prompts: list[str], trainer: GRPOTrainer) -> dict:
        """All rows in lock-step turns, as in TRL's own tool loop; a prompt is the id of a task."""
        chat, config = self.chat, self.config
        episodes = [
            Episode(self.tasks[name], config.format, config.max_messages, config.strict_empty_turn)
            for name in prompts
        ]
        start = [chat.prompt_ids(*episode.prompt(), episode.format) for episode in episodes]
        written: list[list[int]] = [[] for _ in prompts]
        mask: list[list[int]] = [[] for _ in prompts]
        scripts = [row.spoken_ids() for row in self.rows]
        live, turn = list(range(len(prompts))), 0
        while live:
            contexts, wanted = [start[i] + written[i] for i in live], [scripts[i][turn] for i in live]
            self.replay = ReplayProcessor(wanted, max(map(len, contexts)), chat.end_id)
            groups = trainer.num_generations if turn == 0 else 1
            sampled = trainer._generate_single_turn(contexts, None, {}, groups)[0]
            still = []
            for i, ids, message in zip(live, sampled, wanted, strict=True):
                ids = ids[: len(message)]  # a cut message is ended by the replay, and cut again
                written[i], mask[i] = written[i] + ids, mask[i] + [1] * len(ids)
                stopped = ids[-1] in chat.stop_ids
                answer = episodes[i].step(chat.decode(ids[:-1] if stopped else ids), overlong=not stopped)
                if answer is None:
                    continue
                more = chat.extend_ids(answer, ids[-1])
                if len(start[i]) + len(written[i]) + len(more) + 1 >= config.context:
                    episodes[i].abort("the context is full")
                    continue
                written[i], mask[i] = written[i] + more, mask[i] + [0] * len(more)
                still.append(i)
            live, turn = still, turn + 1
        for i, row in enumerate(self.rows):
            n = row.prompt_length
            same = start[i] == row.tokens[:n] and written[i] == row.tokens[n:]
            assert same and mask[i] == row.loss_mask[n:] and episodes[i].reward == row.reward, row.task_id
        return {
            "prompt_ids": start,
            "completion_ids": written,
            "logprobs": None,  # the trainer's own forward makes them
            "env_mask": mask,
            "episode_reward": [episode.reward for episode in episodes],
        }


class _Log(TrainerCallback):
    def __init__(self, step: TrlStep) -> None:
        self.step = step

    def on_step_begin(self, *_: object, **__: object) -> None:
        self.step.started = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        self.step.ended = time.perf_counter()

    def on_log(
        self, args: object, state: object, control: object, logs: dict | None = None, **_: object
    ) -> None:
        if logs and "grad_norm" in logs:
            self.step.grad_norm = float(logs["grad_norm"])
