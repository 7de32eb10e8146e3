# %% [markdown]
# # A tour: a model uses tools, collapses, and is rescued
#
# A million parameters on two CPU cores: no GPU, no download of weights. The whole takes about a quarter of an
# hour: six minutes the collapse, six the rescue, the rest the doctor.
#
# On your own machine start Jupyter in the repository. In Colab, first clone it in a cell of its own
# (`!git clone ADDRESS`, `%cd nanotoolrl`, `!pip install -r requirements.txt`). The notebook is made from
# `docs/tour.py`: `pip install jupytext nbclient ipykernel`, `jupytext --to ipynb --execute docs/tour.py`.

# %%
import os
import sys
import warnings
from pathlib import Path

if not Path("nanotoolrl").is_dir() and Path("../nanotoolrl").is_dir():
    os.chdir("..")
if not Path("nanotoolrl").is_dir():
    raise SystemExit("Start this notebook in the repository: clone it, and install requirements.txt.")
sys.path.insert(0, os.getcwd())
os.environ["TQDM_DISABLE"] = "1"  # figures are drawn as they come
warnings.filterwarnings("ignore", message="IProgress")

import nanotoolrl  # before torch
import torch

torch.set_num_threads(min(2, os.cpu_count()))
STEPS = int(os.environ.get("TOUR_STEPS", 20))  # a test takes fewer
COUNT = os.environ.get("TOUR_COUNT", "40")

# %% [markdown]
# ## A task
#
# The model sees tools and a wish. It writes calls, sees what they return, and replies. The verdict is about
# the world: is it as the ground truth leaves it?

# %%
import sample

_ = sample.main(["--task", "test-005-base"])
# %% [markdown]
# The same task, and the same model after the collapse that we are about to make:

# %%
_ = sample.main(["--model", "collapsed", "--task", "test-005-base"])
# %% [markdown]
# ## One step by hand
#
# Eight rollouts of a task; the reward of each; its advantage over the others.

# %%
from nanotoolrl.commandline import resolve
from nanotoolrl.loading import load
from nanotoolrl.run import Run, group_advantages, rollout
from nanotoolrl.updates import policy_update, rescore
from nanotoolrl.world.tasks import in_epochs, load_tasks

run = Run.begin(resolve({"scheme": "grpo", "prompts": 1, "updates": 1, "warmup": 0}), load("nano"))
run.next_step()
task = next(task for task in load_tasks("train") if task.id == "train-013-base")
rows = rollout(run, [task])
advantages = group_advantages(run, rows)
policy_update(run, rows, advantages)
for row, advantage in zip(rows, advantages.tolist()):
    change = sum(rescore(run.policy, row, 1.0)) - sum(row.logprobs)
    print(f"R {row.reward:.0f}  A {advantage:+.2f}  log-prob {change:+.2f}  {' '.join(row.states)}")

# %% [markdown]
# What was good has become likelier, what was bad less. [docs/1-one-step.md](1-one-step.md) does the same
# token by token.
#
# ## A collapse, live
#
# Plain GRPO, but for one thing: bad rollouts do not push control tokens down (`--guard 1`). Three curves:
# sampled success, the share of messages that are `bare` (a tag and nothing to call), and the probability of
# the tag where a reply is due. [docs/2-one-collapse.md](2-one-collapse.md) reads such a run.

# %%
import matplotlib.pyplot as plt
from IPython.display import clear_output, display

from nanotoolrl.probes import ProbeSet
from nanotoolrl.signals import SCHEMES


def train(scheme, **settings):
    """Steps of a scheme, drawn as they come; returns the run and its curves."""
    config = resolve({"scheme": scheme, "preset": "rescue", "steps": STEPS} | settings)
    run = Run.begin(config, load("nano"), load_tasks("train"))
    probes = ProbeSet(run.policy, load_tasks("val")[: config.probe_tasks], config.format)
    curves = {"success": [], "bare messages": [], "p(tag), reply due": []}
    for n in range(STEPS):
        run.next_step()
        tasks = in_epochs(run.tasks, str(config.seed), range(n * config.prompts, (n + 1) * config.prompts))
        step = SCHEMES[scheme].step(run, tasks)
        states = [state for row in step.trajectories for state in row.states]
        tag = probes.measure(run.policy).tokens["<tool_call>"]["start_reply"]
        success = sum(row.reward for row in step.trajectories) / len(step.trajectories)
        for curve, value in zip(curves.values(), (success, states.count("bare") / len(states), tag)):
            curve.append(value)
        clear_output(wait=True)
        figure, axes = plt.subplots(figsize=(7, 2.6))
        for name, curve in curves.items():
            axes.plot(range(1, n + 2), curve, label=name)
        axes.set(title=scheme, xlabel="step", ylim=(0, 1), xlim=(1, max(2, STEPS)))
        axes.legend(loc="upper left")
        display(figure)
        plt.close(figure)
    return run, curves


collapsed, fall = train("grpo")

# %% [markdown]
# ## What broke
#
# The doctor plays tasks in other formats, with the structure forced, and with half of the tokens taken from
# the start. (Few tasks here, and wide intervals; it takes 400 by default.)

# %%
from nanotoolrl import evaluate

_ = evaluate.main(["--doctor", "--model", "collapsed", "--compare", "nano", "--count", COUNT])
# %% [markdown]
# ## With a signal
#
# The same again, with one signal: after every fourth step, supervised training on the ground truth of the
# tasks whose rollouts all failed (ETS of Hao et al. 2026).

# %%
rescued, stands = train("ets")

# %%
figure, axes = plt.subplots(figsize=(7, 2.6))
for name, curves in (("grpo", fall), ("ets", stands)):
    axes.plot(range(1, STEPS + 1), curves["success"], label=name)
axes.set(xlabel="step", ylabel="sampled success", ylim=(0, None))
axes.legend()
display(figure)
plt.close(figure)

# %% [markdown]
# p(tag) shows the mechanism: in each round the tag becomes likelier where a reply is due, and each burst
# takes it back. One seed shows that it can happen; [docs/results.md](results.md) has more, with intervals,
# and what it costs.
