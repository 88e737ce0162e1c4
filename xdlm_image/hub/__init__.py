"""Self-contained folders for model hubs: the verb `export`, and model cards from the files of a run.

Saving, loading and uploading themselves are methods of the pipeline (`pipelines/self_contained.py`), as they travel.
"""
