"""The machine: what it has, how much memory a run needs, several processes, threads."""
