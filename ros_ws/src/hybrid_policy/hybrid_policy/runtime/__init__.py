"""A model becomes an engine: recipes, CUDA graphs, timing."""
