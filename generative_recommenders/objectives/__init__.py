"""Objectives: training examples, negative samplers, losses."""
