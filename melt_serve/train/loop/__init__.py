"""How a run survives: the loop of steps, states, logs, several processes, export."""
