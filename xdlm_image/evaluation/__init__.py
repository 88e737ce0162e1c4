"""Evaluation: images against references, sweeps over step counts, NELBO, copies, and the pages that tell of them."""
