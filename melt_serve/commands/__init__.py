"""Flags of the commands whose code is heavy to import: `melt-serve --help` reads this, and waits for nothing."""
