"""Floor 7: the command line, one small file a command group. `main.py` is the table of commands, imported on call."""
