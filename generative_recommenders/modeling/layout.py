"""Where a batch's tokens lie, and who sees whom.

Everything position-wise in an encoder runs on ``[T, D]`` (jagged) or on ``[B * N, D]`` (padded) without knowing which;
only attention asks the layout for rectangles. Both layouts give the same numbers on real tokens.
"""
