"""A trajectory as a strip of tokens: all of them from the first user message on, coloured where trained."""

import pytest

from nanotoolrl.config import Config
from nanotoolrl.loading import load
from nanotoolrl.look import strips
from nanotoolrl.run import Run, rollout
from nanotoolrl.world.tasks import load_tasks


@pytest.fixture(scope="module")
def played():
    """(the policy, three rollouts of a task)"""
    run = Run.begin(Config(scheme="grpo", prompts=1, group=3), load("nano"))
    run.next_step()
    return run.policy, rollout(run, load_tasks("train")[:1])


def test_a_strip_holds_every_token_once(played):
    policy, rows = played
    for row, advantage in zip(rows, (0.7, -0.7, 0.0)):
        lines = strips.boxes_of(row, advantage, policy.chat)
        boxes = [box for line in lines for box in line]
        start = len(row.tokens) - len(boxes)
        assert (
            boxes[0][1] == policy.chat.layout.begin
            and boxes[1][1] == "user"
            and not any(row.loss_mask[:start])
        )
        for (_, text, color, logprob), t in zip(boxes, range(start, len(row.tokens))):
            assert text == policy.chat.decode([row.tokens[t]]).replace("\n", "\u23ce")
            assert logprob == (row.logprobs[t] if row.loss_mask[t] else None)
            up, down = row.loss_mask[t] and advantage > 0, row.loss_mask[t] and advantage < 0
            assert color == (strips.GOOD if up else strips.BAD if down else strips.GIVEN)
        for line in lines:
            edges = [box[0] for box in line]
            assert edges == sorted(set(edges)) and edges[0] == 0 and edges[-1] < strips.WIDTH


def test_drawn(played, tmp_path):
    policy, rows = played
    strips.draw(rows[:2], [0.5, -0.5], policy.chat, tmp_path / "new" / "s.png")
    assert (tmp_path / "new" / "s.png").stat().st_size > 5000
