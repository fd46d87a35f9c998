"""How many random examples a run tries: `pytest --hypothesis-profile=long` for many more."""

from hypothesis import settings

settings.register_profile("default", max_examples=8, deadline=None, derandomize=True, print_blob=True)
settings.register_profile("long", max_examples=100, deadline=None, print_blob=True)
