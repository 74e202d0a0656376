"""Transformers4Rec's masking schemes and ranking metrics over this package's parts."""
