"""One run over several devices: a process for each, which share the rows of every step."""
