"""Times methods beside transformers' own generation, and against what the machine could do."""
