"""Preparation of a data set from the command line: ``python preprocess_public_data.py --help`` shows how."""

from generative_recommenders.commands.program import imported

if __name__ == "__main__":
    imported("commands.preprocess").start()
