"""What everything runs on: tensors and their arithmetic, memory, processes, caches; nothing here knows a model."""
