"""Drawing with pipelines: opening them, sampler settings, sets of images, class grids, and traces of the states."""
