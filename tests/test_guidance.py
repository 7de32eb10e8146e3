"""The hinted teacher of `selfdistil`, and the restart of an optimiser, by hand."""

import pytest
import torch
from helpers.models import tiny_policy, whole_logits
from helpers.updates import all_close, gradient_of, loss_by_hand, made_up, make_run, objective_of, tasks

from nanotoolrl import guidance
from nanotoolrl.run import begin_anew
from nanotoolrl.signals import SCHEMES
from nanotoolrl.updates import policy_update, warm_up


@pytest.mark.parametrize("at_once", [3, 1000])
def test_selfdistil_by_hand(tiny, monkeypatch, at_once):
    """GRPO, and the gated KL to the same model under another prompt, place by place."""
    monkeypatch.setattr(guidance, "ROWS_AT_ONCE", at_once)
    monkeypatch.setattr(guidance, "hint_text", lambda task, format: f"Say {task.id}.")
    rows, advantages = made_up(tiny)
    for i, row in enumerate(rows):
        row.task_id = f"t{i // 4}"
    gradients, _ = objective_of("selfdistil", monkeypatch, tiny, rows, advantages, distil_coef=0.7)
    loss = loss_by_hand(tiny, rows, advantages, make_run(tiny).config)
    count = sum(row.sampled_tokens for row in rows)
    hinted = {
        task.id: tiny.chat.prompt_ids(*guidance.Episode(task).prompt(), "hermes", f"Say {task.id}.")
        for task in tasks()
    }
    for row in rows:
        ids, mask = guidance.under(row, hinted[row.task_id])
        ours = torch.log_softmax(whole_logits(tiny, torch.tensor([row.tokens]))[0], -1)
        theirs = torch.log_softmax(whole_logits(tiny, torch.tensor([ids]))[0], -1).detach()
        places = [t for t, on in enumerate(row.loss_mask) if on]
        others = [t for t, on in enumerate(mask) if on]
        for t, u in zip(places, others, strict=True):
            p, q = ours[t - 1], theirs[u - 1]
            token = row.tokens[t]
            gate = q[token].exp() / (q[token].exp() + p[token].exp()).detach()
            loss = loss + 0.7 * gate * (q.exp() * (q - p)).sum() / count
    all_close(gradients[0], gradient_of(loss, tiny), atol=2e-5, rtol=1e-3)


def test_a_restart_forgets_moments_and_warms_up_anew(policy):
    tiny = tiny_policy(policy.tokenizer)
    run = make_run(tiny, torch.optim.AdamW, lr=1e-3, warmup=4, kl=0.1)
    run.step = 1
    policy_update(run, *made_up(tiny))
    assert run.optimizer.state and warm_up(run) == 0.5
    run.step = 6
    assert warm_up(run) == 1.0
    begin_anew(run)
    assert not run.optimizer.state and warm_up(run) == 0.5 and run.optimizer.param_groups[0]["lr"] == 1e-3
    held = run.state.reference["lm_head.weight"]
    assert torch.equal(held, tiny.model.lm_head.weight) and held is not tiny.model.lm_head.weight


def test_restarts_come_every_so_many_steps(tiny, monkeypatch):
    """At steps 4, 7, 10 with --restart-steps 3; never with 0."""
    from nanotoolrl import schemes

    for every, expected in ((3, [4, 7, 10]), (0, [])):
        run = make_run(tiny, restart_steps=every)
        begun = []
        monkeypatch.setattr(schemes, "begin_anew", lambda run, begun=begun: begun.append(run.step))
        monkeypatch.setattr(schemes, "grpo", lambda run, tasks: None)
        for _ in range(10):
            run.step += 1
            SCHEMES["restart"].step(run, tasks())
        assert begun == expected
