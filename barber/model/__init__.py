"""A model's decoder layers: where they come from, how they are cut open, where they go."""
