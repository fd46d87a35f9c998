"""A step makes the host wait for nothing but exits, and for those once a loop."""

from tests.engine.engines import on
from tests.engine.waits import judge_waits


@on("token", "chunk")
def test_a_step_waits_for_exits_alone(served):
    judge_waits(served)
