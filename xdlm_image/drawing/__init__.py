"""Drawing with pipelines: opening them, samplers and seeds, sets of images, class grids, and traces of the states."""
