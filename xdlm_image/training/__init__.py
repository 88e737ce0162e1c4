"""Training the transformer: the loop, checkpoints, going on, validation, and what several processes share."""
