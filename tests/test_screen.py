"""What the terminal says of a step."""

from nanotoolrl.calls import UNHEALTHY_STATES
from nanotoolrl.look.screen import alarm


def test_alarm_names_token_and_state():
    calm = {f"state_{state}": 0.0 for state in UNHEALTHY_STATES}
    quiet = {"<tool_call>": {"growth": 9.9}, "<|im_end|>": {"growth": 1.0}}
    assert alarm(calm, calm, quiet) == alarm({}, {}, {}) == ""
    spiking = quiet | {"<tool_call>": {"growth": 12.0}, '{"': {"growth": 40.0}}
    loud = alarm(calm | {"state_bare": 0.5}, calm, spiking)
    assert "bare 50%" in loud and "<tool_call> x12" in loud and '{" x40' in loud and "im_end" not in loud
