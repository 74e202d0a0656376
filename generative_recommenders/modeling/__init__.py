"""Models: item embeddings, preprocessors, encoders, postprocessors, similarities."""
