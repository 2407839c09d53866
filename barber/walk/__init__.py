"""The walk over the decoder layers, and what looks at them before it."""
