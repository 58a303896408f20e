"""Training: prepare a run, take its steps, log, save. The loop is `loop.take_steps`."""
