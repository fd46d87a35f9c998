"""How the student learns: its rows, its teacher, the losses, a phase."""
