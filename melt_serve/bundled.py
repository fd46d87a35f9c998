"""Where the checkpoints that come with the package lie."""

from pathlib import Path

CHECKPOINTS = Path(__file__).parent / "checkpoints"
LOOPLM = CHECKPOINTS / "looplm-demo"
"""The teacher: a LoopLM, one KV row a (layer, token, loop)."""
MELT = CHECKPOINTS / "melt-demo"
"""Its student, which is served by default."""
