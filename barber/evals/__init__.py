"""What is measured of a model. One file a kind; `evaluation` puts them together, `results` says what comes out."""
