"""From data to an adapter's folder: texts, examples, tasks, the loop, checkpoints, ranks."""
