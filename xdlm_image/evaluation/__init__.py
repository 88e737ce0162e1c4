"""Evaluation: references, FID and its kin over step counts, NELBO, and the tables and pages that tell them."""
